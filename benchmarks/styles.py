"""The peers' own benchmarks, in their style, with our pool beside theirs.

What each of them measures and with which numbers is theirs; the code is not.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from functools import partial

from sqlalchemy import Engine

from .contenders import TASKS, Setup, TaskPeer
from .crowd import Crowd, Member, Outcome
from .figures import Figure, pairwise, percentile
from .peers import fair_engine, queue_engine
from .report import Distribution, Distributions, Findings, Role
from .rivalry import spread
from .stage import Stage
from .targets import TARGETS
from .tasks import TaskCrowd, TaskMember

__all__ = ["asyncpg_1247", "hikaricp", "pg_doorman"]

_ROLES: dict[str, Role] = {"FairQueuePool": "ours", "QueuePool": "base"}


def _contenders(size: int) -> dict[str, Callable[[], Engine]]:
    # None of these benchmarks knows tags: one tag, which may have everything.
    return {
        "FairQueuePool": partial(fair_engine, size, soft_limit=size, max_limit=size),
        "QueuePool": partial(queue_engine, size),
    }


def _crowd(
    make: Callable[[], Engine], threads: int, hold: float, seconds: float
) -> Outcome:
    engine = make()
    connect = engine.execution_options(scraper="a").connect
    outcome = Crowd([Member(connect, hold)] * threads).run(seconds)
    engine.dispose()
    return outcome


def _waits(title: str, runs: dict[str, list[Outcome]]) -> Distributions:
    rows = []
    for name, outcomes in runs.items():
        never = max(outcome.never_served for outcome in outcomes)
        waits = [wait for outcome in outcomes for wait in outcome.all_waits]
        remark = f"{never} never served" if never else ""
        rows.append(Distribution.of(name, waits, _ROLES.get(name, "other"), remark))
    return Distributions(title, tuple(rows))


def pg_doorman(stage: Stage) -> Findings:
    """500 clients on 40 connections: p99 over p50, as in pg_doorman's documentation.

    They measure a proxy with pgbench; here it is threads and a hold of 5 ms, and
    what is compared is the same: how far the unlucky are from the usual.
    """
    seconds = stage.pick(3.0, 0.8)
    contenders = {
        name: partial(_crowd, make, 500, 0.005, seconds)
        for name, make in _contenders(40).items()
    }
    runs = stage.interleave("pg_doorman's spread", contenders, stage.pick(5, 2))
    target = TARGETS["spread"]
    ours, theirs = ([spread(o) for o in each] for each in runs.values())
    figures = (
        Figure(target.what, target.beside, tuple(ours), target),
        Figure("QueuePool: the same", "-", tuple(theirs)),
    )
    title = "Waits of 500 clients on 40 connections (pg_doorman's benchmark)"
    return Findings(figures, (_waits(title, runs),))


def _p999(outcomes: Sequence[Outcome]) -> list[float]:
    return [percentile(outcome.all_waits, 99.9) for outcome in outcomes]


def hikaricp(stage: Stage) -> Findings:
    """32 threads on 16 connections, nothing held: HikariCP's connection cycle.

    Its figures are cycles per millisecond; its users' issue 1232 adds p99.9.
    """
    contenders = {
        name: partial(_crowd, make, 32, 0.0, stage.pick(1.0, 0.4))
        for name, make in _contenders(16).items()
    }
    what = "HikariCP's connection cycle"
    runs = stage.interleave(what, contenders, stage.pick(7, 3))
    fair, queue = runs.values()
    rates = [[o.throughput for o in each] for each in (fair, queue)]
    remark = "; ".join(
        f"{name} {statistics.median(each) / 1000:,.1f} per ms"
        for name, each in zip(runs, rates, strict=True)
    )
    name = "32 threads on 16 connections, no hold"
    figures = (
        Figure(f"{name}: cycles", "QueuePool", tuple(pairwise(*rates)), remark=remark),
        Figure(
            f"{name}: p99.9 wait",
            "QueuePool",
            tuple(pairwise(_p999(fair), _p999(queue))),
        ),
    )
    title = "Waits of 32 threads on 16 connections, no hold (HikariCP's benchmark)"
    return Findings(figures, (_waits(title, runs),))


async def _hundred_tasks(stage: Stage, peer: TaskPeer, seconds: float) -> Outcome:
    async with peer.open(Setup(stage.place, 10, 1)) as connects:
        crowd = TaskCrowd([TaskMember(connects("a"), 0.2)] * 100)
        return await crowd.run(seconds, settle=0.5)


def asyncpg_1247(stage: Stage) -> Findings:
    """100 tasks on 10 connections, 200 ms hold: asyncpg's issue 1247.

    A fair pool serves each task every two seconds. Needs a PostgreSQL; in the full
    form only.
    """
    if stage.short:
        return Findings()

    def run(peer: TaskPeer) -> Outcome:
        return asyncio.run(_hundred_tasks(stage, peer, 8.0))

    peers = {peer.name: partial(run, peer) for peer in TASKS}
    runs = stage.interleave("asyncpg's issue 1247", peers, 1)
    figures = tuple(
        Figure(
            f"100 tasks on 10 connections, 200 ms hold: longest wait, s, {name}",
            "-",
            tuple(outcome.longest_wait for outcome in outcomes),
        )
        for name, outcomes in runs.items()
    )
    title = "Waits of 100 tasks on 10 connections, 200 ms hold (asyncpg's issue 1247)"
    return Findings(figures, (_waits(title, runs),))
