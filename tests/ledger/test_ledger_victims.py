"""Members that are killed: their slots come back session by session, none too soon.

On a real PostgreSQL, over both stores, for threads and tasks. The server is looked at
all the time.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.pool import NullPool
from support import state
from support.threads import PATIENCE, eventually

from sqla_fairpool import FairQueuePool

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

PROGRAM = Path(__file__).parents[1] / "support" / "victim_program.py"
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
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self):
        with self._engine.connect() as connection:
            while not self._over.is_set():
                before = self.now
                self.now = connection.scalar(self._query, {"role": self._role})
                self.most = max(self.most, min(before, self.now))

    def close(self):
        self._over.set()
        self._thread.join()


@pytest.fixture
def survivor(postgres_url, role, ledger):
    """A member that wants all slots, all the time; and what the server sees."""
    url = make_url(postgres_url).set(username=role)
    engine = create_engine(
        url,
        poolclass=FairQueuePool,
        pool_size=SLOTS,
        soft_limit=SLOTS,
        max_limit=SLOTS,
        pool_timeout=PATIENCE,
        ledger=ledger,
        execution_options={"scraper": "survivor"},
    )
    watched, over, errors = Watched(postgres_url, role), threading.Event(), []

    def work():
        try:
            while not over.is_set():
                with engine.connect() as connection:
                    connection.execute(text("select pg_sleep(0.02)"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(SLOTS)]
    watched.threads = threads
    watched.pool = engine.pool
    yield watched
    over.set()
    for thread in threads:
        thread.join()
    engine.dispose()
    state.keeper(engine).close()
    eventually(lambda: watched.now == 0)
    watched.close()
    assert not errors
    # One beside the budget may ask for the sessions of the dead, for a moment.
    assert watched.most <= SLOTS + 1


@pytest.fixture
def victim(postgres_url, role, ledger):
    """Start a member that uses so many slots for a statement, and others for none."""
    processes = []

    def start(driver, busy, idle, seconds, *how):
        url = make_url(postgres_url).set(
            username=role, drivername=f"postgresql+{driver}"
        )
        numbers = map(str, (SLOTS, busy, idle, seconds))
        process = subprocess.Popen(
            [
                sys.executable,
                PROGRAM,
                url.render_as_string(hide_password=False),
                ledger,
                *numbers,
                *how,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "working\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def held_by(survivor):
    return state.connections_there(survivor)


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
    for thread in survivor.threads:
        thread.start()
    eventually(lambda: survivor.now == SLOTS)
    process.kill()
    killed = time.monotonic()
    eventually(lambda: held_by(survivor) == SLOTS)
    assert time.monotonic() - killed > 1.5  # not before the statements had ended
    assert survivor.most <= SLOTS + 1


def test_one_long_statement_keeps_one_slot(survivor, victim):
    process = victim("psycopg2", 1, 3, 6.0)
    for thread in survivor.threads:
        thread.start()
    process.kill()
    eventually(lambda: held_by(survivor) == SLOTS - 1)
    eventually(lambda: survivor.now == SLOTS)


def test_child_of_a_killed_member_keeps_no_slot(survivor, victim):
    """It has inherited the sockets of its parent, and lets go of them."""
    process = victim("psycopg2", 0, 4, 0.0, "fork")
    for thread in survivor.threads:
        thread.start()
    process.kill()
    eventually(lambda: held_by(survivor) == SLOTS)


def test_server_is_asked_with_what_a_listener_keeps_on_the_record(
    postgres_url, role, ledger, victim
):
    """As for passwords that are made at connect: without a record there is none."""
    engine = create_engine(
        make_url(postgres_url).set(username="nobody"),
        poolclass=FairQueuePool,
        pool_size=SLOTS,
        soft_limit=SLOTS,
        max_limit=SLOTS,
        pool_timeout=PATIENCE,
        ledger=ledger,
    )

    @event.listens_for(engine, "do_connect")
    def connect(dialect, record, arguments, parameters):
        record.info["user"] = role
        parameters["user"] = record.info["user"]

    process = victim("psycopg2", 0, 4, 0.0)
    first = engine.connect()
    process.kill()
    killed = time.monotonic()
    connections = [first, *(engine.connect() for _ in range(SLOTS - 1))]
    assert state.keeper(engine).member.unasked is None
    assert time.monotonic() - killed < PATIENCE
    for connection in connections:
        connection.close()
    engine.dispose()
    state.keeper(engine).close()
