"""On a real PostgreSQL: the scenarios by every road, drivers' errors, bounds."""

from __future__ import annotations

import statistics
import threading
import time
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from support.state import assert_quiet
from support.threads import Caller, eventually

import sqla_fairpool
from sqla_fairpool import FairQueuePool

pytestmark = pytest.mark.postgres

#: Seconds a scraper keeps a connection, asleep in the server. Long beside the
#: moment between two checkouts, also on a busy machine, so that samples agree.
HOLD = 0.15


@pytest.fixture
def engine(postgres_url):
    engine = create_engine(
        postgres_url,
        poolclass=FairQueuePool,
        idle_timeout=0.5,
        reallocation_interval=0.1,
    )
    yield engine
    assert_quiet(engine.pool)
    engine.dispose()


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

    def __init__(self, engine, url, road):
        self.engine, self.road = engine, road
        self._observer = create_engine(url, poolclass=NullPool).connect()
        self._stops = {}
        self._callers = []
        self.waits = {}

    def start(self, tag, threads=60):
        self._stops[tag] = threading.Event()
        self.waits[tag] = []
        for _ in range(threads):
            self._callers.append(Caller(self._work, tag))

    def stop(self, tag):
        self._stops[tag].set()

    def _work(self, tag):
        stop, waits = self._stops[tag], self.waits[tag]
        statement = text(f"select pg_sleep({HOLD}) /* {tag} */")
        while not stop.is_set():
            asked = time.monotonic()
            with self.road(self.engine, tag) as connection:
                waits.append(time.monotonic() - asked)
                connection.execute(statement)

    def count(self):
        """Return the sessions that run a statement of each scraper, and all."""
        rows = self._observer.execute(
            text(
                "select substring(query from '/\\* (\\w+) \\*/'), count(*)"
                " from pg_stat_activity where backend_type = 'client backend'"
                " and pid <> pg_backend_pid() and state <> 'idle' group by 1"
            )
        )
        counts = {tag: number for tag, number in rows if tag}
        self._observer.rollback()
        return [counts.get(tag, 0) for tag in self._stops]

    def settled(self, expected):
        """Wait for the pool's figures to be as expected, then sample the server.

        Returns the median of each scraper's samples, largest first.
        """
        eventually(lambda: self._pool_figures() == expected, f"{expected}")
        samples = []
        for _ in range(60):
            counts = self.count()
            assert sum(counts) <= 20
            samples.append(sorted(counts, reverse=True))
            time.sleep(0.005)
        return [statistics.median_high(column) for column in zip(*samples, strict=True)]

    def _pool_figures(self):
        rows = self.engine.pool.stats().tags
        held = {row.name: row.connections for row in rows}
        return sorted((held.get(tag, 0) for tag in self._stops), reverse=True)

    def finish(self):
        for stop in self._stops.values():
            stop.set()
        for caller in self._callers:
            caller.result()
        self._observer.close()


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_four_scenarios_counted_in_the_server(engine, postgres_url, road):
    scrapers = Scrapers(engine, postgres_url, road)
    try:
        scrapers.start("layer1_5")
        assert scrapers.settled([15]) == [15]
        scrapers.start("layer3")
        assert scrapers.settled([10, 10]) == [10, 10]
        scrapers.start("layer2")
        assert scrapers.settled([7, 7, 6]) == [7, 7, 6]
        scrapers.stop("layer2")
        assert scrapers.settled([10, 10, 0]) == [10, 10, 0]
        row = engine.pool.stats().tag("unknown")
        assert row is None or not row.active, "the untagged moment is no scraper"
    finally:
        scrapers.finish()


@pytest.mark.slow
@pytest.mark.parametrize(("road", "holds"), [(by_engine, 1.5), (by_connection, 3.0)])
def test_light_scraper_beside_a_flood_is_served_first(
    engine, postgres_url, road, holds
):
    """No time is asserted but in holds: how many callers were served before it."""
    served = []
    gate = threading.Event()

    def flood():
        while not gate.is_set():
            with road(engine, "flood") as connection:
                served.append("flood")
                connection.execute(text(f"select pg_sleep({HOLD})"))

    callers = [Caller(flood) for _ in range(100)]
    eventually(lambda: engine.pool.stats().waiting >= 80)
    overtaken = []
    for _ in range(50):
        before = len(served)
        with road(engine, "light") as connection:
            overtaken.append(len(served) - before)
            connection.execute(text("select 1"))
    gate.set()
    for caller in callers:
        caller.result()
    # In one hold the flood's 19 or 20 connections change hands once each.
    overtaken.sort()
    assert overtaken[48] <= holds * 20


def test_killed_backend_is_replaced(engine, postgres_url):
    tagged = engine.execution_options(scraper="a")
    with tagged.connect() as connection:
        pid = connection.scalar(text("select pg_backend_pid()"))
    killer = create_engine(postgres_url, poolclass=NullPool)
    with killer.connect() as connection:
        connection.execute(text(f"select pg_terminate_backend({pid})"))
    with tagged.connect() as connection:
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text("select 1"))
        assert caught.value.connection_invalidated
        connection.rollback()
        assert connection.scalar(text("select pg_backend_pid()")) != pid
    assert engine.pool.checkedout() == 0


def test_pre_ping_notices_a_killed_backend(postgres_url):
    engine = create_engine(postgres_url, poolclass=FairQueuePool, pool_pre_ping=True)
    tagged = engine.execution_options(scraper="a")
    with tagged.connect() as connection:
        pid = connection.scalar(text("select pg_backend_pid()"))
    with create_engine(postgres_url, poolclass=NullPool).connect() as connection:
        connection.execute(text(f"select pg_terminate_backend({pid})"))
    with tagged.connect() as connection:
        assert connection.scalar(text("select pg_backend_pid()")) != pid
    assert_quiet(engine.pool)
    engine.dispose()


def test_failed_connect_is_sqlalchemys_error_and_shows_no_password(postgres_url):
    url = sqla_url(postgres_url).set(password="s3cret", database="no_such_database")
    engine = create_engine(url, poolclass=FairQueuePool, pool_size=1)
    for _ in range(2):
        with pytest.raises(OperationalError) as caught:
            engine.execution_options(scraper="a").connect()
        assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(engine.pool) + engine.pool.status()
    assert_quiet(engine.pool)


def sqla_url(url):
    from sqlalchemy import make_url

    return make_url(url)


def test_isolation_level_survives_the_wait_for_a_tag(postgres_url):
    engine = create_engine(
        postgres_url,
        poolclass=FairQueuePool,
        pool_size=2,
        soft_limit=1,
        max_limit=1,
    )
    holder = engine.execution_options(scraper="a").connect()

    def work():
        connection = engine.connect().execution_options(isolation_level="SERIALIZABLE")
        with connection.execution_options(scraper="a"):
            return connection.scalar(text("show transaction_isolation"))

    caller = Caller(work)
    eventually(lambda: engine.pool.stats().waiting == 1)
    holder.close()
    assert caller.result() == "serializable"
    with engine.execution_options(scraper="a").connect() as connection:
        level = connection.scalar(text("show transaction_isolation"))
        assert level == "read committed"
    assert_quiet(engine.pool)
    engine.dispose()


def test_orm_session_reads_and_writes(engine):
    with Session(engine.execution_options(scraper="a")) as session:
        session.execute(text("create temporary table t (x int)"))
        session.execute(text("insert into t values (:x)"), [{"x": 1}, {"x": 2}])
        assert session.scalar(text("select sum(x) from t")) == 3
    assert engine.pool.stats().tag("a").checkouts == 1


def test_events_of_the_engine_fire_as_with_any_pool(engine):
    seen = []
    event.listen(engine, "checkout", lambda *args: seen.append("checkout"))
    event.listen(engine, "checkin", lambda *args: seen.append("checkin"))
    for _ in range(2):
        engine.execution_options(scraper="a").connect().close()
    assert seen == ["checkout", "checkin"] * 2
