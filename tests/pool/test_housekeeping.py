"""Connections opened ahead, closed when unused, and options changed while running."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading

import pytest
from sqlalchemy.exc import ArgumentError
from sqlalchemy.util import greenlet_spawn
from support import state
from support.state import assert_consistent, assert_quiet
from support.stub import StubError
from support.tasks import checkin, checkout
from support.threads import PATIENCE, Caller, ensure_waiting, eventually

import sqla_fairpool
from sqla_fairpool import AsyncAdaptedFairQueuePool
from sqla_fairpool.pool.waiters import ThreadWaiter


def take(pool, number, name="a"):
    """Check out so many connections under a tag."""
    with sqla_fairpool.tag(name):
        return [pool.connect() for _ in range(number)]


def give(fairies):
    while fairies:
        fairies.pop().close()


def opened_ahead(pool):
    """Wait until all that are opened ahead are open."""
    eventually(
        lambda: not any(t.name.endswith("min_idle") for t in threading.enumerate())
    )


# -- min_idle -------------------------------------------------------------------------


def test_first_use_opens_min_idle_connections(make_pool, server):
    pool = make_pool(min_idle=5)
    assert server.opened == 0
    fairy = pool.connect()
    opened_ahead(pool)
    assert server.opened == 5
    fairy.close()
    give(take(pool, 5))
    assert server.opened == 5


def test_first_caller_does_not_wait_for_those_opened_ahead(make_pool, server):
    pool = make_pool(min_idle=3)
    go_on = threading.Event()

    def connect():
        if server.opened:
            assert go_on.wait(PATIENCE)

    server.before["connect"] = connect
    pool.connect().close()
    assert server.opened == 1
    go_on.set()
    opened_ahead(pool)
    assert server.opened == 3


def test_what_is_opened_ahead_knows_nothing_of_the_first_caller(server):
    """A creator, or a listener, that starts something in the background."""
    seen, variable = [], contextvars.ContextVar("variable", default=None)

    async def main():
        pool = server.pool(AsyncAdaptedFairQueuePool, min_idle=2)
        server.before["connect"] = lambda: seen.append(variable.get())
        variable.set("the first caller's")
        fairy = await greenlet_spawn(pool.connect)
        while len(seen) < 2:
            await asyncio.sleep(0)
        await greenlet_spawn(fairy.close)
        await greenlet_spawn(pool.dispose)

    asyncio.run(main())
    assert seen == ["the first caller's", None]


def test_warm_up_opens_them_before_the_first_use(make_pool, server):
    pool = make_pool(min_idle=5)
    assert pool.warm_up() == 5
    assert pool.checkedin() == 5
    assert pool.warm_up() == 0
    pool.connect().close()
    assert server.opened == 5


def test_those_that_are_out_count_for_min_idle(make_pool, server):
    pool = make_pool(min_idle=5)
    fairies = take(pool, 3)
    opened_ahead(pool)
    assert server.opened == 5
    assert pool.warm_up() == 0
    give(fairies)


def test_nothing_is_opened_ahead_by_default(make_pool, server):
    pool = make_pool()
    assert pool.warm_up() == 0
    pool.connect().close()
    assert server.opened == 1


def test_first_use_succeeds_if_the_others_cannot_be_opened(make_pool, server, caplog):
    pool = make_pool(min_idle=3)

    def connect():
        if server.opened:
            raise StubError("no more")

    server.before["connect"] = connect
    with caplog.at_level(logging.WARNING, "sqlalchemy.pool"):
        pool.connect().close()
        opened_ahead(pool)
    assert "3 connections (min_idle) could not be opened ahead: no more" in caplog.text
    assert_quiet(pool)


def test_warm_up_raises_what_opening_raises_and_keeps_what_is_open(make_pool, server):
    pool = make_pool(min_idle=3)

    def connect():
        if server.opened == 2:
            raise StubError("no more")

    server.before["connect"] = connect
    with pytest.raises(StubError):
        pool.warm_up()
    assert pool.checkedin() == 2
    assert_quiet(pool)


def test_interrupt_in_the_first_use_loses_neither_slot_nor_connection(
    make_pool, monkeypatch
):
    def interrupt(function):
        raise KeyboardInterrupt

    pool = make_pool(min_idle=3)
    monkeypatch.setattr(ThreadWaiter, "run_apart", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.connect()
    assert pool.checkedin() == 1
    assert_quiet(pool)


def test_slot_of_a_connection_that_is_opened_ahead_is_taken(make_pool, server):
    """Nobody opens one more than the capacity meanwhile; who waits gets it."""
    pool = make_pool(pool_size=1, soft_limit=1, max_limit=1, min_idle=1)
    callers = []

    def connect():
        server.before.clear()
        callers.append(Caller(pool.connect))
        ensure_waiting(pool, 1)

    server.before["connect"] = connect
    pool.warm_up()
    callers[0].result().close()
    assert server.opened == server.most == 1


def test_forked_child_or_new_pool_opens_them_again(make_pool, server):
    pool = make_pool(min_idle=3)
    pool.connect().close()
    opened_ahead(pool)
    pool.dispose()
    assert server.open == 0
    successor = pool.recreate()
    successor.connect().close()
    opened_ahead(pool)
    assert server.open == 3
    state.after_fork(pool)
    successor.connect().close()
    opened_ahead(pool)
    assert server.opened == 9


def test_new_pool_is_warmed_up_before_its_first_use(make_pool, server):
    pool = make_pool(min_idle=3)
    pool.warm_up()
    pool.dispose()
    successor = pool.recreate()
    assert successor.warm_up() == 3
    assert (server.open, successor.checkedin()) == (3, 3)


def test_warming_up_ends_when_another_pool_takes_over(make_pool, server):
    pool = make_pool(min_idle=3)
    successor = pool.recreate()

    def connect():
        server.before.clear()
        successor.connect().close()

    server.before["connect"] = connect
    assert pool.warm_up() == 1
    # The new one counted the connection that was being opened, and this was closed.
    assert server.open == successor.checkedin() == 2
    assert successor.warm_up() == 1


def test_asyncio_pool_is_warmed_up_in_a_task(server):
    async def main():
        pool = server.pool(AsyncAdaptedFairQueuePool, min_idle=4)
        assert await pool.warm_up() == 4
        await checkin(await checkout(pool))
        await pool.upkeep()
        assert_quiet(pool)

    asyncio.run(main())
    assert server.opened == 4


# -- idle_connection_ttl ------------------------------------------------------------


def test_unused_connections_are_closed_by_the_next_visitor(make_pool, server, clock):
    pool = make_pool(idle_connection_ttl=100.0)
    give(take(pool, 5))
    for _ in range(8):
        clock.advance(25.0)
        give(take(pool, 1))  # one is enough for what is asked here
    assert server.open == 1


def test_connection_is_not_closed_before_its_time(make_pool, server, clock):
    pool = make_pool(idle_connection_ttl=100.0)
    give(take(pool, 5))
    for _ in range(4):
        pool.upkeep()
        clock.advance(24.9)
    pool.upkeep()
    assert server.open == 5
    clock.advance(26.0)
    pool.upkeep()
    assert server.open == 0


def test_connection_that_is_used_stays(make_pool, server, clock):
    pool = make_pool(idle_connection_ttl=100.0)
    for _ in range(20):
        give(take(pool, 2))
        clock.advance(50.0)
    assert server.opened == 2


def test_connection_used_without_the_lock_counts_as_used(make_pool, server, clock):
    """Kept warm and taken again, no critical section in between."""
    pool = make_pool(idle_connection_ttl=100.0)
    give(take(pool, 1))
    for _ in range(50):
        clock.advance(10.0)
        give(take(pool, 1))
    assert server.opened == 1


def test_min_idle_stays_open(make_pool, server, clock):
    pool = make_pool(idle_connection_ttl=100.0, min_idle=2)
    give(take(pool, 5))
    for _ in range(20):
        clock.advance(30.0)
        pool.upkeep()
    assert server.open == 2


def test_connection_out_counts_for_min_idle_when_others_are_closed(
    make_pool, server, clock
):
    pool = make_pool(idle_connection_ttl=100.0, min_idle=2)
    fairies = take(pool, 5)
    held = take(pool, 1)
    give(fairies)
    for _ in range(20):
        clock.advance(30.0)
        pool.upkeep()
    assert server.open == 2
    give(held)


def test_asking_in_vain_is_no_use_of_a_connection(make_pool, server, clock):
    """A tag at its ceiling looks at an idle connection, and does not get it."""
    pool = make_pool(
        pool_size=4, soft_limit=1, max_limit=1, timeout=0, idle_connection_ttl=100.0
    )
    held = take(pool, 1)
    give(take(pool, 1, "b"))
    for _ in range(8):
        with pytest.raises(sqla_fairpool.CheckoutTimeout):
            take(pool, 1)
        clock.advance(25.0)
    pool.upkeep()
    assert server.open == 1
    give(held)


def test_slot_is_taken_until_the_unused_connection_is_closed(make_pool, server, clock):
    pool = make_pool(pool_size=1, soft_limit=1, max_limit=1, idle_connection_ttl=100.0)
    give(take(pool, 1))
    pool.upkeep()
    callers = []

    def close():
        server.before.clear()
        callers.append(Caller(pool.connect))
        ensure_waiting(pool, 1)

    server.before["close"] = close
    for _ in range(5):
        clock.advance(30.0)
        pool.upkeep()
    callers[0].result().close()
    assert server.most == 1


def test_common_path_does_not_look(make_pool, server, clock):
    """With a connection kept warm, a checkout enters no critical section."""
    pool = make_pool(idle_connection_ttl=100.0, min_idle=2)
    give(take(pool, 1))
    with state.lock_forbidden(pool):
        give(take(pool, 1))


# -- reconfigure ----------------------------------------------------------------------


def test_waiter_who_may_go_on_is_woken(make_pool):
    pool = make_pool(pool_size=4, soft_limit=1, max_limit=1)
    fairies = take(pool, 1)
    caller = Caller(take, pool, 1)
    ensure_waiting(pool, 1)
    pool.reconfigure(soft_limit=2, max_limit=2)
    fairies += caller.result()
    assert pool.stats().tag("a").limit == 2
    give(fairies)


def test_several_waiters_are_woken_by_one_change(make_pool):
    pool = make_pool(pool_size=2, soft_limit=2, max_limit=2)
    fairies = take(pool, 2)
    callers = [Caller(take, pool, 1, name) for name in "abc"]
    ensure_waiting(pool, 3)
    pool.reconfigure(pool_size=5, soft_limit=5, max_limit=5)
    for caller in callers:
        fairies += caller.result()
    assert pool.checkedout() == 5
    give(fairies)


def test_lowered_limit_drains_and_takes_nothing_away(make_pool):
    pool = make_pool(pool_size=4, soft_limit=4, max_limit=4, timeout=0)
    fairies = take(pool, 4)
    pool.reconfigure(soft_limit=2, max_limit=2)
    assert pool.checkedout() == 4
    for left in (3, 2):
        fairies.pop().close()
        with pytest.raises(sqla_fairpool.CheckoutTimeout):
            take(pool, 1)
        assert pool.checkedout() == left
    fairies.pop().close()
    fairies += take(pool, 1)
    give(fairies)


def test_lowered_capacity_drains(make_pool, server):
    pool = make_pool(pool_size=6, soft_limit=6, max_limit=6)
    fairies = take(pool, 6)
    pool.reconfigure(pool_size=2, soft_limit=None, max_limit=None)
    for still_open in (5, 4, 3, 2):
        fairies.pop().close()
        assert server.open == still_open
        assert_consistent(pool)
    give(fairies)
    assert server.open == pool.checkedin() == 2


def test_waiter_gets_no_slot_that_is_above_a_lowered_capacity(make_pool, server):
    pool = make_pool(pool_size=3, soft_limit=3, max_limit=3)
    fairies = take(pool, 3)
    caller = Caller(take, pool, 1, "b")
    ensure_waiting(pool, 1)
    pool.reconfigure(pool_size=1, soft_limit=1, max_limit=1)
    fairies.pop().close()
    fairies.pop().close()
    assert state.waiting(pool) == 1
    assert server.open == 1
    fairies.pop().close()
    give(caller.result())
    assert server.opened == 3


def test_idle_connections_above_a_lowered_capacity_are_closed(make_pool, server):
    pool = make_pool(pool_size=6, soft_limit=6, max_limit=6)
    fairies = take(pool, 6)
    while len(fairies) > 1:
        fairies.pop().close()
    pool.reconfigure(pool_size=3, soft_limit=3, max_limit=3)
    assert server.open == 3
    fairies += take(pool, 2)
    assert server.opened == 6
    give(fairies)


def test_pool_size_alone_may_move_to_overflow(make_pool, server):
    pool = make_pool(pool_size=4, soft_limit=4, max_limit=4)
    give(take(pool, 4))
    pool.reconfigure(pool_size=1, max_overflow=3)
    assert server.open == 1
    fairies = take(pool, 4)
    assert server.open == 4
    give(fairies)
    assert server.open == 1
    pool.reconfigure(pool_size=4, max_overflow=0)
    give(take(pool, 4))
    assert server.open == 4


def test_limits_that_were_not_given_follow_the_capacity(make_pool):
    pool = make_pool()
    pool.reconfigure(pool_size=40)
    assert (pool.options.soft_limit, pool.options.max_limit) == (20, 30)
    pool.reconfigure(soft_limit=5)
    pool.reconfigure(pool_size=20)
    assert (pool.options.soft_limit, pool.options.max_limit) == (5, 15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_limit": 12, "soft_limit": 0}, "soft_limit=0 is not allowed"),
        ({"max_limit": 12, "pool_size": "x"}, "pool_size='x' is not allowed"),
        ({"max_limit": 12, "min_idle": 21}, "min_idle=21 is not allowed"),
        ({"max_limit": 12, "tag_option": "x"}, "tag_option='x' is not allowed: what"),
        ({"max_limit": 12, "softlimit": 3}, "softlimit=3 is not allowed: what can"),
    ],
)
def test_bad_value_changes_nothing(make_pool, changes, message):
    pool = make_pool()
    before = pool.options
    with pytest.raises(ArgumentError, match=message):
        pool.reconfigure(**changes)
    assert pool.options is before
    give(take(pool, 15))


def test_idle_timeout_takes_effect_for_tags_that_are_active(make_pool, clock):
    pool = make_pool()
    give(take(pool, 1))
    pool.reconfigure(idle_timeout=5.0, reallocation_interval=1.0)
    clock.advance(6.0)
    pool.upkeep()
    assert not pool.stats().tag("a").active


def test_waiter_looks_at_the_new_times(make_pool, clock):
    """The one that watches for the reallocation is woken to wait for the new one."""
    pool = make_pool(pool_size=2, soft_limit=1, max_limit=2, idle_timeout=1000.0)
    give(take(pool, 1, "b"))
    fairies = take(pool, 1)
    caller = Caller(take, pool, 1)
    ensure_waiting(pool, 1)
    clock.advance(10.0)
    pool.reconfigure(idle_timeout=0.01, reallocation_interval=0.01)
    clock.advance(0.02)
    fairies += caller.result()
    give(fairies)


def test_timeout_and_max_waiting_are_for_those_who_come(make_pool):
    pool = make_pool(pool_size=1)
    fairies = take(pool, 1)
    caller = Caller(take, pool, 1)
    ensure_waiting(pool, 1)
    pool.reconfigure(max_waiting=0)
    with pytest.raises(sqla_fairpool.TooManyWaiting):
        take(pool, 1)
    pool.reconfigure(max_waiting=None, timeout=0)
    with pytest.raises(sqla_fairpool.CheckoutTimeout):
        take(pool, 1)
    give(fairies)
    give(caller.result())


def test_change_is_logged_with_what_it_was(make_pool, caplog):
    pool = make_pool()
    with caplog.at_level(logging.INFO, "sqlalchemy.pool"):
        pool.reconfigure(soft_limit=8)
        pool.reconfigure(soft_limit=8)
    assert caplog.messages == ["Pool reconfigured: soft_limit 10 -> 8"]


def test_recreated_pool_has_the_changed_options(make_pool):
    pool = make_pool()
    pool.reconfigure(soft_limit=8)
    assert pool.recreate().options.soft_limit == 8


def test_limit_that_rises_while_connections_are_still_being_closed(make_pool, server):
    """They are connections until they are closed."""
    pool = make_pool(pool_size=4, soft_limit=4, max_limit=4)
    give(take(pool, 4))
    closing, go_on = threading.Event(), threading.Event()

    def slowly():
        closing.set()
        assert go_on.wait(30)

    server.before["close"] = slowly
    few = {"pool_size": 1, "soft_limit": 1, "max_limit": 1}
    many = {"pool_size": 4, "soft_limit": 4, "max_limit": 4}
    shrinking = Caller(lambda: pool.reconfigure(**few))
    assert closing.wait(30)
    growing = Caller(lambda: pool.reconfigure(**many))  # helps to close
    eventually(lambda: pool.options.pool_size == 4)
    callers = [Caller(pool.connect) for _ in range(4)]
    ensure_waiting(pool, 3)
    go_on.set()
    shrinking.result()
    growing.result()
    give([caller.result() for caller in callers])
    assert server.most == 4
