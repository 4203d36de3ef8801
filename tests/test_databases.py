"""One contract on real databases: a SQLite file and PostgreSQL."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session
from support.state import assert_quiet
from support.threads import Caller, ensure_waiting

import sqla_fairpool
from sqla_fairpool import CheckoutTimeout, FairQueuePool


@pytest.fixture(
    params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]
)
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def make_engine(url):
    engines = []

    def make(**options):
        if url.startswith("sqlite"):
            # As for any pool of SQLite connections that threads hand on.
            options.setdefault("connect_args", {"check_same_thread": False})
        engine = create_engine(url, poolclass=FairQueuePool, **options)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        assert_quiet(engine.pool)
        engine.dispose()


@pytest.fixture
def opened():
    """Count the connections that engines open: `opened(engine)` is a list."""

    def count(engine):
        seen = []
        event.listen(engine, "connect", lambda connection, record: seen.append(1))
        return seen

    return count


def test_reads_and_writes_under_every_kind_of_tag(make_engine):
    engine = make_engine()
    with engine.execution_options(scraper="engine").begin() as connection:
        connection.execute(text("create table contract (x int)"))
    try:
        with engine.connect().execution_options(scraper="connection") as connection:
            connection.execute(text("insert into contract values (1)"))
            connection.commit()
        with sqla_fairpool.tag("context"), engine.begin() as connection:
            connection.execute(text("insert into contract values (2)"))
        with Session(engine.execution_options(scraper="session")) as session:
            assert session.scalar(text("select sum(x) from contract")) == 3
        names = [row.name for row in engine.pool.stats().tags]
        assert names == ["connection", "context", "engine", "session"]
    finally:
        with engine.begin() as connection:
            connection.execute(text("drop table contract"))


def test_one_connection_serves_one_caller_after_the_other(make_engine, opened):
    engine = make_engine()
    seen = opened(engine)
    for tag in ("a", "a", "b", "a"):
        with engine.execution_options(scraper=tag).connect() as connection:
            assert connection.scalar(text("select 1")) == 1
    assert len(seen) == 1


def test_connection_is_handed_from_thread_to_thread(make_engine, opened):
    engine = make_engine(pool_size=1)
    seen = opened(engine)
    tagged = engine.execution_options(scraper="a")

    def work():
        with tagged.connect() as connection:
            return connection.scalar(text("select 1"))

    with tagged.connect() as connection:
        caller = Caller(work)
        ensure_waiting(engine.pool, 1)
        assert connection.scalar(text("select 1")) == 1
    assert caller.result() == 1
    assert len(seen) == 1


def test_tag_at_its_ceiling_times_out_and_others_do_not(make_engine):
    engine = make_engine(pool_size=4, soft_limit=2, max_limit=2, pool_timeout=0)
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    held = [a.connect(), a.connect()]
    with pytest.raises(CheckoutTimeout, match="tag 'a' in_use=2 ceiling=2"):
        a.connect()
    with b.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    for connection in held:
        connection.close()


def test_open_transaction_is_rolled_back_when_the_connection_comes_back(make_engine):
    engine = make_engine(pool_size=1)
    tagged = engine.execution_options(scraper="a")
    with tagged.begin() as connection:
        connection.execute(text("create table contract (x int)"))
    try:
        with tagged.connect() as connection:
            connection.execute(text("insert into contract values (1)"))
        with tagged.connect() as connection:
            assert connection.scalar(text("select count(*) from contract")) == 0
    finally:
        with tagged.begin() as connection:
            connection.execute(text("drop table contract"))


def test_overflow_connection_is_closed_on_return(make_engine, opened):
    engine = make_engine(pool_size=1, max_overflow=1, soft_limit=2, max_limit=2)
    seen = opened(engine)
    tagged = engine.execution_options(scraper="a")
    with tagged.connect(), tagged.connect():
        assert engine.pool.stats().overflow == 1
    assert engine.pool.checkedin() == 1
    with tagged.connect(), tagged.connect():
        assert len(seen) == 3


def test_invalidated_connection_is_replaced_and_detached_one_is_left(make_engine):
    engine = make_engine(pool_size=1)
    with engine.execution_options(scraper="a").connect() as connection:
        connection.invalidate()
        assert engine.pool.checkedout() == 0
        assert connection.scalar(text("select 1")) == 1
        connection.rollback()
        connection.detach()
        assert engine.pool.checkedout() == 0
        assert connection.scalar(text("select 1")) == 1


def test_dispose_closes_what_is_in_the_pool(make_engine, opened):
    engine = make_engine()
    seen = opened(engine)
    tagged = engine.execution_options(scraper="a")
    tagged.connect().close()
    engine.dispose()
    assert engine.pool.checkedin() == 0
    with tagged.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    assert len(seen) == 2


def test_pre_ping_and_recycle_leave_a_working_connection(make_engine):
    engine = make_engine(pool_pre_ping=True, pool_recycle=0, pool_use_lifo=True)
    for _ in range(3):
        with engine.execution_options(scraper="a").connect() as connection:
            assert connection.scalar(text("select 1")) == 1
