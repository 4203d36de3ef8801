"""What only tasks have: cancellation, loops, greenlets. See also `test_handover.py`."""

from __future__ import annotations

import asyncio
import gc
import random
import threading

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.exc import ArgumentError, MissingGreenlet
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only
from support import state
from support.stub import all_for_one
from support.tasks import steps
from support.threads import PATIENCE, Caller, connect, give, take
from support.worlds import make_world

from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    FairQueuePool,
    tag,
)


@pytest.fixture(params=["asyncio", "uvloop"])
def loops(request):
    """A world of tasks whose loops the test runs itself."""
    return make_world(request.param)


def passes(number):
    """Let the loop run through its ready callbacks so many times."""
    await_only(steps(number))


def without_greenlet(function):
    """Call a function in the loop, where nothing can be awaited."""
    called = asyncio.get_running_loop().create_future()

    def call():
        try:
            called.set_result(function())
        except Exception as error:
            called.set_exception(error)

    asyncio.get_running_loop().call_soon(call)
    return await_only(called)


def cancel(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        task.result()


@pytest.mark.parametrize("fails", [False, True])
def test_connection_that_is_opened_again_for_a_cancelled_task_counts(tmp_path, fails):
    """Whatever the driver: it goes on, and no other one takes the place."""

    async def main():
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{tmp_path / 'test.db'}",
            poolclass=AsyncAdaptedFairQueuePool,
            **{**all_for_one(1), "pool_timeout": PATIENCE},
        )
        go_on, connected = asyncio.Event(), []

        @event.listens_for(engine.sync_engine, "do_connect")
        def on_connect(dialect, record, arguments, options):
            connected.append(None)
            if len(connected) == 2:
                await_only(go_on.wait())
                if fails:
                    raise OSError
            return dialect.connect(*arguments, **options)

        async with engine.connect() as connection:
            await connection.invalidate()
        connecting = asyncio.ensure_future(engine.connect().start())
        while len(connected) < 2:
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.wait([connecting])
        with tag("late", timeout=0.1), pytest.raises(CheckoutTimeout):
            await engine.connect()
        assert len(connected) == 2
        go_on.set()
        await (await engine.connect()).close()
        await engine.dispose()

    asyncio.run(main())


# -- where one can wait ----------------------------------------------------------------


def test_waiting_needs_sqlalchemys_greenlet(tasks):
    pool = tasks.pool(1, deadlock_timeout=None)
    with pool.connect():
        with pytest.raises(MissingGreenlet):
            without_greenlet(pool.connect)
        assert state.waiting(pool) == 0
        pool.reconfigure(timeout=0)  # what does not wait needs none
        with pytest.raises(CheckoutTimeout):
            without_greenlet(pool.connect)


def test_closing_is_left_to_a_caller_that_can_await(tasks):
    pool = tasks.pool(2)
    give(take(pool, 2))
    # One is too many then.
    without_greenlet(lambda: pool.reconfigure(pool_size=1, soft_limit=1, max_limit=1))
    assert (tasks.server.open, pool.stats().idle) == (2, 1)
    connect(pool).close()
    assert tasks.server.open == 1


# -- cancellation ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "order", ["cancel, pass, grant", "cancel, grant", "grant, cancel"]
)
def test_cancelled_waiter_passes_on_what_it_was_granted(tasks, order):
    """Without a pass between them, the task has not run since the first of both."""
    pool = tasks.pool(1)
    holder = connect(pool)
    first, second = tasks.wait_in_line(pool, count=2)
    actions = {"cancel": first.cancel, "grant": holder.close, "pass": lambda: passes(3)}
    for action in order.split(", "):
        actions[action]()
    with pytest.raises(asyncio.CancelledError):
        first.result()
    second.result()
    assert tasks.server.opened == 1


def test_cancel_and_time_out_in_the_same_moment(tasks, clock):
    pool = tasks.pool(1, timeout=0.001)
    with connect(pool):
        (caller,) = tasks.wait_in_line(pool)
        clock.advance(1.0)
        state.line(pool, "a")[0].waiter.wake()  # as the timer does
        cancel(caller)


def test_cancelled_connect_frees_the_slot(tasks):
    pool = tasks.pool(1)
    tasks.server.before["connect"] = gate = tasks.gate()
    first = tasks.come(pool)
    gate.reached()
    (second,) = tasks.wait_in_line(pool)
    cancel(first)
    gate.open()
    second.result()


# A cancelled rollback leaves a connection that cannot be terminated.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("overflow", [0, 1])
@pytest.mark.parametrize("step", range(12))
def test_cancel_at_every_step(tasks, step, overflow):
    """A visitor waits, connects and returns; the cancel comes anywhere in it."""
    pool = tasks.pool(2 - overflow, max_overflow=overflow)
    tasks.server.before["connect"] = lambda: passes(2)
    tasks.server.before["rollback"] = lambda: passes(2)

    def visit():
        with connect(pool):
            passes(1)

    holders = take(pool, 2)
    task = tasks.start(visit)
    tasks.ensure_waiting(pool, 1)
    back = tasks.start(holders.pop().close)
    passes(step)
    if task.is_alive():
        cancel(task)
    back.result()
    state.assert_consistent(pool)
    give(holders)
    gc.collect()


# -- loops -----------------------------------------------------------------------------


def leave_in_a_closed_loop(loops, count):
    """Return a connection that is out, and callers that wait in a loop that is gone."""
    pool = loops.pool(1)

    def begin():
        holder = connect(pool)
        callers = loops.wait_in_line(pool, count=count)
        for caller in callers:
            caller.strand()
        return pool, holder, callers

    return loops.in_a_loop(begin, all_end=False)


def test_waiter_whose_loop_is_closed_is_passed_over(loops):
    pool, holder, stranded = leave_in_a_closed_loop(loops, 1)

    def hand_over():
        (caller,) = loops.wait_in_line(pool)
        holder.close()
        caller.result().close()

    loops.in_a_loop(hand_over)
    state.assert_quiet(pool)
    assert stranded.pop().is_alive()
    gc.collect()  # its greenlet is ended now, and must find nothing to give back
    state.assert_quiet(pool)


def test_line_of_a_closed_loop_drains_by_itself(loops):
    pool, holder, _stranded = leave_in_a_closed_loop(loops, 3)
    with pytest.raises(MissingGreenlet, match="no event loop is running"):
        pool.connect()
    holder.close()  # in no loop at all
    assert state.waiting(pool) == 0
    assert pool.stats().idle == 1


def test_waiter_is_woken_in_its_own_loop_by_another_one(tasks):
    pool = tasks.pool(1)

    def visit():
        connect(pool).close()
        return threading.get_ident()

    with connect(pool):
        caller = Caller(tasks.in_a_loop, visit)
        tasks.ensure_waiting(pool, 1)
    tasks.eventually(lambda: not caller.is_alive())
    assert caller.result() != threading.get_ident()


def test_disposed_of_in_another_loop(loops):
    pool = loops.pool(2)
    holder, other = loops.in_a_loop(take, pool, 2)
    loops.in_a_loop(other.close)
    loops.in_a_loop(pool.dispose)
    assert pool.checkedin() == 0
    loops.in_a_loop(holder.close)
    assert pool.checkedout() == 0


@pytest.mark.filterwarnings("ignore:The garbage collector is trying")
@pytest.mark.parametrize("where", ["loop", "other thread", "critical section"])
def test_leaked_connection_wakes_the_waiter(tasks, where):
    pool = tasks.pool(1)
    leaked = [connect(pool)]
    (caller,) = tasks.wait_in_line(pool)

    def drop():
        leaked.clear()
        gc.collect()

    if where == "loop":
        drop()
    elif where == "other thread":
        await_only(asyncio.to_thread(drop))
    else:
        with state.critical_section(pool):
            drop()
            assert state.came_back_meanwhile(pool) == 1
    # The record came back hollow, so a connection was opened.
    assert caller.result().dbapi_connection.number == tasks.server.opened == 2


# -- which class -----------------------------------------------------------------------


def test_asyncio_class_overrides_how_to_wait_and_what_does_io_and_nothing_else():
    own = {name for name in vars(AsyncAdaptedFairQueuePool) if name[:2] != "__"}
    assert own == {"_is_asyncio", "_waiter_class", "_dialect", "warm_up", "upkeep"}
    message = "FairQueuePool cannot be used with asyncio"
    with pytest.raises(ArgumentError, match=message):
        create_async_engine("sqlite+aiosqlite://", poolclass=FairQueuePool)
    message = "AsyncAdaptedFairQueuePool cannot be used with non-asyncio"
    with pytest.raises(ArgumentError, match=message):
        create_engine("sqlite://", poolclass=AsyncAdaptedFairQueuePool)


# -- all together ----------------------------------------------------------------------


def test_cancellations_time_outs_and_slow_connects_of_many_tasks_leave_nothing(tasks):
    pool = tasks.pool(5, timeout=0.002)
    chance = random.Random(7)
    tasks.server.before["connect"] = lambda: passes(chance.randrange(3))
    outcomes = {None: 0, asyncio.CancelledError: 0, CheckoutTimeout: 0}

    def visit():
        with connect(pool, chance.choice("abc")) as connection:
            connection = connection.dbapi_connection
            assert connection.owner is None, "handed out twice"
            connection.owner = me = asyncio.current_task()
            try:
                await_only(asyncio.sleep(chance.choice((0, 0, 0.001))))
            finally:
                assert connection.owner is me
                connection.owner = None

    def outcome(task):
        try:
            task.result()
        except BaseException as error:
            return type(error)

    rounds = 0
    # How many are cancelled in time is a matter of the machine's speed.
    while rounds < 20 or outcomes[None] < 100 or outcomes[asyncio.CancelledError] < 50:
        rounds += 1
        assert rounds < 500, outcomes
        visits = [tasks.start(visit) for _ in range(50)]
        for _ in range(30):
            passes(chance.randrange(4))
            chance.choice(visits).cancel()
        for one in visits:
            outcomes[outcome(one)] += 1
        state.assert_quiet(pool)
    assert tasks.server.most <= 5
    tasks.eventually(lambda: tasks.server.open <= 5)
