"""How connections change hands, each race frozen and asserted: threads and tasks."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError
from support import state
from support.stub import StubError
from support.threads import (
    Caller,
    Gate,
    connect,
    ensure_waiting,
    eventually,
    give,
    take,
    wait_in_line,
)
from support.worlds import contract

from sqla_fairpool import CheckoutTimeout, FairQueuePool, TooManyWaiting
from sqla_fairpool.pool.transitions import Transitions
from sqla_fairpool.pool.waiters import ThreadWaiter
from sqla_fairpool.pool.warm import WarmRecords

# -- hand-off ------------------------------------------------------------------


@contract
def test_waiter_gets_the_very_connection_that_came_back(world):
    pool = world.pool(1)
    holder = connect(pool)
    dbapi_connection = holder.dbapi_connection
    (caller,) = world.wait_in_line(pool)
    holder.close()
    connection = caller.result()
    assert connection.dbapi_connection is dbapi_connection
    connection.close()


@contract
def test_line_is_served_in_order(world):
    pool = world.pool(1)
    holder = connect(pool)
    for number, caller in enumerate(world.wait_in_line(pool, count=5), 1):
        holder.close()
        holder = caller.result()
        assert state.waiting(pool) == 5 - number
    holder.close()


@contract
def test_caller_that_comes_back_does_not_overtake_the_waiter(world):
    pool = world.pool(1)
    holder = connect(pool)
    (caller,) = world.wait_in_line(pool)
    holder.close()
    again = world.start(connect, pool)
    first = caller.result()
    world.ensure_waiting(pool, 1)
    first.close()
    again.result().close()
    assert world.server.opened == 1


@contract
def test_freed_connection_goes_to_the_tag_that_holds_less(world):
    pool = world.pool(pool_size=4, soft_limit=3, max_limit=4)
    a, b = take(pool, 3, "a"), take(pool, 1, "b")
    (heavy,) = world.wait_in_line(pool, "a")
    (light,) = world.wait_in_line(pool, "b")
    a.pop().close()
    b.append(light.result())
    assert state.waiting(pool) == 1
    give(a + b)
    heavy.result().close()


@contract
def test_tag_at_its_ceiling_waits_although_connections_are_free(world):
    pool = world.pool(pool_size=4, soft_limit=1, max_limit=2)
    held = take(pool, 2, "a")
    (caller,) = world.wait_in_line(pool, "a")
    with connect(pool, "b"):
        assert pool.stats().tag("b").connections == 1
    held.pop().close()
    assert state.waiting(pool) == 1, "with two active tags the ceiling is 1"
    held.pop().close()
    caller.result().close()


# -- keeping warm --------------------------------------------------------------


def test_connection_kept_warm_is_there_for_everybody_and_counts_as_idle(make_pool):
    pool = make_pool(1)
    for tag in ("a", "a", "b"):
        connect(pool, tag).close()
        assert state.in_use(pool) == 1, "kept warm"
        assert (pool.checkedout(), pool.checkedin(), pool.stats().idle) == (0, 1, 1)
        assert pool.stats().tag(tag).connections == 0


def test_checkin_that_meets_a_new_waiter_serves_it(make_pool):
    """The checkin has seen no waiter; before the record is warm, one comes."""
    pool = make_pool(1)
    holder = connect(pool)
    callers = []

    class Late(WarmRecords):
        def append(self, record):
            callers.extend(wait_in_line(pool, "b"))
            super().append(record)

    state.replace_warm(pool, "a", Late)
    holder.close()
    callers[0].result().close()


def test_checkout_that_meets_a_new_waiter_lets_it_go_first(make_pool):
    """The checkout has taken the warm record when another caller waits."""
    pool = make_pool(1)
    connect(pool).close()
    callers = []

    class Early(WarmRecords):
        def pop(self, index):
            record = super().pop(index)
            if not callers:
                callers.extend(wait_in_line(pool, "b"))
            return record

    state.replace_warm(pool, "a", Early)
    again = Caller(connect, pool)
    eventually(lambda: callers, "the waiter")
    callers[0].result().close()
    again.result().close()


def test_warm_connection_above_a_fallen_ceiling_is_not_taken(make_pool):
    pool = make_pool(pool_size=4, soft_limit=1, max_limit=3)
    a = take(pool, 3, "a")
    with connect(pool, "b"):
        a.pop().close()  # a holds two still, above its ceiling of 1
        (caller,) = wait_in_line(pool, "a")
        give(a)
    caller.result().close()


def test_warm_connection_of_an_idle_tag_counts_for_nobody(make_pool, clock):
    pool = make_pool(pool_size=2, soft_limit=1, max_limit=2)
    connect(pool, "a").close()
    clock.advance(100.0)
    held = take(pool, 2, "b")
    assert pool.stats().tag("b").connections == 2
    give(held)


# -- opening and closing -------------------------------------------------------


@contract
def test_nobody_waits_while_a_connection_is_being_opened(world):
    pool = world.pool(2)
    held = connect(pool)
    world.server.before["connect"] = gate = world.gate()
    caller = world.start(connect, pool, "b")
    gate.reached()
    held.close()
    connect(pool).close()  # would hang if the lock were held
    assert pool.checkedout() == 1, "the slot is reserved"
    gate.open()
    caller.result().close()


@contract
def test_failed_connect_passes_the_slot_on(world):
    pool, gate = world.pool(1), world.gate()

    def fail():
        gate()
        world.server.before.clear()
        raise StubError("refused")

    world.server.before["connect"] = fail
    caller = world.start(connect, pool, "a")
    gate.reached()
    (waiter,) = world.wait_in_line(pool, "b")
    gate.open()
    with pytest.raises(StubError):
        caller.result()
    waiter.result().close()


@contract
def test_waiter_does_not_wait_for_the_closing_of_another_connection(world):
    pool, gate = world.pool(2), world.gate()
    held = take(pool, 2)
    (caller,) = world.wait_in_line(pool)
    # As a transition leaves it that grants a slot to a caller as well.
    state.do_later(pool, gate)
    back = world.start(held.pop().close)
    caller.result().close()
    gate.reached()
    gate.open()
    back.result()
    give(held)


@contract
def test_overflow_slot_is_free_when_its_connection_is_closed(world):
    pool = world.pool(1, max_overflow=1)
    one, two = take(pool, 2, "a")
    world.server.before["close"] = gate = world.gate()
    one.close()
    caller = world.start(two.close)
    gate.reached()
    assert pool.checkedout() == 1
    late = connect(pool, "b")
    (waiter,) = world.wait_in_line(pool, "b")
    gate.open()
    caller.result()
    waiter.result().close()
    late.close()
    assert world.server.most == 2


@pytest.mark.parametrize("cleanup", ["close", "invalidate", "detach"])
@pytest.mark.filterwarnings("ignore:Can't invalidate an already-closed connection")
@contract
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
    second = connect(pool, "b")
    getattr(first, cleanup)()
    assert pool.checkedout() == 1
    assert not second.dbapi_connection.closed
    second.close()


# -- waiting -------------------------------------------------------------------


@contract
def test_time_out_names_tag_ceiling_line_and_holders(world, clock):
    pool = world.pool(pool_size=3, soft_limit=2, max_limit=3, timeout=0)
    held = take(pool, 2, "web") + take(pool, 1, "jobs")
    with pytest.raises(CheckoutTimeout) as caught:
        connect(pool, "web")
    assert str(caught.value).startswith(
        "checkout timed out after 0.00s: tag 'web' in_use=2 ceiling=2 waiting=1 "
        "position=1; pool in_use=3/3 idle=0 active_tags=2; held by web=2 jobs=1; "
        "oldest: "
    )
    assert isinstance(caught.value, SQLAlchemyTimeoutError)
    assert (caught.value.tag, caught.value.waited) == ("web", 0.0)
    assert pool.stats().tag("web").timeouts == 1
    assert state.waiting(pool) == 0
    give(held)


@contract
def test_time_out_does_happen(world):
    pool = world.pool(1, timeout=0.01, deadlock_timeout=None)
    with connect(pool), pytest.raises(CheckoutTimeout, match=r"after 0\.0\ds"):
        connect(pool)


def test_many_holders_are_summed_up(make_pool):
    pool = make_pool(10, timeout=0)
    held = [connect(pool, f"t{n}") for n in range(10)]
    summed_up = "held by t0=1 t1=1 t2=1 t3=1 t4=1 t5=1 and 4 more tags=4; "
    with pytest.raises(CheckoutTimeout, match=summed_up):
        connect(pool, "late")
    give(held)


@contract
def test_one_more_than_max_waiting_is_refused_at_once(world):
    pool = world.pool(1, max_waiting=1)
    holder = connect(pool, "a")
    (caller,) = world.wait_in_line(pool, "a")
    with pytest.raises(TooManyWaiting) as caught:
        connect(pool, "b")
    assert str(caught.value) == (
        "too many waiting: tag 'b' refused, waiting=1 max_waiting=1; pool in_use=1/1"
    )
    assert caught.value.tag == "b"
    holder.close()
    caller.result().close()


def test_refused_caller_takes_no_idle_connection_away(make_pool, server):
    pool = make_pool(pool_size=3, soft_limit=1, max_limit=2, max_waiting=0)
    give(take(pool, 2, "a"))
    with connect(pool, "a"), connect(pool, "b"):
        for _ in range(3):
            with pytest.raises(TooManyWaiting):
                connect(pool, "a")
    assert server.open == 2
    assert pool.checkedin() == 2


class Interrupted(BaseException):
    pass


def waiter(sleep):
    """Return a class of waiters that call `sleep` in the place of waiting."""
    return type("Waiter", (ThreadWaiter,), {"wait": lambda self, time: sleep(time)})


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_exception_while_waiting_leaves_the_line(make_pool, error):
    pool = make_pool(1, deadlock_timeout=None)
    with connect(pool):
        state.wait_with(pool, waiter(Mock(side_effect=error)))
        with pytest.raises(error):
            connect(pool)
        assert pool.stats().waiting == 0


def test_watch_is_passed_on_though_its_owner_is_interrupted_in_leaving(
    make_pool, monkeypatch
):
    pool, leave_line = make_pool(1, timeout=0), Transitions.leave_line
    interrupts = [Interrupted, Interrupted]

    def leave(transitions, checkout):
        if interrupts:
            raise interrupts.pop()
        leave_line(transitions, checkout)

    monkeypatch.setattr(Transitions, "leave_line", leave)
    with connect(pool), pytest.raises(Interrupted):
        connect(pool)
    assert state.watcher(pool) is None


def test_exception_that_meets_the_grant_passes_it_on(make_pool):
    """Granted and interrupted in the same instant: the next caller gets it."""
    pool, others = make_pool(1), []
    holder = connect(pool)

    def granted_meanwhile(time):
        state.wait_with(pool, ThreadWaiter)
        others.extend(wait_in_line(pool))
        holder.close()
        raise Interrupted

    state.wait_with(pool, waiter(granted_meanwhile))
    with pytest.raises(Interrupted):
        connect(pool)
    others[0].result().close()


def test_time_out_that_meets_the_grant_takes_it(make_pool, clock):
    """Granted in the same instant as the deadline passes: no error, no loss."""
    pool = make_pool(1, timeout=5.0)
    holder = connect(pool)

    def sleep(time):
        clock.advance(5.0)
        holder.close()

    state.wait_with(pool, waiter(sleep))
    connect(pool).close()


def test_waiter_that_wakes_up_for_nothing_sleeps_on(make_pool, clock):
    pool = make_pool(1, deadlock_timeout=None)
    holder, wakes = connect(pool), []

    def sleep(time):
        wakes.append(time)
        if len(wakes) == 3:
            holder.close()

    state.wait_with(pool, waiter(sleep))
    connect(pool).close()
    assert wakes == [30.0, 30.0, 30.0]


# -- the reallocation, noticed by waiters --------------------------------------


@contract
def test_waiters_notice_by_themselves_that_a_tag_became_idle(world):
    times = {"idle_timeout": 0.05, "reallocation_interval": 0.01}
    pool = world.pool(pool_size=4, soft_limit=1, max_limit=2, **times)
    connect(pool, "b").close()
    with connect(pool, "a"):
        # Its ceiling is 1 for as long as b is active. No call touches the pool.
        connect(pool, "a").close()


def test_watch_is_passed_on_to_the_newest_waiter_when_its_owner_leaves(make_pool):
    """It will wait longest, so the watch changes hands seldom."""
    pool = make_pool(1)
    holder = connect(pool)
    for left, caller in zip((2, 1, 0), wait_in_line(pool, count=3), strict=True):
        assert state.watcher(pool).waiter is not None, "the watcher waits itself"
        holder.close()
        holder = caller.result()
        state.assert_consistent(pool)
        assert state.watcher(pool) is (state.newest_waiter(pool) if left else None)
    holder.close()


# -- dispose and recreate ------------------------------------------------------


def test_dispose_keeps_the_bound(make_engine, server):
    engine = make_engine(4)
    out, idle = take(engine, 2), take(engine, 2)
    give(idle)
    engine.dispose()
    assert server.open == 2
    more = take(engine, 2)
    caller = Caller(connect, engine)
    ensure_waiting(engine.pool, 1)
    assert server.most == 4
    out.pop().close()  # closed, not kept in the pool that is gone
    caller.result().close()
    assert server.most == 4
    give(out + more)
    engine.dispose()
    assert server.open == 0


@pytest.mark.parametrize("tag", ["a", "unknown"])
def test_connection_held_over_a_dispose_is_closed_when_it_comes_back(
    make_engine, server, tag
):
    engine = make_engine()
    with connect(engine, tag):
        engine.dispose()
    assert server.open == 0
    with connect(engine, tag):
        assert (server.opened, server.open) == (2, 1)


def test_connection_held_over_a_dispose_is_not_handed_to_a_waiter(make_engine, server):
    engine = make_engine(1)
    with connect(engine):
        engine.dispose()
        caller = Caller(connect, engine)
        ensure_waiting(engine.pool, 1)
    caller.result().close()
    assert (server.opened, server.most) == (2, 1)


def test_connections_being_closed_by_dispose_keep_their_slots(make_engine, server):
    engine, gate = make_engine(2), Gate()
    give(take(engine, 2))
    server.before["close"] = gate
    disposal = Caller(engine.dispose)
    gate.reached()
    callers = [Caller(connect, engine) for _ in range(2)]
    eventually(lambda: state.waiting(engine) >= 1)
    gate.open()
    disposal.result()
    give([caller.result() for caller in callers])
    assert server.most <= 2


def test_interrupt_while_disposing_leaves_the_rest_to_the_next(make_pool, server):
    pool = make_pool(3)
    connections = take(pool, 3)
    dbapi_connections = [c.dbapi_connection for c in connections]
    for connection in connections:
        connection.close()
    dbapi_connections[-1].close = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.dispose()
    connect(pool, "b").close()
    assert [c.closed for c in dbapi_connections[:2]] == [True, True]
    assert state.capacity(pool) == 3


def test_recreate_keeps_every_option(server):
    pool = server.pool(
        FairQueuePool,
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
    assert type(again) is FairQueuePool
    assert again.options == pool.options
    assert state.core(again) is state.core(pool)
    for name in ("_recycle", "_pre_ping", "_reset_on_return", "_orig_logging_name"):
        assert getattr(again, name) == getattr(pool, name)


def test_recreate_of_a_subclass_with_options_of_its_own(server):
    class ScraperPool(FairQueuePool):
        def __init__(self, creator, colour="red", **kw):
            self.colour = colour
            super().__init__(creator, **kw)

    pool = server.pool(ScraperPool, pool_size=3)
    assert type(pool.recreate()) is ScraperPool
    assert pool.recreate().size() == 3


@contract
def test_successor_waits_in_the_same_way_and_for_the_same_slots(world):
    pool = world.pool(1)
    successor = pool.recreate()
    assert type(successor) is world.pool_class
    holder = connect(pool)
    (caller,) = world.wait_in_line(successor)
    holder.close()
    caller.result().close()


def test_what_a_former_pool_has_left_gives_way_when_it_is_in_the_way(make_pool, server):
    pool = make_pool(2)
    give(take(pool, 2))
    held = take(pool.recreate(), 2)
    assert (server.most, server.open) == (2, 2)
    give(held)


def test_pool_goes_on_while_its_successor_is_not_used(make_pool, server):
    pool = make_pool(2)
    pool.recreate()
    for _ in range(2):
        connect(pool).close()
    assert server.opened == 1


def test_successor_that_was_not_used_yet_is_empty(make_engine, server):
    """As ``engine.dispose(close=False)`` leaves it; the old one ends by its use."""
    engine = make_engine()
    connect(engine).close()
    former = engine.pool
    engine.dispose(close=False)
    assert (former.checkedin(), engine.pool.checkedin()) == (1, 0)
    connect(engine).close()
    assert (former.checkedin(), engine.pool.checkedin()) == (0, 1)
    former.dispose()
    assert (former.checkedin(), engine.pool.checkedin()) == (0, 1)
    assert server.open == 1


def test_lost_connection_is_refused_where_its_replacement_may_not_wait(make_pool):
    """Opened again, it would be one too many: its caller asks as at a checkout."""
    pool = make_pool(pool_size=2, max_waiting=0)
    first, second = connect(pool, "a"), connect(pool, "b")
    pool.reconfigure(pool_size=1)
    record = state.record_of(first)
    record.invalidate()
    with pytest.raises(TooManyWaiting):
        record.get_connection()
    first.close()
    second.close()
    connect(pool).close()
    state.assert_quiet(pool)
