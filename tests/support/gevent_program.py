"""What `test_gevent.py` runs, each scenario in a process of its own.

Monkey-patching cannot be undone, so it must not happen in the tests' process. Threads
are greenlets here, and `time.sleep` lets the others run.
"""

from gevent import monkey  # isort: skip

monkey.patch_all()

import gc  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import gevent  # noqa: E402
import gevent.event  # noqa: E402
import gevent.socket  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

from sqlalchemy import create_engine, text  # noqa: E402

from sqla_fairpool import CheckoutTimeout, FairQueuePool, SelfDeadlock  # noqa: E402
from support import state  # noqa: E402
from support.stub import StubServer, all_for_one  # noqa: E402
from support.threads import (  # noqa: E402
    connect,
    ensure_waiting,
    eventually,
    give,
    wait_in_line,
)


def one_connection(**options):
    server = StubServer()
    return server, server.pool(pool_size=1, **options)


def spawn_in_line(pool, number):
    """Start greenlets that wait for a connection, one after the other."""
    greenlets = []
    for waiting in range(1, number + 1):
        greenlets.append(gevent.spawn(connect, pool))
        ensure_waiting(pool, waiting)
    return greenlets


def waiters_are_served_in_order(url):
    _, pool = one_connection()
    holder = connect(pool)
    for left, caller in zip((2, 1, 0), wait_in_line(pool, count=3), strict=True):
        holder.close()
        holder = caller.result()
        assert state.waiting(pool) == left
    holder.close()
    state.assert_quiet(pool)


def time_out_does_not_block_the_hub(url):
    _, pool = one_connection(timeout=0.05)
    holder, beats = connect(pool), []

    def heart():
        while True:
            beats.append(1)
            gevent.sleep(0.001)

    heart = gevent.spawn(heart)
    try:
        connect(pool)
    except CheckoutTimeout:
        heart.kill()
    assert heart.dead, "no time-out"
    assert len(beats) > 2
    holder.close()
    state.assert_quiet(pool)


def greenlet_that_waits_for_itself_is_refused(url):
    pool = StubServer().pool(**all_for_one(2), timeout=1000, deadlock_timeout=0.001)

    def nested():
        holder = pool.connect()
        gevent.sleep(0.01)  # until both have one
        try:
            pool.connect().close()
        except SelfDeadlock:
            return "refused"
        finally:
            holder.close()
        return "served"

    both = [gevent.spawn(nested) for _ in range(2)]
    assert sorted(one.get() for one in both) == ["refused", "served"]
    state.assert_quiet(pool)


def killed_while_waiting(url):
    _, pool = one_connection()
    holder = connect(pool)
    first, second = spawn_in_line(pool, 2)
    first.kill()
    ensure_waiting(pool, 1)
    holder.close()
    second.get().close()
    state.assert_quiet(pool)


def killed_when_it_was_granted(url):
    server, pool = one_connection()
    holder = connect(pool)
    first, second = spawn_in_line(pool, 2)
    first.kill(block=False)  # at the next switch
    holder.close()  # before it, the slot becomes the first one's
    assert state.waiting(pool) == 1
    second.get().close()
    assert server.opened == 1
    state.assert_quiet(pool)


def killed_in(server, pool, name, function):
    """Kill a greenlet that is in the middle of a call to the server."""
    gate, reached = gevent.event.Event(), []
    server.before[name] = lambda: reached.append(1) or gate.wait()
    first = gevent.spawn(function)
    eventually(lambda: reached)
    (second,) = spawn_in_line(pool, 1)
    first.kill()
    gate.set()
    second.get().close()
    state.assert_quiet(pool)


def killed_while_connecting(url):
    server, pool = one_connection()
    killed_in(server, pool, "connect", pool.connect)


def killed_while_returning(url):
    server, pool = one_connection()
    connections = [connect(pool)]
    killed_in(server, pool, "rollback", lambda: give(connections))


def make_cooperative():
    """Make psycopg2 cooperative by its documented wait callback."""
    import psycopg2
    import psycopg2.extensions as psycopg2_extensions

    def wait(connection):
        while True:
            state = connection.poll()
            if state == psycopg2_extensions.POLL_OK:
                return
            if state == psycopg2_extensions.POLL_READ:
                gevent.socket.wait_read(connection.fileno())
            elif state == psycopg2_extensions.POLL_WRITE:
                gevent.socket.wait_write(connection.fileno())
            else:
                raise psycopg2.OperationalError(f"state {state}")

    psycopg2_extensions.set_wait_callback(wait)


def kill_anywhere(engine, after_each):
    chance = random.Random(3)
    outcomes = {"killed": 0, "done": 0}

    def visit(name):
        with engine.execution_options(scraper=name).connect() as connection:
            connection.execute(text("select pg_sleep(0.002)"))
        return "done"

    for _ in range(10):
        visits = [gevent.spawn(visit, chance.choice("abc")) for _ in range(40)]
        for _ in range(25):
            gevent.sleep(chance.random() * 0.002)
            chance.choice(visits).kill(block=False)
        for one in visits:
            ended = one.get()
            outcomes["done" if ended == "done" else "killed"] += 1
            assert ended == "done" or isinstance(ended, gevent.GreenletExit)
        del visits, one, ended  # with tracebacks, in whose frames are connections
        gc.collect()
        after_each()
    assert min(outcomes.values()) > 20, outcomes


def fair_engine(url, **options):
    return create_engine(url, poolclass=FairQueuePool, **all_for_one(5), **options)


def killed_anywhere_on_postgresql(url):
    make_cooperative()
    engine = fair_engine(url)

    def settled():
        # A statement that was cut off may take a moment to end at the server.
        eventually(lambda: state.capacity(engine) == 5)
        state.assert_quiet(engine)

    kill_anywhere(engine, settled)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    engine.dispose()


def killed_anywhere_with_a_ledger(url):
    make_cooperative()
    with tempfile.TemporaryDirectory() as folder:
        for ledger in (f"{folder}/app.ledger", "database"):
            engine = fair_engine(url, ledger=ledger)

            def all_can_be_had(engine=engine):
                takers = [gevent.spawn(engine.connect) for _ in range(5)]
                gevent.joinall(takers, raise_error=True)
                give([taker.get() for taker in takers])

            kill_anywhere(engine, all_can_be_had)
            engine.dispose()
            state.keeper(engine).close()


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
    print("passed")
