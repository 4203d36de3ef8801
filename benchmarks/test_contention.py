"""More threads than connections: throughput, fairness, and who starves.

Where throughput counts, the threads are under three tags, with the options as
they are by default: three active tags may hold ten connections each, so all
twenty are in use, as ``QueuePool``'s are. One tag alone would leave five free
for newcomers, by design, and be a comparison of fifteen with twenty.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from sqlalchemy import Engine

from sqla_fairpool.bench.crowd import Crowd, Member, Outcome
from sqla_fairpool.bench.figures import Figure, interleave, pairwise
from sqla_fairpool.bench.peers import fair_engine, handoff_engine, queue_engine

from .conftest import Sheet

HOLD = 0.005


def under_three_tags(
    make: Callable[[], Engine], threads: int, hold: float, seconds: float
) -> Outcome:
    """Run `threads` on a new engine's pool, a third of them under each tag."""
    engine = make()
    tagged = [engine.execution_options(scraper=tag).connect for tag in "abc"]
    outcome = Crowd([Member(tagged[n % 3], hold) for n in range(threads)]).run(seconds)
    engine.dispose()
    return outcome


def throughputs(outcomes: list[Outcome]) -> list[float]:
    return [outcome.throughput for outcome in outcomes]


def told(outcomes: list[Outcome]) -> str:
    """Say how a pool's threads fared, in its median round."""
    rates = Figure("", "", tuple(throughputs(outcomes))).median
    fairness = Figure("", "", tuple(o.fairness for o in outcomes)).median
    longest = max(o.longest_wait for o in outcomes)
    starved = max(o.never_served for o in outcomes)
    return (
        f"{rates:,.0f}/s, Jain {fairness:.3f}, never served {starved}, "
        f"longest wait {longest * 1000:,.0f} ms"
    )


PEERS: dict[str, Callable[[], Engine]] = {
    "fair": fair_engine,
    "queue": queue_engine,
    "hand-off": handoff_engine,
}


def test_with_hold(sheet: Sheet) -> None:
    """200 threads on 20 connections."""
    contenders = {
        name: partial(under_three_tags, make, 200, HOLD, 1.0)
        for name, make in PEERS.items()
    }
    runs = sheet.measure(lambda: interleave(contenders, 5))
    rates = {name: throughputs(outcomes) for name, outcomes in runs.items()}
    fair, queue = runs["fair"], runs["queue"]
    remark = f"fair: {told(fair)}; QueuePool: {told(queue)}"
    sheet.target("hold", pairwise(rates["fair"], rates["queue"]), remark)
    bare = pairwise(rates["hand-off"], rates["queue"])
    sheet.note("a bare hand-off: the same, throughput", "QueuePool", bare)
    sheet.target("fair 200", [outcome.fairness for outcome in fair])
    sheet.note("QueuePool: the same", "-", [outcome.fairness for outcome in queue])


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


def without_hold(rounds: int) -> dict[str, list[Outcome]]:
    contenders = {
        name: partial(under_three_tags, make, 40, 0.0, 0.4)
        for name, make in PEERS.items()
    }
    return interleave(contenders, rounds)


def test_without_hold(sheet: Sheet) -> None:
    """40 threads on 20 connections that do nothing but check out and return.

    On one core, because the interpreter lets one thread run at a time anyway: on
    several it falls, for seconds and with any pool, into passing its lock from
    core to core at a fifth of the speed, and a ratio of two pools of which one
    was just caught in that says nothing.
    """
    with one_core() as pinned:
        runs = sheet.measure(lambda: without_hold(9))
    rates = {name: throughputs(outcomes) for name, outcomes in runs.items()}
    remark = (
        f"{'on one core; ' if pinned else ''}fair: {told(runs['fair'])}; "
        f"QueuePool: {told(runs['queue'])}"
    )
    sheet.target("no hold", pairwise(rates["fair"], rates["queue"]), remark)
    fair, bare = rates["fair"], rates["hand-off"]
    sheet.note("the same", "a bare hand-off", pairwise(fair, bare))


def test_without_hold_on_all_cores(sheet: Sheet) -> None:
    """The same as it comes, see above."""
    runs = sheet.measure(lambda: without_hold(9))
    rates = {name: throughputs(outcomes) for name, outcomes in runs.items()}
    remark = f"fair: {told(runs['fair'])}; QueuePool: {told(runs['queue'])}"
    ratios = pairwise(rates["fair"], rates["queue"])
    sheet.note("the same, on all cores", "QueuePool", ratios, remark)
    ratios = pairwise(rates["hand-off"], rates["queue"])
    sheet.note("a bare hand-off: the same, on all cores", "QueuePool", ratios)


def under_one_tag(make: Callable[[], Engine]) -> Outcome:
    """SQLAlchemy's issue 7679: 100 threads of one application, 10 connections."""
    engine = make()
    connect = engine.execution_options(scraper="a").connect
    outcome = Crowd([Member(connect, 0.010)] * 100).run(2.0)
    engine.dispose()
    return outcome


def test_starvation(sheet: Sheet) -> None:
    """SQLAlchemy's issue 7679: who returns a connection overtakes who waits.

    There are no tags in that issue, so there is one here, and it may use all.
    """
    all_ten = partial(fair_engine, 10, soft_limit=10, max_limit=10)
    contenders = {
        "fair": partial(under_one_tag, all_ten),
        "queue": partial(under_one_tag, partial(queue_engine, 10)),
    }
    runs = sheet.measure(lambda: interleave(contenders, 3))
    fair, queue = runs["fair"], runs["queue"]
    sheet.target(
        "fair 7679", [outcome.fairness for outcome in fair], f"fair: {told(fair)}"
    )
    sheet.note(
        "QueuePool: the same",
        "-",
        [outcome.fairness for outcome in queue],
        f"QueuePool: {told(queue)}",
    )
