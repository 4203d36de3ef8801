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
from sqlalchemy.util import await_only
from support import state
from support.sessions import Sessions
from support.stub import all_for_one
from support.threads import PATIENCE, Caller, eventually, give

from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    FairQueuePool,
    tag,
)
from sqla_fairpool.ledger.store import ServerDiffers
from sqla_fairpool.pool import ledger_member, ledger_sessions

pytestmark = pytest.mark.postgres

SLOTS = 4
OPTIONS = {**all_for_one(SLOTS), "pool_timeout": PATIENCE}

threads = pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
tasks = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])

END_SESSIONS = (
    "select pg_terminate_backend(pid) from pg_stat_activity "
    "where application_name = :name"
)


class Member:
    """An engine that shares a ledger, and what the server has of it."""

    def __init__(self, url, ledger, driver="psycopg2", is_asyncio=False, **options):
        self.name = f"slots {uuid.uuid4().hex[:12]}"
        #: Sessions that there may be beside the slots, for a moment.
        self.beside = 0
        arguments = {"application_name": self.name}
        if driver == "asyncpg":
            arguments = {"server_settings": arguments}
        make, pool_class = create_engine, FairQueuePool
        if is_asyncio:
            make, pool_class = create_async_engine, AsyncAdaptedFairQueuePool
        self.engine = make(
            make_url(url).set(drivername=f"postgresql+{driver}"),
            poolclass=pool_class,
            ledger=ledger,
            connect_args=arguments,
            **{**OPTIONS, **options},
        )
        self.pool = getattr(self.engine, "sync_engine", self.engine).pool
        self.keeper = state.keeper(self)
        self.sessions = Sessions(url, self.name)

    def all_can_be_had(self):
        """Assert that as many connections can be had as there are slots."""
        gc.collect()  # tracebacks of exceptions have some
        callers = [Caller(self.engine.connect) for _ in range(SLOTS)]
        give([caller.result() for caller in callers])

    async def connect(self):
        return await self.engine.connect()

    async def all_can_be_had_by_tasks(self):
        for connection in await asyncio.gather(*(self.connect() for _ in range(SLOTS))):
            await connection.close()

    async def query(self, seconds):
        async with self.engine.connect() as connection:
            await connection.execute(text(f"select pg_sleep({seconds})"))


@pytest.fixture
def member(postgres_url, ledger):
    """Make members; afterwards they were never above the bound."""
    members = []

    def make(*args, **options):
        members.append(Member(postgres_url, ledger, *args, **options))
        members[-1].sessions.__enter__()
        return members[-1]

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


@pytest.fixture
def in_a_loop(member):
    """Run a coroutine function with a member; then all can be had by its tasks."""

    def run(function, driver="asyncpg", **options):
        async def main():
            one = member(driver, True, **options)
            await function(one)
            await one.all_can_be_had_by_tasks()
            await one.engine.dispose()

        asyncio.run(asyncio.wait_for(main(), 2 * PATIENCE))

    return run


# -- opening again fails ------------------------------------------------------------


@threads
def test_listener_that_fails_when_a_connection_is_opened_again(
    member, postgres_url, operator, driver
):
    """As those do that check for the primary during a failover."""
    one = member(driver, pool_pre_ping=True)
    one.all_can_be_had()
    failing = True

    @event.listens_for(one.engine, "connect")
    def on_connect(dbapi_connection, record):
        if failing:
            raise RuntimeError("not the primary")

    operator(postgres_url, END_SESSIONS, name=one.name)
    for _ in range(2 * SLOTS):
        with pytest.raises(RuntimeError, match="primary"):
            one.engine.connect()
    failing = False
    one.all_can_be_had()


@tasks
def test_task_that_is_cancelled_when_a_connection_is_opened_again(
    in_a_loop, postgres_url, operator, driver
):
    async def main(one):
        await one.all_can_be_had_by_tasks()
        slowly = asyncio.Event()

        @event.listens_for(one.engine.sync_engine, "connect")
        def on_connect(dbapi_connection, record):
            if not slowly.is_set():
                await_only(slowly.wait())

        end = END_SESSIONS.replace(":name", f"'{one.name}'")
        await asyncio.to_thread(operator, postgres_url, end)
        for _ in range(2):
            connecting = [asyncio.ensure_future(one.connect()) for _ in range(SLOTS)]
            await asyncio.sleep(0.1)  # they are anywhere
            for task in connecting:
                task.cancel()
            await asyncio.wait(connecting)
        slowly.set()

    in_a_loop(main, driver, pool_pre_ping=True)


@pytest.mark.parametrize("fails", [False, True])
def test_task_that_is_cancelled_while_its_driver_connects_again(
    in_a_loop, postgres_url, operator, fails
):
    """The session is there, though no caller waits for it any more."""

    async def main(one):
        await one.all_can_be_had_by_tasks()
        go_on, connected = asyncio.Event(), []

        @event.listens_for(one.engine.sync_engine, "do_connect")
        def on_connect(dialect, record, arguments, options):
            connection = dialect.connect(*arguments, **options)
            connected.append(connection)
            if len(connected) == 1:
                await_only(go_on.wait())
                if fails:
                    connection.close()
                    raise OSError
            return connection

        end = END_SESSIONS.replace(":name", f"'{one.name}'")
        await asyncio.to_thread(operator, postgres_url, end)
        connecting = asyncio.ensure_future(one.connect())
        while not connected:
            await asyncio.sleep(0.01)
        connecting.cancel()
        await asyncio.wait([connecting])
        with tag("late", timeout=1.0):  # longer than a goodbye takes
            others = [one.connect() for _ in range(SLOTS)]
            got = await asyncio.gather(*others, return_exceptions=True)
        late = [error for error in got if isinstance(error, CheckoutTimeout)]
        assert len(late) == 1
        for connection in {*got} - {*late}:
            await connection.close()
        go_on.set()

    in_a_loop(main, "psycopg", pool_pre_ping=True)


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
    with monkeypatch.context() as patch:
        patch.setattr(
            ledger_sessions,
            "identify",
            lambda *args: ("postgresql elsewhere", *identify(*args)[1:]),
        )
        with pytest.raises(ServerDiffers, match="postgresql elsewhere"):
            other.engine.connect()
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


@threads
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

    running = [threading.Thread(target=target, daemon=True) for _ in range(SLOTS + 2)]
    for thread in running:
        thread.start()
    chance = random.Random(1)
    end = time.monotonic() + PATIENCE
    # One that is thrown into a thread which waits in the driver replaces another.
    while len(hits) < 100:
        assert time.monotonic() < end
        time.sleep(chance.random() * 0.01)  # at any moment
        thread = chance.choice(running)
        throw(ctypes.c_ulong(thread.ident), ctypes.py_object(Thrown))
        gc.collect()  # connections in cycles, for which all the threads may wait
    over.set()

    def all_have_ended():
        gc.collect()
        return not any(thread.is_alive() for thread in running)

    eventually(all_have_ended)
    one.all_can_be_had()


@threads
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


def drop(objects):
    objects.clear()
    gc.collect()


@threads
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
    existing = state.existing(one)
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
    drop(kept)
    assert one.pool.checkedout() == 0
    one.all_can_be_had()


# -- requests that are given up -----------------------------------------------------


@tasks
def test_requests_that_time_out(in_a_loop, driver):
    """Each of twelve at a time is given up after at most 60 ms, and costs no slot."""
    chance = random.Random(1)

    async def main(one):
        async def request():
            try:
                await asyncio.wait_for(one.query(0.005), chance.random() * 0.06)
            except (asyncio.TimeoutError, DBAPIError):
                pass

        for _ in range(40):
            await asyncio.gather(*(request() for _ in range(12)))

    in_a_loop(main, driver)


@tasks
def test_tasks_that_are_cancelled_at_random(in_a_loop, driver):
    chance = random.Random(1)

    async def main(one):
        async def loop():
            while True:
                await one.query(0.002)

        running = [asyncio.ensure_future(loop()) for _ in range(8)]
        for _ in range(150):
            await asyncio.sleep(chance.random() * 0.01)
            number = chance.randrange(len(running))
            running[number].cancel()
            await asyncio.wait([running[number]])
            running[number] = asyncio.ensure_future(loop())
        for task in running:
            task.cancel()
        await asyncio.wait(running)

    in_a_loop(main, driver)


# -- connections that leave the pool ------------------------------------------------


@tasks
def test_connection_of_a_task_that_the_collector_ends(in_a_loop, driver):
    async def main(one):
        leaked = [await one.connect()]
        await leaked[0].execute(text("select 1"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of SQLAlchemy and of the driver
            drop(leaked)

    in_a_loop(main, driver)


@threads
def test_detached_connection_keeps_its_own_slot_and_no_other(member, driver):
    one = member(driver)
    detached = one.engine.connect()
    detached.detach()
    callers = [Caller(one.engine.connect) for _ in range(SLOTS - 1)]
    others = [caller.result() for caller in callers]
    assert one.sessions.now == SLOTS
    waiting = Caller(one.engine.connect)
    eventually(lambda: state.waiting(one) == 1)
    detached.close()
    waiting.result().close()
    give(others)
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
    give([caller.result() for caller in callers])
    engine.dispose()
    state.keeper(engine).close()


def test_connections_of_a_loop_that_is_gone_are_given_up(member):
    """A script's asyncio.run() has ended; its process goes on."""
    script, other = member("asyncpg", True), member()
    asyncio.run(script.all_can_be_had_by_tasks())
    assert script.sessions.now == SLOTS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python, which finds unclosed sockets
        other.all_can_be_had()
        eventually(lambda: script.sessions.now == 0)
        gc.collect()


def test_connections_of_a_loop_that_is_blocked_are_given_up(member, in_a_loop):
    async def main(script):
        await script.all_can_be_had_by_tasks()
        member().all_can_be_had()  # in this thread: no task runs meanwhile

    in_a_loop(main)


def test_first_connections_do_not_wait_for_the_ledger_one_after_the_other(
    member, monkeypatch
):
    """SQLAlchemy has an engine's first ones connect one at a time."""
    one, posts = member(), []
    post = one.keeper.post
    monkeypatch.setattr(state.share(one.pool), "before_opening", lambda: None)
    monkeypatch.setattr(one.keeper, "post", posts.append)
    callers = [Caller(one.engine.connect) for _ in range(SLOTS)]
    eventually(lambda: len(posts) == SLOTS)
    for done in posts:
        post(done)
    give([caller.result() for caller in callers])


# -- opening ahead ------------------------------------------------------------------


def test_connections_that_are_opened_ahead_get_their_slots(member, in_a_loop):
    one, other = member(min_idle=3), member(min_idle=3)
    assert one.pool.warm_up() == one.sessions.now == 3
    one.engine.dispose()
    other.engine.connect().close()
    eventually(lambda: other.sessions.now == 3)
    other.engine.dispose()

    async def main(one):
        assert await one.pool.warm_up() == 3

    in_a_loop(main, min_idle=3)
