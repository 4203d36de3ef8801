"""A connection that was refused a tag is as it was before, or says so."""

from __future__ import annotations

from functools import partial
from unittest.mock import Mock

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, select, text
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Session
from support import state
from support.stub import StubError
from support.worlds import holders, world_of

from sqla_fairpool import CheckoutTimeout, SelfDeadlock, TooManyWaiting
from sqla_fairpool.pool.waiters import ThreadWaiter

#: One connection for each of two tags, so that a tag which has its own is full.
ONE_EACH = {"pool_size": 2, "soft_limit": 1, "max_limit": 1, "pool_timeout": 0}

DRIVERS = ["psycopg2", "psycopg", "psycopg tasks", "asyncpg"]


@pytest.fixture(
    params=[pytest.param(driver, marks=pytest.mark.postgres) for driver in DRIVERS]
)
def world(request, postgres_url):
    """Threads or tasks, with the URL of a PostgreSQL."""
    return world_of(postgres_url, f"postgresql+{request.param}")


AUTOCOMMIT = {"isolation_level": "AUTOCOMMIT"}


def autocommit(engine, **options):
    return engine.connect().execution_options(**AUTOCOMMIT, **options)


def mine(engine):
    """A connection with a tag of its own, and a level that its `Levels` note."""
    return autocommit(engine, scraper="mine")


def setting(name):
    def read(connection):
        value = connection.scalar(text(f"show {name}"))
        connection.rollback()
        return value

    return read


def is_autocommit(connection):
    """Tell if what is written stays without a commit."""
    connection.execute(text("create table refused_tag (x int)"))
    connection.rollback()
    stays = connection.scalar(text("select to_regclass('refused_tag') is not null"))
    connection.execute(text("drop table if exists refused_tag"))
    connection.rollback()
    return stays


def catalogue(connection):
    table = Table("pg_class", MetaData(schema="mine"), Column("relpages", Integer))
    found = connection.execute(select(table).limit(1)).first() is not None
    connection.rollback()
    return found


def token(connection):
    setting("server_version")(connection)
    return connection._message_formatter("a message")


def streams(connection):
    result = connection.execute(text("select 1"))
    is_streamed = result.context._is_server_side
    result.close()
    connection.rollback()
    return is_streamed


OPTIONS = [
    ({"isolation_level": "AUTOCOMMIT"}, is_autocommit, True),
    (
        {"isolation_level": "REPEATABLE READ"},
        setting("transaction_isolation"),
        "repeatable read",
    ),
    ({"postgresql_readonly": True}, setting("transaction_read_only"), "on"),
    ({"postgresql_deferrable": True}, setting("transaction_deferrable"), "on"),
    ({"schema_translate_map": {"mine": "pg_catalog"}}, catalogue, True),
    ({"stream_results": True}, streams, True),
    ({"logging_token": "mine"}, token, "[mine] a message"),
]


@pytest.mark.parametrize(
    ("options", "look", "expected"), OPTIONS, ids=[next(iter(o[0])) for o in OPTIONS]
)
def test_options_hold_after_a_refused_tag(world, options, look, expected):
    engine = world.engine(**ONE_EACH)
    with engine.connect().execution_options(scraper="mine", **options) as connection:
        assert look(connection) == expected
        before = connection.get_execution_options()
        with engine.execution_options(scraper="full").connect():
            with pytest.raises(CheckoutTimeout, match="tag 'full' in_use=1"):
                connection.execution_options(scraper="full")
            assert connection.get_execution_options() == before
            assert holders(engine) == {"full": 1}
            assert look(connection) == expected
            assert holders(engine) == {"full": 1, "mine": 1}
        connection.execution_options(scraper="full")
        assert look(connection) == expected
        assert holders(engine) == {"full": 1}


def test_options_of_the_refused_call_are_not_claimed_and_an_engines_hold(world):
    """SQLAlchemy applies those of an engine only once."""
    engine = world.engine(**ONE_EACH)
    of_engine = engine.execution_options(scraper="mine", **AUTOCOMMIT)
    more = {"isolation_level": "SERIALIZABLE", "stream_results": True}
    with engine.execution_options(scraper="full").connect():
        for connect in partial(autocommit, engine), of_engine.connect:
            with connect() as connection:
                before = connection.get_execution_options()
                with pytest.raises(CheckoutTimeout):
                    connection.execution_options(
                        scraper="full", fairpool_timeout=0.0, **more
                    )
                assert connection.get_execution_options() == before
                assert is_autocommit(connection)


def by_connection(connection):
    connection.execution_options(scraper="full")


def by_session(connection):
    with Session(connection) as session:
        session.connection(execution_options={"scraper": "full"})


@pytest.mark.parametrize(
    ("set_tag", "options", "error"),
    [
        (by_session, {}, CheckoutTimeout),
        (by_connection, {"max_waiting": 0}, TooManyWaiting),
        (by_connection, {"pool_timeout": 30, "deadlock_timeout": 0.01}, SelfDeadlock),
    ],
)
def test_every_refusal_leaves_the_options(world, set_tag, options, error):
    engine = world.engine(**{**ONE_EACH, **options})
    with autocommit(engine) as connection:
        with engine.execution_options(scraper="full").connect():
            with pytest.raises(error):
                set_tag(connection)
            assert is_autocommit(connection)


def test_connection_that_cannot_be_had_again_raises_and_forgets_nothing(world):
    """Both the new tag and the old one are full: the next use says so."""
    engine = world.engine(**{**ONE_EACH, "pool_size": 3})
    mine = engine.execution_options(scraper="mine")
    with autocommit(mine) as connection:
        with engine.execution_options(scraper="full").connect():
            with pytest.raises(CheckoutTimeout):
                connection.execution_options(scraper="full")
            with mine.connect():
                for _ in range(2):
                    with pytest.raises(StatementError, match="tag 'mine'"):
                        connection.execute(text("select 1"))
            assert is_autocommit(connection)
        # One with a tag of its own keeps them over an invalidation as well.
        connection.execution_options(scraper="mine").invalidate()
        assert is_autocommit(connection)


@pytest.fixture(params=["asyncpg", "psycopg tasks"])
def tasks(request, postgres_url):
    return world_of(postgres_url, f"postgresql+{request.param}")


@pytest.mark.postgres
def test_cancellation_while_waiting_refuses_in_the_same_way(tasks):
    engine = tasks.engine(**{**ONE_EACH, "pool_timeout": 30})
    with engine.execution_options(scraper="full").connect():
        with autocommit(engine) as connection:
            caller = tasks.start(by_connection, connection)
            tasks.ensure_waiting(engine, 1)
            assert holders(engine) == {"full": 1}
            caller.cancel()
            with pytest.raises(tasks.interruption):
                caller.result()
            assert connection.get_execution_options() == AUTOCOMMIT
            assert is_autocommit(connection)


# -- on the stub: in moments that no server can be brought to --------------------------


class Levels(list):
    """Notes on which connection which isolation level was set; raises `error`."""

    error = None

    def __init__(self, dialect):
        dialect.set_isolation_level = self.set
        dialect.reset_isolation_level = lambda connection: None

    def set(self, connection, level):
        if self.error is not None:
            raise self.error
        self.append((connection, level))

    def are_on(self, connection):
        """Tell if the last one was set on the connection that this one has now."""
        dbapi_connection = connection.connection.dbapi_connection
        return self[-1] == (dbapi_connection, "AUTOCOMMIT")


def test_interrupt_while_waiting_refuses_in_the_same_way(threads, monkeypatch):
    engine = threads.engine(**{**ONE_EACH, "pool_timeout": 30}, deadlock_timeout=None)
    levels = Levels(engine.dialect)
    threads.connect(engine, "full")
    with autocommit(engine) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(ThreadWaiter, "wait", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                connection.execution_options(scraper="full")
        assert len(levels) == 1
        assert levels.are_on(connection)
        assert len(levels) == 2
        assert holders(engine) == {"full": 1, "unknown": 1}


def test_failed_connect_refuses_in_the_same_way(threads):
    engine = threads.engine(**{**ONE_EACH, "pool_timeout": 30})
    levels = Levels(engine.dialect)
    with autocommit(engine) as connection:
        holder = threads.connect(engine, "full")
        caller = threads.start(by_connection, connection)
        threads.ensure_waiting(engine, 1)
        threads.server.before["connect"] = Mock(side_effect=StubError)
        holder.invalidate()  # hands on a record without a connection
        with pytest.raises(StubError):
            caller.result()
        threads.server.before.clear()
        assert levels.are_on(connection)
        assert holders(engine) == {"unknown": 1}


def test_interrupt_in_the_move_leaves_nothing_under_the_new_tag(
    make_engine, monkeypatch
):
    engine = make_engine()
    levels = Levels(engine.dialect)
    with mine(engine) as connection:
        core = type(state.core(engine))
        move = core.move

        def interrupted(*args):
            move(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(core, "move", interrupted)
            with pytest.raises(KeyboardInterrupt):
                connection.execution_options(scraper="new")
        assert holders(engine) == {}
        assert levels.are_on(connection)
        assert holders(engine) == {"mine": 1}


def test_options_that_cannot_be_applied_again_keep_the_connection_unused(make_engine):
    engine = make_engine()
    levels = Levels(engine.dialect)
    with mine(engine) as connection:
        connection.invalidate()
        levels.error = StubError("not now")
        for _ in range(2):
            with pytest.raises(StatementError, match="not now"):
                connection.execute(text("select 1"))
            assert holders(engine) == {}
        levels.error = None
        connection.execute(text("select 1"))
        assert levels.are_on(connection)


def test_option_that_was_refused_is_neither_claimed_nor_applied_later(make_engine):
    engine = make_engine()
    levels = Levels(engine.dialect)
    with mine(engine) as connection:
        levels.error = StubError("no such level")
        with pytest.raises(StubError):
            connection.execution_options(scraper="b", isolation_level="SERIALIZABLE")
        levels.error = None
        assert holders(engine) == {"b": 1}
        assert connection.get_execution_options() == {
            "scraper": "b",  # this had been accepted by then
            "isolation_level": "AUTOCOMMIT",
        }
        connection.invalidate()
        assert levels.are_on(connection)


@pytest.mark.parametrize("tag", [{}, {"scraper": "full"}], ids=["level", "tag"])
def test_option_for_which_no_connection_can_be_had_is_not_claimed(threads, tag):
    """What is set on an invalidated connection checks out, to be applied."""
    engine = threads.engine(**ONE_EACH)
    levels = Levels(engine.dialect)
    with engine.connect().execution_options(scraper="mine") as connection:
        connection.invalidate()
        threads.connect(engine, "full")
        other = threads.connect(engine, "mine")
        before = connection.get_execution_options()
        for _ in range(2):
            with pytest.raises(CheckoutTimeout):
                connection.execution_options(**AUTOCOMMIT, **tag)
            assert connection.get_execution_options() == before
        other.close()
        connection.execute(text("select 1"))
        assert levels == []
        assert holders(engine) == {"full": 1, "mine": 1}
