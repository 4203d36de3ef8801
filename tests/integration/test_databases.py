"""One contract, on every driver: threads and tasks, on real databases."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.orm import Session
from support.threads import connect, give, take
from support.worlds import contract, count_opened, make_world

import sqla_fairpool
from sqla_fairpool import CheckoutTimeout

postgres = pytest.mark.postgres


@pytest.fixture(
    params=[
        "sqlite",
        "sqlite+aiosqlite asyncio",
        pytest.param("postgresql+psycopg2", marks=postgres),
        pytest.param("postgresql+psycopg", marks=postgres),
        pytest.param("postgresql+psycopg asyncio", marks=postgres),
        pytest.param("postgresql+asyncpg asyncio", marks=postgres),
        pytest.param("postgresql+asyncpg uvloop", marks=postgres),
        "mysql+pymysql",
    ]
)
def world(request, tmp_path):
    """Threads or tasks, with the URL of a database."""
    driver, _, variant = request.param.partition(" ")
    if driver.startswith("sqlite"):
        url = f"{driver}:///{tmp_path / 'test.db'}"
    elif driver.startswith("mysql"):
        url = request.getfixturevalue("mariadb_url")
    else:
        url = make_url(request.getfixturevalue("postgres_url"))
        url = url.set(drivername=driver)
    return make_world(variant or "threads", url)


@contextmanager
def a_table(engine):
    """A table for the time of a test."""
    with engine.begin() as connection:
        connection.execute(text("create table contract (x int)"))
    try:
        yield
    finally:
        with engine.begin() as connection:
            connection.execute(text("drop table contract"))


@contract
def test_reads_and_writes_under_every_kind_of_tag(world):
    engine = world.engine()
    with a_table(engine.execution_options(scraper="engine")):
        with engine.connect().execution_options(scraper="connection") as connection:
            connection.execute(text("insert into contract values (1)"))
            connection.commit()
        with sqla_fairpool.tag("context"), engine.begin() as connection:
            connection.execute(text("insert into contract values (2)"))
        with Session(engine.execution_options(scraper="session")) as session:
            assert session.scalar(text("select sum(x) from contract")) == 3
        names = [row.name for row in engine.pool.stats().tags]
        assert names == ["connection", "context", "engine", "session"]


@contract
def test_one_connection_serves_one_caller_after_the_other(world):
    engine = world.engine(pool_size=1)
    seen = count_opened(engine)

    def work(tag="a"):
        with connect(engine, tag) as connection:
            return connection.scalar(text("select 1"))

    for tag in ("a", "a", "b", "a"):
        assert work(tag) == 1
    with connect(engine) as connection:
        caller = world.start(work)
        world.ensure_waiting(engine, 1)
        assert connection.scalar(text("select 1")) == 1
    assert caller.result() == 1
    assert len(seen) == 1


@contract
def test_tag_at_its_ceiling_times_out_and_others_do_not(world):
    engine = world.engine(pool_size=4, soft_limit=2, max_limit=2, pool_timeout=0)
    held = take(engine, 2, "a")
    with pytest.raises(CheckoutTimeout, match="tag 'a' in_use=2 limit=2"):
        connect(engine, "a")
    with connect(engine, "b") as connection:
        assert connection.scalar(text("select 1")) == 1
    give(held)


@contract
def test_open_transaction_is_rolled_back_when_the_connection_comes_back(world):
    engine = world.engine(pool_size=1)
    with a_table(engine):
        with connect(engine) as connection:
            connection.execute(text("insert into contract values (1)"))
        with connect(engine) as connection:
            assert connection.scalar(text("select count(*) from contract")) == 0


@contract
def test_overflow_connection_is_closed_on_return(world):
    engine = world.engine(pool_size=1, max_overflow=1, soft_limit=2, max_limit=2)
    seen = count_opened(engine)
    give(take(engine, 2))
    assert (engine.pool.checkedin(), len(seen)) == (1, 2)
    give(take(engine, 2))
    assert (engine.pool.checkedin(), len(seen)) == (1, 3)


# psycopg's asyncio connections are dropped by SQLAlchemy without being closed when
# they are invalidated or detached, with its own pools as well; psycopg warns of that.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@contract
def test_invalidated_connection_is_replaced_and_detached_one_is_left(world):
    engine = world.engine(pool_size=1)
    with connect(engine) as connection:
        connection.invalidate()
        assert engine.pool.checkedout() == 0
        assert connection.scalar(text("select 1")) == 1
        connection.rollback()
        connection.detach()
        assert engine.pool.checkedout() == 0
        assert connection.scalar(text("select 1")) == 1


@contract
def test_dispose_closes_what_is_in_the_pool(world):
    engine = world.engine()
    seen = count_opened(engine)
    connect(engine).close()
    engine.dispose()
    assert engine.pool.checkedin() == 0
    with connect(engine) as connection:
        assert connection.scalar(text("select 1")) == 1
    assert len(seen) == 2
    engine = world.engine(pool_pre_ping=True, pool_recycle=0, pool_use_lifo=True)
    for _ in range(3):  # those leave a working connection
        with connect(engine) as connection:
            assert connection.scalar(text("select 1")) == 1
