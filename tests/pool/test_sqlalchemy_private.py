"""SQLAlchemy's private names keep their promises on the version installed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from unittest.mock import Mock, patch

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util import greenlet_spawn
from support import state

from sqla_fairpool.pool import sqlalchemy_private as private
from sqla_fairpool.pool.sqlalchemy_private import record_of


@pytest.fixture
def engine(server):
    """An engine without our pool: what is tested is SQLAlchemy."""
    return server.engine(poolclass=QueuePool)


def test_record_of_a_connection_and_what_was_handed_out_with_it(engine):
    connection = engine.connect()
    record = record_of(connection)
    assert isinstance(record, ConnectionPoolEntry)
    assert record.dbapi_connection is connection.connection.dbapi_connection
    assert private.handed_out(record) is connection.connection
    assert private.pool_of(record) is engine.pool
    connection.invalidate()
    assert record_of(connection) is None
    connection.close()
    assert record_of(connection) is private.handed_out(record) is None
    assert private.handed_out(ConnectionPoolEntry()) is None
    with engine.connect() as connection:
        connection.detach()
        assert record_of(connection) is None


def test_check_out_again_returns_one_and_takes_another(engine):
    with engine.connect() as connection:
        first = connection.connection.dbapi_connection
        with engine.connect():
            pass
        private.check_out_again(connection)
        assert engine.pool.checkedout() == 1
        assert connection.connection.dbapi_connection is not first
        connection.execute(text("select 1"))


def test_connection_that_could_not_check_out_again_holds_nothing(server):
    engine = server.engine(poolclass=QueuePool, pool_size=1, max_overflow=0)
    with engine.connect() as connection:
        connection.connection.dbapi_connection.close()
        connection.connection.invalidate()
        server.before["connect"] = Mock(side_effect=RuntimeError)
        with pytest.raises(RuntimeError):
            private.check_out_again(connection)
        assert engine.pool.checkedout() == 0
        server.before.clear()
        connection.execute(text("select 1"))


def test_later_checkouts_are_made_by_a_function_without_a_cycle(engine):
    made = []

    def check_out(ref):
        made.append((ref, private.check_out(ref())))
        return made[-1][1]

    gc.disable()
    try:
        with engine.connect() as connection:
            private.check_out_by(connection, check_out)
            connection.execute(text("select 1"))
            assert made == []
            for number in 1, 2:
                connection.rollback()
                connection.invalidate()
                connection.execute(text("select 1"))
                assert made[-1] == (weakref.ref(connection), connection.connection)
                assert len(made) == number
        with pytest.raises(ResourceClosedError):
            connection.execute(text("select 1"))
        del connection
        assert made[0][0]() is None
    finally:
        gc.enable()


def test_root_is_the_engine_that_has_the_pool_also_after_dispose(engine):
    derived = engine.execution_options(scraper="a").execution_options(echo=False)
    assert private.root_of(engine) is engine
    assert private.root_of(derived) is engine is not derived
    before = engine.pool
    derived.dispose()
    assert engine.pool is derived.pool is not before


def test_options_are_replaced_without_a_word_to_the_dialect(engine):
    with engine.connect() as connection:
        before = connection.get_execution_options()
        connection.execution_options(logging_token="a")
        private.set_options(connection, before)
        assert connection.get_execution_options() == {}
        connection.execute(text("select 1"))


def test_disowned_record_reaches_the_dbapi_connection_no_more(engine):
    connection = engine.connect()
    connection.execute(text("select 1"))
    record = record_of(connection)
    dbapi_connection = record.dbapi_connection
    rollbacks = dbapi_connection.rollbacks
    private.disown(record)
    connection.close()
    assert (dbapi_connection.rollbacks, dbapi_connection.closed) == (rollbacks, False)
    private.disown(record)  # twice does no harm


def test_in_greenlet_is_true_where_something_can_be_awaited():
    async def main():
        assert not private.in_greenlet()
        return await greenlet_spawn(private.in_greenlet)

    assert asyncio.run(main())
    assert not private.in_greenlet()
    ends = RuntimeError("greenlet is being finalized")  # as the interpreter ends
    with patch("greenlet.getcurrent", side_effect=ends):
        assert not private.in_greenlet()
    assert private.async_connection_dialect().is_async


def test_dropped_is_what_nobody_has_any_more(engine, server):
    seen = []
    connection = engine.connect()
    record = record_of(connection)
    assert not private.is_dropped(record)
    server.before["rollback"] = lambda: seen.append(private.is_dropped(record))
    connection.close()
    connection = engine.connect()
    assert not private.is_dropped(record)
    del connection
    assert seen == [False, True]  # told to close it; lost
    assert private.is_dropped(ConnectionPoolEntry())


def test_creator_can_be_called_with_a_record_of_no_connection(server):
    """As the pool calls it: it may keep something on the record."""
    engine, seen = server.engine(), []

    def creator(record):
        record.info["token"] = "secret"
        seen.append(record.dbapi_connection)
        return server.connect()

    engine.pool._creator = creator
    assert private.bare_record(engine.pool).dbapi_connection is None
    assert engine.pool.open_another().closed is False
    assert seen == [None]
    assert engine.pool.checkedout() == 0


def test_every_opening_and_closing_passes_through_the_pool(server):
    engine = server.engine()
    with engine.connect() as connection:
        (physical,) = state.connections(engine)
        assert physical.driver is connection.connection.dbapi_connection
        connection.invalidate()
        assert not state.connections(engine)
    with engine.connect():
        assert len(state.connections(engine)) == 1
    engine.dispose()
    assert not state.connections(engine)


def test_record_expires_with_the_pools_recycle(server, monkeypatch):
    engine = server.engine(poolclass=QueuePool, pool_recycle=100)
    with engine.connect() as connection:
        record = record_of(connection)
        assert not private.expired(engine.pool, record)
        monkeypatch.setattr("time.time", lambda: record.starttime + 101)
        assert private.expired(engine.pool, record)
    never = server.engine(poolclass=QueuePool)
    assert not private.expired(never.pool, record)
