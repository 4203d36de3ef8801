"""One quiet thread under its own tag, beside a flood of 200 under another.

By default the flood may hold ten of twenty connections as soon as the quiet one
is active, which leaves it more than it can use. The harder case is measured as
well: both may use all twenty, so that every checkout of the quiet one meets a
pool that is empty and must be next in line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Engine

from .crowd import Closing, Crowd, Member, Outcome
from .figures import Figure, percentile
from .peers import fair_engine, queue_engine
from .report import Distribution, Distributions, Findings, Role
from .stage import Stage
from .targets import TARGETS

__all__ = ["CASES", "beside_a_flood", "light_tag"]

_HOLD = 0.005

#: The quiet thread is the last one, after the flood.
_LIGHT = 200

_Road = Callable[[Engine, str], Callable[[], Closing]]


def by_engine(engine: Engine, tag: str) -> Callable[[], Closing]:
    return engine.execution_options(scraper=tag).connect


def by_connection(engine: Engine, tag: str) -> Callable[[], Closing]:
    return lambda: engine.connect().execution_options(scraper=tag)


#: By the names of their targets.
CASES: dict[str, tuple[_Road, dict[str, Any]]] = {
    "light": (by_engine, {}),
    "light, full": (by_engine, {"soft_limit": 20, "max_limit": 20}),
    "light, connection": (by_connection, {}),
}


def beside_a_flood(make: Callable[[], Engine], road: _Road, seconds: float) -> Outcome:
    """Run the flood and, once it has settled, the quiet thread."""
    engine = make()
    flood = [Member(road(engine, "flood"), _HOLD)] * _LIGHT
    light = Member(road(engine, "light"), _HOLD, pause=_HOLD)
    outcome = Crowd(flood, [light]).run(seconds)
    engine.dispose()
    return outcome


def _waits(outcomes: Sequence[Outcome]) -> list[float]:
    """Return the quiet thread's waits, with those that had not ended."""
    waits = [wait for outcome in outcomes for wait in outcome.waits[_LIGHT]]
    return waits + [o.pending[_LIGHT] for o in outcomes if o.pending[_LIGHT]]


def _told(outcomes: Sequence[Outcome]) -> str:
    """Say how the quiet thread fared."""
    served = sum(outcome.served[_LIGHT] for outcome in outcomes)
    flood = sum(sum(outcome.served) for outcome in outcomes) - served
    seconds = sum(outcome.seconds for outcome in outcomes)
    waits = _waits(outcomes)
    median = f", median wait {percentile(waits, 50) * 1000:.2f} ms" if served else ""
    return (
        f"served {served} times (the flood {flood:,}) in {seconds:.1f} s{median}, "
        f"longest wait {max(waits) * 1000:,.1f} ms"
    )


def _row(name: str, outcomes: Sequence[Outcome], role: Role) -> Distribution:
    starved = not any(outcome.served[_LIGHT] for outcome in outcomes)
    remark = "never served" if starved else ""
    return Distribution.of(name, _waits(outcomes), role, remark)


def light_tag(stage: Stage, key: str = "light") -> Findings:
    """Measure one of `CASES`."""
    road, options = CASES[key]
    seconds = stage.pick(1.5, 0.5)
    contenders = {
        "FairQueuePool": partial(
            beside_a_flood, partial(fair_engine, **options), road, seconds
        ),
        "QueuePool": partial(beside_a_flood, queue_engine, road, seconds),
    }
    target = TARGETS[key]
    runs = stage.interleave(target.what, contenders, stage.pick(3, 2))
    fair, queue = runs.values()
    p99 = tuple(outcome.wait(99, _LIGHT) / _HOLD for outcome in fair)
    remark = f"light: {_told(fair)}; beside QueuePool: {_told(queue)}"
    figure = Figure(target.what, target.beside, p99, target, remark)
    if key != "light":
        return Findings((figure,))
    title = "Waits of one quiet thread beside a flood of 200"
    rows = _row("FairQueuePool", fair, "ours"), _row("QueuePool", queue, "base")
    return Findings((figure,), (Distributions(title, rows),))


def all_cases(stage: Stage) -> Findings:
    """The usual case; all three in the full form."""
    found = light_tag(stage)
    if not stage.short:
        for key in list(CASES)[1:]:
            found += light_tag(stage, key)
    return found
