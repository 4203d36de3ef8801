"""More threads than connections: throughput, fairness, and who starves.

Where throughput counts, the threads are under three tags, with the options as
they are by default: three active tags may hold ten connections each, so all
twenty are in use, as ``QueuePool``'s are. One tag alone would leave five free
for newcomers, by design, and be a comparison of fifteen with twenty.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from sqlalchemy import Engine

from ..harness.bench import Bench, Runs, scenario
from ..harness.contenders import TASKS, Contender, Setup
from ..harness.crowd import Caller, Outcome, in_tasks, in_threads
from ..harness.findings import Finding, Lines, Series, figure, percentile
from ..harness.pools import PEERS, fair_engine, handoff_engine, queue_engine

_HOLD = 0.005

#: Ours, the one beside it, and what stands in one line.
_THREE = PEERS | {(BARE := "bare hand-off"): handoff_engine}


def _under_tags(
    make: Callable[[], Engine], tags: str, threads: int, hold: float, seconds: float
) -> Outcome:
    """Run `threads` on a new engine's pool, as many of them under each tag."""
    engine = make()
    tagged = [engine.execution_options(scraper=tag).connect for tag in tags]
    callers = [Caller(tagged[n % len(tags)], hold) for n in range(threads)]
    outcome = in_threads(callers, seconds)
    engine.dispose()
    return outcome


def on_one_tag(
    size: int, threads: int, hold: float, seconds: float
) -> dict[str, Callable[[], Outcome]]:
    """Contenders where nobody knows tags: there is one, which may have everything."""
    ours = partial(fair_engine, size, soft_limit=size, max_limit=size)
    makes = zip(PEERS, (ours, partial(queue_engine, size)), strict=True)
    return {n: partial(_under_tags, m, "a", threads, hold, seconds) for n, m in makes}


def _told(outcomes: Sequence[Outcome]) -> str:
    rate = statistics.median(outcome.throughput for outcome in outcomes)
    fairness = statistics.median(outcome.fairness for outcome in outcomes)
    longest = max(outcome.longest_wait for outcome in outcomes)
    told = f"{rate:,.0f}/s, Jain {fairness:.3f}, longest wait {longest * 1e3:,.0f} ms"
    return f"{told} {_never_served(outcomes)}"


def _both(runs: Runs) -> str:
    return "; ".join(f"{n}: {_told(runs[n])}" for n in PEERS)


def _compared(
    bench: Bench, what: str, threads: int, hold: float, seconds: float, rounds: int
) -> Runs:
    run = lambda make: _under_tags(make, "abc", threads, hold, seconds)  # noqa: E731  (short)
    return bench.interleave(what, _THREE, rounds, run)


def with_hold(bench: Bench) -> Iterator[Finding]:
    seconds, rounds = bench.pick((1.0, 7), (0.4, 3))
    runs = _compared(bench, "200 threads, 5 ms hold", 200, _HOLD, seconds, rounds)
    yield runs.ratio("hold", "throughput", remark=_both(runs))
    yield runs.ratio(f"a {BARE}: the same, throughput", "throughput", of=BARE)
    yield runs.value("fair 200", "fairness")
    yield runs.value("QueuePool: the same", "fairness", "QueuePool")


@contextmanager
def _one_core() -> Iterator[bool]:
    """Keep the threads that are started in the block on one core, if we can.

    Tells if we could; there is no such thing on macOS and Windows.
    """
    with ExitStack() as stack:
        if can := hasattr(os, "sched_setaffinity"):
            cores = os.sched_getaffinity(0)
            stack.callback(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, {max(cores)})
        yield can


def _without_hold(bench: Bench, what: str) -> Runs:
    return _compared(bench, what, 40, 0.0, *bench.pick((0.4, 9), (0.2, 5)))


def without_hold(bench: Bench) -> Iterator[Finding]:
    """40 threads on 20 connections that do nothing but check out and return.

    On one core, because the interpreter lets one thread run at a time anyway: on
    several it falls, for seconds and with any pool, into passing its lock from
    core to core at a fifth of the speed, and a ratio of two pools of which one
    was just caught in that says nothing.
    """
    with _one_core() as pinned:
        runs = _without_hold(bench, "40 threads, no hold")
    remark = f"{'on one core; ' if pinned else ''}{_both(runs)}"
    yield runs.ratio("no hold", "throughput", remark=remark)
    yield runs.ratio("the same", "throughput", over=BARE)


def without_hold_on_all_cores(bench: Bench) -> Iterator[Finding]:
    runs = _without_hold(bench, "40 threads, all cores")
    what = "the same, on all cores"
    yield runs.ratio(what, "throughput", remark=_both(runs))
    yield runs.ratio(f"a {BARE}: {what}", "throughput", of=BARE)


def issue_7679(bench: Bench) -> Iterator[Finding]:
    """SQLAlchemy's issue 7679: threads that return a connection overtake the waiters.

    100 threads of one application, 10 connections.
    """
    contenders = on_one_tag(10, 100, 0.010, bench.pick(2.0, 0.8))
    runs = bench.interleave("issue 7679", contenders, bench.pick(3, 2))
    fair, queue = runs.values()
    yield runs.value("fair 7679", "fairness", remark=_told(fair))
    yield runs.value("QueuePool: the same", "fairness", "QueuePool", _told(queue))
    served = {name: sorted(o[0].served, reverse=True) for name, o in runs.items()}
    series = [Series(n, list(enumerate(each, 1))) for n, each in served.items()]
    title = "100 threads on 10 connections, 10 ms hold (SQLAlchemy issue 7679)"
    x, y = "threads, the luckiest first", "times served"
    yield Lines(title, x, y, series)


# -- one quiet thread under its own tag, beside a flood of 200 under another ----------
#
# By default the flood may hold ten of twenty connections as soon as the quiet one is
# active, which leaves it more than it can use. The harder case is measured as well:
# both may use all twenty, so that every checkout of the quiet one meets a pool that
# is empty and must be next in line.

Connects = Callable[[Engine, str], Callable[[], Any]]


def _by_engine(engine: Engine, tag: str) -> Callable[[], Any]:
    return engine.execution_options(scraper=tag).connect


def _by_connection(engine: Engine, tag: str) -> Callable[[], Any]:
    return lambda: engine.connect().execution_options(scraper=tag)


#: By the names of their targets.
LIGHT_CASES: dict[str, tuple[Connects, dict[str, Any]]] = {
    "light": (_by_engine, {}),
    "light, full": (_by_engine, {"soft_limit": 20, "max_limit": 20}),
    "light, connection": (_by_connection, {}),
}


def _beside_a_flood(
    make: Callable[[], Engine], connects: Connects, seconds: float
) -> Outcome:
    """Run the flood and, once it has settled, the quiet thread, which is the last."""
    engine = make()
    flood = [Caller(connects(engine, "flood"), _HOLD)] * 200
    light = Caller(connects(engine, "light"), _HOLD, pause=_HOLD)
    outcome = in_threads(flood, seconds, late=[light])
    engine.dispose()
    return outcome


def _told_of_light(outcomes: Sequence[Outcome]) -> str:
    served = sum(outcome.served[-1] for outcome in outcomes)
    flood = sum(sum(outcome.served) for outcome in outcomes) - served
    waits = [wait for outcome in outcomes for wait in outcome.last_waits]
    middle, longest = percentile(waits, 50) * 1000, max(waits) * 1000
    told = f"served {served} times (the flood {flood:,}), median wait {middle:.2f} ms"
    return f"{told}, longest {longest:,.1f} ms"


def starved(outcomes: Sequence[Outcome]) -> str:
    """Return a remark if the last caller was never served."""
    return "" if any(outcome.served[-1] for outcome in outcomes) else "never served"


def light_tag(bench: Bench, key: str = "light") -> Iterator[Finding]:
    connects, options = LIGHT_CASES[key]
    seconds = bench.pick(1.5, 0.5)
    makes = PEERS | {"FairQueuePool": partial(fair_engine, **options)}
    run = partial(_beside_a_flood, connects=connects, seconds=seconds)
    runs = bench.interleave(key, makes, bench.pick(3, 2), run)
    ours, theirs = map(_told_of_light, runs.values())
    p99 = lambda o: percentile(o.waits[-1] or o.last_waits, 99) / _HOLD  # noqa: E731  (used twice)
    remark = f"light: {ours}; with QueuePool: {theirs}"
    yield runs.value(key, p99, remark=remark)
    if key == "light":
        title = "Waits of one quiet thread during a flood of 200"
        yield runs.waits(title, "last_waits", starved)


# -- the peers' own benchmarks, in their style: what is measured, and with which numbers


def _never_served(outcomes: Sequence[Outcome]) -> str:
    never = max(outcome.never_served for outcome in outcomes)
    return f"{never} never served" if never else ""


def pg_doorman(bench: Bench) -> Iterator[Finding]:
    """500 clients on 40 connections: p99 over p50, as in pg_doorman's documentation.

    It has 1.08 for itself, 1.23 for PgBouncer and 25.5 for Odyssey, measured with
    pgbench against a proxy. Here it is threads and a hold of 5 ms, and what is
    compared is the same: how far the unlucky are from the usual.
    """
    contenders = on_one_tag(40, 500, 0.005, bench.pick(3.0, 0.8))
    runs = bench.interleave("pg_doorman's spread", contenders, bench.pick(5, 2))
    yield runs.value("spread", "spread")
    yield runs.value("QueuePool: the same", "spread", "QueuePool")
    title = "Waits of 500 clients on 40 connections (pg_doorman's benchmark)"
    yield runs.waits(title, remark=_never_served)


def hikaricp(bench: Bench) -> Iterator[Finding]:
    """32 threads on 16 connections, nothing held: HikariCP's connection cycle.

    Its figures are cycles per millisecond; its users' issue 1232 adds p99.9.
    """
    contenders = on_one_tag(16, 32, 0.0, bench.pick(1.0, 0.4))
    what = "HikariCP's connection cycle"
    runs = bench.interleave(what, contenders, bench.pick(7, 3))
    remark = runs.medians(lambda outcome: outcome.throughput / 1000, ",.1f")
    name = "32 threads on 16 connections, no hold"
    yield runs.ratio(f"{name}: cycles", "throughput", remark=f"per ms: {remark}")
    yield runs.ratio(f"{name}: p99.9 wait", lambda outcome: outcome.wait(99.9))
    title = "Waits of 32 threads on 16 connections, no hold (HikariCP's benchmark)"
    yield runs.waits(title, remark=_never_served)


async def _hundred_tasks(bench: Bench, peer: Contender) -> Outcome:
    async with peer.open(Setup(bench.database, 10, 1)) as connects:
        callers = [Caller(connects("a"), 0.2)] * 100
        return await in_tasks(callers, 8.0, settle=0.5)


def asyncpg_1247(bench: Bench) -> Iterator[Finding]:
    """100 tasks on 10 connections, 200 ms hold: asyncpg's issue 1247.

    A fair pool serves each task every two seconds.
    """

    def run(peer: Contender) -> Outcome:
        return asyncio.run(_hundred_tasks(bench, peer))

    peers = {peer.name: peer for peer in TASKS}
    runs = bench.interleave("asyncpg's issue 1247", peers, 1, run)
    case = "100 tasks on 10 connections, 200 ms hold"
    for name, longest in runs.each("longest_wait").items():
        yield figure(f"{case}: longest wait, s, {name}", longest)
    title = f"Waits of {case} (asyncpg's issue 1247)"
    yield runs.waits(title, remark=_never_served)


STYLES = scenario(
    "styles", issue_7679, pg_doorman, hikaricp, more=[asyncpg_1247], sessions=12
)
