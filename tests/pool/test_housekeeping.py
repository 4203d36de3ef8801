"""Connections opened ahead, closed when unused, and options changed while running."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from unittest.mock import Mock

import pytest
from sqlalchemy.exc import ArgumentError
from sqlalchemy.util import await_only
from support import state
from support.stub import StubError, all_for_one
from support.threads import connect, eventually, give, take

from sqla_fairpool import CheckoutTimeout, TooManyWaiting
from sqla_fairpool.pool.waiters import ThreadWaiter


def opened_ahead():
    """Wait until all that are opened ahead are open."""
    eventually(
        lambda: not any(t.name.endswith("min_idle") for t in threading.enumerate())
    )


# -- min_idle --------------------------------------------------------------------------


@pytest.mark.parametrize("out", [1, 3])
def test_first_use_opens_min_idle_connections_with_those_that_are_out(threads, out):
    pool, server, gate = threads.pool(min_idle=5), threads.server, threads.gate()
    assert server.opened == 0
    server.before["connect"] = lambda: server.opened >= out and gate()
    held = take(pool, out)
    assert server.opened == out  # the first caller does not wait for the others
    gate.open()
    opened_ahead()
    assert server.opened == 5
    assert pool.warm_up() == 0
    give(held)
    give(take(pool, 5))
    assert server.opened == 5


def test_what_is_opened_ahead_knows_nothing_of_the_first_caller(tasks):
    """A creator, or a listener, that starts something in the background."""
    seen, variable = [], contextvars.ContextVar("variable", default=None)
    pool = tasks.pool(min_idle=2)
    tasks.server.before["connect"] = lambda: seen.append(variable.get())
    variable.set("the first caller's")
    connect(pool).close()
    tasks.eventually(lambda: len(seen) == 2)
    assert seen == ["the first caller's", None]
    pool.dispose()


@pytest.mark.parametrize(("min_idle", "number"), [(5, 5), (None, 0)])
def test_warm_up_opens_them_before_the_first_use_of_a_pool(threads, min_idle, number):
    options = {"min_idle": min_idle} if min_idle else {}
    pool = threads.pool(**options, idle_connection_ttl=100.0)
    assert pool.warm_up() == pool.checkedin() == number
    assert pool.warm_up() == 0
    pool.dispose()
    pool = pool.recreate()
    assert pool.warm_up() == pool.checkedin() == threads.server.open == number
    connect(pool).close()
    assert threads.server.open == max(number, 1)
    with state.lock_forbidden(pool):  # what is kept warm needs no look around
        connect(pool).close()


def test_asyncio_pool_is_warmed_up_in_a_task(tasks):
    pool = tasks.pool(min_idle=4)
    assert await_only(pool.warm_up()) == 4
    connect(pool).close()
    await_only(pool.upkeep())
    assert tasks.server.opened == 4


def fail_after(server, number):
    """Have the server accept so many connections and no more."""

    def refuse():
        if server.opened == number:
            raise StubError("no more")

    server.before["connect"] = refuse


def test_what_cannot_be_opened_ahead_fails_warm_up_and_no_first_use(threads, caplog):
    pool = threads.pool(min_idle=3)
    fail_after(threads.server, 1)
    with caplog.at_level(logging.WARNING, "sqlalchemy.pool"):
        connect(pool).close()
        opened_ahead()
    assert "3 connections (min_idle) could not be opened ahead: no more" in caplog.text
    state.assert_quiet(pool)
    fail_after(threads.server, 2)
    with pytest.raises(StubError):
        pool.warm_up()
    assert pool.checkedin() == 2  # what is open is kept


def test_interrupt_in_the_first_use_loses_neither_slot_nor_connection(
    threads, monkeypatch
):
    pool = threads.pool(min_idle=3)
    interrupt = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(ThreadWaiter, "run_apart", interrupt)
    with pytest.raises(KeyboardInterrupt):
        connect(pool)
    assert pool.checkedin() == 1


@pytest.mark.parametrize("name", ["connect", "close"])
def test_slot_is_taken_while_a_connection_is_opened_ahead_or_closed(
    threads, clock, name
):
    """No caller opens one more than the capacity meanwhile; one that waits gets it."""
    pool, callers = threads.pool(1, min_idle=0, idle_connection_ttl=100.0), []

    def come():
        threads.server.before.clear()
        callers.extend(threads.wait_in_line(pool))

    if name == "connect":
        pool.reconfigure(min_idle=1)
        threads.server.before[name] = come
        pool.warm_up()
    else:
        connect(pool).close()
        pool.upkeep()
        threads.server.before[name] = come
        grow_old(pool, clock, 5)
    callers[0].result()
    assert threads.server.most == 1


def test_forked_child_or_new_pool_opens_them_again(threads):
    pool, server = threads.pool(min_idle=3), threads.server
    connect(pool).close()
    opened_ahead()
    pool.dispose()
    assert server.open == 0
    successor = pool.recreate()
    connect(successor).close()
    opened_ahead()
    assert server.open == 3
    state.after_fork(pool)
    connect(successor).close()
    opened_ahead()
    assert server.opened == 9


def test_warming_up_ends_when_another_pool_takes_over(threads):
    pool = threads.pool(min_idle=3)
    successor = pool.recreate()

    def take_over():
        threads.server.before.clear()
        connect(successor).close()

    threads.server.before["connect"] = take_over
    assert pool.warm_up() == 1
    opened_ahead()
    # The new one counted the connection that was being opened, and this was closed.
    assert threads.server.open == successor.checkedin() == 2
    assert successor.warm_up() == 1


# -- idle_connection_ttl ---------------------------------------------------------------


@pytest.fixture
def make_aging(make_pool):
    """Make pools whose connections live for 100 seconds without use."""
    return lambda *args, **kw: make_pool(*args, idle_connection_ttl=100.0, **kw)


def grow_old(pool, clock, looks, seconds=30.0):
    for _ in range(looks):
        clock.advance(seconds)
        pool.upkeep()


@pytest.mark.parametrize(
    ("min_idle", "step", "in_use", "left"),
    [(0, 25.0, 1, 1), (0, 50.0, 5, 5), (0, 10.0, 1, 1), (0, 25.0, 0, 0), (2, 30, 0, 2)],
)
def test_connections_that_are_not_used_are_closed_but_for_min_idle(
    make_aging, server, clock, min_idle, step, in_use, left
):
    """One that is taken without the lock, because it is kept warm, is used as well."""
    pool = make_aging(min_idle=min_idle)
    pool.warm_up()  # nothing is opened in the background then
    give(take(pool, 5))
    for _ in range(20):
        clock.advance(step)
        give(take(pool, in_use))
    pool.upkeep()
    assert (server.open, server.opened) == (left, 5)


def test_connection_is_not_closed_before_its_time(make_aging, server, clock):
    pool = make_aging()
    give(take(pool, 5))
    pool.upkeep()
    grow_old(pool, clock, 4, 24.9)
    assert server.open == 5
    grow_old(pool, clock, 1, 26.0)
    assert server.open == 0


def test_connection_out_counts_for_min_idle_when_others_are_closed(
    make_aging, server, clock
):
    pool = make_aging(min_idle=2)
    pool.warm_up()
    held = take(pool, 5)
    while len(held) > 1:
        held.pop().close()
    grow_old(pool, clock, 20)
    assert server.open == 2
    give(held)


def test_asking_in_vain_is_no_use_of_a_connection(make_aging, server, clock):
    """A tag at its ceiling looks at an idle connection, and does not get it."""
    pool = make_aging(pool_size=4, soft_limit=1, max_limit=1, timeout=0)
    held = take(pool, 1, "a")
    give(take(pool, 1, "b"))
    for _ in range(8):
        with pytest.raises(CheckoutTimeout):
            connect(pool, "a")
        clock.advance(25.0)
    pool.upkeep()
    assert server.open == 1
    give(held)


# -- reconfigure -----------------------------------------------------------------------


def test_capacity_that_rises_wakes_waiters_and_one_that_falls_drains(threads):
    pool, server = threads.pool(2), threads.server
    threads.take(pool, 2)
    callers = [caller for tag in "abc" for caller in threads.wait_in_line(pool, tag)]
    pool.reconfigure(**all_for_one(5))
    held = [caller.result() for caller in callers]
    assert pool.checkedout() == 5
    pool.reconfigure(**all_for_one(3))
    (caller,) = threads.wait_in_line(pool, "b")
    for still_open in (4, 3):
        held.pop().close()
        assert (state.waiting(pool), server.open) == (1, still_open)
        state.assert_consistent(pool)
    held.pop().close()
    caller.result()
    assert server.opened == 5


def test_ceiling_that_rises_wakes_a_waiter_and_one_that_falls_drains(threads):
    pool = threads.pool(pool_size=4, soft_limit=1, max_limit=1)
    held = take(pool, 1)
    (caller,) = threads.wait_in_line(pool)
    pool.reconfigure(soft_limit=3, max_limit=3, timeout=0)
    held += [caller.result(), connect(pool)]
    assert pool.stats().tag("a").limit == 3
    pool.reconfigure(soft_limit=1, max_limit=1)
    for left in (3, 2, 1):
        assert pool.checkedout() == left, "nothing is taken away"
        with pytest.raises(CheckoutTimeout):
            connect(pool)
        held.pop().close()
    connect(pool).close()


def test_pool_size_alone_may_move_to_overflow(make_pool, server):
    pool = make_pool(4)
    give(take(pool, 4))
    pool.reconfigure(pool_size=1, max_overflow=3)
    assert server.open == 1
    held = take(pool, 4)
    assert server.open == 4
    give(held)
    assert server.open == 1
    pool.reconfigure(pool_size=4, max_overflow=0)
    give(take(pool, 4))
    assert server.open == 4


def test_limits_that_were_not_given_follow_the_capacity(make_pool, caplog):
    pool = make_pool()
    pool.reconfigure(pool_size=40)
    assert (pool.options.soft_limit, pool.options.max_limit) == (20, 30)
    with caplog.at_level(logging.INFO, "sqlalchemy.pool"):
        pool.reconfigure(soft_limit=5)
        pool.reconfigure(soft_limit=5)
    assert caplog.messages == ["Pool reconfigured: soft_limit 20 -> 5"]
    pool.reconfigure(pool_size=20)
    assert (pool.options.soft_limit, pool.options.max_limit) == (5, 15)
    assert pool.recreate().options.soft_limit == 5


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


def test_new_times_hold_for_active_tags_and_callers_that_wait(threads, clock):
    """The one that watches for the reallocation is woken to wait for the new one."""
    times = {"idle_timeout": 1000.0, "reallocation_interval": 1000.0}
    times |= {"deadlock_timeout": None}
    pool = threads.pool(pool_size=2, soft_limit=1, max_limit=2, **times)
    connect(pool, "b").close()
    threads.connect(pool, "a")
    (caller,) = threads.wait_in_line(pool, "a")
    clock.advance(10.0)
    pool.reconfigure(idle_timeout=0.01, reallocation_interval=0.01)
    clock.advance(0.02)
    caller.result()
    assert not pool.stats().tag("b").active


def test_timeout_and_max_waiting_are_for_those_who_come(threads):
    pool = threads.pool(1)
    threads.connect(pool)
    threads.wait_in_line(pool)
    for changes, error in (
        ({"max_waiting": 0}, TooManyWaiting),
        ({"max_waiting": None, "timeout": 0}, CheckoutTimeout),
    ):
        pool.reconfigure(**changes)
        with pytest.raises(error):
            connect(pool)


def test_connections_that_are_being_opened_as_a_limit_falls_are_not_kept(world):
    pool, server, gate = world.pool(4), world.server, world.gate()
    server.before["connect"] = gate
    callers = [world.start(connect, pool) for _ in range(4)]
    world.eventually(lambda: server.open == 4)
    pool.reconfigure(**all_for_one(1))
    gate.open()
    give([caller.result() for caller in callers])
    assert server.open == 1


def test_limit_that_rises_while_connections_are_still_being_closed(threads):
    """They are connections until they are closed."""
    pool = threads.pool(4)
    give(take(pool, 4))
    threads.server.before["close"] = gate = threads.gate()
    shrinking = threads.start(lambda: pool.reconfigure(**all_for_one(1)))
    gate.reached()
    # It helps to close.
    growing = threads.start(lambda: pool.reconfigure(**all_for_one(4)))
    eventually(lambda: pool.options.pool_size == 4)
    callers = [threads.come(pool) for _ in range(4)]
    threads.ensure_waiting(pool, 3)
    gate.open()
    for caller in shrinking, growing, *callers:
        caller.result()
    assert threads.server.most == 4


# -- recycle_jitter -------------------------------------------------------------------


def test_connections_opened_together_are_not_recycled_together(world, clock):
    pool = world.pool(6, recycle=1000, recycle_jitter=0.5)
    first = take(pool, 6)
    drivers = {c.dbapi_connection for c in first}
    give(first)
    ages = []
    for age in range(0, 1001, 10):
        out = take(pool, 6)
        there = {c.dbapi_connection for c in out}
        give(out)
        ages += [age] * len(drivers - there)
        drivers &= there
        clock.advance(10)
    assert len(ages) == 6
    assert min(ages) >= 500
    assert len(set(ages)) > 1
    assert pool.stats().closures["recycled"] >= 6


def test_connection_that_is_out_is_not_recycled_under_its_user(world, clock):
    pool = world.pool(1, recycle=1000, recycle_jitter=1)
    held = connect(pool)
    clock.advance(1001)
    state.look_around(pool)
    assert not held.dbapi_connection.closed
    old = held.dbapi_connection
    held.close()
    with contextlib.closing(connect(pool)) as other:
        assert old.closed
        assert other.dbapi_connection is not old


@pytest.mark.parametrize(
    "options", [{"recycle": -1}, {"recycle": 1000, "recycle_jitter": 0}]
)
def test_without_recycle_or_jitter_nothing_is_due(make_pool, clock, options):
    pool = make_pool(2, **options)
    give(take(pool, 2))
    clock.advance(1e6)
    give(take(pool, 2))
    assert not any(pool.stats().closures.values())
