"""One quiet thread under its own tag, beside a flood of 200 under another.

By default the flood may hold ten of twenty connections as soon as the quiet one
is active, which leaves it more than it can use. The harder case is measured as
well: both may use all twenty, so that every checkout of the quiet one meets a
pool that is empty and must be next in line.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from sqlalchemy import Engine

from sqla_fairpool.bench.crowd import Closing, Crowd, Member, Outcome
from sqla_fairpool.bench.figures import interleave, percentile
from sqla_fairpool.bench.peers import fair_engine, queue_engine

from .conftest import Sheet

HOLD = 0.005
ROUNDS, SECONDS = 3, 1.5

#: The quiet thread is the last one, after the flood.
LIGHT = 200

Road = Callable[[Engine, str], Callable[[], Closing]]


def by_engine(engine: Engine, tag: str) -> Callable[[], Closing]:
    return engine.execution_options(scraper=tag).connect


def by_connection(engine: Engine, tag: str) -> Callable[[], Closing]:
    return lambda: engine.connect().execution_options(scraper=tag)


def beside_a_flood(make: Callable[[], Engine], road: Road) -> Outcome:
    engine = make()
    flood = [Member(road(engine, "flood"), HOLD)] * LIGHT
    light = Member(road(engine, "light"), HOLD, pause=HOLD)
    outcome = Crowd(flood, [light]).run(SECONDS)
    engine.dispose()
    return outcome


def told(outcomes: list[Outcome]) -> str:
    """Say how the quiet thread fared."""
    served = sum(outcome.served[LIGHT] for outcome in outcomes)
    longest = max(max([o.pending[LIGHT], *o.waits[LIGHT]]) for o in outcomes)
    flood = sum(sum(o.served) for o in outcomes) - served
    waits = [wait for outcome in outcomes for wait in outcome.waits[LIGHT]]
    median = f", median wait {percentile(waits, 50) * 1000:.2f} ms" if waits else ""
    return (
        f"served {served} times (the flood {flood:,}) in {ROUNDS * SECONDS:.1f} s"
        f"{median}, longest wait {longest * 1000:,.1f} ms"
    )


@pytest.mark.parametrize(
    ("key", "road", "options"),
    [
        ("light", by_engine, {}),
        ("light, full", by_engine, {"soft_limit": 20, "max_limit": 20}),
        ("light, connection", by_connection, {}),
    ],
)
def test_light_tag(sheet: Sheet, key: str, road: Road, options: dict[str, int]) -> None:
    contenders = {
        "fair": partial(beside_a_flood, partial(fair_engine, **options), road),
        "queue": partial(beside_a_flood, queue_engine, road),
    }
    runs = sheet.measure(lambda: interleave(contenders, ROUNDS))
    fair, queue = runs["fair"], runs["queue"]
    p99 = [outcome.wait(99, LIGHT) / HOLD for outcome in fair]
    remark = f"light: {told(fair)}; beside QueuePool: {told(queue)}"
    sheet.target(key, p99, remark)
