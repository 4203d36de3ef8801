"""What `test_greenlets.py` runs, each scenario in a process of its own.

Called with the name of a library (gevent or eventlet), of a scenario and the server's
URL. Monkey-patching cannot be undone, so it must not happen in the tests' process.
Threads are greenlets here, and `time.sleep` lets the others run.
"""

from __future__ import annotations

import sys
import warnings


class Gevent:
    """The library's own words for what the scenarios do."""

    def __init__(self):
        from gevent import monkey

        monkey.patch_all()
        import gevent
        import gevent.socket

        self.spawn, self.Timeout = gevent.spawn, gevent.Timeout
        self.wait_read = gevent.socket.wait_read
        self.wait_write = gevent.socket.wait_write

    def result(self, greenlet):
        """Wait for its end; return what it returned, "killed" if it was killed."""
        value = greenlet.get()
        return "killed" if isinstance(value, GreenletExit) else value

    def kill(self, greenlet):
        """Kill it, and wait for its end."""
        greenlet.kill()

    def kill_soon(self, greenlet):
        """Kill it when greenlets are switched the next time."""
        greenlet.kill(block=False)


class Eventlet:
    """The same for the other library."""

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated, and still in use
            import eventlet
        eventlet.monkey_patch()
        from eventlet import hubs

        self.spawn, self.Timeout = eventlet.spawn, eventlet.Timeout
        self.wait_read = lambda file: hubs.trampoline(file, read=True)
        self.wait_write = lambda file: hubs.trampoline(file, write=True)
        self._hub = hubs.get_hub()

    def result(self, greenlet):
        try:
            return greenlet.wait()
        except GreenletExit:
            return "killed"

    def kill(self, greenlet):
        greenlet.kill()
        self.result(greenlet)

    def kill_soon(self, greenlet):
        self._hub.schedule_call_global(
            0, lambda: None if greenlet.dead else greenlet.throw(GreenletExit())
        )


from greenlet import GreenletExit  # noqa: E402 - the libraries need it

LIBRARIES = {"gevent": Gevent, "eventlet": Eventlet}
library = LIBRARIES[sys.argv[1]]()  # before all that uses what is patched

import gc  # noqa: E402  (patched first)
import random  # noqa: E402  (patched first)
import tempfile  # noqa: E402  (patched first)
import threading  # noqa: E402  (patched first)
import time  # noqa: E402  (patched first)
from pathlib import Path  # noqa: E402  (patched first)

sys.path.insert(0, str(Path(__file__).parents[1]))

from sqlalchemy import create_engine, text  # noqa: E402  (patched first)

from sqla_fairpool import CheckoutTimeout, FairQueuePool, SelfDeadlock  # noqa: E402  (patched first)
from support import state  # noqa: E402  (patched first)
from support.stub import StubServer, all_for_one  # noqa: E402  (patched first)
from support.threads import (  # noqa: E402  (patched first)
    connect,
    ensure_waiting,
    eventually,
    give,
    wait_in_line,
)

SLOTS = 5


def one_connection(**options):
    server = StubServer()
    return server, server.pool(pool_size=1, **options)


def spawn_in_line(pool, number):
    """Start greenlets that wait for a connection, one after the other."""
    greenlets = []
    for waiting in range(1, number + 1):
        greenlets.append(library.spawn(connect, pool))
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
            time.sleep(0.001)

    heart = library.spawn(heart)
    try:
        connect(pool)
    except CheckoutTimeout:
        library.kill(heart)
    assert heart.dead, "no time-out"
    assert len(beats) > 2
    holder.close()
    state.assert_quiet(pool)


def greenlet_that_waits_for_itself_is_refused(url):
    pool = StubServer().pool(**all_for_one(2), timeout=1000, deadlock_timeout=0.001)

    def nested():
        holder = pool.connect()
        time.sleep(0.01)  # until both have one
        try:
            pool.connect().close()
        except SelfDeadlock:
            return "refused"
        finally:
            holder.close()
        return "served"

    both = [library.spawn(nested) for _ in range(2)]
    assert sorted(library.result(one) for one in both) == ["refused", "served"]
    state.assert_quiet(pool)


def killed_while_waiting(url):
    _, pool = one_connection()
    holder = connect(pool)
    first, second = spawn_in_line(pool, 2)
    library.kill(first)
    ensure_waiting(pool, 1)
    holder.close()
    library.result(second).close()
    state.assert_quiet(pool)


def killed_when_it_was_granted(url):
    server, pool = one_connection()
    holder = connect(pool)
    first, second = spawn_in_line(pool, 2)
    library.kill_soon(first)
    holder.close()  # before it is killed, the slot becomes the first one's
    assert state.waiting(pool) == 1
    library.result(second).close()
    assert library.result(first) == "killed"
    assert server.opened == 1
    state.assert_quiet(pool)


def killed_in(server, pool, name, function):
    """Kill a greenlet that is in the middle of a call to the server."""
    gate, reached = threading.Event(), []
    server.before[name] = lambda: reached.append(1) or gate.wait()
    first = library.spawn(function)
    eventually(lambda: reached)
    (second,) = spawn_in_line(pool, 1)
    library.kill(first)
    gate.set()
    library.result(second).close()
    state.assert_quiet(pool)


def killed_while_connecting(url):
    server, pool = one_connection()
    killed_in(server, pool, "connect", pool.connect)


def killed_while_returning(url):
    server, pool = one_connection()
    connections = [connect(pool)]
    killed_in(server, pool, "rollback", lambda: give(connections))


# -- on PostgreSQL, at random moments ----------------------------------------------


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
                library.wait_read(connection.fileno())
            elif state == psycopg2_extensions.POLL_WRITE:
                library.wait_write(connection.fileno())
            else:
                raise psycopg2.OperationalError(f"state {state}")

    psycopg2_extensions.set_wait_callback(wait)


def visit(engine, name):
    with engine.execution_options(scraper=name).connect() as connection:
        connection.execute(text("select pg_sleep(0.002)"))
    return "done"


def visits_that_are_killed(engine, chance):
    """Start 40, and kill some of them at random moments."""
    visits = [library.spawn(visit, engine, chance.choice("abc")) for _ in range(40)]
    for _ in range(25):
        time.sleep(chance.random() * 0.002)
        library.kill_soon(chance.choice(visits))
    return visits


def visits_that_time_out(engine, chance):
    """Start 40; the library throws its Timeout into about half of them."""
    began = time.monotonic()
    for one in [library.spawn(visit, engine, "a") for _ in range(40)]:
        library.result(one)
    takes = time.monotonic() - began  # on this machine, now

    def limited(name, seconds):
        try:
            with library.Timeout(seconds):
                return visit(engine, name)
        except library.Timeout:
            return "timed out"

    return [
        library.spawn(limited, chance.choice("abc"), chance.random() * takes)
        for _ in range(40)
    ]


def end_anywhere(engine, start, after_each):
    chance, outcomes = random.Random(3), []
    for _ in range(10):
        visits = start(engine, chance)
        outcomes += [library.result(one) for one in visits]
        del visits  # with tracebacks, in whose frames are connections
        gc.collect()
        after_each()
    done = outcomes.count("done")
    assert min(done, len(outcomes) - done) > 20, outcomes


def fair_engine(url, **options):
    return create_engine(url, poolclass=FairQueuePool, **all_for_one(SLOTS), **options)


def anywhere_on_postgresql(url, start):
    make_cooperative()
    engine = fair_engine(url)

    def settled():
        # A statement that was cut off may take a moment to end at the server.
        eventually(lambda: state.capacity(engine) == SLOTS)
        state.assert_quiet(engine)

    end_anywhere(engine, start, settled)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    engine.dispose()


def anywhere_with_a_ledger(url, start):
    make_cooperative()
    with tempfile.TemporaryDirectory() as folder:
        for ledger in (f"{folder}/app.ledger", "database"):
            engine = fair_engine(url, ledger=ledger)

            def all_can_be_had(engine=engine):
                takers = [library.spawn(engine.connect) for _ in range(SLOTS)]
                give([library.result(taker) for taker in takers])

            end_anywhere(engine, start, all_can_be_had)
            engine.dispose()
            state.keeper(engine).close()


def killed_anywhere_on_postgresql(url):
    anywhere_on_postgresql(url, visits_that_are_killed)


def timed_out_anywhere_on_postgresql(url):
    anywhere_on_postgresql(url, visits_that_time_out)


def killed_anywhere_with_a_ledger(url):
    anywhere_with_a_ledger(url, visits_that_are_killed)


def timed_out_anywhere_with_a_ledger(url):
    anywhere_with_a_ledger(url, visits_that_time_out)


if __name__ == "__main__":
    globals()[sys.argv[2]](sys.argv[3])
    print("passed")
