"""Members that are killed: their slots come back session by session, none too soon.

On a real PostgreSQL, over both stores, for threads and tasks. The server is looked at
all the time.
"""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.pool import NullPool
from support import state
from support.stores import end, start
from support.stub import all_for_one
from support.threads import PATIENCE, Caller, eventually, give

from sqla_fairpool import FairQueuePool

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

SLOTS = 6


@pytest.fixture(scope="module")
def role(postgres_url):
    """A role of the pools' own, by which their sessions are known."""
    engine = create_engine(
        postgres_url, poolclass=NullPool, isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(text("create role member login superuser"))
        connection.execute(text("create database other"))
    return "member"


class Watched:
    """The sessions of the pools' role in all databases of the server."""

    def __init__(self, url, role):
        self._engine = create_engine(
            url, poolclass=NullPool, isolation_level="AUTOCOMMIT"
        )
        self._query = text(
            "select count(*) from pg_stat_activity where usename = :role "
            "and application_name <> 'sqla_fairpool ledger'"
        )
        self._role = role
        #: Most of them in two looks one after the other.
        self.most = self.now = 0
        self.over = threading.Event()
        self.thread = Caller(self._look)

    def _look(self):
        with self._engine.connect() as connection:
            while not self.over.is_set():
                before = self.now
                self.now = connection.scalar(self._query, {"role": self._role})
                self.most = max(self.most, min(before, self.now))


@pytest.fixture
def engine(request, postgres_url, role, ledger):
    """A member's, as a user that may be given."""
    engine = create_engine(
        make_url(postgres_url).set(username=getattr(request, "param", role)),
        poolclass=FairQueuePool,
        **all_for_one(SLOTS),
        pool_timeout=PATIENCE,
        ledger=ledger,
        execution_options={"scraper": "survivor"},
    )
    yield engine
    engine.dispose()
    state.keeper(engine).close()


@pytest.fixture
def survivor(postgres_url, role, engine):
    """A member that wants all slots, all the time; and what the server sees."""
    watched, over = Watched(postgres_url, role), threading.Event()

    def work():
        while not over.is_set():
            with engine.connect() as connection:
                connection.execute(text("select pg_sleep(0.02)"))

    callers = []
    watched.begin = lambda: callers.extend(Caller(work) for _ in range(SLOTS))
    watched.holds = lambda: state.connections_there(engine)
    yield watched
    over.set()
    for caller in callers:
        caller.result()
    engine.dispose()
    state.keeper(engine).close()
    eventually(lambda: watched.now == 0)
    watched.over.set()
    watched.thread.result()
    # One beside the budget may ask for the sessions of the dead, for a moment.
    assert watched.most <= SLOTS + 1


@pytest.fixture
def victim(postgres_url, role, ledger):
    """Start a member that uses so many slots for a statement, and others for none."""
    processes = []

    def victim(driver, *how):
        url = make_url(postgres_url).set(username=role)
        url = url.set(drivername=f"postgresql+{driver}")
        url = url.render_as_string(hide_password=False)
        processes.append(start("victim_program.py", url, ledger, SLOTS, *how))
        return processes[-1]

    yield victim
    for process in processes:
        end(process)


KINDS = [
    pytest.param("psycopg2", [], id="threads"),
    pytest.param("psycopg2", ["wipe"], id="wiped"),
    pytest.param("psycopg2", ["database=other"], id="other database"),
    pytest.param("asyncpg", ["asyncio"], id="asyncpg"),
    pytest.param("psycopg", ["asyncio"], id="psycopg tasks"),
]


@pytest.mark.parametrize(("driver", "how"), KINDS)
def test_killed_in_the_middle_of_statements(survivor, victim, driver, how):
    """Its slots are not given on while its sessions live, and soon after."""
    process = victim(driver, 4, 0, 3.0, *how)
    survivor.begin()
    eventually(lambda: survivor.now == SLOTS)
    process.kill()
    killed = time.monotonic()
    eventually(lambda: survivor.holds() == SLOTS)
    assert time.monotonic() - killed > 1.5  # not before the statements had ended
    assert survivor.most <= SLOTS + 1


def test_one_long_statement_keeps_one_slot(survivor, victim):
    process = victim("psycopg2", 1, 3, 6.0)
    survivor.begin()
    process.kill()
    eventually(lambda: survivor.holds() == SLOTS - 1)
    eventually(lambda: survivor.now == SLOTS)


def test_child_of_a_killed_member_keeps_no_slot(survivor, victim):
    """It has inherited the sockets of its parent, and lets go of them."""
    process = victim("psycopg2", 0, 4, 0.0, "fork")
    survivor.begin()
    process.kill()
    eventually(lambda: survivor.holds() == SLOTS)


@pytest.mark.parametrize("engine", ["nobody"], indirect=True)
def test_server_is_asked_with_what_a_listener_keeps_on_the_record(engine, role, victim):
    """As for passwords that are made at connect: without a record there is none."""

    @event.listens_for(engine, "do_connect")
    def connect(dialect, record, arguments, parameters):
        parameters["user"] = record.info["user"] = role

    process = victim("psycopg2", 0, 4, 0.0)
    first = engine.connect()
    process.kill()
    connections = [first, *(engine.connect() for _ in range(SLOTS - 1))]
    assert state.keeper(engine).member.watch.unasked is None
    give(connections)
