"""The connections that exist at the server: what pays for them, when they end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sqlite3
import warnings
from types import SimpleNamespace

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError, DisconnectionError, TimeoutError
from sqlalchemy.ext.asyncio import create_async_engine
from support import state
from support.sessions import Sessions
from support.stub import all_for_one
from support.threads import PATIENCE, eventually
from support.worlds import make_world

from sqla_fairpool import AsyncAdaptedFairQueuePool, CheckoutTimeout, FairQueuePool
from sqla_fairpool.pool.endings import ENDED, OPEN, UNKNOWN, EndWatcher, SocketCopy
from sqla_fairpool.pool.physical import PhysicalConnection, PhysicalConnections
from sqla_fairpool.scheduling.ticket import FREE


class Driver:
    """A driver's connection over one end of a pair of sockets."""

    def __init__(self):
        self.near, self.server = socket.socketpair()

    def fileno(self):
        return self.near.fileno()

    def close(self):
        self.near.close()


class Record:
    """What PhysicalConnections looks at of a record."""

    dbapi_connection = None
    fair = None


class Fair:
    """What the pool notes on it."""

    checkout = SimpleNamespace(state=FREE)
    physical = None


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.near.close()
    driver.server.close()


@pytest.fixture
def ends():
    """Both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    yield near, far
    near.close()
    far.close()


def reset(sock):
    """Close a TCP socket so that the other side is reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


# -- the copy of a socket ----------------------------------------------------------


def test_session_is_over_when_the_server_closes_its_side(driver):
    driver.near.settimeout(None)
    line = SocketCopy.of(driver)
    assert line.look() is OPEN
    assert os.get_blocking(driver.fileno()), "a flag of the driver's socket changed"
    driver.close()
    driver.server.send(b"what nobody has read")
    assert line.look() is OPEN
    line.hang_up()  # reaches the server without the driver
    assert driver.server.recv(1) == b""
    assert line.look() is OPEN
    driver.server.close()
    assert line.look() is ENDED


def test_reset_connection_tells_nothing_of_the_session(ends):
    near, far = ends
    line = SocketCopy.of(near)
    near.close()
    reset(far)
    eventually(lambda: line.look() is UNKNOWN)


@pytest.mark.parametrize("how", ["reset", "closed"])
def test_reset_that_the_driver_has_read_is_told_from_an_end(ends, how):
    """A reset is reported once; after that one reads the end of the stream."""
    near, far = ends
    line = SocketCopy.of(near)
    assert not line.was_reset()
    if how == "reset":
        reset(far)
        with pytest.raises(ConnectionResetError):
            near.recv(1)
    else:
        far.close()
        assert near.recv(1) == b""
    assert line.was_reset() is (how == "reset")
    line.hang_up()
    assert line.look() is (UNKNOWN if how == "reset" else ENDED)


def test_what_has_no_socket_has_no_copy():
    with contextlib.closing(sqlite3.connect(":memory:")) as driver:
        assert SocketCopy.of(driver) is None
    assert SocketCopy.of(object()) is None


def test_watcher_tells_the_end_and_the_time(driver):
    watcher, told = EndWatcher(), []
    line = SocketCopy.of(driver)
    watcher.watch(line, 0.0, told.append)
    eventually(lambda: told == [OPEN])
    eventually(lambda: not watcher._runner)
    watcher.watch(line, PATIENCE, told.append)
    driver.close()
    driver.server.close()
    eventually(lambda: told == [OPEN, ENDED])


# -- the set -----------------------------------------------------------------------


@pytest.fixture
def changes():
    return []


@pytest.fixture
def connections(changes):
    return PhysicalConnections(lambda: changes.append("ended"), may_block=True)


@pytest.fixture
def open_one(connections):
    """Open a connection for a record, which is another one if none is given."""

    def open_one(driver, record=None):
        record = record or Record()
        record.fair = Fair()
        record.fair.physical = physical = PhysicalConnection(record)
        with connections.opening(physical):
            connections.opened(physical, driver)
        record.dbapi_connection = driver
        return physical

    return open_one


def test_connection_that_could_not_be_opened_does_not_exist(connections):
    physical = PhysicalConnection(Record())
    with contextlib.suppress(RuntimeError), connections.opening(physical):
        assert list(connections) == [physical]
        raise RuntimeError
    assert not list(connections)


def test_child_of_a_fork_tells_failures_from_interruptions_as_its_parent(make_pool):
    pool = make_pool()
    state.existing(pool).failures = (OSError,)
    state.after_fork(pool)
    assert state.existing(pool).failures == (OSError,)


def test_connection_is_paid_for_by_its_opener_the_pool_or_nothing(
    connections, open_one, driver
):
    record = Record()
    physical = open_one(driver, record)
    assert not connections.apart(())
    physical.opening = False
    assert not connections.apart({id(record)})
    record.dbapi_connection = None  # detached
    assert len(connections.apart({id(record)})) == 1


@pytest.fixture
def no_patience(monkeypatch):
    """The end of a session is not waited for by the thread that closes."""
    monkeypatch.setattr(state.GOODBYE, 0.0)


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("is_dropped", [False, True])
def test_lost_connection_is_there_until_it_is_released(
    connections, open_one, changes, is_dropped
):
    """The server has not ended its session; also if the driver's object is gone."""
    lost, driver, record = [], Driver(), Record()
    server, physical = driver.server, open_one(driver, record)
    connections.on_lost = lambda: lost.append(physical)
    connections.close(driver, driver.close)
    assert list(connections) == [physical] == lost
    if is_dropped:
        record.dbapi_connection = driver = None
        gc.collect()
        assert physical.driver is None
        connections.end_abandoned()
    assert connections.lost_ones() == [physical]
    assert changes == []
    assert connections.release(physical)
    assert not connections.release(physical)
    server.close()


@pytest.mark.usefixtures("no_patience")
def test_without_a_ledger_a_late_end_is_waited_for(
    connections, open_one, driver, changes
):
    physical = open_one(driver)
    connections.close(driver, driver.close)
    assert physical in connections
    driver.server.close()
    eventually(lambda: physical not in connections)
    assert changes == ["ended"]


def test_connection_without_a_reference_is_hung_up(connections, open_one, changes):
    driver = Driver()
    server, physical = driver.server, open_one(driver)
    driver.near = os.dup(driver.near.detach())  # no warning of Python's
    del driver
    gc.collect()
    assert physical.ending
    assert server.recv(1) == b""
    server.close()
    eventually(lambda: changes == ["ended"])
    assert not list(connections)


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_one_that_cannot_be_watched_weakly_is_looked_at(connections, open_one, how):
    driver, record = sqlite3.connect(":memory:"), Record()
    physical = open_one(driver, record)
    physical.opening = False
    record.dbapi_connection = None
    connections.end_abandoned()
    assert list(connections) == [physical]
    if how == "closed":
        driver.close()
    else:
        del driver
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, that it was not closed
        connections.end_abandoned()
        del physical, record
        gc.collect()
    assert not list(connections)


def test_a_set_keeps_nothing_alive(connections):
    record = Record()
    record.fair = Fair()
    physical = PhysicalConnection(record)
    assert physical.record() is None  # another one is the record's
    record.fair.physical = physical
    assert physical.record() is record
    del record
    gc.collect()
    assert physical.record() is None


# -- on PostgreSQL -----------------------------------------------------------------


class AlarmError(Exception):
    """What a signal handler raises."""


@pytest.fixture
def alarm():
    """Raise AlarmError in the main thread soon, as a soft time limit does."""

    def ring(*_):
        raise AlarmError

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def fair(url, size, name, driver="psycopg2", **options):
    """The arguments of an engine whose sessions have a name at the server."""
    arguments = {"application_name": name}
    if driver == "asyncpg":
        arguments = {"server_settings": arguments}
    options |= {"connect_args": arguments, **all_for_one(size)}
    return {"url": url.replace("psycopg2", driver), **options}


def none_is_left(engine):
    return not state.connections(engine)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_interrupted_statements_leave_no_session_too_many(
    postgres_url, alarm, driver, no_log
):
    """An exception that is not the driver's own ends the client's side only."""
    name = f"interrupted {driver}"
    engine = create_engine(
        **fair(postgres_url, 3, name, driver), poolclass=FairQueuePool
    )

    def work():
        # psycopg2 goes on to the end of the statement; psycopg is in the middle of it,
        # and cannot roll back.
        with contextlib.suppress(AlarmError, DBAPIError):
            with engine.connect() as connection:
                alarm(0.05)
                connection.execute(text("select pg_sleep(0.5)"))
                pytest.fail("was not interrupted")

    with Sessions(postgres_url, name) as sessions:
        for _ in range(10):
            work()
            alarm(0)
            gc.collect()  # the traceback may be part of a cycle
    assert 1 <= sessions.most <= 3
    in_pool = (0, engine.pool.checkedin())  # none, or all that are
    eventually(lambda: len(state.connections(engine)) in in_pool)
    engine.dispose()
    state.assert_quiet(engine)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_cancelled_statements_leave_no_session_too_many(postgres_url, driver):
    name = f"cancelled {driver}"
    arguments = fair(postgres_url, 3, name, driver)

    async def main():
        engine = create_async_engine(**arguments, poolclass=AsyncAdaptedFairQueuePool)

        async def work():
            async with engine.connect() as connection:
                await connection.execute(text("select pg_sleep(5)"))

        for _ in range(10):
            tasks = [asyncio.create_task(work()) for _ in range(3)]
            await asyncio.sleep(0.05)  # they may be anywhere
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        async with engine.connect() as connection:
            assert await connection.scalar(text("select 1")) == 1
        await engine.dispose()
        return engine

    with Sessions(postgres_url, name) as sessions:
        engine = asyncio.run(main())
    assert 1 <= sessions.most <= 3
    eventually(lambda: none_is_left(engine))


@pytest.mark.postgres
@pytest.mark.usefixtures("no_patience")
def test_checkout_waits_for_the_session_in_whose_place_it_comes(
    postgres_url, monkeypatch
):
    """A connection is found dead whose session the server has not ended."""
    name = "in its place"
    engine = create_engine(
        **fair(postgres_url, 1, name, pool_timeout=0.2), poolclass=FairQueuePool
    )
    with engine.connect() as connection:
        raw = connection.connection.dbapi_connection

    def leave_at_work(dbapi_connection):
        query = b"select pg_sleep(1)\0"
        os.write(raw.fileno(), b"Q" + (len(query) + 4).to_bytes(4, "big") + query)

    monkeypatch.setattr(engine.dialect, "do_terminate", leave_at_work)

    @event.listens_for(engine, "checkout")
    def on_checkout(dbapi_connection, record, proxied):
        if dbapi_connection is raw:
            raise DisconnectionError

    with Sessions(postgres_url, name) as sessions:
        with pytest.raises(CheckoutTimeout):
            engine.connect()
        eventually(lambda: none_is_left(engine))
        engine.connect().close()
    assert sessions.most == 1
    engine.dispose()
    eventually(lambda: none_is_left(engine))
    state.assert_quiet(engine)


def drop(objects):
    objects.clear()
    gc.collect()


@pytest.fixture
def tasks(tmp_path):
    return make_world("asyncio", f"sqlite+aiosqlite:///{tmp_path / 'leak.db'}")


def test_leaked_connection_of_tasks_is_replaced(tasks):
    """The collector ends it; its slot is free again."""
    engine = tasks.engine(pool_size=1, pool_timeout=PATIENCE)
    leaked = [engine.connect()]
    leaked[0].scalar(text("select 1"))
    with pytest.warns(Warning, match="garbage collector"):
        drop(leaked)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1


@pytest.mark.usefixtures("no_patience")
def test_thread_that_waits_is_served_when_a_session_ends(threads):
    """A session that ends late wakes a caller that waits for its slot."""
    driver = Driver()
    driver.rollback = lambda: None
    drivers = iter([driver])
    pool = threads.pool(1)
    pool._creator = lambda: next(drivers, None) or threads.server.connect()
    pool.connect().invalidate()
    (caller,) = threads.wait_in_line(pool)
    driver.server.close()
    caller.result().close()
    pool.dispose()


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("how", ["interrupted", "granted", "refused"])
def test_caller_that_waits_again_leaves_the_line(world, monkeypatch, how):
    """It had a slot, found its connection dead, and waits for the session's end."""
    driver = Driver()
    driver.rollback = lambda: None
    drivers = iter([driver])
    pool = world.pool(1)
    pool._creator = lambda: next(drivers, None) or world.server.connect()
    error = TimeoutError if how == "refused" else world.interruption

    @event.listens_for(pool, "checkout")
    def on_checkout(dbapi_connection, record, proxied):
        if dbapi_connection is driver:
            raise DisconnectionError

    def wait(*args):
        assert state.waiting(pool) == 1
        if how == "granted":  # in the moment in which the caller goes
            driver.server.close()
            world.eventually(lambda: state.in_use(pool) == 1)
        raise error("now")

    with monkeypatch.context() as patch:
        patch.setattr(pool._waiter_class, "wait", wait)
        with pytest.raises(error):
            pool.connect()
    assert state.waiting(pool) == state.in_use(pool) == 0
    driver.server.close()
    world.eventually(lambda: state.capacity(pool) == 1)
    world.connect(pool)
    assert state.in_use(pool) == 1
