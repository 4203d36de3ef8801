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
from support.stub import StubServer, all_for_one
from support.threads import Caller, Gate, connect, ensure_waiting, give, take
from support.invariants import check_valid
from sqla_fairpool import FairQueuePool

server = StubServer()
engine = server.engine(**all_for_one(2), pool_timeout=2)
pool = engine.pool

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


def test_child_has_an_empty_pool_and_leaves_alone_what_is_the_parents():
    run(
        """
        warm, out = take(engine, 2)
        out.execute(text("select 1"))
        warm.close()
        deleted = []
        inherited = out.connection.dbapi_connection
        type(inherited).__del__ = lambda self: deleted.append(self)

        def child():
            global out, inherited
            opened, open_, rollbacks = server.opened, server.open, inherited.rollbacks
            assert (pool.checkedout(), pool.checkedin()) == (0, 0)
            assert pool.stats().tags == ()
            out.close()
            assert pool.checkedin() == 0
            assert inherited.rollbacks == rollbacks
            out = inherited = None
            engine.dispose()
            gc.collect()
            assert server.open == open_
            assert not deleted, "the driver may say goodbye to the server"
            held = take(engine, 2)
            assert server.opened == opened + 2, "the parent's connection was used"
            for connection in held:
                connection.execute(text("select 1"))
            give(held)
            assert engine.pool.checkedin() == 2

        forked(child)
        assert (pool.checkedout(), pool.checkedin()) == (1, 1)
        out.execute(text("select 1"))
        out.close()
        """
    )


def test_fork_while_other_threads_are_in_the_pool():
    """One has the lock, one opens a connection, one waits."""
    run(
        """
        pool.reconfigure(**all_for_one(1), timeout=30)
        server.before["connect"] = opening = Gate()
        opener = Caller(connect, engine)
        opening.reached()
        waiter = Caller(connect, engine)
        ensure_waiting(pool, 1)
        inside = Gate()

        def occupy():
            with state.critical_section(pool):
                inside()

        occupier = Caller(occupy)
        inside.reached()

        def child():
            server.before.clear()
            assert (pool.checkedout(), pool.stats().waiting) == (0, 0)
            connect(engine).close()  # would hang on the parent's lock
            assert pool.checkedin() == 1
            gc.collect()
            state.assert_consistent(pool)
            assert pool.checkedout() == 0

        forked(child)
        inside.open()
        occupier.result()
        opening.open()
        for caller in (opener, waiter):
            caller.result().close()
        assert pool.checkedout() == 0
        """
    )


def test_fork_while_another_thread_reads_the_rows_of_a_ledger():
    run(
        """
        import signal
        from sqla_fairpool.ledger.book import Book
        inside = Gate()

        class Rows(dict):
            def get(self, key):
                inside()

        reader = Caller(lambda: Book(Rows()).meta)
        inside.reached()

        def child():
            signal.alarm(10)  # it would hang on a lock of the class
            assert Book({}).meta is None

        forked(child)
        inside.open()
        assert reader.result() is None
        """
    )


def test_fork_in_a_connect_listener_gives_the_child_no_slot():
    run(
        """
        pids = []

        def fork_once():
            server.before.clear()
            pids.append(os.fork())

        server.before["connect"] = fork_once
        for _ in range(2):
            connect(engine).close()
            assert pool.checkedout() == 0
        check_valid(state.scheduler(pool), [])
        if pids == [0]:
            os._exit(0)
        assert os.waitpid(pids[0], 0)[1] == 0
        """
    )


@pytest.mark.parametrize("before", ["", "connect(engine).close(); engine.dispose()"])
def test_child_is_not_forked_in_the_first_connect_of_another_thread(before):
    """SQLAlchemy holds a lock in it, and does some things in it once."""
    run(
        f"""
        from sqlalchemy import event

        {before}
        reached, may_end = threading.Event(), threading.Event()
        os.register_at_fork(before=may_end.set)
        done = []

        @event.listens_for(engine, "connect")
        def listen(dbapi_connection, record):
            reached.set()
            may_end.wait()
            for n in range(100):
                os.sched_yield()  # not over as soon as it may be
            done.append(os.getpid())

        first = Caller(connect, engine)
        reached.wait()
        parent = [os.getpid()]

        def child():
            assert done == parent, "the first connect was not over"
            connect(engine).close()  # would hang on SQLAlchemy's lock
            assert len(done) == 2

        forked(child)
        first.result().close()
        assert done == parent
        """
    )


def test_fork_in_a_first_connect_of_the_same_thread():
    run(
        """
        from sqlalchemy import event

        pids = []
        event.listen(engine, "connect", lambda *_: pids or pids.append(os.fork()))
        with connect(engine) as one, connect(engine) as other:
            pass
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
