"""With a ledger no slot is lost, whatever becomes of a connection.

In one process; both stores, threads and tasks. At the end of each test all slots can be
had, and while it ran there was never a session too many at the server.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import signal
import sys
import threading
import time
import uuid
import warnings

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import create_async_engine
from support import state
from support.sessions import Sessions
from support.threads import PATIENCE, Caller, eventually

from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    FairQueuePool,
)
from sqla_fairpool.ledger.errors import ServerDiffers
from sqla_fairpool.pool import ledger_member, ledger_sessions

pytestmark = pytest.mark.postgres

SLOTS = 4
OPTIONS = {
    "pool_size": SLOTS,
    "soft_limit": SLOTS,
    "max_limit": SLOTS,
    "pool_timeout": PATIENCE,
}
THREADS = ["psycopg2", "psycopg"]
TASKS = ["asyncpg", "psycopg"]


class Member:
    """An engine that shares a ledger, and what the server has of it."""

    def __init__(self, url, ledger, driver, tasks, **options):
        self.name = f"slots {uuid.uuid4().hex[:12]}"
        #: Sessions that there may be beside the slots, for a moment.
        self.beside = 0
        arguments = {"application_name": self.name}
        if driver == "asyncpg":
            arguments = {"server_settings": arguments}
        options = {**OPTIONS, "ledger": ledger, "connect_args": arguments, **options}
        url = url.replace("psycopg2", driver)
        if tasks:
            self.engine = create_async_engine(
                url, poolclass=AsyncAdaptedFairQueuePool, **options
            )
            self.pool = self.engine.sync_engine.pool
        else:
            self.engine = create_engine(url, poolclass=FairQueuePool, **options)
            self.pool = self.engine.pool
        self.sessions = Sessions(postgres(url), self.name)

    @property
    def keeper(self):
        return state.keeper(self)

    def all_can_be_had(self):
        """Assert that as many connections can be had as there are slots."""
        gc.collect()  # tracebacks of exceptions have some
        callers = [Caller(self.engine.connect) for _ in range(SLOTS)]
        connections = [caller.result() for caller in callers]
        for connection in connections:
            connection.close()

    async def all_can_be_had_by_tasks(self):
        connecting = [asyncio.ensure_future(self._take()) for _ in range(SLOTS)]
        for connection in await asyncio.gather(*connecting):
            await connection.close()

    async def _take(self):
        return await self.engine.connect()


def postgres(url):
    return make_url(url).set(drivername="postgresql+psycopg2")


@pytest.fixture
def member(postgres_url, ledger):
    """Make members; afterwards they were never above the bound."""
    members = []

    def make(driver="psycopg2", tasks=False, **options):
        member = Member(postgres_url, ledger, driver, tasks, **options)
        member.sessions.__enter__()
        members.append(member)
        return member

    yield make
    for member in members:
        member.keeper.close()
        member.sessions.__exit__()
    for member in members:
        assert member.sessions.most <= SLOTS + member.beside
    del member
    members.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python: what a loop has left unclosed
        gc.collect()


def run(main):
    asyncio.run(asyncio.wait_for(main, 2 * PATIENCE))


# -- opening again fails ------------------------------------------------------------


def lose(connection):
    """Have the server end the session of a connection."""
    pid = connection.scalar(text("select pg_backend_pid()"))
    connection.rollback()
    return pid


def end_sessions(postgres_url, name):
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(
            text(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where application_name = :name"
            ),
            {"name": name},
        )
    engine.dispose()


@pytest.mark.parametrize("driver", THREADS)
def test_listener_that_fails_when_a_connection_is_opened_again(
    member, postgres_url, driver
):
    """As those do that check for the primary during a failover."""
    one = member(driver, pool_pre_ping=True)
    one.all_can_be_had()
    failing = True

    @event.listens_for(one.engine, "connect")
    def on_connect(dbapi_connection, record):
        if failing:
            raise RuntimeError("not the primary")

    end_sessions(postgres_url, one.name)
    for _ in range(2 * SLOTS):
        with pytest.raises(RuntimeError, match="primary"):
            one.engine.connect()
    failing = False
    one.all_can_be_had()


@pytest.mark.parametrize("driver", TASKS)
def test_task_that_is_cancelled_when_a_connection_is_opened_again(
    member, postgres_url, driver
):
    async def main():
        one = member(driver, tasks=True, pool_pre_ping=True)
        await one.all_can_be_had_by_tasks()
        slowly = asyncio.Event()

        @event.listens_for(one.engine.sync_engine, "connect")
        def on_connect(dbapi_connection, record):
            if not slowly.is_set():
                dbapi_connection.await_(slowly.wait())

        await asyncio.to_thread(end_sessions, postgres_url, one.name)
        for _ in range(2):
            tasks = [asyncio.ensure_future(one._take()) for _ in range(SLOTS)]
            await asyncio.sleep(0.1)  # they are anywhere
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        slowly.set()
        await one.all_can_be_had_by_tasks()
        await one.engine.dispose()

    run(main())


def test_ledger_that_cannot_confirm_a_new_connection_costs_no_slot(member, monkeypatch):
    one = member()
    one.all_can_be_had()
    its_share = state.share(one)
    one.engine.dispose()

    def fail(physical):
        raise its_share.unconfirmed("for a test")

    with monkeypatch.context() as patch:
        patch.setattr(its_share, "after_opening", fail)
        for _ in range(2 * SLOTS):
            with pytest.raises(SQLAlchemyError, match="for a test"):
                one.engine.connect()
    one.all_can_be_had()


def test_first_connection_to_another_server_is_not_used(member, monkeypatch):
    """Its session is none of those that the ledger's slots are for."""
    one, other = member(), member()
    one.all_can_be_had()
    one.engine.dispose()
    identify = ledger_sessions.identify

    def elsewhere(cursor, pid):
        return "postgresql elsewhere", identify(cursor, pid)[1]

    monkeypatch.setattr(ledger_sessions, "identify", elsewhere)
    with pytest.raises(ServerDiffers, match="postgresql elsewhere"):
        other.engine.connect()
    monkeypatch.undo()
    eventually(lambda: other.sessions.now == 0)
    one.all_can_be_had()


@pytest.mark.parametrize("hindered", [True, False])
def test_denied_connection_is_used_only_if_the_ledger_cannot_say(
    member, ledger, monkeypatch, hindered
):
    """On the host: what is owned then stays so."""
    one = member()
    one.all_can_be_had()
    one.engine.dispose()
    monkeypatch.setattr(ledger_member, "_CONFIRMED_WITHIN", 0.1)
    monkeypatch.setattr(one.keeper, "post", lambda done: done(False))
    monkeypatch.setattr(type(one.keeper), "is_hindered", hindered)
    if hindered and not ledger.startswith("postgresql"):
        one.engine.connect().close()
    else:
        with pytest.raises(CheckoutTimeout, match="does not confirm"):
            one.engine.connect()
    monkeypatch.undo()
    one.all_can_be_had()


# -- exceptions from outside ----------------------------------------------------------


@pytest.fixture
def nobody_keeps_what_is_ignored(monkeypatch):
    """Let nobody keep exceptions that nobody can catch.

    They are raised in a destructor or a finaliser: Python reports them and goes on.
    pytest keeps them until the test is over, and in their frames are the records whose
    return they have interrupted.
    """
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)


class Thrown(Exception):  # noqa: N818  (what Celery's SoftTimeLimitExceeded is)
    """Thrown into a thread."""


def work(engine, statement="select pg_sleep(0.002)"):
    with engine.connect() as connection:
        connection.execute(text(statement))


@pytest.mark.parametrize("driver", THREADS)
@pytest.mark.usefixtures("no_log", "nobody_keeps_what_is_ignored", "light_heap")
def test_exceptions_thrown_into_threads(member, driver):
    one = member(driver)
    one.beside = 1  # of a driver that was interrupted while it connected
    throw = ctypes.pythonapi.PyThreadState_SetAsyncExc
    over = threading.Event()
    hits = []

    def loop():
        while not over.is_set():
            try:
                work(one.engine)
            except (Thrown, StatementError):
                hits.append(1)

    def target():
        while not over.is_set():
            try:
                loop()
            except Thrown:
                hits.append(1)

    threads = [threading.Thread(target=target, daemon=True) for _ in range(SLOTS + 2)]
    for thread in threads:
        thread.start()
    chance = random.Random(1)
    end = time.monotonic() + PATIENCE
    # One that is thrown into a thread which waits in the driver replaces another.
    while len(hits) < 100:
        assert time.monotonic() < end
        time.sleep(chance.random() * 0.01)  # at any moment
        thread = chance.choice(threads)
        throw(ctypes.c_ulong(thread.ident), ctypes.py_object(Thrown))
        gc.collect()  # connections in cycles, for which all the threads may wait
    over.set()

    def all_have_ended():
        gc.collect()
        return not any(thread.is_alive() for thread in threads)

    eventually(all_have_ended)
    one.all_can_be_had()


@pytest.mark.parametrize("driver", THREADS)
@pytest.mark.usefixtures("no_log", "nobody_keeps_what_is_ignored")
def test_signal_handlers_that_raise(member, driver):
    """Soft time limits, and time-outs by SIGALRM."""
    one = member(driver)
    one.beside = 1  # of a driver that was interrupted while it connected
    chance = random.Random(1)

    def ring(*_):
        raise Thrown

    before = signal.signal(signal.SIGALRM, ring)
    hits = 0
    try:
        for _ in range(100):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + chance.random() * 0.01)
                work(one.engine, "select pg_sleep(0.005)")
                one.engine.dispose()
            except (Thrown, StatementError):
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert hits > 20
    one.all_can_be_had()


@pytest.mark.parametrize("driver", THREADS)
@pytest.mark.usefixtures("no_log")
def test_exception_in_a_finaliser_costs_a_slot_while_it_is_kept(
    member, monkeypatch, driver
):
    """SQLAlchemy 2.0's own pool loses that slot for good.

    A dropped connection is returned by SQLAlchemy's finaliser. Where an exception ends
    that, only the record's own end tells that nobody will return it.
    """
    one = member(driver)
    kept = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: kept.append(u.exc_value))
    connections = [one.engine.connect()]
    existing = state.core(one).slots.existing
    close = existing.close

    def fail(*_):  # as psycopg's does in the middle of a statement
        raise one.engine.dialect.loaded_dbapi.Error

    def interrupted(*args):
        close(*args)
        raise Thrown

    with monkeypatch.context() as patch:
        patch.setattr(one.engine.dialect, "do_rollback", fail)
        patch.setattr(existing, "close", interrupted)
        drop(connections)
    assert [type(error) for error in kept] == [Thrown]
    assert one.pool.checkedout() == 1
    kept.clear()
    gc.collect()
    assert one.pool.checkedout() == 0
    one.all_can_be_had()


# -- requests that are given up -----------------------------------------------------


@pytest.mark.parametrize("driver", TASKS)
def test_requests_that_time_out(member, driver):
    """Each of twelve at a time is given up after at most 60 ms, and costs no slot."""

    async def main():
        one = member(driver, tasks=True)
        chance = random.Random(1)

        async def query():
            async with one.engine.connect() as connection:
                await connection.execute(text("select pg_sleep(0.005)"))

        async def request():
            try:
                await asyncio.wait_for(query(), chance.random() * 0.06)
            except (asyncio.TimeoutError, DBAPIError):
                pass

        for _ in range(40):
            await asyncio.gather(*(request() for _ in range(12)))
        await one.all_can_be_had_by_tasks()
        await one.engine.dispose()

    run(main())


@pytest.mark.parametrize("driver", TASKS)
def test_tasks_that_are_cancelled_at_random(member, driver):
    async def main():
        one = member(driver, tasks=True)
        chance = random.Random(1)

        async def loop():
            while True:
                async with one.engine.connect() as connection:
                    await connection.execute(text("select pg_sleep(0.002)"))

        tasks = [asyncio.ensure_future(loop()) for _ in range(8)]
        for _ in range(150):
            await asyncio.sleep(chance.random() * 0.01)
            number = chance.randrange(len(tasks))
            tasks[number].cancel()
            await asyncio.wait([tasks[number]])
            tasks[number] = asyncio.ensure_future(loop())
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await one.all_can_be_had_by_tasks()
        await one.engine.dispose()

    run(main())


# -- connections that leave the pool ------------------------------------------------


def drop(objects):
    objects.clear()
    gc.collect()


@pytest.mark.parametrize("driver", TASKS)
def test_connection_of_a_task_that_the_collector_ends(member, driver):
    async def main():
        one = member(driver, tasks=True)
        leaked = [await one.engine.connect()]
        await leaked[0].execute(text("select 1"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of SQLAlchemy and of the driver
            drop(leaked)
        await one.all_can_be_had_by_tasks()
        await one.engine.dispose()

    run(main())


@pytest.mark.parametrize("driver", THREADS)
def test_detached_connection_keeps_its_own_slot_and_no_other(member, driver):
    one = member(driver)
    detached = one.engine.connect()
    detached.detach()
    others = [Caller(one.engine.connect) for _ in range(SLOTS - 1)]
    others = [caller.result() for caller in others]
    assert one.sessions.now == SLOTS
    waiting = Caller(one.engine.connect)
    eventually(lambda: state.waiting(one) == 1)
    detached.close()
    waiting.result().close()
    for connection in others:
        connection.close()
    one.all_can_be_had()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_detached_connection_of_sqlite(tmp_path, how):
    """It cannot be referred to weakly."""
    engine = create_engine(
        f"sqlite:///{tmp_path / 'app.db'}",
        poolclass=FairQueuePool,
        **OPTIONS,
        ledger=str(tmp_path / "app.ledger"),
    )
    with engine.connect() as connection:
        raw = connection.connection.dbapi_connection
        connection.detach()
        connection._dbapi_connection = None  # the driver's own is all there is
    if how == "close":
        raw.close()
    del connection
    del raw
    gc.collect()
    callers = [Caller(engine.connect) for _ in range(SLOTS)]
    for connection in [caller.result() for caller in callers]:
        connection.close()
    engine.dispose()
    state.keeper(engine).close()


def test_connections_of_a_loop_that_is_gone_are_given_up(member):
    """A script's asyncio.run() has ended; its process goes on."""
    script, other = member("asyncpg", tasks=True), member()
    asyncio.run(script.all_can_be_had_by_tasks())
    assert script.sessions.now == SLOTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, which finds unclosed sockets
        other.all_can_be_had()
        eventually(lambda: script.sessions.now == 0)
        gc.collect()


def test_connections_of_a_loop_that_is_blocked_are_given_up(member):
    async def main():
        script, other = member("asyncpg", tasks=True), member()
        await script.all_can_be_had_by_tasks()
        other.all_can_be_had()  # in this thread: no task runs meanwhile
        await script.all_can_be_had_by_tasks()
        await script.engine.dispose()

    run(main())


# -- opening ahead ------------------------------------------------------------------


def test_warm_up_asks_the_ledger_for_slots(member):
    one = member(min_idle=3)
    assert one.pool.warm_up() == 3
    assert one.sessions.now == 3
    one.all_can_be_had()


def test_min_idle_asks_the_ledger_for_slots(member):
    one = member(min_idle=3)
    one.engine.connect().close()
    eventually(lambda: one.sessions.now == 3)


def test_tasks_warm_up_with_a_ledger(member):
    async def main():
        one = member("asyncpg", tasks=True, min_idle=3)
        assert await one.pool.warm_up() == 3
        await one.engine.dispose()

    run(main())
