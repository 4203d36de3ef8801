"""A caller that waits for itself is refused; no other caller is."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text
from support import state
from support.threads import PATIENCE, Caller, Gate, ensure_waiting, eventually
from support.worlds import contract, world_of

from sqla_fairpool import CheckoutTimeout, SelfDeadlock
from sqla_fairpool.diagnosis import capture
from sqla_fairpool.pool.waiters import ThreadWaiter

FOR_EVER = 1000.0

#: The time-out of a checkout never comes, and deadlocks are looked for all the time.
WATCHFUL = {"pool_timeout": FOR_EVER, "deadlock_timeout": 0.001}

#: Two connections for whichever tag.
TWO = {"pool_size": 2, "soft_limit": 2, "max_limit": 2, **WATCHFUL}


@pytest.fixture(params=["sqlite", "sqlite+aiosqlite"])
def world(request, tmp_path):
    """Threads, and tasks."""
    return world_of(f"sqlite:///{tmp_path / 'test.db'}", request.param)


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
    looks, is_stuck = Looks(), capture.is_stuck

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


@contract
def test_nested_checkout_is_refused(world):
    engine = world.engine(**TWO)
    with engine.connect(), engine.connect():
        with pytest.raises(SelfDeadlock, match=r"by (thread|task) '") as caught:
            engine.connect()
    assert isinstance(caught.value, CheckoutTimeout)
    message = str(caught.value)
    assert message.startswith("checkout would wait for itself: tag 'unknown' in_use=2 ")
    assert "the caller itself holds a connection of 'unknown'" in message
    assert [h.own for h in caught.value.diagnosis.holdings] == [True, True]
    engine.pool.reconfigure(pool_size=4, soft_limit=1, max_limit=1)
    tagged = engine.execution_options(scraper="a")
    # At its ceiling, what another caller has under another tag would not help.
    others = world.start(engine.execution_options(scraper="b").connect).result()
    with tagged.connect(), pytest.raises(SelfDeadlock, match="tag 'a' in_use=1"):
        tagged.connect()
    others.close()


@contract
def test_what_an_ended_caller_has_left_is_no_deadlock(world, looks):
    engine = world.engine(**{**TWO, "pool_timeout": 0.05})
    left = world.start(engine.connect).result()
    with engine.connect(), pytest.raises(CheckoutTimeout, match="ended") as caught:
        engine.connect()
    assert not isinstance(caught.value, SelfDeadlock)
    assert looks
    left.close()


@pytest.mark.parametrize("tags", ["aa", "a" * 8, "ab"])
@contract
def test_one_of_those_that_wait_for_each_other_is_refused(world, tags):
    """It returns what it holds, and with that the others are served in turn.

    Each of "a" and "b" holds what the other one's tag wants: no single tag shows it.
    """
    number = len(tags)
    limit = number // len(set(tags))
    limits = {"pool_size": number, "soft_limit": limit, "max_limit": limit}
    engine = world.engine(**limits, **WATCHFUL)
    gates = [world.gate() for _ in tags]

    def hold_and_want(held, wanted, gate):
        with engine.execution_options(scraper=held).connect():
            gate()
            engine.execution_options(scraper=wanted).connect().close()

    each = zip(tags, reversed(tags), gates, strict=True)
    callers = [world.start(hold_and_want, *arguments) for arguments in each]
    for gate in gates:
        gate.reached()
    for gate in gates:
        gate.open()
    refused = []
    for caller in callers:
        try:
            caller.result()
        except SelfDeadlock as error:
            refused.append(error)
    (error,) = refused
    assert all(h.waits for h in error.diagnosis.holdings if not h.own)
    assert error.diagnosis.advice.startswith("the caller itself holds a connection of")
    assert "waits for one more" in str(error)


@pytest.fixture
def wakes(monkeypatch):
    """Return for how long the waiting callers of an engine want to sleep."""

    def wakes(engine, wait=ThreadWaiter.wait):
        wakes = []

        class Waiter(ThreadWaiter):
            def wait(self, seconds):
                wakes.append(seconds)
                wait(self, seconds)

        state.wait_with(engine, Waiter)
        return wakes

    return wakes


def test_not_before_deadlock_timeout(make_engine, looks, clock, wakes):
    engine = make_engine(pool_size=1, pool_timeout=FOR_EVER, deadlock_timeout=20)

    def wait(waiter, seconds):
        if len(woken) == 3:
            assert looks == []
            clock.advance(20)

    woken = wakes(engine, wait)
    with engine.connect(), pytest.raises(SelfDeadlock) as caught:
        engine.connect()
    assert woken == [20.0] * 3
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


def test_caller_that_holds_nothing_is_not_looked_at(make_engine, looks, wakes):
    """Nearly all that wait: they wake up once, and then no more."""
    engine = make_engine(pool_size=1, **WATCHFUL)
    tagged = engine.execution_options(scraper="a")
    Caller(lambda: tagged.connect().close()).result()  # it has had one before
    woken = wakes(engine)
    with tagged.connect():
        caller = Caller(lambda: tagged.connect().close())
        eventually(lambda: len(woken) == 2)
    caller.result()
    assert [seconds > 1 for seconds in woken] == [False, True]
    # Nor one with the number of a thread that has ended with connections out.
    kept = []
    Caller(lambda: kept.append(engine.connect())).result()
    caller = Caller(lambda: engine.connect().close())
    eventually(lambda: len(woken) == 4)
    assert looks == []
    kept.pop().close()
    caller.result()


# -- no false alarm -------------------------------------------------------------------


def test_not_while_a_holder_does_not_wait(engine, looks):
    def other(begun):
        with engine.connect():
            begun()
            looks.ensure()

    with beside(other), engine.connect():
        engine.connect().close()


@contract
def test_connection_is_that_callers_which_executes_a_statement(world, looks):
    """It was handed over, whichever caller has checked it out."""
    engine = world.engine(**TWO)
    connection, used = engine.connect(), world.gate()

    def other():
        connection.execute(text("select 1"))
        used()
        world.eventually(lambda: len(looks) >= 3)
        connection.close()

    caller = world.start(other)
    used.reached()
    used.open()
    with engine.connect():
        engine.connect().close()
    caller.result()
    assert not any(looks)


@pytest.mark.parametrize("kind", ["dropped and reset", "closed", "opened"])
def test_not_while_a_connection_is(kind, engine, server, looks):
    """By another thread, while the database is slow: no caller has the slot then."""
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


def test_not_while_a_caller_has_a_slot_and_has_not_woken_up(engine, looks, wakes):
    def sleep(waiter, seconds):
        ThreadWaiter.wait(waiter, None)
        looks.ensure()

    wakes(engine, sleep)
    with engine.connect(), engine.connect():
        caller = Caller(lambda: engine.connect().close())
        ensure_waiting(engine.pool, 1)
        state.wait_with(engine, ThreadWaiter)
        # The caller gets a slot, and will open a connection.
        engine.pool.reconfigure(pool_size=3, soft_limit=3, max_limit=3)
        engine.connect().close()
        caller.result()


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


@pytest.fixture
def no_gc():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
def test_what_was_dropped_in_a_cycle_is_collected_instead(engine):
    for _ in range(2):
        knot = [engine.connect()]
        knot.append(knot)
    del knot
    assert engine.pool.checkedout() == 2
    engine.connect().close()


class Slow:
    """A finaliser that takes as long as it is told to."""

    def __init__(self, gate):
        self.itself, self.gate = self, gate

    def __del__(self):
        self.gate()


@pytest.mark.usefixtures("no_gc")
def test_not_while_another_thread_collects(engine, looks):
    """It may be about to return a connection, and a second one cannot collect."""

    def take_three():
        with engine.connect(), engine.connect():
            engine.connect()

    gate = Gate()
    Slow(gate)
    collector = Caller(gc.collect)
    gate.reached()
    caller = Caller(take_three)
    eventually(lambda: len(looks) >= 3)
    assert caller.is_alive()
    gate.open()
    with pytest.raises(SelfDeadlock):
        caller.result()
    collector.result()


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
    command = [sys.executable, "-W", "ignore", "-c", PATCHED_TOO_LATE]
    how = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=60, **how)
    assert done.returncode == 0, done.stderr
