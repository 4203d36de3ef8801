"""How connections change hands, each race frozen and asserted: threads and tasks."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError
from support import state
from support.stub import StubError
from support.threads import PATIENCE, connect, give, take, wait_in_line

from sqla_fairpool import CheckoutTimeout, FairQueuePool, TooManyWaiting
from sqla_fairpool.pool.connections import Slots
from sqla_fairpool.pool.transitions import Transitions
from sqla_fairpool.pool.waiters import ThreadWaiter
from sqla_fairpool.pool.warm import WarmRecords

# -- hand-off --------------------------------------------------------------------------


def test_line_is_served_in_order_with_the_connection_that_came_back(world):
    pool = world.pool(1)
    holder = world.connect(pool)
    the_one = holder.dbapi_connection
    callers = world.wait_in_line(pool, count=4)
    for left, caller in zip((3, 2, 1, 0), callers, strict=True):
        assert state.watcher(pool).waiter is not None, "the watcher waits itself"
        holder.close()
        holder = caller.result()
        assert holder.dbapi_connection is the_one
        assert state.waiting(pool) == left
        state.assert_consistent(pool)
        # The newest waiter watches for the reallocation: it will wait longest.
        assert state.watcher(pool) is (state.newest_waiter(pool) if left else None)


def test_caller_that_comes_back_does_not_overtake_the_waiter(world):
    pool = world.pool(1)
    holder = world.connect(pool)
    (caller,) = world.wait_in_line(pool)
    holder.close()
    again = world.come(pool)
    first = caller.result()
    world.ensure_waiting(pool, 1)
    first.close()
    again.result()
    assert world.server.opened == 1


def test_who_is_next_and_which_tag_must_wait(world):
    pool = world.pool(pool_size=4, soft_limit=3, max_limit=4)
    a, b = world.take(pool, 3, "a"), world.take(pool, 1, "b")
    (heavy,) = world.wait_in_line(pool, "a")
    (light,) = world.wait_in_line(pool, "b")
    a.pop().close()
    b.append(light.result())
    assert state.waiting(pool) == 1, "the tag that holds less is served first"
    give(a + b)
    heavy.result()
    pool = world.pool(pool_size=4, soft_limit=1, max_limit=2)
    held = world.take(pool, 2, "a")
    (caller,) = world.wait_in_line(pool, "a")
    with connect(pool, "b"):  # connections are free, for another tag
        assert pool.stats().tag("b").connections == 1
    held.pop().close()
    assert state.waiting(pool) == 1, "with two active tags the ceiling is 1"
    held.pop().close()
    caller.result()


# -- keeping warm ----------------------------------------------------------------------


def test_warm_connection_is_there_for_all_counts_as_idle_and_for_no_tag(threads, clock):
    pool = threads.pool(1)
    for tag in ("a", "a", "b"):
        connect(pool, tag).close()
        assert state.in_use(pool) == 1, "kept warm"
        assert (pool.checkedout(), pool.checkedin(), pool.stats().idle) == (0, 1, 1)
        assert pool.stats().tag(tag).connections == 0
    pool = threads.pool(pool_size=2, soft_limit=1, max_limit=2)
    connect(pool, "a").close()
    clock.advance(100.0)  # the tag is idle
    threads.take(pool, 2, "b")
    assert pool.stats().tag("b").connections == 2


@pytest.mark.parametrize("method", ["append", "pop"])
def test_waiter_that_comes_while_the_lock_is_not_taken_is_served_first(threads, method):
    """A checkin that has seen no waiter adds a record, or a checkout takes one."""
    # No caller that waits looks around by itself.
    times = {"idle_timeout": 1000.0, "reallocation_interval": 1000.0}
    pool, callers = threads.pool(1, **times, deadlock_timeout=None), []

    def meet(name):
        if name == method and not callers:
            callers.extend(threads.wait_in_line(pool, "b"))

    class Met(WarmRecords):
        def append(self, record):
            meet("append")
            super().append(record)

        def pop(self, index):
            record = super().pop(index)
            meet("pop")
            return record

    holder = connect(pool)
    if method == "pop":
        holder.close()
    state.replace_warm(pool, "a", Met)
    if method == "append":
        holder.close()
    else:
        threads.come(pool)
        threads.eventually(lambda: callers, "the waiter")
    callers[0].result()


def test_warm_connection_above_a_fallen_ceiling_is_not_taken(threads):
    pool = threads.pool(pool_size=4, soft_limit=1, max_limit=3)
    a = threads.take(pool, 3, "a")
    with connect(pool, "b"):
        a.pop().close()  # a holds two still, above its ceiling of 1
        (caller,) = threads.wait_in_line(pool, "a")
        give(a)
    caller.result()


# -- opening and closing ---------------------------------------------------------------


def test_no_caller_waits_while_a_connection_is_being_opened(world):
    pool = world.pool(2)
    held = connect(pool)
    world.server.before["connect"] = gate = world.gate()
    caller = world.come(pool, "b")
    gate.reached()
    held.close()
    connect(pool).close()  # would hang if the lock were held
    assert pool.checkedout() == 1, "the slot is reserved"
    gate.open()
    caller.result()


def test_failed_connect_passes_the_slot_on(world):
    pool, gate = world.pool(1), world.gate()

    def fail():
        gate()
        world.server.before.clear()
        raise StubError("refused")

    world.server.before["connect"] = fail
    caller = world.come(pool, "a")
    gate.reached()
    (waiter,) = world.wait_in_line(pool, "b")
    gate.open()
    with pytest.raises(StubError):
        caller.result()
    waiter.result()


def test_waiter_does_not_wait_for_the_closing_of_another_connection(world):
    pool, gate = world.pool(2), world.gate()
    held = world.take(pool, 2)
    (caller,) = world.wait_in_line(pool)
    # As a transition leaves it that grants a slot to a caller as well.
    state.do_later(pool, gate)
    back = world.start(held.pop().close)
    caller.result().close()
    gate.reached()
    gate.open()
    back.result()


def test_overflow_slot_is_free_when_its_connection_is_closed(world):
    pool = world.pool(1, max_overflow=1)
    one, two = world.take(pool, 2, "a")
    world.server.before["close"] = gate = world.gate()
    one.close()
    back = world.start(two.close)
    gate.reached()
    assert pool.checkedout() == 1
    world.connect(pool, "b")
    (waiter,) = world.wait_in_line(pool, "b")
    gate.open()
    back.result()
    waiter.result()
    assert world.server.most == 2


@pytest.mark.parametrize("cleanup", ["close", "invalidate", "detach"])
@pytest.mark.filterwarnings("ignore:Can't invalidate an already-closed connection")
def test_what_follows_an_interrupted_return_leaves_the_next_caller_alone(
    world, cleanup
):
    """With SQLAlchemy before 2.0.56 and 2.1.6 it meets the next caller's connection."""
    pool = world.pool(1)
    first = connect(pool, "a")
    world.server.before["rollback"] = Mock(side_effect=world.interruption)
    with pytest.raises(world.interruption):
        first.close()
    world.server.before.clear()
    second = world.connect(pool, "b")
    getattr(first, cleanup)()
    assert pool.checkedout() == 1
    assert not second.dbapi_connection.closed


# -- waiting ---------------------------------------------------------------------------


def test_time_out_names_tag_ceiling_line_and_holders(world, clock):
    pool = world.pool(pool_size=3, soft_limit=2, max_limit=3, timeout=0)
    world.take(pool, 2, "web")
    world.take(pool, 1, "jobs")
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool, "web")
    assert str(caught.value).startswith(
        "checkout timed out after 0.00s: tag 'web' in_use=2 limit=2 waiting=1 "
        "position=1; pool in_use=3/3 idle=0 active_tags=2; held by web=2 jobs=1; "
        "oldest: "
    )
    assert isinstance(caught.value, SQLAlchemyTimeoutError)
    assert (caught.value.tag, caught.value.waited) == ("web", 0.0)
    assert pool.stats().tag("web").timeouts == 1
    assert state.waiting(pool) == 0
    pool = world.pool(10, timeout=0)
    for n in range(10):
        world.connect(pool, f"t{n}")
    many = "held by t0=1 t1=1 t2=1 t3=1 t4=1 t5=1 and 4 more tags=4; "
    with pytest.raises(CheckoutTimeout, match=many):
        connect(pool, "late")


def test_time_out_does_happen(world):
    pool = world.pool(1, timeout=0.01, deadlock_timeout=None)
    with connect(pool), pytest.raises(CheckoutTimeout, match=r"after 0\.0\ds"):
        connect(pool)


def test_one_more_than_max_waiting_is_refused_and_takes_no_connection_away(world):
    pool = world.pool(1, max_waiting=1)
    world.connect(pool, "a")
    world.wait_in_line(pool, "a")
    with pytest.raises(TooManyWaiting) as caught:
        connect(pool, "b")
    assert caught.value.args[0] == (
        "too many waiting: tag 'b' refused, waiting=1 max_waiting=1; pool in_use=1/1"
    )
    assert caught.value.tag == "b"
    pool = world.pool(pool_size=3, soft_limit=1, max_limit=2, max_waiting=0)
    give(take(pool, 2, "a"))
    with connect(pool, "a"), connect(pool, "b"):
        for _ in range(3):
            with pytest.raises(TooManyWaiting):
                connect(pool, "a")
    assert pool.checkedin() == 2
    assert world.server.opened == 3


class Interrupted(BaseException):
    pass


def wait_by(pool, sleep):
    """Have callers that come from now on call a function in the place of waiting."""
    waiter = type("Waiter", (ThreadWaiter,), {"wait": lambda self, time: sleep(time)})
    state.wait_with(pool, waiter)


def test_exception_while_waiting_leaves_the_line(threads, monkeypatch):
    pool = threads.pool(1, deadlock_timeout=None)
    with connect(pool):
        for error in KeyboardInterrupt, Interrupted:
            wait_by(pool, Mock(side_effect=error))
            with pytest.raises(error):
                connect(pool)
            assert pool.stats().waiting == 0
        # Also if it is interrupted in leaving, twice: it watches no more.
        leave_line, interrupts = Transitions.leave_line, [Interrupted, Interrupted]

        def leave(transitions, checkout):
            if interrupts:
                raise interrupts.pop()
            leave_line(transitions, checkout)

        monkeypatch.setattr(Transitions, "leave_line", leave)
        state.wait_with(pool, ThreadWaiter)
        pool.reconfigure(timeout=0)
        with pytest.raises(Interrupted):
            connect(pool)
    assert state.watcher(pool) is None


@pytest.mark.parametrize("what", ["exception", "time-out", "third wake-up"])
def test_what_meets_the_grant(threads, clock, what):
    """An exception passes it on to the next; a time-out takes it: no error, no loss."""
    pool = threads.pool(1, timeout=95.0, deadlock_timeout=None)
    holder, waits, others = connect(pool), [], []

    def sleep(time):
        waits.append(time)
        if what == "time-out":
            clock.advance(95.0)
        if what == "exception":
            state.wait_with(pool, ThreadWaiter)
            others.extend(threads.wait_in_line(pool))
        if what != "third wake-up" or len(waits) == 3:
            holder.close()
        if what == "exception":
            raise Interrupted

    wait_by(pool, sleep)
    with pytest.raises(Interrupted) if what == "exception" else nullcontext():
        connect(pool).close()
    for other in others:
        other.result()
    # Others wake up for nothing and sleep on, until they look at idle tags again.
    assert waits == [30.0] * (3 if what == "third wake-up" else 1)


def test_waiters_notice_by_themselves_that_a_tag_became_idle(world):
    times = {"idle_timeout": 0.05, "reallocation_interval": 0.01}
    pool = world.pool(pool_size=4, soft_limit=1, max_limit=2, **times)
    connect(pool, "b").close()
    with connect(pool, "a"):
        # Its ceiling is 1 for as long as b is active. No call touches the pool.
        connect(pool, "a").close()


# -- dispose and recreate --------------------------------------------------------------


def test_dispose_keeps_the_bound(threads):
    engine, server = threads.engine(4), threads.server
    out, idle = take(engine, 2), take(engine, 2)
    give(idle)
    engine.dispose()
    assert server.open == 2
    more = take(engine, 2)
    (caller,) = threads.wait_in_line(engine)
    assert server.most == 4
    out.pop().close()  # closed, not kept in the pool that is gone
    caller.result().close()
    assert server.most == 4
    give(out + more)
    engine.dispose()
    assert server.open == 0


@pytest.mark.parametrize("waiting", [0, 1])
@pytest.mark.parametrize("tag", ["a", "unknown"])
def test_connection_held_over_a_dispose_is_closed_when_it_comes_back(
    threads, tag, waiting
):
    engine, server = threads.engine(1), threads.server
    with connect(engine, tag):
        engine.dispose()
        callers = threads.wait_in_line(engine, tag, waiting)
    assert callers or server.open == 0
    for caller in callers or [threads.come(engine, tag)]:
        caller.result()
    assert (server.opened, server.open, server.most) == (2, 1, 1)


def test_connections_being_closed_by_dispose_keep_their_slots(threads):
    engine, gate = threads.engine(2), threads.gate()
    give(take(engine, 2))
    threads.server.before["close"] = gate
    disposal = threads.start(engine.dispose)
    gate.reached()
    callers = [threads.come(engine) for _ in range(2)]
    threads.eventually(lambda: state.waiting(engine) >= 1)
    gate.open()
    for caller in disposal, *callers:
        caller.result()
    assert threads.server.most <= 2


def test_interrupt_while_disposing_leaves_the_rest_to_the_next(threads):
    pool = threads.pool(3)
    connections = take(pool, 3)
    dbapi_connections = [c.dbapi_connection for c in connections]
    give(connections[::-1])
    dbapi_connections[-1].close = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.dispose()
    connect(pool, "b").close()
    assert [c.closed for c in dbapi_connections[:2]] == [True, True]
    assert state.capacity(pool) == 3


def test_recreate_keeps_class_options_and_accounting(server):
    class ScraperPool(FairQueuePool):
        def __init__(self, creator, colour="red", **kw):
            self.colour = colour
            super().__init__(creator, **kw)

    pool = server.pool(
        ScraperPool,
        pool_size=7,
        max_overflow=2,
        timeout=3.0,
        soft_limit=4,
        max_limit=6,
        idle_timeout=5.0,
        reallocation_interval=2.0,
        max_waiting=9,
        tag_option="tenant",
        default_tag="nobody",
        use_lifo=True,
        recycle=99,
        pre_ping=True,
        reset_on_return="commit",
        logging_name="mine",
    )
    again = pool.recreate()
    assert type(again) is ScraperPool
    assert repr(again).startswith("<ScraperPool in_use=0/9")
    assert again.options == pool.options
    assert state.core(again) is state.core(pool)
    for name in ("_recycle", "_pre_ping", "_reset_on_return", "_orig_logging_name"):
        assert getattr(again, name) == getattr(pool, name)


def test_successor_waits_in_the_same_way_and_for_the_same_slots(world):
    pool = world.pool(2)
    successor = pool.recreate()
    assert type(successor) is world.pool_class
    for _ in range(2):
        give(take(pool, 2))  # it goes on while its successor is not used
    assert world.server.opened == 2
    world.connect(pool)
    world.connect(successor)  # what the former has left gives way
    assert (world.server.most, world.server.open) == (2, 2)
    world.wait_in_line(successor)


def test_successor_that_was_not_used_yet_is_empty(threads):
    """As ``engine.dispose(close=False)`` leaves it; the old one ends by its use."""
    engine = threads.engine()
    connect(engine).close()
    former = engine.pool
    engine.dispose(close=False)
    assert (former.checkedin(), engine.pool.checkedin()) == (1, 0)
    connect(engine).close()
    assert (former.checkedin(), engine.pool.checkedin()) == (0, 1)
    former.dispose()
    assert (former.checkedin(), engine.pool.checkedin()) == (0, 1)
    assert threads.server.open == 1


def test_lost_connection_is_refused_where_its_replacement_may_not_wait(threads):
    """Opened again, it would be one too many: its caller asks as at a checkout."""
    pool = threads.pool(pool_size=2, max_waiting=0)
    first, second = connect(pool, "a"), connect(pool, "b")
    pool.reconfigure(pool_size=1)
    record = state.record_of(first)
    record.invalidate()
    with pytest.raises(TooManyWaiting):
        record.get_connection()
    give([first, second])
    connect(pool).close()


def test_caller_that_another_thread_wakes_in_the_middle_of_its_grant(
    make_pool, monkeypatch
):
    """It looks too early, and must not sleep again after that."""
    pool = make_pool(1, timeout=1e6, deadlock_timeout=None)
    held = connect(pool)
    (caller,) = wait_in_line(pool)
    looks = threading.Event()
    monkeypatch.setattr(Slots, "refusal", property(lambda self: looks.set()))

    class WakeUps(deque):
        def append(self, wake):
            wake()  # as a thread does that is waking others at this moment
            assert looks.wait(PATIENCE)

    monkeypatch.setattr(pool._core.lock, "wake_ups", WakeUps())
    held.close()
    caller.result().close()
