"""Leaked connections, the collector, interrupts at any moment."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError
from support import state
from support.stub import StubServer
from support.threads import Caller, connect, give, take

import sqla_fairpool
from sqla_fairpool import CheckoutTimeout, tagging
from sqla_fairpool.pool.execution_options import current

PACKAGE = str(Path(sqla_fairpool.__file__).parent)

needs_timer = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="the system has no interval timer"
)


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


@pytest.fixture
def leak(threads):
    """Have a pool of two lose a connection under a tag; a function collects it."""

    def leak(tag):
        pool, lost = threads.pool(2), []
        lost.append(Cycle(connect(pool, tag)))

        def collect():
            lost.clear()
            gc.collect()

        return pool, collect

    return leak


def meanwhile(pool, transition, function):
    """Call a function in the middle of the next transition of that name."""
    scheduler = state.scheduler(pool)
    original = getattr(scheduler, transition)

    def with_call(*args):
        setattr(scheduler, transition, original)
        assert state.is_busy(pool)
        function()
        return original(*args)

    setattr(scheduler, transition, with_call)


@pytest.mark.parametrize("tag", ["a", "unknown"])
@pytest.mark.parametrize("moment", [None, "request", "release"])
def test_leaked_connection_comes_back_and_serves_a_caller(threads, leak, tag, moment):
    """Also in our own transition, on the same thread: no deadlock, no re-entry."""
    pool, collect = leak(tag)
    grown = []

    def collect_in_it():
        before = state.in_use(pool)
        collect()
        grown.append(state.in_use(pool) - before)

    if moment == "request":
        meanwhile(pool, moment, collect_in_it)
        threads.come(pool, "b").result()
    else:
        holder = threads.connect(pool, tag)
        (caller,) = threads.wait_in_line(pool, "b")
        if moment:
            meanwhile(pool, moment, collect_in_it)
            Caller(holder.close).result()
        else:
            collect()
            holder.close()
        caller.result()
    assert not any(grown), "the checkin ran inside the transition"
    assert pool.checkedout() == 1, "the leaked connection is back"


# -- a caller in the middle of our own transition --------------------------------------


def use(engine):
    """Do as a handler does that writes to the database."""
    with engine.connect() as connection:
        connection.execute(text("select 1"))
        connection.commit()


def handle(engine, handler):
    """Call a handler in the middle of a checkout, as a signal's would be."""
    meanwhile(engine, "request", handler)
    engine.connect().close()


def test_handler_in_a_transition_is_lent_what_is_idle_or_opens_one(make_engine, server):
    engine, used = make_engine(3), []
    handle(engine, lambda: use(engine))
    assert (server.opened, server.most, server.open) == (2, 1, 1)
    give(take(engine, 2))
    before = engine.pool.status()
    handle(engine, lambda: use(engine))
    assert server.opened == 3
    assert engine.pool.status() == before

    class Greedy(Cycle):  # as does a finaliser
        def __del__(self):
            use(engine)
            used.append(1)

    greedy = [Greedy(None)]
    handle(engine, lambda: greedy.clear() or gc.collect())
    assert used == [1]


@pytest.mark.parametrize("tagged_by", ["engine", "connection"])
def test_handler_that_keeps_its_connection_is_accounted_for(make_engine, tagged_by):
    engine = make_engine(pool_size=3, soft_limit=1, max_limit=1)
    kept = []

    def handler():
        if tagged_by == "engine":
            connection = engine.execution_options(scraper="handler").connect()
        else:
            connection = engine.connect().execution_options(scraper="handler")
            connection.execute(text("select 1"))
        kept.append(connection)

    handle(engine, handler)
    assert engine.pool.stats().tag("handler").connections == 1
    assert engine.pool.checkedout() == 1
    kept.pop().close()
    assert engine.pool.checkedout() == 0


@pytest.mark.parametrize("moment", ["in a transition", "given out", "warm"])
def test_record_lost_before_its_owner_knows_gives_its_slot_back(make_pool, moment):
    """An exception struck before SQLAlchemy knew of it, or as it was taken."""
    pool = make_pool(3 if moment == "in a transition" else 1)
    with sqla_fairpool.tag("a"):
        if moment == "in a transition":
            meanwhile(pool, "request", lambda: pool._do_get() and None)
        elif moment == "given out":
            record = pool._do_get()
            assert pool.checkedout() == 1
            del record
        else:
            pool.connect().close()
            state.warm(pool, "a").pop()
        gc.collect()
    connect(pool, "b").close()
    assert pool.checkedout() == 0


def test_handler_for_which_nothing_is_idle_is_told_what_to_do(make_engine):
    engine, errors = make_engine(1), []

    def handler():
        with pytest.raises(InvalidRequestError) as caught:
            engine.connect()
        errors.append(caught.value.args[0])

    handle(engine, handler)
    assert errors == [
        "a signal handler or a finaliser has called the pool in the middle of the "
        "pool's own bookkeeping, on the same thread, and no connection is idle: let "
        "the handler set a flag and do the work outside of it, or give it an engine of "
        "its own"
    ]


def test_handlers_on_top_of_each_other_open_no_more_than_there_is_room_for(
    make_engine, server
):
    engine, outcomes = make_engine(4), []

    def handler():
        try:
            use(engine)
            outcomes.append("served")
        except InvalidRequestError:
            outcomes.append("refused")

    # The next one comes while this one connects.
    server.before["connect"] = lambda: outcomes or handler()
    handle(engine, handler)
    assert outcomes == ["refused", "served", "served", "served"]
    assert server.most == 3  # and one, as it seems, in the section's hands


class AtLine:
    """Calls a handler at one line of our package, the n-th in critical sections."""

    def __init__(self, pool, number, handler):
        self.pool, self.number, self.handler = pool, number, handler
        self.seen = 0

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and state.is_busy(self.pool):
            self.seen += 1
            if self.seen == self.number:
                sys.settrace(None)
                self.handler()
        return self

    def run(self, work):
        """Do `work`; tell if it came to that line."""
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(None)
        return self.seen >= self.number


@pytest.mark.slow
@pytest.mark.parametrize(("size", "keeps"), [(1, True), (2, True), (4, False)])
def test_handler_at_any_line_of_a_transition(clock, size, keeps):
    """It is served, if there is anything to be had, and nothing is confused by it."""
    number = refused = 0
    reached = True
    while reached:
        number += 1
        server = StubServer()
        options = {"pool_size": size, "max_overflow": size // 3, "pool_timeout": 0}
        engine = server.engine(**options, idle_connection_ttl=9)
        errors, kept = [], []

        def handler(engine=engine, errors=errors, kept=kept):
            try:
                connection = engine.connect().execution_options(scraper="handler")
            except InvalidRequestError as error:
                errors.append(error)
                return
            connection.execute(text("select 1"))
            kept.append(connection)
            if not keeps:
                kept.pop().close()

        for tag in "ab":
            engine.execution_options(scraper=tag).connect().close()
        at_line = AtLine(engine.pool, number, handler)
        reached = at_line.run(partial(do_all_there_is_to_do, engine, clock))
        refused += len(errors)
        assert server.most <= size + size // 3
        for connection in kept:
            assert engine.pool.stats().tag("handler").connections == 1
            connection.close()
        state.assert_quiet(engine.pool)
        assert engine.pool.checkedout() == 0
    assert number > 300
    assert refused < number if size < 4 else refused == 0


def do_all_there_is_to_do(engine, clock):
    """Enter every kind of critical section."""
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    held = []

    def take(*engines):
        for one in engines:
            try:
                held.append(one.connect())
            except CheckoutTimeout:
                pass  # the handler has what there is

    take(a, b)
    if held:
        held.pop().close()
    clock.advance(5)
    take(a, b)
    if held:
        held[0].invalidate()
        held.pop(0).close()
    clock.advance(70)
    engine.pool.upkeep()
    give(held)
    engine.pool.reconfigure(pool_size=engine.pool.size())
    engine.dispose()
    take(b)
    give(held)


class Timer:
    """Calls a handler by a timer's signal; the handler stays to the end of a block.

    After that one that does nothing stays: where another thread of the process took the
    last signal, Python sees it late, and complains if there is no handler then.
    """

    def __init__(self, handler):
        self.handler = handler

    def __enter__(self):
        signal.signal(signal.SIGALRM, self.handler)
        return partial(signal.setitimer, signal.ITIMER_REAL)

    def __exit__(self, *exc_info):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, lambda signum, frame: None)


@pytest.mark.slow
@needs_timer
def test_signal_handler_that_uses_the_pool_at_any_moment(make_engine, server):
    """A worker that marks its job as aborted, while others use the pool as well."""
    engine = make_engine(6)
    tagged = [engine.execution_options(scraper=tag) for tag in "abc"]
    handled, stop = [], threading.Event()

    def handler(signum, frame):
        use(tagged[2])
        handled.append(1)
        signal.setitimer(signal.ITIMER_REAL, 7.3e-4)  # no sooner: no handler in another

    def other():
        while not stop.is_set():
            use(tagged[1])

    others = [Caller(other) for _ in range(2)]
    try:
        with Timer(handler) as start:
            start(7.3e-4)
            while len(handled) < 1500:
                use(tagged[len(handled) % 2])
    finally:
        stop.set()
    for caller in others:
        caller.result()
    assert server.most <= 6


def test_dropped_pool_is_collected_with_its_warm_connections():
    server = StubServer()
    pool = server.pool()
    give(take(pool, 2))
    is_collected = state.is_collected(pool)
    del pool
    gc.collect()
    assert is_collected()


@pytest.mark.parametrize(("what", "left"), [("detach", 1), ("invalidate", 0)])
def test_connection_that_leaves_the_pool_frees_its_slot(
    make_engine, server, what, left
):
    """Its record comes back hollow, so nothing is open in the pool."""
    engine = make_engine(1)
    connection = engine.execution_options(scraper="a").connect()
    getattr(connection, what)()
    assert server.open == left
    assert (engine.pool.checkedout(), engine.pool.stats().idle) == (0, 0)
    with connect(engine):
        assert server.open == left + 1
    connection.close()
    assert server.open == 1


# -- interrupts ------------------------------------------------------------------------


class Interrupt(BaseException):
    """What a signal handler raises."""


def strike(work):
    """Run `work` over and over until a signal handler's exception ends it.

    The handler raises, as that of Ctrl-C does, where the signal finds us; here
    only if that is in our own package. (SQLAlchemy's checkout has moments of its
    own, between our return and its first reference to the record; and one that ends a
    `with tag(...)` at the very call of its `__exit__` leaves it open, as it does with
    those of contextlib. What is raised in a `__del__` Python prints and forgets, so
    that it would end nothing.)
    """
    armed = True

    def handler(signum, frame):
        nonlocal armed
        code = frame.f_code
        is_ours = code.co_filename.startswith(PACKAGE)
        if armed and is_ours and code.co_name not in ("__exit__", "__del__"):
            armed = False
            raise Interrupt

    with contextlib.suppress(Interrupt), Timer(handler) as start:
        start(random.uniform(2e-6, 1.5e-4), 2.3e-5)
        while True:
            work()


@pytest.mark.slow
@needs_timer
@pytest.mark.parametrize("tags", [["a"], ["a", "b", "unknown"]])
@pytest.mark.usefixtures("light_heap")
def test_signal_at_any_moment_in_our_code_loses_no_slot(make_pool, tags):
    pool = make_pool(4, timeout=5.0)
    random.seed(11)

    def work():
        connect(pool, random.choice(tags)).close()

    for _ in range(400):
        strike(work)
        gc.collect()
        assert pool.checkedout() == 0
        assert tagging.context_tag() is current.begun.request is None


@pytest.mark.slow
@pytest.mark.usefixtures("light_heap")
def test_collections_at_random_moments_in_many_threads_lose_nothing(make_pool, server):
    pool = make_pool(5)
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
    assert server.most <= 5
