"""The records of a pool: the order in which they are handed out, what is granted."""

from __future__ import annotations

import pytest
from support import state
from support.parts import CORE, Parts, Record
from support.threads import connect, wait_in_line

from sqla_fairpool.pool.checkout import TOLD, Checkout
from sqla_fairpool.pool.connections import Connections
from sqla_fairpool.pool.waiters import ThreadWaiter


@pytest.mark.parametrize(("use_lifo", "order"), [(False, "abc"), (True, "cba")])
def test_records_are_handed_out_in_order(use_lifo, order):
    connections = Connections(use_lifo)
    connections.idle.extend("abc")
    first = connections.pop()
    connections.put_back(first)
    assert "".join(iter(connections.pop, None)) == order
    connections.idle.extend("abc")
    connections.hand_out(last_first=not use_lifo)
    assert connections.pop() == order[-1]
    assert "abc"[connections.end] == order[-1]


@pytest.mark.parametrize("use_lifo", [False, True])
def test_record_that_the_server_knows_is_the_next(use_lifo):
    connections = Connections(use_lifo)
    records = [Record() for _ in range(3)]
    records[1].info[TOLD] = "b"
    connections.idle.extend(records)
    connections.prefer("none")
    assert list(connections.idle) == records
    connections.prefer("b")
    assert connections.pop() is records[1]
    assert len(connections.idle) == 2


def test_record_is_removed_once():
    connections = Connections(use_lifo=False)
    closed, is_open = Record(is_open=False), Record()
    connections.idle.extend([closed, is_open])
    assert connections.count_open() == 1
    assert connections.remove(closed)
    assert not connections.remove(closed)
    assert list(connections.idle) == [is_open]


def test_what_is_out_is_kept_warm_no_more():
    parts = Parts()
    out, idle = parts.out(), parts.idle()
    for record in out, idle:
        record.fair.checkout.may_keep = True
    assert parts.connections.granted() == [out.fair.checkout]
    parts.connections.release_soon(0.0)
    assert not out.fair.checkout.may_keep
    assert idle.fair.checkout.may_keep


def test_grant_meets_a_caller_that_was_interrupted_as_it_joined_the_line():
    """It has no waiter yet: it gives its slot back when it has the lock again."""
    parts = Parts(pool_size=1)
    holder, joining, waiting = parts.out(), Checkout(CORE), Checkout(CORE)
    assert not parts.scheduler.request(joining, "a", 0.0)
    assert not parts.scheduler.request(waiting, "a", 0.0)
    waiting.waiter = ThreadWaiter(waiting)
    parts.state.take_back(holder.fair.checkout, holder, True, 0.0)
    parts.state.take_back(joining, joining.record, True, 0.0)
    assert waiting.record is holder
    assert len(parts.lock.wake_ups) == 1


def test_checkout_serves_the_next_caller_unless_it_may_be_given_up_late(make_pool):
    """By its waiter, which may be woken once more, or by its interrupted caller."""
    pool = make_pool(1)
    holder = connect(pool, "a")
    first = state.checkout_of(holder)
    holder.close()
    holder = connect(pool, "b")
    assert state.checkout_of(holder) is first
    (caller,) = wait_in_line(pool, "c")
    holder.close()
    holder = caller.result()
    waited = state.checkout_of(holder)
    holder.close()
    given_up = state.interrupted_checkout(pool, "a")
    assert given_up not in (first, waited)
    with connect(pool, "b") as holder:
        assert state.checkout_of(holder) is not given_up
