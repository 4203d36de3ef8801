"""A network that is cut between members of a ledger and their server.

A proxy stands in between; the server's sessions are looked at all the time, past it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import uuid
import warnings
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool
from support import state
from support.proxy import Proxy
from support.sessions import Sessions
from support.stores import rows_of, write
from support.threads import PATIENCE, Caller, eventually

from sqla_fairpool import CheckoutTimeout, FairQueuePool
from sqla_fairpool.ledger import postgres
from sqla_fairpool.ledger.keeper import Keeper, Pace
from sqla_fairpool.ledger.postgres import PostgresStore
from sqla_fairpool.pool import ledger_member, ledger_sessions

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

SLOTS = 4

#: Slots whose sessions cannot be asked after are free after a second, so that one can
#: see that those are not that can be.
PACE = Pace(beat=0.2, slow=0.5, grace=0.1, reclaim_after=1.0, retry=0.5)


@pytest.fixture
def proxy(postgres_url):
    proxy = Proxy(postgres_url)
    yield proxy
    proxy.close()


@pytest.fixture(params=["host", "postgresql", "cut postgresql"])
def ledger(request, tmp_path, postgres_url, proxy):
    """Where a new ledger is: on the host, on the server past the proxy, and behind."""
    if request.param == "host":
        return str(tmp_path / "app.ledger")
    url = proxy.url if request.param.startswith("cut") else make_url(postgres_url)
    url = url.update_query_dict({"ledger": uuid.uuid4().hex})
    return url.render_as_string(hide_password=False)


@pytest.fixture
def operator(postgres_url):
    """A connection past the proxy, for what the test itself does."""
    engine = create_engine(
        postgres_url, poolclass=NullPool, isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        yield lambda statement, **values: connection.execute(text(statement), values)


class Member:
    """An engine that shares a ledger."""

    def __init__(self, url, ledger, driver, name):
        self.engine = create_engine(
            make_url(url).set(drivername=f"postgresql+{driver}"),
            poolclass=FairQueuePool,
            pool_size=SLOTS,
            soft_limit=SLOTS,
            max_limit=SLOTS,
            pool_timeout=PATIENCE,
            ledger=ledger,
            connect_args={"application_name": name},
        )
        self.over = threading.Event()
        self.errors = []
        #: Statements that were executed.
        self.done = 0

    @property
    def keeper(self):
        return state.keeper(self.engine)

    def work(self, statement, **values):
        with self.engine.connect() as connection:
            connection.execute(text(statement), values)
        self.done += 1

    def go_on(self):
        """As an application does whose statements fail: try again."""
        while not self.over.is_set():
            try:
                self.work("select 1")
            except SQLAlchemyError as error:
                self.errors.append(error)

    def reaches_the_ledger(self):
        """Return once it was read after this moment: a cut may not be known yet."""
        before = self.keeper.member.rows.transactions
        eventually(
            lambda: (
                self.keeper.trouble is None
                and self.keeper.member.rows.transactions > before
            ),
            "the ledger is there",
        )

    def close(self):
        self.over.set()
        self.engine.dispose()
        self.keeper.close()


@pytest.fixture
def member(monkeypatch, postgres_url, proxy, ledger):
    """Make members; all of them never have more sessions than there are slots."""
    monkeypatch.setattr(ledger_sessions, "Keeper", partial(Keeper, pace=PACE))
    monkeypatch.setattr(ledger_member, "_CONFIRMED_WITHIN", 2.5)
    name = f"network {uuid.uuid4().hex[:12]}"
    members = []

    def make(driver="psycopg2", past=False, ledger=ledger):
        """Make one that connects through the proxy, or past it."""
        url = postgres_url if past else proxy.url
        members.append(Member(url, ledger, driver, name))
        return members[-1]

    # Sessions that there may be beside the slots, for a moment.
    make.beside = 0

    open_another = FairQueuePool.open_another

    def look(pool):
        connection = open_another(pool)
        sessions.apart.add(ledger_sessions._backend_pid(connection))
        return connection

    monkeypatch.setattr(FairQueuePool, "open_another", look)
    with Sessions(postgres_url, name) as sessions:
        make.sessions = sessions
        make.name = name
        yield make
        for one in members:
            one.close()
    # Who asks for sessions that are lost does it beside the budget, for a moment: these
    # are known, but for one that could not be opened.
    beside = 0 if ledger.startswith("postgresql") else len(members)
    assert SLOTS <= sessions.most <= SLOTS + beside + make.beside


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_store_needs_few_round_trips_and_one_while_it_has_the_lock(proxy, driver):
    """Members may be far away from it."""
    url = proxy.url.set(drivername=f"postgresql+{driver}")
    name = uuid.uuid4().hex
    store = PostgresStore(url, name)
    store.open()

    def trips(function, *args):
        before = proxy.messages
        function(*args)
        return proxy.messages - before

    assert trips(store.read) == 1
    assert trips(lambda: write(store, **{f"k{i}": "{'\\%}" for i in range(9)})) == 2
    assert trips(rows_of, store) == 2
    assert rows_of(store)["k8"] == "{'\\%}"
    assert trips(store.ring, ["a", "b", "c"]) == 1
    assert trips(lambda: write(store, ["a", "b"], k1="new")) == 2
    assert trips(store.swap, "k1", "new", "newer") == 1
    assert rows_of(store)["k1"] == "newer"
    another = PostgresStore(url, name)
    assert trips(another.open) == 8  # two of these connect
    for one in (store, another):  # last: a goodbye may be counted later
        one.close()


LOCK = 4711
WAITS = f"select pg_advisory_xact_lock_shared({LOCK})"


@contextlib.contextmanager
def at_work(operator, one):
    """Have all slots of a member in the middle of statements, until this is over."""
    operator(f"select pg_advisory_lock({LOCK})")
    try:
        callers = [Caller(one.work, WAITS) for _ in range(SLOTS)]
        waiting = "select count(*) from pg_locks where not granted and objid = :lock"
        eventually(lambda: operator(waiting, lock=LOCK).scalar() == SLOTS)
        yield callers
    finally:
        operator(f"select pg_advisory_unlock({LOCK})")


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_only_the_clients_learn_of_the_end(member, proxy, operator, driver, no_log):
    """As by a firewall's reset: the server goes on with the statements."""
    one, other = member(driver), member(driver)
    with at_work(operator, one) as callers:
        proxy.reset()
        for caller in callers:
            with pytest.raises(SQLAlchemyError):
                caller.result()
        callers.clear()  # nobody has the driver's connections any more
        caller = None
        gc.collect()
        working = [Caller(m.go_on) for m in (one, other) for _ in range(SLOTS)]
        # Much longer than a slot is kept whose session cannot be asked after.
        threading.Event().wait(3 * PACE.reclaim_after)
        assert member.sessions.now >= SLOTS  # and who asks after them
        assert one.done + other.done == 0
        for m in (one, other):
            # Also where the server has not noticed the end of a control connection.
            m.reaches_the_ledger()
            assert m.keeper.member.watch.unasked is None
    proxy.let_go()
    eventually(lambda: one.done and other.done, "there are slots again")
    for m in (one, other):
        m.over.set()
    for caller in working:
        caller.result()


def has_one_less(one, proxy):
    """Assert that a slot is kept for as long as the server has a lost session."""
    callers = [Caller(one.engine.connect) for _ in range(SLOTS)]
    waiting = state.scheduler(one.engine)
    eventually(lambda: sum(not c.is_alive() for c in callers) == SLOTS - 1)
    # Much longer than a slot is kept whose session cannot be asked after.
    threading.Event().wait(3 * PACE.reclaim_after)
    assert waiting.waiting == 1
    proxy.let_go()
    for caller in callers:
        caller.result().close()


@pytest.mark.parametrize("ledger", ["host", "postgresql"], indirect=True)
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_connection_that_is_lost_before_the_ledger_knows_its_session(
    member, proxy, driver, monkeypatch, no_log
):
    identify = ledger_sessions.identify
    monkeypatch.setattr(
        ledger_sessions, "identify", lambda *args: (proxy.reset(), identify(*args))[1]
    )
    with pytest.raises(SQLAlchemyError):
        member(driver).engine.connect()
    monkeypatch.setattr(ledger_sessions, "identify", identify)
    has_one_less(member(driver, past=True), proxy)


@pytest.mark.parametrize("ledger", ["host", "postgresql"], indirect=True)
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_lost_connection_that_the_collector_ends(member, proxy, driver, no_log):
    """Its driver has read of the reset; nobody has closed it through the pool."""
    connection = member(driver).engine.connect()
    raw = connection.connection.driver_connection
    connection.detach()
    proxy.reset()
    with pytest.raises(Exception, match="connection"):
        raw.execute("select 1") if driver == "psycopg" else raw.cursor().execute("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the driver, that it was not closed
        connection._dbapi_connection = raw = None
        gc.collect()
    has_one_less(member(driver, past=True), proxy)


SILENCED = pytest.mark.parametrize("ledger", ["cut postgresql"], indirect=True)


def end_control_connections(operator):
    """As the server does when its keepalives are not answered."""
    operator(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where application_name = 'sqla_fairpool ledger'"
    )


def take_all(one):
    """Return all connections that there may be, once a member has them."""
    callers = [Caller(one.engine.connect) for _ in range(SLOTS)]
    return [caller.result() for caller in callers]


def refuses(one):
    """Assert that as many as there are slots cannot be had: nobody confirms them."""
    callers = [Caller(one.engine.connect) for _ in range(SLOTS)]
    for caller in callers:
        with pytest.raises(CheckoutTimeout, match="confirm that this process owns"):
            caller.result()


@SILENCED
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_member_whose_control_connection_is_silent_opens_nothing(
    member, proxy, operator, driver
):
    """It cannot know that its slots were given on; the network is back for others."""
    one = member(driver, past=True)
    mine = take_all(one)
    proxy.silence()
    end_control_connections(operator)
    operator(
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where application_name = :name",
        name=member.name,
    )
    other = member(driver, past=True)
    theirs = take_all(other)
    for connection in mine:
        connection.invalidate()
        connection.close()
    refuses(one)
    assert member.sessions.now == SLOTS
    proxy.notice()
    one.reaches_the_ledger()
    for connection in theirs:
        connection.close()
    for connection in take_all(one):
        connection.close()


@SILENCED
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_control_connection_that_says_nothing_is_hung_up_on_and_made_anew(
    member, ledger, proxy, driver, monkeypatch, caplog
):
    """A proxy takes everything: no keepalive and no time limit of TCP notices that."""
    monkeypatch.setattr(postgres, "_ANSWER_WITHIN", 1.0)
    one = member(driver, past=True, ledger=ledger.replace("psycopg2", driver))
    one.work("select 1")
    one.engine.dispose()
    proxy.silence()
    for connection in take_all(one):
        connection.close()
    assert "no answer within 1 s" in caplog.text
    one.reaches_the_ledger()


@SILENCED
@pytest.mark.parametrize("in_use", [0, SLOTS])
def test_silence_is_noticed_by_one_that_has_nothing_to_say(
    member, proxy, monkeypatch, caplog, in_use
):
    monkeypatch.setattr(postgres, "_ANSWER_WITHIN", 1.0)
    pace = Pace(slow=1000.0, far=0.2, retry=0.5)
    monkeypatch.setattr(ledger_sessions, "Keeper", partial(Keeper, pace=pace))
    one = member(past=True)
    connections = take_all(one)
    for connection in connections[in_use:]:
        connection.close()
    proxy.silence()
    eventually(lambda: "no answer within 1 s" in caplog.text, "it is noticed")
    one.reaches_the_ledger()
    for connection in connections:
        connection.close()


def test_silence_is_noticed_within_the_time_of_a_quarantine():
    pace = Pace()
    assert pace.far + postgres._ANSWER_WITHIN < pace.reclaim_after


@SILENCED
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
def test_control_connection_that_falls_silent_while_connections_are_opened(
    member, proxy, operator, driver
):
    """The sign of life is looked at over the new connection itself."""
    one = member(driver, past=True)
    member.beside = SLOTS  # for a moment, in which nothing else is done in them
    connecting, goes_on = threading.Barrier(SLOTS + 1), threading.Event()

    @event.listens_for(one.engine, "do_connect")
    def on_connect(*_):
        if not goes_on.is_set():
            connecting.wait(PATIENCE)
            goes_on.wait(PATIENCE)

    callers = [Caller(one.engine.connect) for _ in range(SLOTS)]
    connecting.wait(PATIENCE)
    proxy.silence()
    end_control_connections(operator)
    other = member(driver, past=True)
    theirs = take_all(other)
    goes_on.set()
    for caller in callers:
        with pytest.raises(CheckoutTimeout, match="sign of life is gone"):
            caller.result()
    eventually(lambda: member.sessions.now == SLOTS)
    refuses(one)
    proxy.notice()
    one.reaches_the_ledger()
    for connection in theirs:
        connection.close()
    for connection in take_all(one):
        connection.close()


@SILENCED
def test_member_that_is_stopped_while_it_connects(
    member, operator, postgres_url, ledger
):
    """And loses its control connection meanwhile."""
    other = member(past=True)
    member.beside = SLOTS  # for a moment, in which nothing else is done in them
    program = Path(__file__).parents[1] / "support" / "stopped_program.py"
    process = subprocess.Popen(
        [sys.executable, program, postgres_url, ledger, str(SLOTS), member.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        os.waitpid(process.pid, os.WUNTRACED)
        end_control_connections(operator)
        theirs = take_all(other)
        os.kill(process.pid, signal.SIGCONT)
        told = [process.stdout.readline() for _ in range(SLOTS)]
        assert told == ["refused\n"] * SLOTS
        eventually(lambda: member.sessions.now == SLOTS)
        for connection in theirs:
            connection.close()
        process.stdin.close()
        assert process.stdout.readline() == f"has {SLOTS}\n"
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
