"""A network that is cut between members of a ledger and their server.

A proxy stands in between; the server's sessions are looked at all the time, past it.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from functools import partial

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool
from support.proxy import Proxy
from support.sessions import Sessions
from support.threads import PATIENCE, Caller, eventually

from sqla_fairpool import FairQueuePool, joining
from sqla_fairpool.ledger.keeper import Keeper, Pace

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
    """An engine that connects through the proxy."""

    def __init__(self, proxy, ledger, driver, name):
        self.engine = create_engine(
            proxy.url.set(drivername=f"postgresql+{driver}"),
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
        return self.engine.pool._exchange.share.keeper

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
        eventually(lambda: self.keeper.status().trouble is None, "the ledger is there")

    def close(self):
        self.over.set()
        self.engine.dispose()
        self.keeper.close()


@pytest.fixture
def member(monkeypatch, postgres_url, proxy, ledger):
    """Make members; all of them never have more sessions than there are slots."""
    monkeypatch.setattr(joining, "Keeper", partial(Keeper, pace=PACE))
    name = f"network {uuid.uuid4().hex[:12]}"
    members = []

    def make(driver="psycopg2"):
        members.append(Member(proxy, ledger, driver, name))
        return members[-1]

    with Sessions(postgres_url, name) as sessions:
        make.sessions = sessions
        make.name = name
        yield make
        for one in members:
            one.close()
    # Who asks for sessions that are lost does it beside the budget, for a moment.
    beside = 0 if ledger.startswith("postgresql") else len(members)
    assert SLOTS <= sessions.most <= SLOTS + beside


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
def test_only_the_clients_learn_of_the_end(member, proxy, operator, driver):
    """As by a firewall's reset: the server goes on with the statements."""
    one, other = member(driver), member(driver)
    with at_work(operator, one) as callers:
        proxy.reset()
        for caller in callers:
            with pytest.raises(SQLAlchemyError):
                caller.result()
        working = [Caller(m.go_on) for m in (one, other) for _ in range(SLOTS)]
        # Much longer than a slot is kept whose session cannot be asked after.
        threading.Event().wait(3 * PACE.reclaim_after)
        assert member.sessions.now == SLOTS
        assert one.done + other.done == 0
        for m in (one, other):
            # Also where the server has not noticed the end of a control connection.
            m.reaches_the_ledger()
            assert m.keeper.status().unasked is None
    proxy.let_go()
    eventually(lambda: one.done and other.done, "there are slots again")
    for m in (one, other):
        m.over.set()
    for caller in working:
        caller.result()
