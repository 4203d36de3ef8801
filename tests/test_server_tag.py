"""``server_tag``: the server sees who is who."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine
from support.state import assert_quiet

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool

pytestmark = pytest.mark.postgres


def name_of(connection):
    return connection.scalar(text("select current_setting('application_name')"))


@pytest.fixture
def engine(postgres_url):
    engine = create_engine(
        postgres_url, poolclass=FairQueuePool, server_tag=True, pool_size=4
    )
    yield engine
    assert_quiet(engine.pool)
    engine.dispose()


@pytest.fixture
def told(engine):
    """The statements that tell the server a tag."""
    statements = []

    class Cursor:
        def __init__(self, cursor):
            self._cursor = cursor

        def execute(self, statement):
            statements.append(statement)
            self._cursor.execute(statement)

        def close(self):
            self._cursor.close()

    class Connection:
        def __init__(self, connection):
            self._connection = connection

        def cursor(self):
            return Cursor(self._connection.cursor())

        def commit(self):
            self._connection.commit()

    import sqla_fairpool.pool
    import sqla_fairpool.server_tag as module

    tell = module.tell
    with pytest.MonkeyPatch.context() as patch:
        for where in (module, sqla_fairpool.pool):
            patch.setattr(
                where,
                "tell",
                lambda connection, *args: tell(Connection(connection), *args),
            )
        yield statements


@pytest.mark.parametrize(
    ("tag", "seen"),
    [
        ("layer3", "layer3"),
        ('it\'s 100% \\n "x"', 'it\'s 100% \\n "x"'),
        ("x" * 128, "x" * 63),  # as long as PostgreSQL's names are
        ("Ünï", "\\xc3\\x9cn\\xc3\\xaf"),  # no plain letters: as it writes them
    ],
)
def test_server_sees_the_tag(engine, tag, seen):
    with engine.execution_options(scraper=tag).connect() as connection:
        assert name_of(connection) == seen


def test_it_is_said_only_when_a_connection_changes_hands(engine, told):
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    for _ in range(3):
        with a.connect() as connection:
            assert name_of(connection) == "a"
    assert len(told) == 1
    with a.connect(), b.connect() as connection:
        assert name_of(connection) == "b"
    assert len(told) == 2
    # Each gets the connection that it had, whichever came back last.
    for _ in range(3):
        with b.connect() as one, a.connect() as two:
            assert (name_of(one), name_of(two)) == ("b", "a")
        engine.pool.stats()  # nothing is kept warm
        with a.connect() as two, b.connect() as one:
            assert (name_of(one), name_of(two)) == ("b", "a")
    assert len(told) == 2


def test_rollback_does_not_take_it_back(engine):
    with engine.execution_options(scraper="a").connect() as connection:
        connection.execute(text("select 1"))
        connection.rollback()
        assert name_of(connection) == "a"


def test_tag_set_on_the_connection(engine):
    with engine.connect() as connection:
        assert name_of(connection) == "unknown"
        connection.rollback()
        assert name_of(connection.execution_options(scraper="late")) == "late"


def test_new_connection_in_an_old_record(engine):
    tagged = engine.execution_options(scraper="a")
    with tagged.connect() as connection:
        connection.invalidate()
        assert name_of(connection) == "a"
    with tagged.connect() as connection:
        connection.invalidate()
    with tagged.connect() as connection:
        assert name_of(connection) == "a"


def test_dead_connection_is_replaced(engine):
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    with a.connect() as connection:
        pid = connection.scalar(text("select pg_backend_pid()"))
    with create_engine(engine.url).connect() as other:
        other.execute(text("select pg_terminate_backend(:pid)"), {"pid": pid})
    with b.connect() as connection:
        assert name_of(connection) == "b"
        assert connection.scalar(text("select pg_backend_pid()")) != pid


def test_dispose_keeps_it(engine):
    engine.dispose()
    with engine.execution_options(scraper="a").connect() as connection:
        assert name_of(connection) == "a"


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_asyncio_drivers(postgres_url, driver):
    import asyncio

    async def main():
        engine = create_async_engine(
            postgres_url.replace("psycopg2", driver),
            poolclass=AsyncAdaptedFairQueuePool,
            server_tag=True,
        )
        for tag in "ab":
            tagged = engine.execution_options(scraper=tag)
            async with tagged.connect() as connection:
                query = text("select current_setting('application_name')")
                assert await connection.scalar(query) == tag
        assert_quiet(engine.pool)
        await engine.dispose()

    asyncio.run(main())


def test_only_postgresql_has_it():
    with pytest.raises(ArgumentError, match=r"server_tag=True .*sqlite"):
        create_engine("sqlite://", poolclass=FairQueuePool, server_tag=True)
