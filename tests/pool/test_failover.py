"""A server that takes no writes any more, and how the pool comes back after it."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import psycopg2
import pymysql
import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.dialects.postgresql.psycopg2 import PGDialect_psycopg2
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from support import state
from support.cluster import Cluster, ask
from support.stub import StubCursor, StubError, all_for_one
from support.threads import PATIENCE, Caller, Gate, connect, eventually, give, take

from sqla_fairpool import AsyncAdaptedFairQueuePool, CheckoutTimeout, FairQueuePool

# -- what is a disconnect --------------------------------------------------------------


class ReadOnly(psycopg2.Error):
    pgcode = "25006"


class Shutdown(psycopg2.Error):
    pgcode = "57P01"


class Unique(psycopg2.Error):
    pgcode = "23505"


def mysql(number, message=""):
    return pymysql.err.OperationalError(number, message)


NOT_ALLOWED = mysql(1290, "The server is running with the --read-only option so it")
WRITES = {"in_hot_standby": "off", "default_transaction_read_only": "off"}
FOLLOWS = WRITES | {"in_hot_standby": "on"}
FENCED = WRITES | {"default_transaction_read_only": "on"}
OLD = {}  # before PostgreSQL 14, which reports neither


@pytest.fixture
def refuse(server, monkeypatch):
    """Have a stub of a server refuse a write; return which connections were replaced.

    :param modes: what the server reports to connections as they are opened.
    :param now: and to all when it refuses.
    """
    engines = []

    def run(driver, error, modes, now, options=None, listener=None, **pool_options):
        said = iter(modes)
        opened, failing = [], []

        def open_one():
            connection = server.connect()
            connection.mode = next(said, now)
            connection.info = SimpleNamespace(
                parameter_status=lambda name: connection.mode.get(name)
            )
            connection.character_set_name = lambda: "utf8mb4"
            connection.closed = 0
            opened.append(connection)
            return connection

        def execute(cursor, statement, parameters=()):
            cursor._rows = [(int(cursor.connection.mode is not WRITES),)]
            if statement == "write" and cursor.connection in failing:
                raise error

        monkeypatch.setattr(StubCursor, "execute", execute)
        monkeypatch.setattr(PGDialect_psycopg2, "on_connect", lambda dialect: None)
        engine = create_engine(
            driver,
            creator=open_one,
            poolclass=FairQueuePool,
            **all_for_one(4),
            **pool_options,
        )
        engines.append(engine)
        if listener is not None:
            event.listen(engine, "connect", listener)
        monkeypatch.setattr(engine.dialect, "initialize", lambda connection: None)
        connections = [engine.connect() for _ in modes]
        give(connections[1:])  # they lie idle, the first one is in use
        failing += opened
        for connection in opened:
            connection.mode = now
        writer = connections[0].execution_options(**(options or {}))
        with pytest.raises(DBAPIError) as caught:
            writer.exec_driver_sql("write")
        writer.close()
        before = len(opened)
        give(take(engine, len(modes)))
        assert caught.value.connection_invalidated == (len(opened) > before)
        return len(opened) - before

    yield run
    for engine in engines:
        engine.dispose()


READONLY_OPTION = {"postgresql_readonly": True}


@pytest.mark.parametrize(
    ("driver", "error", "modes", "now", "options", "replaced"),
    [
        ("postgresql+psycopg2", ReadOnly(), [WRITES] * 3, FENCED, {}, 3),
        ("postgresql+psycopg2", ReadOnly(), [WRITES] * 3, FOLLOWS, {}, 3),
        ("postgresql+psycopg2", Shutdown(), [WRITES] * 3, WRITES, {}, 3),
        ("postgresql+psycopg2", Shutdown(), [FOLLOWS] * 3, FOLLOWS, {}, 3),
        ("postgresql+psycopg2", Unique(), [WRITES] * 3, FENCED, {}, 0),
        # Opened on a server that follows already, by a pool that could write before.
        ("postgresql+psycopg2", ReadOnly(), [FOLLOWS, WRITES], FOLLOWS, {}, 1),
        ("postgresql+psycopg2", ReadOnly(), [FENCED, WRITES], FENCED, {}, 1),
        ("postgresql+psycopg2", ReadOnly(), [OLD] * 3, OLD, {}, 1),
        # By intent.
        ("postgresql+psycopg2", ReadOnly(), [FOLLOWS] * 3, FOLLOWS, {}, 0),
        ("postgresql+psycopg2", ReadOnly(), [FENCED] * 3, FENCED, {}, 0),
        ("postgresql+psycopg2", ReadOnly(), [WRITES] * 3, WRITES, {}, 0),
        ("postgresql+psycopg2", ReadOnly(), [WRITES] * 3, FENCED, READONLY_OPTION, 0),
        ("mysql+pymysql", NOT_ALLOWED, [WRITES] * 3, FOLLOWS, {}, 3),
        ("mysql+pymysql", mysql(1836, "read only"), [WRITES] * 3, FOLLOWS, {}, 3),
        ("mysql+pymysql", mysql(1053), [FOLLOWS] * 3, FOLLOWS, {}, 3),
        ("mysql+pymysql", NOT_ALLOWED, [FOLLOWS] * 3, FOLLOWS, {}, 0),
        ("mysql+pymysql", NOT_ALLOWED, [FOLLOWS, WRITES], FOLLOWS, {}, 1),
        ("mysql+pymysql", mysql(1290, "--secure-file-priv"), [WRITES], WRITES, {}, 0),
        ("mysql+pymysql", mysql(1792), [WRITES] * 3, WRITES, {}, 0),
    ],
)
def test_refused_write_is_a_disconnect_if_the_server_has_changed(
    refuse, driver, error, modes, now, options, replaced
):
    assert refuse(f"{driver}://", error, modes, now, options) == replaced


def test_listener_that_has_sessions_read_only_is_an_intent(refuse):
    def listener(connection, record):
        connection.mode.update(FENCED)

    modes = [dict(WRITES) for _ in range(3)]
    url = "postgresql+psycopg2://"
    assert refuse(url, ReadOnly(), modes, FENCED, listener=listener) == 0


def test_failover_guard_may_be_off(refuse):
    url, off = "postgresql+psycopg2://", {"failover_guard": False}
    assert refuse(url, ReadOnly(), [WRITES] * 3, FENCED, **off) == 0


# -- one at a time, with pauses --------------------------------------------------------


GONE = StubError("the server is gone")


def no_answer():
    raise StubError("no answer")


def test_one_caller_at_a_time_connects_until_the_first_success(world):
    pool, gate = world.pool(4), world.gate()
    state.lose(pool, GONE)
    world.server.before["connect"] = gate
    callers = [world.start(connect, pool) for _ in range(4)]
    gate.reached()
    world.eventually(lambda: len(state.reconnects(pool).in_line()) == 4)
    assert world.server.open == 1
    gate.open()
    give([caller.result() for caller in callers])
    assert world.server.opened == 4
    assert state.reconnects(pool).error is None


def test_time_that_ends_in_the_line_ends_with_the_servers_error(world):
    pool, gate = world.pool(4), world.gate()
    state.lose(pool, GONE)
    world.server.before["connect"] = gate
    first = world.start(connect, pool)
    gate.reached()
    pool.reconfigure(timeout=0.05)
    with pytest.raises(StubError, match="the server is gone"):
        connect(pool)
    assert world.server.open == 1
    gate.open()
    first.result().close()
    assert state.in_use(pool) in (0, 1)


def test_time_that_ends_before_a_slot_is_free_ends_likewise(world):
    pool = world.pool(1, timeout=0.05)
    state.lose(pool, GONE)
    held = connect(pool)
    state.lose(pool, GONE)
    with pytest.raises(CheckoutTimeout):
        connect(pool)  # no attempt has failed
    held.invalidate()
    held.close()
    world.server.before["connect"] = no_answer
    with pytest.raises(StubError, match="no answer"):
        connect(pool)
    gate = world.server.before["connect"] = world.gate()
    pool.reconfigure(timeout=30)
    first = world.start(connect, pool)
    gate.reached()
    pool.reconfigure(timeout=0.05)
    with pytest.raises(StubError, match="no answer"):
        connect(pool)
    assert pool.stats().tag("a").timeouts == 2
    gate.open()
    first.result().close()


def test_lost_connection_is_opened_again_in_its_turn(world):
    pool = world.pool(2, reconnect_backoff=0)
    give(take(pool, 2))
    held = connect(pool)
    held.invalidate()
    held.close()
    state.lose(pool, GONE)
    world.server.before["connect"] = no_answer
    out = take(pool, 1)  # one that is open
    for failures in (1, 2):
        with pytest.raises(StubError, match="no answer"):
            connect(pool)
        assert state.reconnects(pool).failures == failures
    del world.server.before["connect"]
    give([*out, connect(pool)])
    assert state.reconnects(pool).error is None


def test_caller_that_is_interrupted_in_the_line_keeps_nobody_waiting(world):
    pool, gate = world.pool(4), world.gate()
    state.lose(pool, GONE)
    world.server.before["connect"] = gate
    first = world.start(connect, pool)
    gate.reached()
    line = state.reconnects(pool).in_line
    if world.interruption is KeyboardInterrupt:
        waiter = world.start(interrupted, pool, world.interruption)
        with pytest.raises(world.interruption):
            waiter.result()
    else:
        waiter = world.start(connect, pool)
        world.eventually(lambda: len(line()) == 2)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            waiter.result()
    assert len(line()) == 1
    gate.open()
    give([first.result(), connect(pool)])


def interrupted(pool, interruption):
    """Connect, and be interrupted as soon as the caller waits."""

    class Interrupted:
        can_wait = staticmethod(lambda: True)

        def __init__(self, owner):
            pass

        def wait(self, seconds):
            raise interruption

    state.reconnects(pool)._waiter_class = Interrupted
    return connect(pool)


def test_pauses_grow_up_to_the_option_and_begin_anew(make_pool, server, clock):
    pool = make_pool(2, timeout=0)
    server.before["connect"] = no_answer
    reconnects = state.reconnects(pool)
    for _ in range(2):
        state.lose(pool, GONE)
        pauses = []
        for _ in range(8):
            with pytest.raises(StubError, match="no answer"):
                connect(pool)
            pauses.append(reconnects.next_attempt - clock())
            with pytest.raises(StubError, match="no answer"):
                connect(pool)  # its time is over before the pause is
            clock.advance(pauses[-1])
        bounds = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
        assert all(b / 2 <= p <= b for p, b in zip(pauses, bounds, strict=True))
        assert len(set(pauses)) == 8  # no two processes come at once
        del server.before["connect"]
        connect(pool).close()
        pool.dispose()
        server.before["connect"] = no_answer


def test_without_a_disconnect_every_caller_tries(make_pool, server):
    pool, gate = make_pool(3), Gate()
    server.before["connect"] = gate
    callers = [Caller(connect, pool) for _ in range(3)]
    eventually(lambda: server.open == 3)
    gate.open()
    give([caller.result() for caller in callers])


def test_disconnects_that_the_engine_finds_begin_it(make_engine, server, monkeypatch):
    """By a statement, and by ``pool_pre_ping``; not by what cannot be opened at all."""
    engine = make_engine(2, pool_pre_ping=True)
    monkeypatch.setattr(engine.dialect, "is_disconnect", lambda *args: True)
    dbapi_error = engine.dialect.loaded_dbapi.OperationalError

    def fail(*args):
        raise dbapi_error("gone")

    server.before["connect"] = fail
    with pytest.raises(DBAPIError):
        engine.connect()
    assert state.reconnects(engine).error is None
    del server.before["connect"]
    with engine.connect() as connection, monkeypatch.context() as patch:
        patch.setattr(StubCursor, "execute", fail)
        with pytest.raises(DBAPIError):
            connection.exec_driver_sql("select 1")
        assert str(state.reconnects(engine).error) == "gone"
    engine.connect().close()
    assert state.reconnects(engine).error is None


# -- a real promotion ------------------------------------------------------------------


@pytest.fixture
def cluster():
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


SIZE = 4
WRITE = text("insert into written values (0)")


class Writers:
    """Callers of one engine that write for as long as they may."""

    def __init__(self, url, **options):
        self.url = url
        self.options = {**all_for_one(SIZE), "pool_timeout": 2.0, **options}
        self.written, self.errors, self.over = 0, [], threading.Event()
        self.caller = Caller(self.run)

    def noted(self, error):
        if error is None:
            self.written += 1
        else:
            self.errors.append(error)

    def run(self):
        engine = create_engine(self.url, poolclass=FairQueuePool, **self.options)
        callers = [Caller(self.write, engine) for _ in range(2 * SIZE)]
        for caller in callers:
            caller.result(2 * PATIENCE)
        engine.dispose()

    def write(self, engine):
        while not self.over.wait(0.005):
            try:
                with engine.execution_options(scraper="a").begin() as connection:
                    connection.execute(WRITE)
                self.noted(None)
            except SQLAlchemyError as error:
                self.noted(error)


class AsyncWriters(Writers):
    def run(self):
        asyncio.run(self.write_all())

    async def write_all(self):
        engine = create_async_engine(
            self.url, poolclass=AsyncAdaptedFairQueuePool, **self.options
        )
        await asyncio.gather(*[self.write_one(engine) for _ in range(2 * SIZE)])
        await engine.dispose()

    async def write_one(self, engine):
        while not self.over.is_set():
            await asyncio.sleep(0.005)
            try:
                async with engine.begin() as connection:
                    await connection.execute(WRITE)
                self.noted(None)
            except Exception as error:  # SQLAlchemy 2.0 has asyncpg's as they are
                self.noted(error)


@pytest.mark.postgres
def test_pool_follows_a_promotion(cluster, tmp_path):
    """No writer is started again, and no server has more sessions than the budget."""
    sessions = "select count(*) from pg_stat_activity where application_name = 'writer'"
    url = cluster.url().update_query_dict({"application_name": "writer"})
    tasks = cluster.url("asyncpg")
    ledger = {"ledger": str(tmp_path / "ledger")}
    writers = [
        Writers(url, **ledger),
        Writers(url.set(drivername="postgresql+psycopg"), **ledger),
        AsyncWriters(tasks),
        Writers(cluster.url(), ledger=cluster.url().render_as_string(False)),
    ]
    try:
        eventually(lambda: all(one.written > 20 for one in writers), "writes")
        cluster.fence()
        eventually(lambda: all(len(one.errors) > 5 for one in writers), "errors")
        before = [one.written for one in writers]
        cluster.promote()
        promoted, most, took = time.monotonic(), 0, {}
        while len(took) < len(writers) and time.monotonic() < promoted + PATIENCE:
            most = max(most, ask(cluster.standby.url, sessions))
            for one, number in zip(writers, before, strict=True):
                if one.written > number:
                    took.setdefault(one, time.monotonic() - promoted)
        assert len(took) == len(writers)
        assert most <= SIZE
        eventually(lambda: not ask(cluster.primary.url, sessions), "old sessions' end")
    finally:
        for one in writers:
            one.over.set()
        for one in writers:
            one.caller.result(3 * PATIENCE)
    # Without the ledger's database no connection is opened, so there they may wait.
    errors = {type(error) for one in writers[:3] for error in one.errors}
    assert CheckoutTimeout not in errors
