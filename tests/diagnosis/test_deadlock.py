"""A caller that waits for itself is refused; no other caller is."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from support import state
from support.tasks import until
from support.threads import PATIENCE, Caller, ensure_waiting, eventually

from sqla_fairpool import CheckoutTimeout, SelfDeadlock
from sqla_fairpool.diagnosis import deadlock
from sqla_fairpool.pool.waiters import ThreadWaiter

FOR_EVER = 1000.0

#: The time-out of a checkout never comes, and deadlocks are looked for all the time.
WATCHFUL = {"pool_timeout": FOR_EVER, "deadlock_timeout": 0.001}

#: Two connections for whichever tag.
TWO = {"pool_size": 2, "soft_limit": 2, "max_limit": 2, **WATCHFUL}


@pytest.fixture
def engine(make_engine):
    return make_engine(**TWO)


class Looks(list):
    """The results of the looks for deadlocks that were made."""

    def ensure(self, number=3):
        """Return once `number` more looks were made; all have found none."""
        number += len(self)
        eventually(lambda: len(self) >= number, "looks for a deadlock")
        assert not any(self)


@pytest.fixture
def looks(monkeypatch):
    looks, is_stuck = Looks(), deadlock.is_stuck

    def look(*args):
        looks.append(is_stuck(*args))
        return looks[-1]

    monkeypatch.setattr(state.DEADLOCK_CHECK, look)
    return looks


@contextmanager
def beside(work, *arguments):
    """Have a thread do some work from when it has begun, which it tells.

    :param work: its first argument is what it calls when it has begun.
    """
    begun = threading.Event()
    caller = Caller(work, begun.set, *arguments)
    assert begun.wait(PATIENCE)
    yield caller
    caller.result()


def taking(engine, number, taken, go_on):
    """Hold `number` connections until told to go on, then ask for one more."""
    with ExitStack() as held:
        for _ in range(number):
            held.enter_context(engine.connect())
        taken.set()
        assert go_on.wait(PATIENCE)
        with engine.connect():
            pass


def start(engine, number):
    """Start a caller that holds `number`; return it and what lets it go on."""
    taken, go_on = threading.Event(), threading.Event()
    caller = Caller(taking, engine, number, taken, go_on)
    assert taken.wait(PATIENCE)
    return caller, go_on


def test_nested_checkout_is_refused(engine):
    with engine.connect(), engine.connect():
        with pytest.raises(SelfDeadlock) as caught:
            engine.connect()
    assert isinstance(caught.value, CheckoutTimeout)
    message = str(caught.value)
    assert message.startswith("checkout would wait for itself: tag 'unknown' in_use=2 ")
    assert "the caller itself holds a connection of 'unknown'" in message
    assert [h.own for h in caught.value.diagnosis.holdings] == [True, True]
    engine.connect().close()


def test_tag_at_its_ceiling(make_engine):
    engine = make_engine(pool_size=4, soft_limit=1, max_limit=1, **WATCHFUL)
    tagged = engine.execution_options(scraper="a")
    with tagged.connect(), pytest.raises(SelfDeadlock, match="tag 'a' in_use=1"):
        tagged.connect()


def test_orm_sessions(engine):
    with Session(engine) as one, Session(engine) as two, Session(engine) as three:
        one.execute(text("select 1"))
        two.execute(text("select 1"))
        with pytest.raises(SelfDeadlock):
            three.execute(text("select 1"))


@contextmanager
def in_a_generator(engine):
    with engine.connect() as connection:
        yield [connection]


class Owner:
    def __init__(self, engine):
        self.connections = {"one": engine.connect(), "two": engine.connect()}

    def close(self):
        for connection in self.connections.values():
            connection.close()


def test_whatever_the_caller_keeps_them_in(engine):
    with in_a_generator(engine), in_a_generator(engine):
        with pytest.raises(SelfDeadlock):
            engine.connect()
    owner = Owner(engine)
    with pytest.raises(SelfDeadlock):
        engine.connect()
    owner.close()


def outcomes(*callers):
    """Return the names of what the callers have raised or returned."""
    for caller in callers:
        caller.join(PATIENCE)
        assert not caller.is_alive(), "the thread hangs"
    return sorted(type(caller.error).__name__ for caller in callers)


def test_one_of_two_that_wait_for_each_other(engine):
    """Whichever is found first; its refusal lets the other one go on."""
    (one, go_on), (two, go_on_too) = start(engine, 1), start(engine, 1)
    go_on.set()
    go_on_too.set()
    assert outcomes(one, two) == ["NoneType", "SelfDeadlock"]


def test_one_of_many_that_wait_for_each_other(make_engine):
    """Each that is refused returns what it holds, which serves another one."""
    engine = make_engine(pool_size=8, soft_limit=8, max_limit=8, **WATCHFUL)
    started = [start(engine, 1) for _ in range(8)]
    for _, go_on in started:
        go_on.set()
    found = outcomes(*[caller for caller, _ in started])
    assert found == ["NoneType"] * 7 + ["SelfDeadlock"]


def test_circle_over_two_tags(make_engine):
    """Each has what the other's tag wants: no single tag shows it."""
    engine = make_engine(pool_size=2, soft_limit=1, max_limit=1, **WATCHFUL)
    tagged = [engine.execution_options(scraper=tag) for tag in "ab"]
    both_hold = threading.Barrier(2)

    def hold_and_want(held, wanted):
        with held.connect():
            both_hold.wait(PATIENCE)
            wanted.connect().close()

    one, two = Caller(hold_and_want, *tagged), Caller(hold_and_want, *tagged[::-1])
    assert outcomes(one, two) == ["NoneType", "SelfDeadlock"]


def test_not_before_deadlock_timeout(make_engine, looks, clock, monkeypatch):
    engine = make_engine(pool_size=1, pool_timeout=FOR_EVER, deadlock_timeout=20)
    wakes = []

    class Waiter(ThreadWaiter):
        def wait(self, seconds):
            wakes.append(seconds)
            if len(wakes) == 3:
                assert looks == []
                clock.advance(20)

    state.wait_with(engine, Waiter)
    with engine.connect(), pytest.raises(SelfDeadlock) as caught:
        engine.connect()
    assert wakes == [20.0] * 3
    assert caught.value.waited == 20.0


def test_not_without_deadlock_timeout(make_engine, looks):
    engine = make_engine(pool_size=1, pool_timeout=0.01, deadlock_timeout=None)
    with engine.connect(), pytest.raises(CheckoutTimeout) as caught:
        engine.connect()
    assert not isinstance(caught.value, SelfDeadlock)
    assert looks == []
    engine.pool.reconfigure(deadlock_timeout=0.001, timeout=FOR_EVER)
    with engine.connect(), pytest.raises(SelfDeadlock):
        engine.connect()


def test_caller_that_holds_nothing_is_not_looked_at(make_engine, looks, monkeypatch):
    """Nearly all that wait: they wake up once, and then no more."""
    engine = make_engine(pool_size=1, **WATCHFUL)
    wakes = []

    class Waiter(ThreadWaiter):
        def wait(self, seconds):
            wakes.append(seconds > 1)
            super().wait(seconds)

    tagged = engine.execution_options(scraper="a")
    Caller(lambda: tagged.connect().close()).result()  # it has had one before
    state.wait_with(engine, Waiter)
    with tagged.connect():
        caller = Caller(lambda: tagged.connect().close())
        eventually(lambda: len(wakes) == 2)
    caller.result()
    assert wakes == [False, True]
    assert looks == []


# -- no false alarm -------------------------------------------------------------------


def test_not_while_a_holder_does_not_wait(engine, looks):
    def other(begun):
        with engine.connect():
            begun()
            looks.ensure()

    with beside(other), engine.connect():
        engine.connect().close()


def test_connection_is_the_other_threads_that_executes_a_statement(engine, looks):
    """It was handed over; so it is that thread's, whichever has checked it out."""
    connection = engine.connect()

    def other(begun):
        connection.execute(text("select 1"))
        begun()
        looks.ensure()
        connection.close()

    with beside(other), engine.connect():
        engine.connect().close()


def test_not_if_a_finished_threads_number_is_used_again(engine, looks):
    """A thread may get the number of one that has ended with connections out."""
    kept = []
    Caller(lambda: kept.extend([engine.connect(), engine.connect()])).result()
    caller = Caller(lambda: engine.connect().close())
    ensure_waiting(engine.pool, 1)
    assert looks == []  # it holds nothing
    for connection in kept:
        connection.close()
    caller.result()


@pytest.mark.parametrize("kind", ["dropped and reset", "closed", "opened"])
def test_not_while_a_connection_is(kind, engine, server, looks):
    """By another thread; the database is slow to answer. The slot is nobody's then."""
    box = [engine.connect()]
    slow, work = {
        "dropped and reset": ("rollback", box.clear),
        "closed": ("close", engine.pool.dispose),
        "opened": ("connect", lambda: engine.connect().close()),
    }[kind]

    def other(begun):
        def answer():
            del server.before[slow]
            begun()
            looks.ensure()

        server.before[slow] = answer
        work()

    with engine.connect():
        if kind != "dropped and reset":
            connection = box.pop()
            if kind == "opened":
                connection.invalidate()
            connection.close()
        with beside(other):
            engine.connect().close()


def test_not_while_a_caller_has_a_slot_and_has_not_woken_up(engine, looks, monkeypatch):
    class Sleeper(ThreadWaiter):
        def wait(self, seconds):
            super().wait(None)
            looks.ensure()

    state.wait_with(engine, Sleeper)
    held, other = engine.connect(), engine.connect()
    caller = Caller(lambda: engine.connect().close())
    ensure_waiting(engine.pool, 1)
    state.wait_with(engine, ThreadWaiter)
    # The caller gets a slot, and will open a connection.
    engine.pool.reconfigure(pool_size=3, soft_limit=3, max_limit=3)
    engine.connect().close()
    caller.result()
    other.close()
    held.close()


def test_not_if_a_ceiling_will_rise_in_time(make_engine, clock, looks):
    """Another tag becomes idle, and then this one may have more."""
    engine = make_engine(pool_size=4, soft_limit=1, max_limit=2, **WATCHFUL)
    a, b = (engine.execution_options(scraper=tag) for tag in "ab")
    b.connect().close()

    def nested(begun):
        with a.connect():
            begun()
            a.connect().close()

    with beside(nested):
        ensure_waiting(engine.pool, 1)
        for _ in range(3):
            clock.advance(0.01)
            looks.ensure(1)
        clock.advance(100.0)
        engine.pool.upkeep()


def test_what_was_dropped_in_a_cycle_is_collected_instead(engine):
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            knot = [engine.connect()]
            knot.append(knot)
        del knot
        assert engine.pool.checkedout() == 2
        engine.connect().close()
    finally:
        gc.enable()


class Slow:
    """A finaliser that takes as long as it is told to."""

    def __init__(self, begun, go_on):
        self.itself, self.begun, self.go_on = self, begun, go_on

    def __del__(self):
        self.begun.set()
        assert self.go_on.wait(PATIENCE)


def test_not_while_another_thread_collects(engine, looks):
    """It may be about to return a connection, and a second one cannot collect."""
    begun, go_on = threading.Event(), threading.Event()
    gc.collect()
    gc.disable()
    try:
        Slow(begun, go_on)
        collector = Caller(gc.collect)
        assert begun.wait(PATIENCE)
        caller, ask = start(engine, 2)
        ask.set()
        eventually(lambda: len(looks) >= 3)
        assert caller.is_alive()
        go_on.set()
        with pytest.raises(SelfDeadlock):
            caller.result()
        collector.result()
    finally:
        go_on.set()
        gc.enable()


PATCHED_TOO_LATE = """
from sqla_fairpool import CheckoutTimeout, FairQueuePool, SelfDeadlock
from gevent import monkey
monkey.patch_all()
import gevent
from support.stub import StubServer

pool = StubServer().pool(pool_size=1, timeout=0.1, deadlock_timeout=0.001)
holder = gevent.spawn(pool.connect)
holder.join()
try:
    gevent.spawn(pool.connect).get()
except CheckoutTimeout as error:
    assert not isinstance(error, SelfDeadlock), error
holder.get().close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="patched signals differ there")
def test_not_where_greenlets_became_threads_too_late():
    """They all look like the same thread."""
    pytest.importorskip("gevent")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PATCHED_TOO_LATE],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# -- tasks ----------------------------------------------------------------------------


def test_task_that_waits_for_itself(run):
    async def main(engine):
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
            with pytest.raises(SelfDeadlock, match="by task"):
                await engine.connect()

    run(main, **WATCHFUL)


def test_tasks_that_wait_for_each_other(run):
    async def take_two(engine, taken):
        async with engine.connect():
            taken.set()
            await asyncio.sleep(0)
            async with engine.connect():
                return "served"

    async def main(engine):
        events = [asyncio.Event(), asyncio.Event()]
        tasks = [asyncio.create_task(take_two(engine, e)) for e in events]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(type(o).__name__ for o in outcomes) == ["SelfDeadlock", "str"]

    run(main, **TWO)


def test_connection_is_the_other_tasks_that_executes_a_statement(run, looks):
    async def main(engine):
        connection = await engine.connect()

        async def give_back():
            await connection.execute(text("select 1"))
            await until(lambda: len(looks) >= 3)
            await connection.close()

        async def take():
            async with engine.connect(), engine.connect():
                pass

        await asyncio.gather(give_back(), take())
        assert not any(looks)

    run(main, **TWO)
