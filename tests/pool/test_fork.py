"""A forked child starts with an empty pool and leaves its parent's alone.

Each case is a program of its own: forking the test runner would fork its threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="the system has no fork"
)

PRELUDE = """
import gc, os, sys, threading, warnings
warnings.simplefilter("ignore")  # newer Pythons warn of threads and fork together
from sqlalchemy import create_engine, text
from support import state
from support.stub import StubServer
from support.threads import Caller, connect, ensure_waiting, give, take
from sqla_fairpool.scheduling.invariants import check_valid
from sqla_fairpool import FairQueuePool

server = StubServer()

def forked(child):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the child failed"
"""


def run(program, *args):
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program), *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr


def test_child_has_an_empty_pool_and_accounting_of_its_own():
    run(
        """
        engine = server.engine(pool_size=2, soft_limit=2, max_limit=2, pool_timeout=0)
        warm, out = take(engine, 2)
        warm.close()

        def child():
            opened = server.opened
            pool = engine.pool
            assert (pool.checkedout(), pool.checkedin()) == (0, 0)
            assert pool.stats().tags == ()
            held = take(engine, 2)
            assert server.opened == opened + 2, "the parent's connection was used"
            for connection in held:
                connection.execute(text("select 1"))
            give(held)
            assert pool.checkedin() == 2

        forked(child)
        assert (engine.pool.checkedout(), engine.pool.checkedin()) == (1, 1)
        out.close()
        """
    )


def test_child_neither_closes_nor_returns_nor_rolls_back_what_is_the_parents():
    run(
        """
        engine = server.engine()
        out = connect(engine)
        out.execute(text("select 1"))
        connect(engine).close()
        deleted = []
        inherited = out.connection.dbapi_connection
        type(inherited).__del__ = lambda self: deleted.append(self)

        def child():
            global out, inherited
            rollbacks, open_ = inherited.rollbacks, server.open
            out.close()
            assert engine.pool.checkedin() == 0
            assert inherited.rollbacks == rollbacks
            out = inherited = None
            engine.dispose()
            gc.collect()
            assert server.open == open_
            assert not deleted, "the driver may say goodbye to the server"

        forked(child)
        out.execute(text("select 1"))
        out.close()
        """
    )


def test_fork_while_another_thread_is_in_the_pool():
    run(
        """
        engine = server.engine(pool_size=1)
        inside, leave = threading.Event(), threading.Event()

        def occupy():
            with state.critical_section(engine):
                inside.set()
                leave.wait()

        occupier = Caller(occupy)
        inside.wait()

        def child():
            connect(engine).close()  # would hang on the parent's lock
            assert engine.pool.checkedin() == 1

        forked(child)
        leave.set()
        occupier.result()
        """
    )


def test_waiters_and_openers_of_other_threads_are_not_the_childs():
    run(
        """
        engine = server.engine(pool_size=1)
        opening, go_on = threading.Event(), threading.Event()
        server.before["connect"] = lambda: (opening.set(), go_on.wait())
        opener = Caller(connect, engine)
        opening.wait()
        waiter = Caller(connect, engine)
        ensure_waiting(engine.pool, 1)

        def child():
            server.before.clear()
            assert (engine.pool.checkedout(), engine.pool.stats().waiting) == (0, 0)
            connect(engine).close()
            gc.collect()
            state.assert_consistent(engine)
            assert engine.pool.checkedout() == 0

        forked(child)
        go_on.set()
        for caller in (opener, waiter):
            caller.result().close()
        assert engine.pool.checkedout() == 0
        """
    )


def test_fork_in_a_connect_listener_gives_the_child_no_slot():
    run(
        """
        engine = server.engine(pool_size=1)
        pids = []

        def fork_once():
            server.before.clear()
            pids.append(os.fork())

        server.before["connect"] = fork_once
        connect(engine).close()
        assert engine.pool.checkedout() == 0
        connect(engine).close()
        assert engine.pool.checkedout() == 0
        check_valid(state.scheduler(engine), [])
        if pids == [0]:
            os._exit(0)
        assert os.waitpid(pids[0], 0)[1] == 0
        """
    )


@pytest.mark.postgres
def test_parents_connections_survive_a_child_on_postgresql(postgres_url):
    run(
        """
        engine = create_engine(sys.argv[1], poolclass=FairQueuePool)
        out, idle = take(engine, 2)
        pids = {c.scalar(text("select pg_backend_pid()")) for c in (out, idle)}
        idle.close()

        def child():
            out.close()
            with connect(engine) as connection:
                assert connection.scalar(text("select pg_backend_pid()")) not in pids
            engine.dispose()
            gc.collect()

        forked(child)
        assert out.scalar(text("select pg_backend_pid()")) in pids
        with connect(engine) as connection:
            assert connection.scalar(text("select pg_backend_pid()")) in pids
        out.close()
        """,
        postgres_url,
    )
