"""How many connections there may be, derived from those that there are."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from support.parts import Parts

from sqla_fairpool.pool.connections import Reservation
from sqla_fairpool.scheduling.ticket import GRANTED


def numbers(parts):
    """Return how many connections are there, usable and out of use."""
    slots = parts.slots
    return slots.there(), slots.usable(), slots.out_of_use()


@pytest.fixture
def parts():
    return Parts(pool_size=4)


def test_what_is_out_or_idle_is_usable(parts):
    assert numbers(parts) == (0, 4, 0)
    out, _, hollow = parts.out(), parts.idle(), parts.idle()
    hollow.close()  # it is no connection
    assert numbers(parts) == (2, 4, 0)
    assert out.fair.checkout.state is GRANTED


def test_detached_connection_is_not_the_pools(parts):
    record = parts.out()
    record.dbapi_connection = None
    assert numbers(parts) == (2, 3, 1)  # its checkout's, and one of whoever has it
    assert not parts.slots.is_over(record.fair.physical)
    parts.slots.detached(record.fair.physical)
    assert numbers(parts) == (1, 4, 0)
    assert parts.slots.is_over(record.fair.physical)


def test_connection_counts_until_its_session_has_ended(parts):
    record = parts.record()
    assert numbers(parts) == (1, 3, 1)
    record.fair.physical.ending = 1.0
    parts.slots.detached(record.fair.physical)
    assert numbers(parts) == (1, 3, 1)
    record.close()
    assert numbers(parts) == (0, 4, 0)


def test_reservation_counts_as_long_as_somebody_has_it(parts):
    reservation = Reservation()
    parts.slots.reserved.add(reservation)
    assert numbers(parts) == (1, 3, 1)
    del reservation
    assert numbers(parts) == (0, 4, 0)


def test_what_is_there_may_be_used_though_there_are_too_many(parts):
    apart = [parts.record(), parts.record()]
    held = [parts.out(), parts.out()]
    held.append(parts.out())
    assert numbers(parts) == (5, 3, 2)
    assert not parts.slots.has_room()
    assert parts.slots.usable(leaving=1) == 2
    parts.slots.allotted = 2
    assert parts.slots.usable() == 2
    for record in apart:
        record.close()
    parts.slots.allotted = 4
    assert parts.slots.has_room()
    parts.slots.frozen = True
    assert not parts.slots.has_room()


# -- of a ledger ----------------------------------------------------------------------


@pytest.fixture
def member():
    return Mock(refusal=None, trouble="no store")


@pytest.fixture
def allotted(member):
    """Slots of a ledger that has allotted two."""
    parts = Parts(member, pool_size=4)
    assert numbers(parts) == (0, 0, 0)
    parts.slots.allotted = 2
    return parts


def rings(parts):
    """Return what the slots leave to do after the lock: to ring, and for which tag."""
    parts.lock.flush()
    calls = [call.args for call in parts.slots.member.ring.call_args_list]
    parts.slots.member.ring.reset_mock()
    return calls


@pytest.mark.parametrize(
    ("pressed", "there", "idle", "is_told"),
    [
        (False, 2, True, False),
        (True, 2, True, True),
        (True, 2, False, False),
        (False, 3, False, True),
    ],
)
def test_ledger_hears_of_returns_that_others_want(
    allotted, pressed, there, idle, is_told
):
    records = [allotted.out() for _ in range(there)]
    allotted.lock.run(allotted.state.allot, 2, {}, 9, {}, {})
    allotted.slots.pressed = pressed
    allotted.slots.returned(idle=idle)
    assert rings(allotted) == [()] * is_told
    assert len(records) == allotted.slots.there()


def test_connections_are_counted_for_a_return_only_while_there_are_too_many(allotted):
    """That costs a look at each of them, in a section."""
    allotted.existing.apart = Mock(side_effect=allotted.existing.apart)
    records = [allotted.out() for _ in range(3)]
    for slots, counts, told in ((2, 3, 3), (len(records), 0, 0)):
        allotted.lock.run(allotted.state.allot, slots, {}, 9, {}, {})
        allotted.existing.apart.reset_mock()
        for _ in range(3):
            allotted.slots.returned(idle=False)
        assert allotted.existing.apart.call_count == counts
        assert rings(allotted) == [()] * told


def test_ledger_hears_who_waits_and_what_has_ended(allotted):
    allotted.slots.wanted("a")
    allotted.slots.recounted()
    assert rings(allotted) == [("a",), ()]
    allotted.existing.on_lost()
    assert rings(allotted) == [()]


def test_detached_connection_keeps_its_slot_of_a_ledger(allotted):
    record = allotted.record()
    record.dbapi_connection = None
    allotted.slots.detached(record.fair.physical)
    assert numbers(allotted) == (1, 1, 1)
    record.close()
    assert not allotted.slots.is_over(record.fair.physical)  # the ledger says so


def test_terms_of_a_ledger_are_changed_by_way_of_the_ledger(allotted):
    before = allotted.options
    other = before.changed({"timeout": 1})
    assert allotted.slots.change(before, other) is other
    for name in "pool_size", "idle_timeout":
        other = before.changed({name: 5, "timeout": 1})
        assert Parts().slots.change(before, other) is other
        there = allotted.slots.change(before, other)
        assert (there.terms, there.timeout) == (before.terms, 1)
        allotted.lock.visit()
        allotted.slots.member.lead.assert_called_with(other.terms)
