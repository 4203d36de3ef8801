"""What `test_gevent.py` runs, each scenario in a process of its own.

Monkey-patching cannot be undone, so it must not happen in the tests' process.
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

from sqla_fairpool import CheckoutTimeout, FairQueuePool, SelfDeadlock, tag  # noqa: E402
from support import state  # noqa: E402
from support.state import assert_quiet  # noqa: E402
from support.stub import StubServer  # noqa: E402


def one_connection():
    server = StubServer()
    return server, server.pool(pool_size=1, soft_limit=1, max_limit=1)


def waiting(pool, number):
    while state.waiting(pool) != number:
        gevent.sleep(0)


def waiters_are_served_in_order(url):
    _, pool = one_connection()
    served = []

    def visit(name):
        with tag(name):
            fairy = pool.connect()
        served.append(name)
        gevent.sleep(0)
        fairy.close()

    holder = pool.connect()
    visits = []
    for number, name in enumerate("abc", 1):
        visits.append(gevent.spawn(visit, name))
        waiting(pool, number)
    holder.close()
    gevent.joinall(visits, raise_error=True)
    assert served == ["a", "b", "c"]
    assert_quiet(pool)


def time_out_does_not_block_the_hub(url):
    server = StubServer()
    pool = server.pool(pool_size=1, timeout=0.05)
    holder = pool.connect()
    beats = []

    def heart():
        while True:
            beats.append(1)
            gevent.sleep(0.001)

    heart = gevent.spawn(heart)
    try:
        pool.connect()
    except CheckoutTimeout:
        pass
    else:
        raise AssertionError("no time-out")
    heart.kill()
    assert len(beats) > 2
    holder.close()
    assert_quiet(pool)


def greenlet_that_waits_for_itself_is_refused(url):
    pool = StubServer().pool(
        pool_size=2, soft_limit=2, max_limit=2, timeout=1000, deadlock_timeout=0.001
    )

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
    assert_quiet(pool)


def killed_while_waiting(url):
    _, pool = one_connection()
    holder = pool.connect()
    first, second = (gevent.spawn(pool.connect) for _ in range(2))
    waiting(pool, 2)
    first.kill()
    waiting(pool, 1)
    holder.close()
    second.get().close()
    assert_quiet(pool)


def killed_when_it_was_granted(url):
    server, pool = one_connection()
    holder = pool.connect()
    first, second = (gevent.spawn(pool.connect) for _ in range(2))
    waiting(pool, 2)
    first.kill(block=False)  # at the next switch
    holder.close()  # before it, the slot becomes the first one's
    assert state.waiting(pool) == 1
    second.get().close()
    assert server.opened == 1
    assert_quiet(pool)


def killed_while_connecting(url):
    server, pool = one_connection()
    gate = gevent.event.Event()
    server.before["connect"] = gate.wait
    first = gevent.spawn(pool.connect)
    while not server.open:
        gevent.sleep(0)
    second = gevent.spawn(pool.connect)
    waiting(pool, 1)
    first.kill()
    gate.set()
    second.get().close()
    assert_quiet(pool)


def killed_while_returning(url):
    server, pool = one_connection()
    gate = gevent.event.Event()
    fairies = [pool.connect()]
    server.before["rollback"] = gate.wait
    first = gevent.spawn(lambda: fairies.pop().close())
    second = gevent.spawn(pool.connect)
    waiting(pool, 1)
    first.kill()
    gate.set()
    second.get().close()
    assert_quiet(pool)


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


def killed_anywhere_on_postgresql(url):
    make_cooperative()
    engine = create_engine(
        url, poolclass=FairQueuePool, pool_size=5, soft_limit=5, max_limit=5
    )

    def settled():
        # A statement that was cut off may take a moment to end at the server.
        pool = engine.pool
        while state.capacity(pool) < pool.options.capacity:
            gevent.sleep(0.001)
        assert_quiet(pool)

    kill_anywhere(engine, settled)
    with engine.connect() as connection:
        assert connection.scalar(text("select 1")) == 1
    engine.dispose()


def killed_anywhere_with_a_ledger(url):
    make_cooperative()
    with tempfile.TemporaryDirectory() as folder:
        for ledger in (f"{folder}/app.ledger", "database"):
            engine = create_engine(
                url,
                poolclass=FairQueuePool,
                pool_size=5,
                soft_limit=5,
                max_limit=5,
                ledger=ledger,
            )

            def all_can_be_had(engine=engine):
                takers = [gevent.spawn(engine.connect) for _ in range(5)]
                gevent.joinall(takers, raise_error=True)
                for taker in takers:
                    taker.get().close()

            kill_anywhere(engine, all_can_be_had)
            engine.dispose()
            state.keeper(engine).close()


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
    print("passed")
