"""One thread, no waiting: what a checkout and a checkin cost, also with settings.

Each way by which a tag reaches the pool is measured. The engines carry the same
options whatever their pool is, so that a ratio is the pools' alone. It is the
thread's own processor time that counts, which a busy machine disturbs less.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, QueuePool

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool, tag

from ..harness.bench import Bench, Runs
from ..harness.findings import Finding, figure
from ..harness.pools import THREE, FloorPool, async_engine, fair_engine, queue_engine

#: In a round of some 2 ms: most of them fall between two disturbances.
CYCLES = 250

Cycle = Callable[[], object]


def by_engine(engine: Engine) -> Cycle:
    connect = engine.execution_options(scraper="a").connect
    return lambda: connect().close()


def by_connection(engine: Engine) -> Cycle:
    connect = engine.connect
    return lambda: connect().execution_options(scraper="a").close()


def by_session(engine: Engine) -> Cycle:
    def cycle() -> None:
        session = Session(engine)
        session.connection(execution_options={"scraper": "a"})
        session.close()

    return cycle


def untagged(engine: Engine) -> Cycle:
    return lambda: engine.connect().close()


def alternating(engine: Engine) -> Cycle:
    first = engine.execution_options(scraper="a").connect
    second = engine.execution_options(scraper="b").connect
    return lambda: (first().close(), second().close())


def timed(
    cycle: Cycle, cycles: int = CYCLES, clock: Callable[[], float] = time.thread_time
) -> Callable[[], float]:
    def run() -> float:
        began = clock()
        for _ in range(cycles):
            cycle()
        return (clock() - began) / cycles * 1e6

    return run


def added(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the microseconds by which ours are longer, in the median."""
    return statistics.median(a - b for a, b in zip(ours, theirs, strict=True))


# -- the pool as it is ----------------------------------------------------------------


def uncontended_tag_on_engine(bench: Bench) -> Iterator[Finding]:
    contenders = {name: timed(by_engine(make())) for name, make in THREE.items()}
    runs = bench.interleave("uncontended", contenders, bench.pick(400, 200))
    best = ", ".join(f"{name} {min(each):.2f}" for name, each in runs.items())
    yield runs.ratio("uncontended", remark=f"best round, µs: {best}")
    yield runs.ratio("floor", over="floor")
    yield runs.ratio("QueuePool: the same, time", of="QueuePool", over="floor")
    yield runs.bars("Uncontended checkout and checkin", "µs, less is better")


def uncontended_other_roads(bench: Bench) -> Iterator[Finding]:
    """The other ways by which a tag arrives, in threads; in asyncio, all of them."""
    for key, way in {
        "road: block": untagged,
        "road: connection": by_connection,
        "road: none": untagged,
        "road: session": by_session,
        "the same, two tags in turn": alternating,
    }.items():
        contenders = {name: timed(way(make())) for name, make in THREE.items()}
        if key == "road: block":
            contenders = {name: tag("a")(run) for name, run in contenders.items()}
        yield bench.interleave(key, contenders, bench.pick(400, 200)).ratio(key)


def uncontended_in_asyncio(bench: Bench) -> Iterator[Finding]:
    loop = asyncio.new_event_loop()
    for road in ("engine", "block", "connection", "none", "session"):
        contenders = {
            pool.__name__: partial(_round_of_tasks, loop, async_engine(pool), road)
            for pool in (AsyncAdaptedFairQueuePool, AsyncAdaptedQueuePool, FloorPool)
        }
        runs = bench.interleave(f"asyncio: {road}", contenders, bench.pick(200, 100))
        yield runs.ratio(f"asyncio: {road}")
        yield runs.ratio(f"the floor in asyncio, {road}, time", of="FloorPool")
    loop.close()


def _round_of_tasks(
    loop: asyncio.AbstractEventLoop, engine: AsyncEngine, road: str
) -> float:
    async def by_connection() -> None:
        connection = await engine.connect()
        await connection.execution_options(scraper="a")
        await connection.close()

    async def by_session() -> None:
        session = AsyncSession(engine)
        await session.connection(execution_options={"scraper": "a"})
        await session.close()

    async def plain() -> None:
        await (await engine.connect()).close()

    if road == "engine":
        engine = engine.execution_options(scraper="a")
    cycle = {"connection": by_connection, "session": by_session}.get(road, plain)

    async def run() -> float:
        began = time.thread_time()
        for _ in range(CYCLES):
            await cycle()
        return (time.thread_time() - began) / CYCLES * 1e6

    run = tag("a")(run) if road == "block" else run
    return loop.run_until_complete(run())


# -- settings -------------------------------------------------------------------------


def settings_of_diagnosis(bench: Bench) -> Iterator[Finding]:
    settings = {"deadlock_timeout": None, "leak_threshold": 60}
    engines = {f"{n}={v}": fair_engine(**{n: v}) for n, v in settings.items()}
    engines["without"] = fair_engine()
    contenders = {name: timed(by_engine(each)) for name, each in engines.items()}
    runs = bench.interleave("settings", contenders, 300)
    for name in list(engines)[:2]:
        remark = f"{added(runs[name], runs['without']):+.2f} µs"
        what = f"checkout + checkin with {name}, time"
        yield runs.ratio(what, of=name, over="without", remark=remark)


def settings_and_figures(bench: Bench) -> Iterator[Finding]:
    """One look at all figures of a pool with a hundred tags."""
    engine = fair_engine()
    for n in range(100):
        engine.execution_options(scraper=f"tag{n}").connect().close()
    pool = engine.pool
    looks = {n: timed(getattr(pool, n), 10) for n in ("stats", "metrics")}
    for name, each in bench.interleave("figures", looks, 30).items():
        yield figure(f"pool.{name}() with 100 tags, µs", each, beside="")


def settings_server_tag(bench: Bench) -> Iterator[Finding]:
    """A connection that changes hands each time, which is the worst case."""
    make = partial(bench.database.engine, pool_size=1)
    engines = {
        "server_tag": make(FairQueuePool, server_tag=True),
        "without": make(FairQueuePool),
        "QueuePool": make(QueuePool),
    }
    clock = time.perf_counter  # and changes enough to see a round trip, some 50 µs
    contenders = {n: timed(alternating(e), 10, clock) for n, e in engines.items()}
    runs = bench.interleave("server_tag", contenders, 100)
    for engine in engines.values():
        engine.dispose()
    more = added(runs["server_tag"], runs["without"]) / 2  # two changes in a cycle
    what = "checkout + checkin on PostgreSQL, each time for another tag, server_tag"
    yield runs.ratio(what, remark=f"{more:+.0f} µs")


# -- statements, each of which counts as activity of its tag --------------------------

#: Rounds of one or two milliseconds.
_ROUNDS, _STATEMENTS = 150, 20


def _selects(connection: Any) -> Callable[[], float]:
    execute, select = connection.execute, text("SELECT 1")
    return timed(lambda: execute(select).all(), _STATEMENTS, time.perf_counter)


def _statements(
    bench: Bench, what: str, rounds: int, flip: bool = False, **options: Any
) -> Runs:
    engines = [make(1, **options) for make in (fair_engine, queue_engine)]
    tagged = [engine.execution_options(scraper="a") for engine in engines]
    with tagged[0].connect() as ours, tagged[1].connect() as theirs:
        contenders = {"FairQueuePool": _selects(ours), "QueuePool": _selects(theirs)}
        if flip:  # neither is always the one after the other
            contenders = dict(reversed(contenders.items()))
        bench.interleave(what, contenders, 2)  # compiles it, warms the backend
        runs = bench.interleave(what, contenders, rounds)
    for engine in engines:
        engine.dispose()
    return runs


def statement_on_postgresql(bench: Bench) -> Iterator[Finding]:
    """The noise of a round is larger than the effect: hence so many of them.

    In each block both pools have the same DBAPI connection, so it is the same socket
    to the same backend; with two, the backends would differ by more than the pools
    do. Each block has a new one, because a backend may be lucky in its memory or its
    core for as long as it lives.
    """
    bare = bench.database.engine(NullPool)
    runs = Runs({"FairQueuePool": [], "QueuePool": []})
    for number in range(bench.pick(12, 4)):
        raw = bare.raw_connection()
        shared = raw.dbapi_connection
        options = {"url": bare.url, "creator": lambda shared=shared: shared}
        block = _statements(bench, "SELECT 1", _ROUNDS, number % 2 == 1, **options)
        raw.invalidate()  # closed with the engines; let its pool know
        for name, times in block.items():
            runs[name] += times
    best = ", ".join(f"{name} {min(times):.1f}" for name, times in runs.items())
    remark = f"best round, µs: {best}; {_added_per_statement(runs)}"
    yield runs.ratio("statement", remark=remark)


def statement_on_sqlite(bench: Bench) -> Iterator[Finding]:
    """The same without a round trip: little noise, but no database is so fast."""
    runs = _statements(bench, "SELECT 1 on SQLite", 1000, url="sqlite://")
    yield runs.ratio("the same on SQLite in memory", remark=_added_per_statement(runs))


def _added_per_statement(runs: Runs) -> str:
    more = added(runs["FairQueuePool"], runs["QueuePool"])
    return f"added per statement, median: {more:.2f} µs"
