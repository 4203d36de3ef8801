"""The peers' own benchmarks, in their style, with our pool beside theirs.

What each of them measures and with which numbers is theirs; the code is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial

from ..harness.bench import Bench, Scenario
from ..harness.contenders import TASKS, Contender, Setup
from ..harness.crowd import Caller, Outcome, in_tasks
from ..harness.findings import Finding
from ..harness.targets import figure
from .contention import issue_7679, on_one_tag


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

    peers = {peer.name: partial(run, peer) for peer in TASKS}
    runs = bench.interleave("asyncpg's issue 1247", peers, 1)
    case = "100 tasks on 10 connections, 200 ms hold"
    for name, longest in runs.each("longest_wait").items():
        yield figure(f"{case}: longest wait, s, {name}", longest)
    title = f"Waits of {case} (asyncpg's issue 1247)"
    yield runs.waits(title, remark=_never_served)


STYLES = Scenario(
    "styles",
    "In the style of the peers' own benchmarks",
    "SQLAlchemy's issue 7679 (100 threads share 10 connections), pg_doorman's spread "
    "(500 clients share 40), HikariCP's connection cycle (32 threads share 16 and hold "
    "them not at all), on a DBAPI that does nothing; and asyncpg's issue 1247 (100 "
    "tasks share 10) in the full form, on PostgreSQL. None of them knows tags: there "
    "is one, and it may have every connection.",
    (issue_7679, pg_doorman, hikaricp),
    ("fair 7679", "spread"),
    more=(asyncpg_1247,),
    sessions=12,
)
