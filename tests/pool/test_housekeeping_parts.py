"""Housekeeping alone: what is due and when, one pool after the other."""

from __future__ import annotations

import math

import pytest
from support.parts import Parts

from sqla_fairpool.pool.checkout import Generation
from sqla_fairpool.pool.opening import Opening
from sqla_fairpool.pool.waiters import ThreadWaiter
from sqla_fairpool.pool.waiting import Waiting

TTL = 40.0


@pytest.fixture
def parts():
    return Parts(pool_size=4, min_idle=1, idle_connection_ttl=TTL)


def look_around(parts, after):
    """Do what is due after some seconds."""
    parts.clock.advance(after)
    parts.lock.run(parts.housekeeping.look_around)


def test_next_visit_is_when_the_first_thing_is_due(parts):
    housekeeping, now = parts.housekeeping, parts.clock()
    assert housekeeping.next_visit == now + TTL / 4
    parts.state.event_log.next_look = now + 3
    housekeeping.plan_visit()
    assert housekeeping.next_visit == now + 3
    assert housekeeping.next_duty == now + TTL / 4  # for which a caller is woken
    parts.state.event_log.next_look = math.inf
    look_around(parts, 3)
    assert housekeeping.next_visit == now + TTL / 4
    look_around(parts, TTL / 4)
    assert housekeeping.next_visit == now + 3 + TTL / 2
    assert Parts().housekeeping.next_visit == now + 30  # the next look for idle tags


def test_unused_connections_are_closed_the_oldest_first(parts):
    now = parts.clock()
    newer, oldest = parts.idle(now - TTL * 3 / 4), parts.idle(now - TTL)
    used = parts.idle(now + TTL)
    look_around(parts, TTL / 4 - 1)
    assert len(parts.connections.idle) == 3  # it is not time to look
    look_around(parts, 1)
    assert list(parts.connections.idle) == [used]
    assert oldest.fair.close_reason == newer.fair.close_reason == "unused"
    assert list(parts.existing) == [used.fair.physical]


@pytest.mark.parametrize("is_out", [False, True])
def test_min_idle_connections_are_left_the_newest(parts, is_out):
    out = [parts.out() for _ in range(is_out)]
    newer, _ = parts.idle(1.0), parts.idle(0.0)
    look_around(parts, TTL)
    assert list(parts.connections.idle) == [newer] * (not is_out)
    assert parts.slots.there() == 1 == len(out or [newer])


def test_what_lies_in_a_former_pool_is_closed_by_the_next(parts):
    successor = Generation()
    record, out = parts.idle(), parts.out()
    out.fair.checkout.may_keep = successor.warmed_up = True
    parts.state.run(parts.housekeeping.hand_over, successor)
    assert parts.housekeeping.owner is successor
    assert record.dbapi_connection is None
    assert record.fair.close_reason == "disposed"
    assert not out.fair.checkout.may_keep
    assert not successor.warmed_up
    assert (parts.slots.there(), parts.slots.usable()) == (1, 4)


def test_connections_are_opened_ahead_until_there_are_enough(parts):
    opener = parts.opener()
    waiting = Waiting(parts.state, parts.housekeeping, ThreadWaiter)
    ahead = Opening(parts.state, parts.housekeeping, waiting, ThreadWaiter)
    assert ahead.warm_up(None, opener) == 1
    assert parts.housekeeping.owner is opener.generation  # it has taken over
    assert parts.connections.count_open() == 1
    assert ahead.warm_up(None, opener) == 0
    (record,) = parts.connections.idle
    assert record.fair.idle_since == parts.clock()
    assert parts.scheduler.capacity == parts.slots.usable() == 4
