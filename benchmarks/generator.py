"""Is it the pools that are measured, or what measures them?

The crowds check out from something that costs nothing and limits nothing. That is
the most they can ask for; what a pool was asked for has to be well below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from .crowd import Crowd, Member, Outcome
from .figures import Figure, pairwise
from .peers import queue_engine
from .report import Bar, Bars, Findings
from .stage import Scenario, Stage
from .targets import TARGETS
from .tasks import TaskCrowd, TaskMember

__all__ = ["GENERATOR", "alone_in_threads", "sleepers"]


class Nothing:
    """A connection that is none."""

    def close(self) -> None:
        pass


class NothingAsync:
    """The same for tasks."""

    async def close(self) -> None:
        pass


_NOTHING, _NOTHING_ASYNC = Nothing(), NothingAsync()


async def _nothing_async() -> NothingAsync:
    return _NOTHING_ASYNC


def alone_in_threads(callers: int, hold: float, seconds: float) -> Outcome:
    """Let threads take turns with nothing at all."""
    return Crowd([Member(lambda: _NOTHING, hold)] * callers).run(seconds, settle=0.05)


def alone_in_tasks(callers: int, hold: float, seconds: float) -> Outcome:
    """Let tasks take turns with nothing at all."""

    async def run() -> Outcome:
        members = [TaskMember(_nothing_async, hold)] * callers
        return await TaskCrowd(members).run(seconds, settle=0.05)

    return asyncio.run(run())


def cheapest(seconds: float) -> Outcome:
    """One thread on a pool that is never contended: the fastest there is."""
    engine = queue_engine(1)
    outcome = Crowd([Member(engine.connect, 0.0)]).run(seconds, settle=0.05)
    engine.dispose()
    return outcome


def headroom(stage: Stage) -> Findings:
    """What the crowd costs in the fastest of all runs, which has no hold."""
    seconds = stage.pick(0.5, 0.2)
    contenders: dict[str, Callable[[], Outcome]] = {
        "crowd alone": partial(alone_in_threads, 1, 0.0, seconds),
        "QueuePool": partial(cheapest, seconds),
    }
    runs = stage.interleave("generator, no hold", contenders, stage.pick(9, 3))
    rates = {name: [o.throughput for o in each] for name, each in runs.items()}
    target = TARGETS["generator: cost"]
    values = tuple(pairwise(rates["QueuePool"], rates["crowd alone"]))
    remark = (
        "the part of a cycle that is the crowd's own, in the fastest of all runs: one "
        "thread, no hold, a DBAPI that does nothing"
    )
    return Findings((Figure(target.what, target.beside, values, target, remark),))


def sleepers(stage: Stage) -> Findings:
    """What the crowd reaches with ten callers that only sleep, of what is possible."""
    seconds, hold, callers = stage.pick(1.0, 0.3), 0.005, 10
    contenders: dict[str, Callable[[], Outcome]] = {
        "threads": partial(alone_in_threads, callers, hold, seconds),
        "tasks": partial(alone_in_tasks, callers, hold, seconds),
    }
    runs = stage.interleave("generator, 5 ms hold", contenders, stage.pick(5, 3))
    figures, bars = [], []
    for name, outcomes in runs.items():
        rates = [outcome.throughput for outcome in outcomes]
        possible = callers / hold
        found = Figure(
            f"ten {name} that only sleep 5 ms: turns per second",
            "ten through 5 ms",
            tuple(rate / possible for rate in rates),
            remark="the rest is late wake-ups, the machine's; no pool reaches more",
        )
        figures.append(found)
        absolute = Figure("", "", tuple(rates))
        bars.append(Bar(name, absolute.median, *absolute.spread))
    plot = Bars(
        "Ten callers without any pool, 5 ms hold: the ceiling of the peers' runs",
        "turns per second",
        tuple(bars),
        level=(callers / hold, "no wake-up late"),
    )
    return Findings(tuple(figures), (plot,))


GENERATOR = Scenario(
    "generator",
    "What the measuring costs",
    "The crowds that ask the pools for connections, asking for nothing: what they cost "
    "themselves, and how many turns ten callers make in which there is no pool. What "
    "the scrapers' process needed is told with their figures above.",
    (headroom, sleepers),
    ("generator: cost",),
)
