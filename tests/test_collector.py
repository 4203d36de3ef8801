"""Leaked connections, the collector, interrupts at any moment."""

from __future__ import annotations

import gc
import random
import signal
import threading
from pathlib import Path

import pytest
from sqlalchemy.exc import InvalidRequestError
from support.state import assert_quiet
from support.stub import StubServer
from support.threads import Caller, ensure_waiting

import sqla_fairpool
from sqla_fairpool import tagging


def connect(pool, tag):
    with sqla_fairpool.tag(tag):
        return pool.connect()


class Cycle:
    """Something that only the collector can free."""

    def __init__(self, content):
        self.itself = self
        self.content = content


@pytest.fixture(autouse=True)
def collector():
    """Nothing is collected but when the test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("tag", ["a", "unknown"])
def test_leaked_connection_comes_back(make_pool, tag):
    pool = make_pool(pool_size=1)
    connection = connect(pool, tag)
    del connection
    assert pool.checkedout() == 0
    connect(pool, tag).close()


def test_leaked_connection_serves_who_waits(make_pool):
    pool = make_pool(pool_size=1)
    leak = Cycle(connect(pool, "a"))
    caller = Caller(connect, pool, "b")
    ensure_waiting(pool, 1)
    del leak
    gc.collect()
    caller.result().close()


@pytest.mark.parametrize("tag", ["a", "unknown"])
def test_collector_in_the_middle_of_our_own_transition(make_pool, tag):
    """On the same thread, at the worst moment: no deadlock, no re-entry."""
    pool = make_pool(pool_size=3, soft_limit=3, max_limit=3)
    scheduler = pool._exchange.scheduler
    leak = [Cycle(connect(pool, tag))]
    request, depth = scheduler.request, []

    def request_with_collection(*args):
        before = scheduler.in_use
        leak.clear()
        gc.collect()
        depth.append(scheduler.in_use - before)
        return request(*args)

    scheduler.request = request_with_collection
    connection = Caller(connect, pool, "b").result()
    assert depth == [0], "the checkin ran inside the transition"
    assert pool.checkedout() == 1, "the leaked connection is back"
    connection.close()


def test_collector_in_a_transition_while_others_wait(make_pool):
    pool = make_pool(pool_size=2, soft_limit=2, max_limit=2)
    scheduler = pool._exchange.scheduler
    leak = [Cycle(connect(pool, "a"))]
    holder = connect(pool, "b")
    caller = Caller(connect, pool, "b")
    ensure_waiting(pool, 1)
    release = scheduler.release

    def release_with_collection(*args):
        leak.clear()
        gc.collect()
        return release(*args)

    scheduler.release = release_with_collection
    Caller(holder.close).result()
    caller.result().close()


def test_finaliser_that_wants_a_connection_in_a_transition_gets_an_error(make_pool):
    pool = make_pool()
    scheduler = pool._exchange.scheduler
    errors = []

    class Greedy(Cycle):
        def __del__(self):
            try:
                connect(pool, "greedy")
            except InvalidRequestError as error:
                errors.append(str(error))

    greedy = [Greedy(None)]
    request = scheduler.request

    def request_with_collection(*args):
        greedy.clear()
        gc.collect()
        return request(*args)

    scheduler.request = request_with_collection
    connect(pool, "a").close()
    assert len(errors) == 1
    assert "finaliser" in errors[0]


def test_record_lost_between_our_return_and_its_owner_gives_its_slot_back(make_pool):
    pool = make_pool(pool_size=1)
    with sqla_fairpool.tag("a"):
        record = pool._do_get()
    assert pool.checkedout() == 1
    del record  # an exception struck before SQLAlchemy knew of it
    gc.collect()
    assert pool.checkedout() == 0
    connect(pool, "b").close()


def test_warm_record_lost_as_it_was_taken_gives_its_slot_back(make_pool):
    pool = make_pool(pool_size=1)
    connect(pool, "a").close()
    pool._exchange.scheduler.accounts["a"].warm.pop()
    gc.collect()
    connect(pool, "b").close()
    assert pool.checkedout() == 0


def test_dropped_pool_is_collected_with_its_warm_connections():
    server = StubServer()
    pool = server.pool()
    connection = connect(pool, "a")
    kept = connect(pool, "a")
    connection.close()
    kept.close()
    exchange = pool._exchange
    seats = [record.seat for record in exchange._records]
    alive = exchange.alive
    del pool, exchange, connection, kept, seats
    gc.collect()
    assert alive() is None


# -- hollow records ------------------------------------------------------------


def test_detached_connection_frees_its_slot(make_engine, server):
    engine = make_engine(pool_size=1)
    tagged = engine.execution_options(scraper="a")
    connection = tagged.connect()
    connection.detach()
    assert engine.pool.checkedout() == 0
    assert engine.pool.stats().idle == 0, "nothing is open in the pool"
    with tagged.connect():
        assert server.open == 2
    connection.close()
    assert server.open == 1


def test_invalidated_connection_frees_its_slot_and_is_closed(make_engine, server):
    engine = make_engine(pool_size=1)
    tagged = engine.execution_options(scraper="a")
    connection = tagged.connect()
    connection.invalidate()
    assert server.open == 0
    assert engine.pool.stats().idle == 0
    with tagged.connect():
        assert server.open == 1
    connection.close()


# -- interrupts ----------------------------------------------------------------


class Interrupt(BaseException):
    pass


PACKAGE = str(Path(sqla_fairpool.__file__).parent)


def strike(work):
    """Run `work` over and over until a signal handler's exception ends it.

    The handler raises, as that of Ctrl-C does, where the signal finds us; here
    only if that is in our own package. (SQLAlchemy's checkout has moments of its
    own, between our return and its first reference to the record; and one that ends a
    `with tag(...)` at the very call of its `__exit__` leaves it open, as it does with
    those of contextlib.)
    """
    armed = True

    def handler(signum, frame):
        nonlocal armed
        code = frame.f_code
        is_ours = code.co_filename.startswith(PACKAGE)
        if armed and is_ours and code.co_name != "__exit__":
            armed = False
            raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, 1.5e-4), 2.3e-5)
    try:
        while True:
            work()
    except Interrupt:
        pass
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="the system has no interval timer"
)
@pytest.mark.parametrize("tags", [["a"], ["a", "b", "unknown"]])
@pytest.mark.usefixtures("light_heap")
def test_signal_at_any_moment_in_our_code_loses_no_slot(tags):
    server = StubServer()
    pool = server.pool(pool_size=4, soft_limit=4, max_limit=4, timeout=5.0)
    random.seed(11)

    def work():
        connect(pool, random.choice(tags)).close()

    for _ in range(400):
        strike(work)
        gc.collect()
        assert pool.checkedout() == 0
        assert tagging.context_tag() is tagging.requested() is None
    assert_quiet(pool)


@pytest.mark.slow
@pytest.mark.usefixtures("light_heap")
def test_collections_at_random_moments_in_many_threads_lose_nothing():
    server = StubServer()
    pool = server.pool(pool_size=5, soft_limit=5, max_limit=5)
    barrier = threading.Barrier(8)
    gc.enable()
    threshold = gc.get_threshold()
    gc.set_threshold(3, 2, 2)

    def work(n):
        chance = random.Random(n)
        barrier.wait()
        for _ in range(400):
            connection = connect(pool, chance.choice("abc"))
            if chance.random() < 0.5:
                Cycle(connection)
            else:
                connection.close()
            del connection

    try:
        for caller in [Caller(work, n) for n in range(8)]:
            caller.result()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert_quiet(pool)
    assert server.most <= 5
