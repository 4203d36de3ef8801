"""Is it the pools that are measured, or what measures them?

The crowds check out from something that costs nothing and limits nothing. That is
the most they can ask for; what a pool was asked for has to be well below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

from ..harness.bench import Bench, scenario
from ..harness.crowd import Caller, Outcome, in_tasks, in_threads
from ..harness.findings import Finding, figure
from ..harness.pools import NullConnection, queue_engine


class _Nothing:
    async def close(self) -> None:
        pass


_NOTHING = NullConnection()


async def _connect() -> _Nothing:
    return _Nothing()


def alone_in_threads(callers: int, hold: float, seconds: float) -> Outcome:
    return in_threads([Caller(lambda: _NOTHING, hold)] * callers, seconds, 0.05)


def alone_in_tasks(callers: int, hold: float, seconds: float) -> Outcome:
    return asyncio.run(in_tasks([Caller(_connect, hold)] * callers, seconds, 0.05))


def cheapest(seconds: float) -> Outcome:
    """One thread on a pool that is never contended: the fastest there is."""
    engine = queue_engine(1)
    outcome = in_threads([Caller(engine.connect, 0.0)], seconds, 0.05)
    engine.dispose()
    return outcome


def headroom(bench: Bench) -> Iterator[Finding]:
    """What the crowd costs in the fastest of all runs, which has no hold."""
    seconds = bench.pick(0.5, 0.2)
    contenders = {
        "QueuePool": partial(cheapest, seconds),
        "crowd alone": partial(alone_in_threads, 1, 0.0, seconds),
    }
    runs = bench.interleave("generator, no hold", contenders, bench.pick(9, 3))
    remark = "the part of a cycle that is the crowd's own, in the fastest of all runs: "
    remark += "one thread, no hold, a DBAPI that does nothing"
    yield runs.ratio("generator: cost", "throughput", remark=remark)


def sleepers(bench: Bench) -> Iterator[Finding]:
    """What the crowd reaches with ten callers that only sleep, of what is possible."""
    seconds, hold, callers = bench.pick(1.0, 0.3), 0.005, 10
    contenders = {
        "threads": partial(alone_in_threads, callers, hold, seconds),
        "tasks": partial(alone_in_tasks, callers, hold, seconds),
    }
    runs = bench.interleave("generator, 5 ms hold", contenders, bench.pick(5, 3))
    possible = callers / hold
    for name, rates in runs.each("throughput").items():
        what = f"ten {name} that only sleep 5 ms: turns per second"
        remark = "the rest is late wake-ups, the machine's; no pool reaches more"
        parts = [rate / possible for rate in rates]
        yield figure(what, parts, "ten through 5 ms", remark)
    title = "Ten callers without any pool, 5 ms hold: the ceiling of the peers' runs"
    level = possible, "no wake-up late"
    yield runs.bars(title, "turns per second", "throughput", level=level)


GENERATOR = scenario("generator", headroom, sleepers)
