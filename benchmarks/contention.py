"""More threads than connections: throughput, fairness, and who starves.

Where throughput counts, the threads are under three tags, with the options as
they are by default: three active tags may hold ten connections each, so all
twenty are in use, as ``QueuePool``'s are. One tag alone would leave five free
for newcomers, by design, and be a comparison of fifteen with twenty.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from sqlalchemy import Engine

from .crowd import Crowd, Member, Outcome
from .figures import Figure, pairwise
from .peers import fair_engine, handoff_engine, queue_engine
from .report import Findings, Lines, Role, Series
from .stage import Stage
from .targets import TARGETS

__all__ = [
    "by_rank",
    "one_core",
    "starvation",
    "told",
    "with_hold",
    "without_hold",
    "without_hold_on_all_cores",
]

_HOLD = 0.005

PEERS: dict[str, Callable[[], Engine]] = {
    "FairQueuePool": fair_engine,
    "QueuePool": queue_engine,
    "bare hand-off": handoff_engine,
}


def under_three_tags(
    make: Callable[[], Engine], threads: int, hold: float, seconds: float
) -> Outcome:
    """Run `threads` on a new engine's pool, a third of them under each tag."""
    engine = make()
    tagged = [engine.execution_options(scraper=tag).connect for tag in "abc"]
    outcome = Crowd([Member(tagged[n % 3], hold) for n in range(threads)]).run(seconds)
    engine.dispose()
    return outcome


def _rates(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.throughput for outcome in outcomes]


def told(outcomes: Sequence[Outcome]) -> str:
    """Say how a pool's threads fared, in its median round."""
    rate = statistics.median(_rates(outcomes))
    fairness = statistics.median(outcome.fairness for outcome in outcomes)
    longest = max(outcome.longest_wait for outcome in outcomes)
    starved = max(outcome.never_served for outcome in outcomes)
    return (
        f"{rate:,.0f}/s, Jain {fairness:.3f}, never served {starved}, "
        f"longest wait {longest * 1000:,.0f} ms"
    )


def _both(fair: Sequence[Outcome], queue: Sequence[Outcome]) -> str:
    return f"FairQueuePool: {told(fair)}; QueuePool: {told(queue)}"


def _ratio(
    key: str, ours: Sequence[float], theirs: Sequence[float], remark: str
) -> Figure:
    target = TARGETS[key]
    values = tuple(pairwise(ours, theirs))
    return Figure(target.what, target.beside, values, target, remark)


def by_rank(title: str, outcomes: dict[str, Outcome]) -> Lines:
    """Return a plot of how often each thread was served, the luckiest first."""
    roles: dict[str, Role] = {"FairQueuePool": "ours", "QueuePool": "base"}
    series = []
    for name, outcome in outcomes.items():
        served = sorted(outcome.served, reverse=True)
        points = tuple((float(n), float(each)) for n, each in enumerate(served, 1))
        series.append(Series(name, points, roles.get(name, "other")))
    return Lines(title, "threads, the luckiest first", "times served", tuple(series))


def with_hold(stage: Stage) -> Findings:
    """200 threads on 20 connections."""
    contenders = {
        name: partial(under_three_tags, make, 200, _HOLD, stage.pick(1.0, 0.4))
        for name, make in PEERS.items()
    }
    what = "200 threads, 5 ms hold"
    fair, queue, bare = stage.interleave(what, contenders, stage.pick(7, 3)).values()
    jain = TARGETS["fair 200"]
    figures = (
        _ratio("hold", _rates(fair), _rates(queue), _both(fair, queue)),
        Figure(
            "a bare hand-off: the same, throughput",
            "QueuePool",
            tuple(pairwise(_rates(bare), _rates(queue))),
        ),
        Figure(jain.what, jain.beside, tuple(o.fairness for o in fair), jain),
        Figure("QueuePool: the same", "-", tuple(o.fairness for o in queue)),
    )
    return Findings(figures)


@contextmanager
def one_core() -> Iterator[bool]:
    """Keep the threads that are started in the block on one core, if we can.

    Tells if we could; there is no such thing on macOS and Windows.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield False
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, cores)


def _without_hold(stage: Stage, what: str) -> dict[str, list[Outcome]]:
    contenders = {
        name: partial(under_three_tags, make, 40, 0.0, stage.pick(0.4, 0.2))
        for name, make in PEERS.items()
    }
    return stage.interleave(what, contenders, stage.pick(9, 5))


def without_hold(stage: Stage) -> Findings:
    """40 threads on 20 connections that do nothing but check out and return.

    On one core, because the interpreter lets one thread run at a time anyway: on
    several it falls, for seconds and with any pool, into passing its lock from
    core to core at a fifth of the speed, and a ratio of two pools of which one
    was just caught in that says nothing.
    """
    with one_core() as pinned:
        runs = _without_hold(stage, "40 threads, no hold")
    fair, queue, bare = runs.values()
    remark = f"{'on one core; ' if pinned else ''}{_both(fair, queue)}"
    figures = (
        _ratio("no hold", _rates(fair), _rates(queue), remark),
        Figure(
            "the same", "bare hand-off", tuple(pairwise(_rates(fair), _rates(bare)))
        ),
    )
    return Findings(figures)


def without_hold_on_all_cores(stage: Stage) -> Findings:
    """The same as it comes, see above; in the full form only."""
    if stage.short:
        return Findings()
    fair, queue, bare = _without_hold(stage, "40 threads, all cores").values()
    figures = (
        Figure(
            "the same, on all cores",
            "QueuePool",
            tuple(pairwise(_rates(fair), _rates(queue))),
            remark=_both(fair, queue),
        ),
        Figure(
            "a bare hand-off: the same, on all cores",
            "QueuePool",
            tuple(pairwise(_rates(bare), _rates(queue))),
        ),
    )
    return Findings(figures)


def under_one_tag(make: Callable[[], Engine], seconds: float) -> Outcome:
    """SQLAlchemy's issue 7679: 100 threads of one application, 10 connections."""
    engine = make()
    connect = engine.execution_options(scraper="a").connect
    outcome = Crowd([Member(connect, 0.010)] * 100).run(seconds)
    engine.dispose()
    return outcome


def starvation(stage: Stage) -> Findings:
    """SQLAlchemy's issue 7679: who returns a connection overtakes who waits.

    There are no tags in that issue, so there is one here, and it may use all.
    """
    all_ten = partial(fair_engine, 10, soft_limit=10, max_limit=10)
    seconds = stage.pick(2.0, 0.8)
    contenders = {
        "FairQueuePool": partial(under_one_tag, all_ten, seconds),
        "QueuePool": partial(under_one_tag, partial(queue_engine, 10), seconds),
    }
    runs = stage.interleave("issue 7679", contenders, stage.pick(3, 2))
    fair, queue = runs.values()
    target = TARGETS["fair 7679"]
    figures = (
        Figure(
            target.what,
            target.beside,
            tuple(outcome.fairness for outcome in fair),
            target,
            told(fair),
        ),
        Figure(
            "QueuePool: the same",
            "-",
            tuple(outcome.fairness for outcome in queue),
            remark=told(queue),
        ),
    )
    title = "100 threads on 10 connections, 10 ms hold (SQLAlchemy issue 7679)"
    plot = by_rank(title, {name: outcomes[0] for name, outcomes in runs.items()})
    return Findings(figures, (plot,))
