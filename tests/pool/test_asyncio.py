"""Callers that are tasks: waiting, cancellation, time-outs, loops, the collector."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import ArgumentError, MissingGreenlet
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn
from support import state
from support.state import assert_consistent, assert_quiet
from support.tasks import checkin, checkout, steps, until, waiting
from support.threads import PATIENCE, Caller, eventually

import sqla_fairpool
from sqla_fairpool import (
    AsyncAdaptedFairQueuePool,
    CheckoutTimeout,
    FairQueuePool,
    TooManyWaiting,
)

LOOPS = {"asyncio": asyncio.new_event_loop}
try:
    import uvloop
except ImportError:  # it has no wheels for Windows
    pass
else:
    LOOPS["uvloop"] = uvloop.new_event_loop


@pytest.fixture(params=LOOPS)
def new_loop(request):
    return LOOPS[request.param]


@pytest.fixture
def run(new_loop):
    """Run a coroutine in a new loop; every task must have ended with it."""

    def run(main):
        loop = new_loop()
        try:
            result = loop.run_until_complete(asyncio.wait_for(main, PATIENCE))
            assert not asyncio.all_tasks(loop)
            return result
        finally:
            loop.close()

    return run


@pytest.fixture
def make_pool(server):
    """Make asyncio pools on the stub; each must be quiet when the test ends."""
    pools = []

    def make(**options):
        options = {"soft_limit": None, "max_limit": None, **options}
        size = options.get("pool_size", 20)
        options["soft_limit"] = options["soft_limit"] or size
        options["max_limit"] = options["max_limit"] or size
        pool = server.pool(AsyncAdaptedFairQueuePool, **options)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        assert_quiet(pool)


def connecting(server, gate):
    """Have the stub's connect wait for an event of asyncio's."""
    server.before["connect"] = lambda: await_only(gate.wait())


# -- waiting ------------------------------------------------------------------------


def test_waiters_are_served_in_the_order_in_which_they_came(make_pool, run):
    pool = make_pool(pool_size=1)
    served = []

    async def visit(name):
        fairy = await checkout(pool)
        served.append(name)
        await checkin(fairy)

    async def main():
        holder = await checkout(pool)
        tasks = []
        for name in range(5):
            tasks.append(asyncio.create_task(visit(name)))
            await waiting(pool, name + 1)
        await checkin(holder)
        await asyncio.gather(*tasks)

    run(main())
    assert served == [0, 1, 2, 3, 4]


def test_connection_goes_straight_to_the_waiter(make_pool, run, server):
    pool = make_pool(pool_size=1)

    async def main():
        holder = await checkout(pool)
        number = holder.dbapi_connection.number
        task = asyncio.create_task(checkout(pool))
        await waiting(pool, 1)
        await checkin(holder)
        # Granted already: who comes now does not overtake.
        late = asyncio.create_task(checkout(pool))
        await waiting(pool, 1)
        fairy = await task
        assert fairy.dbapi_connection.number == number
        await checkin(fairy)
        await checkin(await late)

    run(main())
    assert server.opened == 1


def test_time_out_names_the_holders_and_leaves_the_line(make_pool, run):
    pool = make_pool(pool_size=1, timeout=0.01)

    async def main():
        holder = await checkout(pool)
        with pytest.raises(CheckoutTimeout, match="held by unknown=1"):
            await checkout(pool)
        assert state.waiting(pool) == 0
        await checkin(holder)

    run(main())


def test_time_out_of_zero_does_not_wait(make_pool, run):
    pool = make_pool(pool_size=1, timeout=0)

    async def main():
        holder = await checkout(pool)
        with pytest.raises(CheckoutTimeout):
            # Nothing is awaited, so no greenlet is needed.
            pool.connect()
        await checkin(holder)

    run(main())


def test_one_caller_too_many_is_refused_at_once(make_pool, run):
    pool = make_pool(pool_size=1, max_waiting=0)

    async def main():
        holder = await checkout(pool)
        with pytest.raises(TooManyWaiting):
            await checkout(pool)
        await checkin(holder)

    run(main())


def test_a_waiter_wakes_for_the_reallocation(make_pool, run, clock):
    pool = make_pool(
        pool_size=2,
        soft_limit=1,
        max_limit=2,
        idle_timeout=0.01,
        reallocation_interval=0.01,
    )

    async def main():
        with sqla_fairpool.tag("other"):
            await checkin(await checkout(pool))
        with sqla_fairpool.tag("mine"):
            first = await checkout(pool)
            second = asyncio.create_task(checkout(pool))
            await waiting(pool, 1)
            clock.advance(1.0)  # "other" is idle, and nobody else comes by
            await checkin(await second)
            await checkin(first)

    run(main())


def test_waiting_needs_sqlalchemys_greenlet(make_pool, run):
    pool = make_pool(pool_size=1, deadlock_timeout=None)

    async def main():
        holder = await checkout(pool)
        with pytest.raises(MissingGreenlet):
            pool.connect()
        assert state.waiting(pool) == 0
        await checkin(holder)

    run(main())


def test_waiting_needs_a_loop(make_pool, run):
    pool = make_pool(pool_size=1)
    holder = run(checkout(pool))
    with pytest.raises(MissingGreenlet, match="no event loop is running"):
        pool.connect()
    run(checkin(holder))


# -- cancellation ---------------------------------------------------------------------


def test_cancelled_waiter_leaves_the_line(make_pool, run):
    pool = make_pool(pool_size=1)

    async def main():
        holder = await checkout(pool)
        first, second = [asyncio.create_task(checkout(pool)) for _ in range(2)]
        await waiting(pool, 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await checkin(holder)
        await checkin(await second)

    run(main())


def test_waiter_that_is_cancelled_when_it_was_granted_passes_the_grant_on(
    make_pool, run, server
):
    pool = make_pool(pool_size=1)

    async def main():
        holder = await checkout(pool)
        first, second = [asyncio.create_task(checkout(pool)) for _ in range(2)]
        await waiting(pool, 2)
        await checkin(holder)
        # The grant is made, the bell has rung, the task has not run yet.
        assert state.waiting(pool) == 1
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await checkin(await second)

    run(main())
    assert server.opened == 1


def test_grant_that_meets_a_cancelled_waiter_is_passed_on(make_pool, run, server):
    """The other order: the cancel first, the grant before the task has run."""
    pool = make_pool(pool_size=1)

    async def main():
        holder = await checkout(pool)
        first, second = [asyncio.create_task(checkout(pool)) for _ in range(2)]
        await waiting(pool, 2)
        first.cancel()
        await checkin(holder)
        with pytest.raises(asyncio.CancelledError):
            await first
        await checkin(await second)

    run(main())
    assert server.opened == 1


def test_cancel_and_time_out_in_the_same_moment(make_pool, run, clock):
    pool = make_pool(pool_size=1, timeout=0.001)

    async def main():
        holder = await checkout(pool)
        task = asyncio.create_task(checkout(pool))
        await waiting(pool, 1)
        clock.advance(1.0)
        seat = state.line(pool, "unknown")[0]
        seat.waiter.wake()  # as the timer does
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await checkin(holder)

    run(main())


def test_cancelled_connect_frees_the_slot(make_pool, run, server):
    pool = make_pool(pool_size=1)

    async def main():
        gate = asyncio.Event()
        connecting(server, gate)
        first = asyncio.create_task(checkout(pool))
        await until(lambda: server.open == 1)
        second = asyncio.create_task(checkout(pool))
        await waiting(pool, 1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        gate.set()
        await checkin(await second)

    run(main())


@pytest.mark.parametrize("pool_options", [{}, {"max_overflow": 1, "pool_size": 1}])
@pytest.mark.parametrize("step", range(12))
def test_cancel_at_every_step(make_pool, run, server, step, pool_options):
    """A visitor waits, connects and returns; the cancel comes anywhere in it."""
    pool = make_pool(**{"pool_size": 2, **pool_options}, soft_limit=2, max_limit=2)
    server.before["connect"] = lambda: await_only(steps(2))
    server.before["rollback"] = lambda: await_only(steps(2))

    async def visit():
        fairy = await checkout(pool)
        try:
            await steps(1)
        finally:
            await checkin(fairy)

    async def main():
        holders = [await checkout(pool) for _ in range(2)]
        task = asyncio.create_task(visit())
        await waiting(pool, 1)
        back = asyncio.create_task(checkin(holders.pop()))
        await steps(step)
        was_done = task.done()
        task.cancel()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        assert was_done or isinstance(result, asyncio.CancelledError)
        await back
        assert_consistent(pool)
        await checkin(holders.pop())

    with warnings.catch_warnings():
        # A cancelled rollback leaves a connection that cannot be terminated.
        warnings.simplefilter("ignore")
        run(main())
        gc.collect()


@pytest.mark.parametrize("cleanup", ["close", "invalidate", "detach"])
@pytest.mark.filterwarnings("ignore:Can't invalidate an already-closed connection")
def test_what_follows_a_cancelled_return_leaves_the_next_caller_alone(
    make_pool, run, server, cleanup
):
    """With SQLAlchemy before 2.0.56 and 2.1.6 it meets the next caller's connection."""
    pool = make_pool(pool_size=1)

    async def main():
        first = await checkout(pool)
        server.before["rollback"] = lambda: await_only(steps(2))
        back = asyncio.create_task(checkin(first))
        await steps(1)
        back.cancel()
        with pytest.raises(asyncio.CancelledError):
            await back
        server.before.clear()
        second = await checkout(pool)
        await greenlet_spawn(getattr(first, cleanup))
        assert pool.checkedout() == 1
        assert not second.dbapi_connection.closed
        await checkin(second)

    run(main())


# -- bells and chores -----------------------------------------------------------------


def test_waiter_does_not_wait_for_the_closing_of_another_connection(
    make_pool, run, server
):
    pool = make_pool(pool_size=3, idle_connection_ttl=1.0)
    closing = threading.Event()

    async def main():
        gate = asyncio.Event()

        def close():
            closing.set()
            await_only(gate.wait())

        fairies = [await checkout(pool) for _ in range(3)]
        task = asyncio.create_task(checkout(pool))
        await waiting(pool, 1)
        # As a transition leaves it that grants somebody something as well.
        state.do_later(pool, close)
        back = asyncio.create_task(checkin(fairies.pop()))
        fairies.append(await task)
        await until(closing.is_set)
        gate.set()
        await back
        for fairy in fairies:
            await checkin(fairy)

    run(main())


def test_chores_are_left_to_somebody_who_can_await(make_pool, run, server):
    pool = make_pool(pool_size=2)

    async def main():
        fairies = [await checkout(pool) for _ in range(2)]
        for fairy in fairies:
            await checkin(fairy)
        # Outside of a greenlet; one is too many now.
        pool.reconfigure(pool_size=1, soft_limit=1, max_limit=1)
        assert server.open == 2
        assert pool.stats().idle == 1
        await checkin(await checkout(pool))
        assert server.open == 1

    run(main())
    assert pool.size() == 1


# -- loops ---------------------------------------------------------------------------


def test_waiter_whose_loop_is_closed_is_passed_over(make_pool, new_loop, run):
    pool = make_pool(pool_size=1)
    dead = new_loop()

    async def begin():
        fairy = await checkout(pool)
        task = asyncio.create_task(checkout(pool))
        await waiting(pool, 1)
        return fairy, task

    holder, stranded = dead.run_until_complete(begin())
    dead.close()

    async def main():
        task = asyncio.create_task(checkout(pool))
        await waiting(pool, 2)
        await checkin(holder)
        await checkin(await task)

    run(main())
    assert state.in_use(pool) == 0
    assert not stranded.done()
    stranded._log_destroy_pending = False
    del stranded
    gc.collect()  # its greenlet is ended now, and must find nothing to give back


def test_line_of_a_closed_loop_drains_by_itself(make_pool, new_loop):
    pool = make_pool(pool_size=1)
    dead = new_loop()

    async def begin():
        fairy = await checkout(pool)
        for _ in range(3):
            task = asyncio.create_task(checkout(pool))
            task._log_destroy_pending = False
        await waiting(pool, 3)
        return fairy

    holder = dead.run_until_complete(begin())
    dead.close()
    holder.close()  # in no loop at all
    assert state.waiting(pool) == 0
    assert pool.stats().idle == 1


def test_waiter_is_woken_in_its_own_loop_by_another_one(make_pool, run):
    pool = make_pool(pool_size=1)

    def other():
        async def visit():
            await checkin(await checkout(pool))
            return threading.get_ident()

        return asyncio.run(visit())

    async def main():
        holder = await checkout(pool)
        caller = Caller(other)
        await waiting(pool, 1)
        await checkin(holder)
        await until(lambda: not caller.is_alive())
        assert caller.result() != threading.get_ident()

    run(main())


def test_disposed_of_in_another_loop(make_pool, run, server):
    pool = make_pool(pool_size=2)

    async def begin():
        await checkin(await checkout(pool))
        return await checkout(pool)

    holder = run(begin())
    run(greenlet_spawn(pool.dispose))
    assert pool.checkedin() == 0
    run(checkin(holder))
    assert pool.checkedout() == 0


# -- the collector -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The garbage collector is trying")
def test_connection_collected_on_a_foreign_thread_wakes_the_waiter(
    make_pool, run, server
):
    pool = make_pool(pool_size=1)

    async def main():
        leaked = [await checkout(pool)]
        task = asyncio.create_task(checkout(pool))
        await waiting(pool, 1)

        def drop():
            leaked.clear()
            gc.collect()

        await asyncio.to_thread(drop)
        fairy = await task
        # The record came back hollow, so a connection was opened.
        assert fairy.dbapi_connection.number == 2
        await checkin(fairy)

    run(main())
    assert server.opened == 2


@pytest.mark.filterwarnings("ignore:The garbage collector is trying")
def test_connection_collected_in_the_loops_own_thread_wakes_the_waiter(make_pool, run):
    pool = make_pool(pool_size=1)

    async def main():
        leaked = [await checkout(pool)]
        task = asyncio.create_task(checkout(pool))
        await waiting(pool, 1)
        leaked.clear()
        gc.collect()
        await checkin(await task)

    run(main())


@pytest.mark.filterwarnings("ignore:The garbage collector is trying")
def test_collected_in_the_middle_of_a_critical_section(make_pool, run):
    pool = make_pool(pool_size=1)

    async def main():
        leaked = [await checkout(pool)]
        task = asyncio.create_task(checkout(pool))
        await waiting(pool, 1)
        with state.critical_section(pool):
            leaked.clear()
            gc.collect()
            assert state.came_back_meanwhile(pool) == 1
        await checkin(await task)

    run(main())


# -- which class ---------------------------------------------------------------------


def test_wrong_class_is_sqlalchemys_own_error():
    with pytest.raises(
        ArgumentError, match="FairQueuePool cannot be used with asyncio"
    ):
        create_async_engine("sqlite+aiosqlite://", poolclass=FairQueuePool)
    with pytest.raises(
        ArgumentError, match="AsyncAdaptedFairQueuePool cannot be used with non-asyncio"
    ):
        create_engine("sqlite://", poolclass=AsyncAdaptedFairQueuePool)


def test_the_rules_are_not_written_twice():
    """The asyncio class overrides how to wait and what does I/O, nothing else."""
    own = {name for name in vars(AsyncAdaptedFairQueuePool) if name[:2] != "__"}
    assert own == {"_is_asyncio", "_waiter_class", "_dialect", "warm_up", "upkeep"}


def test_recreated_pool_waits_in_the_same_way(make_pool, run):
    pool = make_pool(pool_size=1)
    successor = pool.recreate()
    assert type(successor) is AsyncAdaptedFairQueuePool

    async def main():
        holder = await checkout(pool)
        task = asyncio.create_task(checkout(successor))
        await waiting(pool, 1)
        await checkin(holder)
        await checkin(await task)

    run(main())


def test_stress_with_cancellations_time_outs_and_leaks(make_pool, run, server):
    """What a thousand confused tasks leave behind: nothing."""
    import random

    pool = make_pool(pool_size=5, timeout=0.002)
    chance = random.Random(7)
    server.before["connect"] = lambda: await_only(steps(chance.randrange(3)))
    outcomes = {"served": 0, "cancelled": 0, "timed out": 0}
    enough = {"served": 100, "cancelled": 50}

    async def visit():
        with sqla_fairpool.tag(chance.choice("abc")):
            fairy = await checkout(pool)
        try:
            connection = fairy.dbapi_connection
            assert connection.owner is None, "handed out twice"
            connection.owner = asyncio.current_task()
            await asyncio.sleep(chance.choice((0, 0, 0.001)))
            assert connection.owner is asyncio.current_task()
            connection.owner = None
        except asyncio.CancelledError:
            connection.owner = None
            raise
        finally:
            await checkin(fairy)

    async def main():
        rounds = 0
        # How many are cancelled in time is a matter of the machine's speed.
        while rounds < 20 or any(outcomes[k] <= n for k, n in enough.items()):
            rounds += 1
            assert rounds < 500, outcomes
            tasks = [asyncio.create_task(visit()) for _ in range(50)]
            for _ in range(30):
                await steps(chance.randrange(4))
                chance.choice(tasks).cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if result is None:
                    outcomes["served"] += 1
                elif isinstance(result, asyncio.CancelledError):
                    outcomes["cancelled"] += 1
                else:
                    assert isinstance(result, CheckoutTimeout), result
                    outcomes["timed out"] += 1
            assert_quiet(pool)

    run(main())
    assert outcomes["served"] > 100 and outcomes["cancelled"] > 50
    assert server.most <= 5
    eventually(lambda: server.open <= 5)
