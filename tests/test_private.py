"""SQLAlchemy's private names keep their promises on the version installed."""

from __future__ import annotations

import asyncio
import gc
from contextlib import contextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool
from sqlalchemy.util import greenlet_spawn

from sqla_fairpool import _private


@pytest.fixture
def engine(server):
    """An engine without our pool: what is tested is SQLAlchemy."""
    return server.engine(poolclass=QueuePool)


def test_record_of_a_connection_is_the_pools_entry(engine):
    with engine.connect() as connection:
        record = _private.record_of(connection)
        assert isinstance(record, ConnectionPoolEntry)
        assert record.dbapi_connection is connection.connection.dbapi_connection


def test_connection_without_a_record_has_none(engine):
    connection = engine.connect()
    connection.invalidate()
    assert _private.record_of(connection) is None
    connection.close()
    assert _private.record_of(connection) is None
    with engine.connect() as connection:
        connection.detach()
        assert _private.record_of(connection) is None


def test_check_out_again_returns_one_and_takes_another(engine):
    with engine.connect() as connection:
        first = connection.connection.dbapi_connection
        with engine.connect():
            pass
        _private.check_out_again(connection)
        assert engine.pool.checkedout() == 1
        assert connection.connection.dbapi_connection is not first
        connection.execute(text("select 1"))


def test_connection_that_could_not_check_out_again_holds_nothing(server):
    engine = server.engine(poolclass=QueuePool, pool_size=1, max_overflow=0)
    connection = engine.connect()
    error = RuntimeError("no connection")

    def fail():
        raise error

    connection.connection.dbapi_connection.close()
    connection.connection.invalidate()
    server.before["connect"] = fail
    with pytest.raises(RuntimeError):
        _private.check_out_again(connection)
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
        _private.check_out_by(connection, check_out)
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
    class Watched(Connection):
        gone = False

        def __del__(self):
            Watched.gone = True

    gc.disable()
    try:
        connection = Watched(engine)
        _private.check_out_by(connection, lambda *_: None)
        del connection
        assert Watched.gone
    finally:
        gc.enable()


def test_options_are_replaced_without_a_word_to_the_dialect(engine):
    with engine.connect() as connection:
        before = connection.get_execution_options()
        connection.execution_options(logging_token="a")
        _private.set_options(connection, before)
        assert connection.get_execution_options() == {}
        connection.execute(text("select 1"))


def test_disowned_record_reaches_the_dbapi_connection_no_more(engine, server):
    connection = engine.connect()
    connection.execute(text("select 1"))
    record = _private.record_of(connection)
    dbapi_connection = record.dbapi_connection
    rollbacks = dbapi_connection.rollbacks
    _private.disown(record)
    connection.close()
    assert dbapi_connection.rollbacks == rollbacks
    assert not dbapi_connection.closed
    _private.disown(record)  # twice does no harm


def test_in_greenlet_is_true_where_something_can_be_awaited():
    async def main():
        assert not _private.in_greenlet()
        return await greenlet_spawn(_private.in_greenlet)

    assert asyncio.run(main())
    assert not _private.in_greenlet()


def test_asyncio_pool_without_an_engine_is_one_of_asyncios():
    assert _private.async_connection_dialect().is_async


def test_handed_out_is_what_the_pool_gave_to_the_connection(engine):
    with engine.connect() as connection:
        record = _private.record_of(connection)
        assert _private.handed_out(record) is connection.connection
    assert _private.handed_out(record) is None
    assert _private.handed_out(ConnectionPoolEntry()) is None


def test_creator_is_timed_at_every_opening(engine, server, clock):
    noted = []
    pool = engine.pool
    _private.time_creator(pool, clock, lambda *args: noted.append(args))
    server.before["connect"] = lambda: clock.advance(0.5)
    with engine.connect() as connection:
        record = _private.record_of(connection)
        connection.invalidate()
    with engine.connect():
        pass
    assert noted == [(record, 0.5), (record, 0.5)]

    def fail():
        raise RuntimeError("no")

    server.before["connect"] = fail
    engine.dispose()
    _private.time_creator(engine.pool, clock, lambda *args: noted.append(args))
    with pytest.raises(RuntimeError):
        engine.connect()
    assert noted[2][1] is None


def test_creator_is_called_in_what_is_to_be_around_it(engine, server, clock):
    order = []

    @contextmanager
    def around():
        order.append("before")
        yield
        order.append("after")

    server.before["connect"] = lambda: order.append("connect")
    _private.time_creator(engine.pool, clock, lambda *_: None, around)
    with engine.connect():
        assert order == ["before", "connect", "after"]


def test_record_expires_with_the_pools_recycle(server, monkeypatch):
    engine = server.engine(poolclass=QueuePool, pool_recycle=100)
    with engine.connect() as connection:
        record = _private.record_of(connection)
        assert not _private.expired(engine.pool, record)
        monkeypatch.setattr("time.time", lambda: record.starttime + 101)
        assert _private.expired(engine.pool, record)
    never = server.engine(poolclass=QueuePool)
    assert not _private.expired(never.pool, record)
