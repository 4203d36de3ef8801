"""On a real PostgreSQL: the scenarios by every road, cancellation, drivers' errors."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import threading
import time
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from support import state
from support.sessions import Sessions
from support.stub import all_for_one
from support.tasks import until
from support.threads import Caller, connect, eventually
from support.worlds import make_world

import sqla_fairpool
from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool
from sqla_fairpool.scheduling import policy

pytestmark = pytest.mark.postgres

#: Seconds a scraper keeps a connection, asleep in the server. Long beside the
#: moment between two checkouts, also on a busy machine, so that samples agree.
HOLD = 0.15
PID = text("select pg_backend_pid()")

#: By a thousand tasks; a hundred thousand take less than half a minute.
CANCELLATIONS = int(os.environ.get("FAIRPOOL_TEST_CANCELLATIONS", "5000"))


@pytest.fixture
def make_engine(postgres_url):
    engines = []

    def make(**options):
        engines.append(create_engine(postgres_url, poolclass=FairQueuePool, **options))
        return engines[-1]

    yield make
    for engine in engines:
        state.assert_quiet(engine.pool)
        engine.dispose()


# -- the scenarios ---------------------------------------------------------------------


@contextmanager
def by_engine(engine, tag):
    with engine.execution_options(scraper=tag).connect() as connection:
        yield connection


@contextmanager
def by_connection(engine, tag):
    with engine.connect().execution_options(scraper=tag) as connection:
        yield connection


@contextmanager
def by_context(engine, tag):
    with sqla_fairpool.tag(tag), engine.connect() as connection:
        yield connection


@contextmanager
def by_session(engine, tag):
    with Session(engine) as session:
        yield session.connection(execution_options={"scraper": tag})


ROADS = [by_engine, by_connection, by_context, by_session]


class Scrapers:
    """Groups of threads that want all they can get; counted in the server."""

    def __init__(self, engine, url):
        self.engine = engine
        self._server = create_engine(url, poolclass=NullPool).connect()
        self._stops, self._callers = {}, []

    def start(self, tag, threads=60):
        self._stops[tag] = threading.Event()
        roads = itertools.islice(itertools.cycle(ROADS), threads)
        self._callers += [Caller(self._work, tag, road) for road in roads]

    def stop(self, tag):
        self._stops[tag].set()

    def _work(self, tag, road):
        while not self._stops[tag].is_set():
            with road(self.engine, tag) as connection:
                connection.execute(text(f"select pg_sleep({HOLD}) /* {tag} */"))

    def _sample(self):
        """Return the sessions that run a statement of each scraper, most first."""
        query = text(
            "select substring(query from '/\\* (\\w+) \\*/'), count(*)"
            " from pg_stat_activity where backend_type = 'client backend'"
            " and pid <> pg_backend_pid() and state <> 'idle' group by 1"
        )
        counts = {tag: count for tag, count in self._server.execute(query) if tag}
        self._server.rollback()
        assert sum(counts.values()) <= 20
        return sorted((counts.get(tag, 0) for tag in self._stops), reverse=True)

    def _pool_figures(self):
        held = {row.name: row.connections for row in self.engine.pool.stats().tags}
        return sorted((held.get(tag, 0) for tag in self._stops), reverse=True)

    def settle_at(self, *expected):
        """Wait for the pool's figures to be as expected; so are the server's then."""
        expected = list(expected)
        eventually(lambda: self._pool_figures() == expected, f"{expected}")
        samples, figures = [], []
        for _ in range(60):
            samples.append(self._sample())
            figures.append(self._pool_figures())
            time.sleep(0.005)
        columns = zip(*figures, strict=True)
        assert [statistics.median_high(column) for column in columns] == expected
        # Between two statements a session is not at work at the server.
        assert max(samples, key=sum) == expected

    def finish(self):
        for stop in self._stops.values():
            stop.set()
        for caller in self._callers:
            caller.result()
        self._server.close()


@pytest.mark.slow
def test_four_scenarios_by_all_roads_counted_in_the_server(make_engine, postgres_url):
    engine = make_engine(idle_timeout=0.5, reallocation_interval=0.1)
    scrapers = Scrapers(engine, postgres_url)
    try:
        scrapers.start("layer1_5")
        scrapers.settle_at(15)
        scrapers.start("layer3")
        scrapers.settle_at(10, 10)
        scrapers.start("layer2")
        scrapers.settle_at(7, 7, 6)
        scrapers.stop("layer2")
        scrapers.settle_at(10, 10, 0)
        row = engine.pool.stats().tag("unknown")
        assert row is None or not row.active, "the untagged moment is no scraper"
    finally:
        scrapers.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "driver", "road", "holds"),
    [
        ("threads", "psycopg2", by_engine, 1.5),
        ("threads", "psycopg2", by_connection, 3.0),
        ("asyncio", "asyncpg", by_engine, 1.5),
    ],
)
def test_light_scraper_beside_a_flood_is_served_first(
    postgres_url, kind, driver, road, holds
):
    """No time is asserted but in holds: how many callers were served before it."""
    world = make_world(kind, postgres_url.replace("psycopg2", driver))
    served, over, overtaken = [], [], []

    def test():
        engine = world.engine()

        def flood():
            while not over:
                with road(engine, "flood") as connection:
                    served.append("flood")
                    connection.execute(text(f"select pg_sleep({HOLD})"))

        callers = [world.start(flood) for _ in range(100)]
        world.eventually(lambda: engine.pool.stats().waiting >= 80)
        for _ in range(50):
            before = len(served)
            with road(engine, "light") as connection:
                overtaken.append(len(served) - before)
                connection.execute(text("select 1"))
        over.append(True)
        for caller in callers:
            caller.result()

    world.run(test)
    # In one hold the flood's 19 or 20 connections change hands once each.
    assert sorted(overtaken)[48] <= holds * 20


# -- tasks that are cancelled ----------------------------------------------------------


class Visits:
    """Tasks that check out, work and return, and are cancelled at any moment."""

    def __init__(self, engine):
        self.engine = engine
        self.chance = random.Random(1)
        self.owners = {}
        self.cancelled = self.served = 0

    async def visit(self):
        tag = self.chance.choice(("a", "b", "c"))
        async with self.engine.execution_options(scraper=tag).connect() as connection:
            raw = await connection.get_raw_connection()
            key = id(raw.driver_connection)
            assert key not in self.owners, "handed out twice"
            self.owners[key] = raw.driver_connection
            try:
                if self.chance.random() < 0.3:
                    await connection.execute(text("select 1"))
                else:
                    await asyncio.sleep(0)
            finally:
                del self.owners[key]

    async def worker(self, cancellations):
        """Visit again and again until so many visits were cancelled."""
        while cancellations:
            task = asyncio.create_task(self.visit())
            # Within a few passes of the loop, or within a few round trips.
            if self.chance.random() < 0.5:
                for _ in range(self.chance.randrange(12)):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(self.chance.random() * 0.05)
            was_done = task.done()
            task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            if isinstance(result, asyncio.CancelledError):
                self.cancelled += 1
                cancellations -= 1
            else:
                assert was_done, f"a cancel was swallowed: {result!r}"
                assert result is None, result
                self.served += 1


@pytest.mark.slow
# A thousand are cancelled in the line as a rule; twelve while they connect, work or
# return.
@pytest.mark.parametrize(
    ("workers", "each", "ledger"),
    [
        (1000, CANCELLATIONS // 1000, False),
        (12, CANCELLATIONS // 60, False),
        (12, CANCELLATIONS // 120, True),
    ],
)
def test_cancellations_at_random_points_lose_no_connection(
    postgres_url, tmp_path, workers, each, ledger
):
    name = f"{workers} cancelled, {ledger}"

    async def main():
        engine = create_async_engine(
            postgres_url.replace("psycopg2", "asyncpg"),
            poolclass=AsyncAdaptedFairQueuePool,
            connect_args={"server_settings": {"application_name": name}},
            **all_for_one(10),
            **({"ledger": str(tmp_path / "ledger")} if ledger else {}),
        )
        visits = Visits(engine)
        await asyncio.gather(*(visits.worker(each) for _ in range(workers)))
        assert visits.cancelled == workers * each
        assert visits.served > 0 or workers == 1000
        assert not visits.owners
        # What was being opened for a cancelled task is out until that has ended.
        await until(lambda: not engine.pool.checkedout())
        if not ledger:
            # A session that was cut off takes a moment to end at the server.
            await until(lambda: state.capacity(engine) == 10)
            state.assert_quiet(engine)
        assert sessions.now <= 10
        # All ten can be had.
        connections = [await engine.connect() for _ in range(10)]
        assert engine.pool.checkedout() == 10
        for connection in connections:
            await connection.close()
        await engine.dispose()
        assert not state.connections(engine)

    sessions = Sessions(postgres_url, name)
    asyncio.run(main())
    eventually(lambda: sessions.now == 0, "the end of all sessions")


# -- errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("pre_ping", [True, False])
def test_killed_backend_is_replaced(make_engine, postgres_url, pre_ping):
    engine = make_engine(pool_pre_ping=pre_ping)
    with connect(engine) as connection:
        pid = connection.scalar(PID)
    with create_engine(postgres_url, poolclass=NullPool).connect() as connection:
        connection.execute(text(f"select pg_terminate_backend({pid})"))
    with connect(engine) as connection:
        if not pre_ping:
            with pytest.raises(DBAPIError) as caught:
                connection.execute(text("select 1"))
            assert caught.value.connection_invalidated
            connection.rollback()
        assert connection.scalar(PID) != pid
    assert engine.pool.checkedout() == 0


def test_failed_connect_is_sqlalchemys_error_and_shows_no_password(postgres_url):
    url = make_url(postgres_url).set(password="s3cret", database="no_such_database")
    engine = create_engine(url, poolclass=FairQueuePool, pool_size=1)
    for _ in range(2):
        with pytest.raises(OperationalError) as caught:
            connect(engine)
        assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(engine.pool) + engine.pool.status()
    state.assert_quiet(engine.pool)


# -- more tags than connections --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("long", [30, 10])
def test_hundred_tags_get_the_same_time_whether_they_hold_long_or_short(
    make_engine, long
):
    """Time is virtual in tests/scheduling; here threads and a server have their own."""
    limits = {"pool_size": 20, "soft_limit": 20, "max_limit": 20}
    engine = make_engine(**limits, pool_timeout=None, usage_half_life=2.5)
    holds = {f"tag{n}": 0.25 if n < long else 0.005 for n in range(100)}
    done = threading.Event()

    def work(tag, hold):
        tagged = engine.execution_options(scraper=tag)
        sleep = text(f"select pg_sleep({hold})")
        while not done.is_set():
            with tagged.connect() as connection:
                connection.execute(sleep)

    callers = [Caller(work, *item) for item in holds.items() for _ in range(4)]
    eventually(lambda: len(engine.pool.stats().tags) == 100)
    done.wait(2.5)
    before = {row.name: row.hold_time.total for row in engine.pool.stats().tags}
    done.wait(10.0)
    rows = engine.pool.stats().tags
    done.set()
    for caller in callers:
        caller.result()
    times = [row.hold_time.total - before[row.name] for row in rows]
    assert policy.jain(times) >= 0.98
