"""SQLAlchemy's private names keep their promises on the version installed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from unittest.mock import Mock

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util import greenlet_spawn
from support import state

from sqla_fairpool.pool import sqlalchemy_private


@pytest.fixture
def engine(server):
    """An engine without our pool: what is tested is SQLAlchemy."""
    return server.engine(poolclass=QueuePool)


def test_record_of_a_connection_is_the_pools_entry_or_none(engine):
    connection = engine.connect()
    record = sqlalchemy_private.record_of(connection)
    assert isinstance(record, ConnectionPoolEntry)
    assert record.dbapi_connection is connection.connection.dbapi_connection
    connection.invalidate()
    assert sqlalchemy_private.record_of(connection) is None
    connection.close()
    assert sqlalchemy_private.record_of(connection) is None
    with engine.connect() as connection:
        connection.detach()
        assert sqlalchemy_private.record_of(connection) is None


def test_check_out_again_returns_one_and_takes_another(engine):
    with engine.connect() as connection:
        first = connection.connection.dbapi_connection
        with engine.connect():
            pass
        sqlalchemy_private.check_out_again(connection)
        assert engine.pool.checkedout() == 1
        assert connection.connection.dbapi_connection is not first
        connection.execute(text("select 1"))


def test_connection_that_could_not_check_out_again_holds_nothing(server):
    engine = server.engine(poolclass=QueuePool, pool_size=1, max_overflow=0)
    connection = engine.connect()
    connection.connection.dbapi_connection.close()
    connection.connection.invalidate()
    server.before["connect"] = Mock(side_effect=RuntimeError)
    with pytest.raises(RuntimeError):
        sqlalchemy_private.check_out_again(connection)
    assert engine.pool.checkedout() == 0
    server.before.clear()
    connection.execute(text("select 1"))
    connection.close()


def test_later_checkouts_are_made_by_a_function(engine):
    made = []

    def check_out(connection, revalidate):
        proxied = revalidate()
        made.append((connection, proxied.dbapi_connection))
        return proxied

    with engine.connect() as connection:
        sqlalchemy_private.check_out_by(connection, check_out)
        connection.execute(text("select 1"))
        assert made == []
        connection.rollback()
        connection.invalidate()
        connection.execute(text("select 1"))
        assert made == [(connection, connection.connection.dbapi_connection)]
        connection.rollback()
        connection.invalidate()
        with connection.begin():
            assert len(made) == 2
    with pytest.raises(ResourceClosedError):
        connection.execute(text("select 1"))


def test_function_for_later_checkouts_makes_no_cycle(engine):
    gc.disable()
    try:
        connection = engine.connect()
        alive = weakref.ref(connection)
        sqlalchemy_private.check_out_by(connection, lambda *_: None)
        connection.close()
        del connection
        assert alive() is None
    finally:
        gc.enable()


def test_options_are_replaced_without_a_word_to_the_dialect(engine):
    with engine.connect() as connection:
        before = connection.get_execution_options()
        connection.execution_options(logging_token="a")
        sqlalchemy_private.set_options(connection, before)
        assert connection.get_execution_options() == {}
        connection.execute(text("select 1"))


def test_disowned_record_reaches_the_dbapi_connection_no_more(engine, server):
    connection = engine.connect()
    connection.execute(text("select 1"))
    record = sqlalchemy_private.record_of(connection)
    dbapi_connection = record.dbapi_connection
    rollbacks = dbapi_connection.rollbacks
    sqlalchemy_private.disown(record)
    connection.close()
    assert dbapi_connection.rollbacks == rollbacks
    assert not dbapi_connection.closed
    sqlalchemy_private.disown(record)  # twice does no harm


def test_in_greenlet_is_true_where_something_can_be_awaited():
    async def main():
        assert not sqlalchemy_private.in_greenlet()
        return await greenlet_spawn(sqlalchemy_private.in_greenlet)

    assert asyncio.run(main())
    assert not sqlalchemy_private.in_greenlet()


def test_asyncio_pool_without_an_engine_is_one_of_asyncios():
    assert sqlalchemy_private.async_connection_dialect().is_async


def test_handed_out_is_what_the_pool_gave_to_the_connection(engine):
    with engine.connect() as connection:
        record = sqlalchemy_private.record_of(connection)
        assert sqlalchemy_private.handed_out(record) is connection.connection
    assert sqlalchemy_private.handed_out(record) is None
    assert sqlalchemy_private.handed_out(ConnectionPoolEntry()) is None


def test_dropped_is_what_nobody_has_any_more(engine, server):
    seen = []
    connection = engine.connect()
    record = sqlalchemy_private.record_of(connection)
    assert not sqlalchemy_private.is_dropped(record)
    server.before["rollback"] = lambda: seen.append(
        sqlalchemy_private.is_dropped(record)
    )
    connection.close()
    connection = engine.connect()
    assert not sqlalchemy_private.is_dropped(record)
    del connection
    assert seen == [False, True]  # told to close it; lost
    assert sqlalchemy_private.is_dropped(ConnectionPoolEntry())


def test_creator_can_be_called_with_a_record_of_no_connection(server):
    """As the pool calls it: it may keep something on the record."""
    engine, seen = server.engine(), []

    def creator(record):
        record.info["token"] = "secret"
        seen.append(record)
        return server.connect()

    engine.pool._creator = creator
    record = sqlalchemy_private.bare_record(engine.pool)
    assert record.dbapi_connection is None
    connection = engine.pool.open_another()
    assert seen[0].dbapi_connection is None
    assert connection.closed is False
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
        record = sqlalchemy_private.record_of(connection)
        assert not sqlalchemy_private.expired(engine.pool, record)
        monkeypatch.setattr("time.time", lambda: record.starttime + 101)
        assert sqlalchemy_private.expired(engine.pool, record)
    never = server.engine(poolclass=QueuePool)
    assert not sqlalchemy_private.expired(never.pool, record)
