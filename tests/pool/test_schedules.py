"""The checkout path under many orders of its steps: see `support.schedules`.

Time stands still where no thread moves it, so a wake-up that is lost is a schedule in
which all threads wait.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import itertools
import os
import random
import sys
import textwrap
from contextlib import suppress
from glob import glob

import pytest
from sqlalchemy.event import attr
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import await_only, greenlet_spawn
from support import schedules, state
from support.schedules import (
    THREADING,
    CooperativeLock,
    Schedule,
    compiled,
    stepwise,
)
from support.stub import StubServer
from support.task_schedules import ScheduledLoop
from support.threads import Caller, connect

import sqla_fairpool
import sqla_fairpool.pool.snapshot  # else a thread waits for another one's import
from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    FairQueuePool,
)
from sqla_fairpool.pool import events, lock, waiters
from sqla_fairpool.pool.checkout import Checkout
from sqla_fairpool.pool.connections import Reservation
from sqla_fairpool.pool.core import PoolCore
from sqla_fairpool.pool.lock import PoolLock
from sqla_fairpool.pool.physical import PhysicalConnection
from sqla_fairpool.pool.transitions import Transitions
from sqla_fairpool.pool.waiting import Waiting
from sqla_fairpool.pool.warm import WarmCache, WarmRecords

#: Schedules of each kind; the environment may ask for more.
COUNT = int(os.environ.get("SCHEDULES", "2000"))
FIRST = int(os.environ.get("FIRST_SCHEDULE", "0"))

ROOT = os.path.dirname(sqla_fairpool.__file__)
FILES = glob(f"{ROOT}/pool/*.py") + glob(f"{ROOT}/scheduling/*.py")

CAPACITY = 2

#: Schedules in one world.
TOGETHER = 10


class World:
    """A pool on the stub, used by threads in one schedule after the other.

    :param changes: options of the pool.
    """

    def __init__(self, **changes):
        World.numbers = itertools.count()
        self.server = StubServer()
        self.collecting = CooperativeLock()
        options = {"pool_size": CAPACITY, "max_limit": CAPACITY, **changes}
        self.begin(0, 1000.0)
        self.pool = self.server.pool(timeout=30.0, deadlock_timeout=None, **options)

    def begin(self, seed, now):
        self.random = random.Random(f"program {seed}")
        self.schedule = Schedule(seed, now)

    def run(self, seed, steps):
        """Run three programs of one to three steps; look at what is left."""
        self.begin(seed, self.schedule.now)
        if self.random.random() < 0.3:  # without connections
            self.pool.dispose()
            self.pool = self.pool.recreate()
        length = self.random.randint(1, 3)
        functions = [
            functools.partial(self.work, self.random.choices(steps, k=length), tag)
            for tag in self.random.choices("ab", k=3)
        ]
        self.schedule.run(*functions)
        state.assert_quiet(self.pool)
        assert self.server.most <= CAPACITY
        assert self.server.open == len(state.connections(self.pool))

    def work(self, program, tag):
        for step in program:
            step(self, tag)

    def end(self):
        self.pool.connect().close()  # so that it is the pool in use
        self.pool.dispose()
        assert self.server.open == 0

    def hold(self, connection):
        stub = connection.dbapi_connection
        assert stub.owner is None, "it was handed out twice"
        assert not stub.closed
        stub.owner = self
        return connection

    def let_go(self, connection):
        connection.dbapi_connection.owner = None


# -- what threads do -------------------------------------------------------------------


def use(world, tag):
    connection = world.hold(connect(world.pool, tag))
    world.let_go(connection)
    connection.close()


def use_again(world, tag):
    for _ in range(2):
        use(world, tag)


def use_both(world, tag):
    use(world, "a")
    use(world, "b")


def invalidate(world, tag):
    connection = world.hold(connect(world.pool, tag))
    connection.invalidate()
    connection.close()


def drop(world, tag):
    connection = world.hold(connect(world.pool, tag))
    world.let_go(connection)
    del connection  # the collector returns it


def collect(world, tag):
    connection = world.hold(connect(world.pool, tag))
    cycle = [connection]
    cycle.append(cycle)
    world.let_go(connection)
    del connection, cycle
    with world.collecting:  # while another thread collects it would do nothing
        gc.collect()


def detach(world, tag):
    connection = world.hold(connect(world.pool, tag))
    connection.dbapi_connection.close()  # it is none of the pool's from here on
    connection.detach()
    connection.close()


def replace(world, tag):
    world.pool.dispose()
    world.pool = world.pool.recreate()
    use(world, tag)


def reconfigure(world, tag):
    size = world.random.randint(1, CAPACITY)
    world.pool.reconfigure(pool_size=size, max_limit=None, soft_limit=None)
    use(world, tag)
    world.pool.reconfigure(pool_size=CAPACITY, max_limit=CAPACITY)


def read(world, tag):
    stats = world.pool.stats()
    assert 0 <= stats.checked_out <= CAPACITY
    use(world, tag)


def give_up(world, tag):
    with suppress(CheckoutTimeout), sqla_fairpool.tag(tag, timeout=1.0):
        connection = world.hold(world.pool.connect())
        world.schedule.now += 0.6
        world.schedule.switch()
        world.let_go(connection)
        connection.close()


def borrow(world, tag):
    """Say the tag later, as an option of a connection does, or execute a statement."""
    connection = world.hold(world.pool.connect())
    core = world.pool._core
    checkout = connection._connection_record.fair.checkout
    if world.random.random() < 0.5:
        expected = tag
        is_moved = core.warm.claim(checkout, tag) or core.move(checkout, tag)
    else:
        expected, is_moved = "unknown", True
        core.activity(checkout)
    if is_moved:
        assert (checkout.tag_state.tag, checkout.borrowed) == (expected, False)
    world.let_go(connection)
    connection.close()


KINDS = {
    "borrows": [borrow, borrow, use],
    "loans": [borrow, borrow, use],
    "uses": [use, use_again, use_both],
    "ends": [use, invalidate, drop, collect, detach],
    "changes": [use, use_both, replace, reconfigure, read],
    "time-outs": [use, give_up],
}


#: A ceiling that is always the same, so that it holds at every moment.
CHANGES = {"borrows": {"soft_limit": 1, "max_limit": 1}}
CHANGES["loans"] = CHANGES["borrows"]

#: Switched only where no lock is taken: few steps, so most orders are tried.
PLACES = {"loans": [inspect.getfile(WarmCache)]}


@pytest.fixture
def scheduled(monkeypatch, light_heap):
    """Have pools use the locks and the time of the schedule that runs."""
    # SQLAlchemy holds a lock of its own while a pool opens its first connection.
    for module in (waiters, attr):
        monkeypatch.setattr(module, "threading", THREADING)
    for module in (lock, events):
        monkeypatch.setattr(module, "make_lock", THREADING.RLock)
    monkeypatch.setattr(lock, "get_ident", THREADING.get_ident)
    clock = staticmethod(lambda: Schedule.running.now)
    monkeypatch.setattr(FairQueuePool, "_clock", clock)
    for numbered in (_ConnectionRecord, Checkout, PhysicalConnection, Reservation):
        number(monkeypatch, numbered)
    gc.disable()  # else the order would depend on what was there before
    yield
    gc.enable()


def number(monkeypatch, numbered):
    """Let the order of sets of a class depend on nothing but how they came about."""
    begin, numbers = numbered.__init__, {}

    def begin_with_number(self, *args, **options):
        numbers[id(self)] = next(World.numbers)
        begin(self, *args, **options)

    monkeypatch.setattr(numbered, "__init__", begin_with_number)
    monkeypatch.setattr(numbered, "__hash__", lambda self: numbers[id(self)])


def explore(kind, seeds):
    """Run schedules of a kind, some of them in one world after the other."""
    with stepwise(PLACES.get(kind, FILES)):
        for first in seeds[::TOGETHER]:
            gc.collect()
            world = World(**CHANGES.get(kind, {}))
            for seed in range(first, first + TOGETHER):
                try:
                    world.run(seed, KINDS[kind])
                except BaseException as error:
                    error.add_note(f"kind {kind!r}, seed {seed}, from {first} on")
                    raise
            world.end()


@pytest.mark.parametrize("kind", KINDS)
def test_no_order_of_steps_breaks_a_promise(kind, scheduled):
    explore(kind, range(FIRST, FIRST + COUNT // len(KINDS)))


# -- would it notice? ------------------------------------------------------------------

MUTANTS = {
    "a section that grants does not see what is borrowed": (
        "borrows",
        PoolLock.run,
        "self.lendable = -1",
        "pass",
    ),
    "a borrower does not see that a section was faster": (
        "borrows",
        WarmCache.borrow,
        " and checkout in self.borrowed",
        "",
    ),
    "a caller claims what a section has charged": (
        "loans",
        WarmCache.claim,
        "or self.borrowed.pop(checkout, self) is not None",
        "",
    ),
    "a waiter that comes during a checkin is forgotten": (
        "uses",
        PoolCore.checkin,
        "    if scheduler.waiting:  # since it was looked at above\n",
        "    if False:\n",
    ),
    "a warm record that a section has not seen is not listed again": (
        "uses",
        PoolCore.checkin,
        "records.append(record)\n    if not records.listed:\n",
        "records.append(record)\n    if False:\n",
    ),
    "a section does not say that it has looked": (
        "uses",
        WarmRecords.__call__,
        "self.listed = False  #",
        "pass  #",
    ),
    "two checkouts may take the same warm record": (
        "uses",
        PoolCore.checkout,
        "record = records.pop(self.connections.end)",
        "record = records[self.connections.end]; records.remove(record)",
    ),
    "a section and a checkout may take the same warm record": (
        "uses",
        WarmRecords.__call__,
        "record = self.pop(0)",
        "record = self[0]; self.remove(record)",
    ),
    "a record that is taken stays warm": (
        "uses",
        PoolCore.checkout,
        "    checkout.warm = False\n",
        "",
    ),
    "sections are not alone": (
        "uses",
        PoolLock.run,
        "with self.mutex:",
        "if True:",
    ),
    "who was granted is not woken": (
        "uses",
        Transitions.deliver,
        "self.lock.wake_ups.append(checkout.waiter.wake)",
        "pass",
    ),
    "a time-out does not see that it was granted": (
        "time-outs",
        Waiting._look,
        "if now < deadline or checkout.waiter is None:",
        "if now < deadline:",
    ),
    "a record is taken back in the middle of another section": (
        "ends",
        PoolCore._release,
        "lock.run(self.state.take_back, checkout, record, keep)",
        "self.state.take_back(checkout, record, keep, self.clock())",
    ),
    "a slot is free before its connection is closed": (
        "changes",
        Transitions._close_and_release,
        "    try:\n",
        "    self.lock.run(self.take_back, record.fair.checkout, None, False)\n"
        "    try:\n",
    ),
    "an idle connection that is closed leaves its slot in use": (
        "changes",
        Transitions.retire,
        "self.recount(now)",
        "pass",
    ),
}

#: Schedules that are tried for each mutant, until it is noticed: the rarest in one of
#: some 300, and which one that is changes with every line on the way.
ENOUGH = 3000


def mutate(monkeypatch, owner, function, old, new):
    """Replace a method by one with another line, which counts its steps, too."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, "the line is not there any more"
    made = {}
    source = "from __future__ import annotations\n" + source.replace(old, new)
    filename = function.__code__.co_filename
    exec(compiled(source, filename), function.__globals__, made)
    monkeypatch.setattr(owner, function.__name__, made[function.__name__])


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_explorer_notices(name, monkeypatch, scheduled):
    kind, function, old, new = MUTANTS[name]
    owner = getattr(
        sys.modules[function.__module__], function.__qualname__.split(".")[0]
    )
    mutate(monkeypatch, owner, function, old, new)
    try:
        explore(kind, range(ENOUGH))
    except Exception:
        return
    pytest.fail("it was not noticed")


def test_threads_of_others_take_no_turn():
    """As a keeper would that another test has left, in code that counts its steps."""

    def foreign():
        for _ in range(1_000):
            schedules.step()

    Schedule(0, 0.0).run(lambda: Caller(foreign).result(), foreign)


# -- tasks -----------------------------------------------------------------------------


class TaskWorld(World):
    """The same for tasks: any order of ready callbacks, cancelled anywhere."""

    def __init__(self, seed, monkeypatch):
        self.random = random.Random(f"tasks {seed}")
        self.loop = ScheduledLoop(seed, self.random.choice([0.0, 0.02, 0.1]))
        clock = staticmethod(self.loop.time)
        monkeypatch.setattr(AsyncAdaptedFairQueuePool, "_clock", clock)
        self.server = StubServer()
        self.server.before["connect"] = self.passes
        options = {"pool_size": CAPACITY, "max_limit": CAPACITY, "timeout": 30.0}
        self.pool = self.server.pool(
            AsyncAdaptedFairQueuePool, deadlock_timeout=None, **options
        )

    def passes(self, seconds=0):
        for _ in range(self.random.randrange(3)):
            await_only(asyncio.sleep(seconds))

    def visit(self, tag, timeout, seconds):
        with sqla_fairpool.tag(tag, timeout=timeout):
            connection = self.hold(self.pool.connect())
        try:
            self.passes(seconds)
        finally:
            self.let_go(connection)
            connection.close()

    def all_at_once(self):
        held = [self.hold(connect(self.pool, tag)) for tag in "ab"]
        assert self.server.open == CAPACITY
        for connection in held:
            self.let_go(connection)
            connection.close()
        state.assert_quiet(self.pool)
        self.pool.dispose()

    def run(self, kind):
        timed = kind == "time-outs"
        expected = {asyncio.CancelledError, type(None)}
        if timed:
            expected.add(CheckoutTimeout)
        try:
            outcomes = self.loop.play(*(self.task(timed) for _ in range(4)))
            for outcome in outcomes:
                assert type(outcome) in expected, outcome
            self.loop.cancellations = 0
            assert self.loop.play(greenlet_spawn(self.all_at_once)) == [None]
        finally:
            self.loop.close()
        assert self.server.most <= CAPACITY
        assert self.server.open == 0

    async def task(self, timed):
        for _ in range(3):
            timeout, seconds = (1.0, 0.6) if timed else (30.0, 0)
            tag = self.random.choice("ab")
            await greenlet_spawn(self.visit, tag, timeout, seconds)


TASK_KINDS = ["uses", "time-outs"]


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_no_order_of_callbacks_and_no_cancellation_breaks_a_promise(kind, monkeypatch):
    for seed in range(FIRST, FIRST + COUNT // len(TASK_KINDS)):
        with monkeypatch.context() as patch:
            try:
                TaskWorld(seed, patch).run(kind)
            except BaseException as error:
                error.add_note(f"tasks, kind {kind!r}, seed {seed}")
                raise


TASK_MUTANTS = {
    "who was granted is not woken": (
        waiters.TaskWaiter,
        waiters.TaskWaiter._ring,
        "if not self._future.done():",
        "if False:",
    ),
    "one that is cancelled when it was granted keeps the slot": (
        PoolCore,
        PoolCore._give_up,
        "if not has_waited:",
        "if False:",
    ),
    "one that is cancelled in its line stays there": (
        PoolCore,
        PoolCore.give_up,
        "self.lock.run(self._give_up, checkout)",
        "pass",
    ),
    "one that is cancelled while it opens a connection gives up the slot twice": (
        PoolCore,
        PoolCore.give_up,
        "if checkout.orphaned:",
        "if False:",
    ),
    "nobody has what was opened for one that was cancelled": (
        waiters,
        waiters._adopt,
        "owner.adopt(None if failed else running.result())",
        "pass",
    ),
}


@pytest.mark.parametrize("name", TASK_MUTANTS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_explorer_of_tasks_notices(name, monkeypatch):
    owner, function, old, new = TASK_MUTANTS[name]
    mutate(monkeypatch, owner, function, old, new)
    for seed in range(ENOUGH):
        with monkeypatch.context() as patch:
            try:
                TaskWorld(seed, patch).run("uses")
            except (Exception, asyncio.CancelledError):
                return
    pytest.fail("it was not noticed")
