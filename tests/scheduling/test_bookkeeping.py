"""What is written down at a transition, and shows only later. Found by mutants."""

from __future__ import annotations

import pytest
from support.invariants import check_valid

from sqla_fairpool.scheduling import counters, tags
from sqla_fairpool.scheduling.dry_run import DryRunScheduler
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.tags import IndexedHeap
from sqla_fairpool.scheduling.ticket import GRANTED, Ticket

RULES = {"capacity": 20, "soft_limit": 10, "max_limit": 15}
RULES |= {"idle_timeout": 60.0, "reallocation_interval": 30.0}


def make():
    return Scheduler(**RULES, now=0.0)


def test_equal_keys_are_in_the_order_of_their_entry():
    heap = IndexedHeap()
    for item in "bca":
        heap.put(item, 1)
    assert [(heap.first(), heap.remove(heap.first()[1]))[0] for _ in "bca"] == [
        *[(1, "b"), (1, "c"), (1, "a")]
    ]


def test_admitted_caller_makes_its_tag_active():
    scheduler, ticket = make(), Ticket()
    scheduler.admit(ticket, "a", 0.0)
    assert ticket.state is GRANTED
    assert scheduler.tag_states["a"].active
    assert scheduler.tags.active == 1
    check_valid(scheduler, [ticket])


def test_checkouts_that_one_grant_served_are_in_the_figures_of_its_tag():
    scheduler, ticket = make(), Ticket()
    scheduler.request(ticket, "a", 0.0)
    ticket.again, ticket.held = 2, 3.0
    ticket.note(2.0)
    ticket.note(1.0)
    scheduler.release(ticket, 4.0)
    state = scheduler.tag_states["a"]
    assert state.checkouts == 3
    assert 3.0 <= state.hold_total <= 7.0
    assert state.hold_max >= 2.0


def test_shorter_idle_timeout_holds_for_tags_that_are_active():
    scheduler, ticket = make(), Ticket()
    scheduler.request(ticket, "a", 0.0)
    scheduler.release(ticket, 0.0)
    scheduler.reconfigure(**RULES | {"idle_timeout": 5.0}, max_waiting=None, now=0.0)
    scheduler.tick(31.0)
    assert not scheduler.tag_states["a"].active


def test_tag_that_is_forgotten_to_make_room_is_not_counted(monkeypatch):
    monkeypatch.setattr(tags, "_MAX_REMEMBERED", 8)
    scheduler, ticket = make(), Ticket()
    for n in range(50):
        scheduler.request(ticket, f"tag{n}", 0.0)
        scheduler.release(ticket, 0.0)
        assert scheduler.tags.active == len(scheduler.tag_states) <= 8
    check_valid(scheduler, [])


def request(scheduler, tag, now=0.0):
    ticket = Ticket()
    assert scheduler.request(ticket, tag, now)
    return ticket


def test_seconds_of_a_connection_are_charged_until_they_are_forgiven():
    scheduler = make()
    tickets = [request(scheduler, "a") for _ in range(3)]
    state = scheduler.tag_states["a"]
    for ticket in tickets[1:]:
        scheduler.release(ticket, 600.0)
    scheduler.release(tickets[0], 600.0)
    scale = scheduler.usage.scale(600.0)
    assert state.charged > 0
    assert abs(state.charged + state.lift - scale) < 1e-6 * scale


def test_move_is_activity_of_the_tag_that_it_goes_to():
    scheduler = make()
    moved = request(scheduler, "a")
    assert scheduler.move(moved, "b", 1.0) is not None
    assert scheduler.tag_states["b"].active
    assert scheduler.tag_states["b"].last_activity == 1.0
    check_valid(scheduler, [moved])


def test_tags_above_the_number_that_is_counted_share_their_counters(monkeypatch):
    monkeypatch.setattr(counters, "MAX_COUNTED_TAGS", 3)
    of_tags = counters.CountersByTag()
    made = [of_tags.of(f"tag{n}") for n in range(6)]
    assert [*of_tags.by_tag] == ["tag0", "tag1", "tag2", counters.OTHER]
    assert made[3] is made[4] is made[5] is of_tags.by_tag[counters.OTHER]
    assert of_tags.of("tag1") is made[1]


def test_counters_have_no_more_than_their_names():
    with pytest.raises(AttributeError):
        _ = counters.Counters().waits


def test_what_a_tag_has_used_counts_half_after_ten_seconds():
    scale = Scheduler(**RULES, now=1000.0).usage.scale
    before = scale(1000.0)
    assert abs(scale(1010.0) / before - 2.0) < 1e-9


def test_move_from_the_silent_tag_takes_back_the_checkout_that_was_counted():
    scheduler = Scheduler(**RULES, now=0.0, silent_tag="unknown")
    ticket = request(scheduler, "unknown")
    assert scheduler.move(ticket, "a", 1.0) is not None
    scheduler.release(ticket, 2.0)
    states = scheduler.tag_states
    assert [states[tag].checkouts for tag in ("unknown", "a")] == [0, 1]
    assert states["unknown"].counters.checkouts == 0
    assert states["a"].counters.checkouts == 1


def test_ceilings_from_outside_rank_those_that_wait_anew():
    scheduler = make()
    scheduler.impose(4, {"a": 1, "b": 1, "c": 1}, 1, 0.0)
    held = [request(scheduler, tag) for tag in "abc"]
    waiting = [Ticket() for _ in "ab"]
    for ticket, tag in zip(waiting, "ab", strict=True):
        assert not scheduler.request(ticket, tag, 0.0)
    assert [*scheduler.impose(5, {"a": 2, "b": 2, "c": 1}, 1, 0.0)] == waiting
    check_valid(scheduler, held + waiting)


def test_only_a_ticket_that_waits_expires_and_counts_as_one():
    scheduler = make()
    held = [request(scheduler, "a") for _ in range(15)]
    late = Ticket()
    assert not scheduler.request(late, "a", 0.0)
    assert scheduler.tag_states["a"].counters.checkouts == 15
    assert scheduler.expire(late)
    assert not scheduler.expire(late)
    assert not scheduler.expire(held[0])
    state = scheduler.tag_states["a"]
    assert state.timeouts == state.counters.timeouts == 1


def test_ceilings_from_outside_hold_for_what_is_checked_without_the_lock():
    scheduler = make()
    request(scheduler, "a")
    scheduler.impose(4, {"a": 3}, 2, 0.0)
    assert scheduler.tags.common_ceiling.value == 2


def test_longest_of_many_is_that_of_all_before():
    histogram = counters.Histogram()
    histogram.add_all(2, 3.0, 2.0, [1.0, 2.0])
    histogram.add_all(1, 0.5, 0.5, [0.5])
    assert (histogram.max, histogram.total, sum(histogram.counts)) == (2.0, 3.5, 3)


def test_dry_run_says_what_was_granted_and_moves_on_both_sides():
    scheduler = DryRunScheduler(**RULES, silent_tag=None, max_waiting=None, now=0.0)
    request(scheduler, "a")
    held = [request(scheduler, "b") for _ in range(19)]
    assert not scheduler.request(Ticket(), "a", 0.0)
    scheduler.cancel(scheduler.lines.newest())
    by_rule = scheduler.rules.tag_states
    assert len(by_rule["b"].waiters) == 9
    assert scheduler.move(held[-1], "c", 1.0) is not None
    assert by_rule["c"].in_use == 1
    assert len(by_rule["b"].waiters) == 8
    check_valid(scheduler.rules)


def test_place_and_charge_are_those_of_the_transition():
    scheduler = make()
    held = [request(scheduler, "a", 5.0) for _ in range(15)]
    waits = [Ticket(), Ticket()]
    for ticket in waits:
        assert not scheduler.request(ticket, "a", 5.0)
    assert [scheduler.place(ticket) for ticket in waits] == [1, 2]
    assert [ticket.number for ticket in waits] == [1, 2]
    assert scheduler.tag_states["a"].charged == -15 * scheduler.usage.scale(5.0)
    assert scheduler.move(held[0], "a", 6.0) == ()
    assert held[0].tag_state.counters.checkouts == 15
