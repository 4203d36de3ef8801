"""What is written down at a transition, and shows only later. Found by mutants."""

from __future__ import annotations

import pytest
from support.invariants import check_valid

from sqla_fairpool.scheduling import counters, tags
from sqla_fairpool.scheduling.dry_run import DryRunScheduler
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.tags import IndexedHeap
from sqla_fairpool.scheduling.ticket import GRANTED, TagLimits, Ticket

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


def test_who_asked_is_told_of_new_counters():
    of_tags, told = counters.CountersByTag(), []
    of_tags.on_new.append(lambda tag, made: told.append((tag, made)))
    assert [*map(of_tags.of, "aab")][1:] == [made for _, made in told]
    assert [tag for tag, _ in told] == ["a", "b"]


def test_each_duration_is_kept_where_that_was_asked_for():
    histogram = counters.Histogram()
    histogram.add(9.0)
    histogram.raw = []
    histogram.add(0.5)
    assert histogram.max == 9.0
    histogram.add_all(4, 3.0, 2.0, [2.0, 0.5])
    histogram.add_all(1, 2.0, 2.0, [2.0])
    histogram.add_all(1, 0.5, 0.5, [])
    assert histogram.raw == [0.5, 2.0, 0.5, 0.25, 0.25, 2.0, 0.5]


def test_long_checkouts_are_noted_one_by_one():
    ticket, noted = Ticket(), []
    for held in (0.0005, 0.002, 0.0007, 9.0, 0.01):
        ticket.note(held)
        noted.append((ticket.held_max, ticket.notable))
    longest = [0.0005, 0.002, 0.002, 9.0, 9.0]
    assert noted == [(held, min(held, 0.001)) for held in longest]
    assert ticket.long_holds == [0.002, 9.0, 0.01]


def test_most_that_were_in_use_at_once_stay_so_after_a_move():
    scheduler = make()
    held = [request(scheduler, tag) for tag in "abbb"]
    for ticket in held[2:]:
        scheduler.release(ticket, 0.0)
    assert scheduler.move(held[0], "b", 0.0) == ()
    peaks = {tag: state.peak for tag, state in scheduler.tag_states.items()}
    assert peaks == {"a": 1, "b": 3}


def test_tag_that_a_slot_is_moved_from_is_ranked_anew():
    scheduler = Scheduler(**RULES | {"capacity": 4}, now=0.0)
    held = [request(scheduler, tag) for tag in "aabb"]
    for tag in "ba":
        assert not scheduler.request(Ticket(), tag, 0.0)
    assert scheduler.move(held[0], "c", 0.0) == []
    check_valid(scheduler, held)
    assert scheduler.lines.next().tag == "a"


def test_slot_is_not_moved_from_a_tag_that_would_be_next_itself():
    scheduler, held = Scheduler(**RULES | {"capacity": 3}, now=0.0), {}
    for used, tag in enumerate("cba"):
        held[tag] = request(scheduler, tag)
        held[tag].tag_state.charged += used
    for tag in "ab":
        assert not scheduler.request(Ticket(), tag, 0.0)
    assert scheduler.move(held["a"], "c", 0.0) is None
    check_valid(scheduler, [*held.values()])


def test_ceilings_that_are_set_anew_are_those_of_the_active_tags():
    scheduler = make()
    held = [request(scheduler, tag) for tag in "ab"]
    scheduler.pause({}, 0.0)
    check_valid(scheduler, held)
    assert scheduler.tags.common_ceiling.value == 10


def test_silent_tag_that_is_active_is_none_of_its_others():
    scheduler = Scheduler(**RULES, now=0.0, silent_tag="unknown")
    assert scheduler.tags.common_ceiling.value == 15
    held = [request(scheduler, "unknown")]
    scheduler.activity(held[0], 0.0)
    for pauses in (None, {}):
        if pauses is not None:
            scheduler.pause(pauses, 0.0)
        check_valid(scheduler, held)
        assert scheduler.tags.silent_ceiling.value == 15


def test_caller_that_is_admitted_puts_its_tag_behind_others_that_wait():
    scheduler = Scheduler(**RULES | {"capacity": 2}, now=0.0)
    held = [request(scheduler, "z"), request(scheduler, "z"), Ticket()]
    for tag in "ab":
        assert not scheduler.request(Ticket(), tag, 0.0)
    scheduler.admit(held[2], "a", 0.0)
    check_valid(scheduler, held)
    assert scheduler.lines.next().tag == "b"


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
    by_rule = scheduler.rules.tag_states
    assert by_rule["a"].in_use == 2
    assert scheduler.cancel(scheduler.lines.newest())
    assert by_rule["a"].in_use == 1
    assert len(by_rule["b"].waiters) == 9
    assert scheduler.move(held[-1], "c", 1.0) is not None
    assert by_rule["c"].in_use == by_rule["c"].checkouts == 1
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


def test_tick_is_due_after_the_interval_or_a_shorter_one_that_is_set():
    scheduler = make()
    assert scheduler.next_tick == 30.0
    assert scheduler.tick(40.0) == ()
    assert scheduler.next_tick == 70.0
    for interval, expected in ((60.0, 70.0), (5.0, 50.0)):
        changed = RULES | {"reallocation_interval": interval}
        scheduler.reconfigure(**changed, max_waiting=None, now=45.0)
        assert scheduler.next_tick == expected


def test_slots_of_a_caller_that_is_admitted_and_of_a_lower_limit_drain():
    scheduler = make()
    held = [request(scheduler, "a") for _ in range(4)]
    scheduler.reconfigure(**RULES | {"capacity": 3}, max_waiting=None, now=0.0)
    held.append(Ticket())
    scheduler.admit(held[-1], "a", 0.0)
    check_valid(scheduler, held)
    assert scheduler.drains_from == scheduler.in_use == 5
    scheduler.reconfigure(**RULES, max_waiting=None, now=0.0, usable=2)
    assert scheduler.capacity == 2


def test_silent_tag_is_not_active_by_an_admitted_caller_nor_by_waiting():
    scheduler = Scheduler(**RULES | {"capacity": 1}, now=0.0, silent_tag="unknown")
    admitted, waiting = Ticket(), Ticket()
    scheduler.admit(admitted, "unknown", 0.0)
    assert not scheduler.request(waiting, "unknown", 0.0)
    scheduler.activity(waiting, 0.0)
    assert [*scheduler.release(admitted, 0.0)] == [waiting]
    assert not scheduler.tags.active
    assert waiting.tag_state.last_activity is None


def test_last_active_tag_and_the_silent_one_get_their_higher_ceilings():
    rules = RULES | {"capacity": 10, "soft_limit": 2, "max_limit": 5}
    scheduler = Scheduler(**rules, now=0.0, silent_tag="unknown")
    other, waiting = request(scheduler, "b"), []
    for tag in ("a", "unknown"):
        request(scheduler, tag), request(scheduler, tag)
        waiting += [Ticket() for _ in range(4)]
        for ticket in waiting[-4:]:
            assert not scheduler.request(ticket, tag, 0.0)
    scheduler.release(other, 0.0)
    assert [*scheduler.tick(61.0)] == waiting[:3]
    for ticket in waiting[3:4]:
        scheduler.cancel(ticket)
    check_valid(scheduler)


def test_no_slot_is_granted_below_a_ceiling_that_has_fallen():
    rules = RULES | {"capacity": 5, "soft_limit": 2, "max_limit": 3}
    scheduler = Scheduler(**rules, now=0.0, silent_tag="unknown")
    held = [request(scheduler, "unknown")]
    check_valid(scheduler, held)
    held += [request(scheduler, tag) for tag in ("unknown", "unknown", "a", "a")]
    waiting = [Ticket() for _ in range(3)]
    for ticket, tag in zip(waiting, ("a", "unknown", "b"), strict=True):
        assert not scheduler.request(ticket, tag, 0.0)
    scheduler.cancel(waiting[2])
    assert [*scheduler.release(held[0], 0.0)] == []
    assert [*scheduler.release(held[1], 0.0)] == [waiting[1]]


def test_of_tags_that_used_the_same_one_that_waits_is_before_one_that_comes():
    scheduler, waiting = Scheduler(**RULES | {"capacity": 1}, now=0.0), Ticket()
    held = request(scheduler, "a")
    assert not scheduler.request(waiting, "b", 0.0)
    assert scheduler.move(held, "c", 0.0) is None
    waiting.tag_state.charged = 1.0
    used = scheduler.tags.get("d", 0.0)
    used.charged, used.lift = 0.5, 1.0
    assert scheduler.move(held, "d", 0.0) is None
    assert [*scheduler.release(held, 0.0)] == [waiting]


def test_slot_that_is_reserved_is_not_wanted_for_others():
    limits = {"health": TagLimits(reserved=2)}
    scheduler = Scheduler(**RULES | {"capacity": 4}, now=0.0, limits=limits)
    held = [request(scheduler, tag) for tag in ("health", "health", "web", "x")]
    assert not any(map(scheduler.wanted, held))
    assert not scheduler.request(Ticket(), "web", 0.0)
    assert [*map(scheduler.wanted, held)] == [False, False, True, True]
    scheduler.set_capacity(3, 0.0)
    assert not scheduler.request(Ticket(), "health", 0.0)
    assert not any(map(scheduler.wanted, held))


def test_slot_that_is_reserved_is_not_moved_to_others():
    limits = {"health": TagLimits(reserved=2)}
    scheduler = Scheduler(**RULES | {"capacity": 3}, now=0.0, limits=limits)
    held = [request(scheduler, tag) for tag in ("health", "health", "x")]
    assert scheduler.move(held[0], "web", 0.0) is None
    assert scheduler.move(held[2], "web", 0.0) is not None
    check_valid(scheduler, held)


def test_reserves_from_outside_stay_when_options_change():
    scheduler = make()
    scheduler.impose(20, {}, 9, 0.0, {"a": 3})
    limits = {"b": TagLimits(reserved=2)}
    scheduler.reconfigure(**RULES, max_waiting=None, now=0.0, limits=limits)
    assert (scheduler.tags.reserves, scheduler.kept_free) == ({"a": 3}, 3)


def test_slots_in_excess_are_not_moved_while_another_tag_waits():
    scheduler = make()
    held = [request(scheduler, "a") for _ in range(15)]
    assert not scheduler.request(Ticket(), "a", 0.0)
    scheduler.set_capacity(14, 0.0)
    assert scheduler.move(held[0], "b", 0.0) is None
    scheduler.set_capacity(15, 0.0)
    assert scheduler.move(held[0], "b", 0.0) == []


@pytest.mark.parametrize(
    ("tag", "changes", "room"),
    [
        *[("b", {}, 2), ("a", {}, 1), ("new", {}, 0), ("b", {"waiting": 1}, 0)],
        *[("b", {"in_use": 20}, 2), ("b", {"in_use": 21}, 0)],
    ],
)
def test_slots_of_others_that_a_tag_has_room_for(tag, changes, room):
    scheduler = Scheduler(**RULES | {"soft_limit": 2}, now=0.0)
    request(scheduler, "a")
    scheduler.release(request(scheduler, "b"), 0.0)
    vars(scheduler).update(changes)
    assert scheduler.room_for_others(tag) == room
    scheduler.tag_states["a"].in_use = 3  # above its ceiling
    assert scheduler.room_for_others("a") == 0
    scheduler.tags.reserved = 1
    assert scheduler.room_for_others(tag) == 0


def test_ticket_is_known_where_it_was_used_last():
    scheduler, ticket = make(), request(make(), "a")
    assert not scheduler.knows(ticket)
    scheduler.request(Ticket(), "a", 0.0)
    assert not scheduler.knows(ticket)
    assert scheduler.knows(request(scheduler, "a"))


def test_tags_that_become_active_or_idle_are_told_with_the_ceiling():
    scheduler, told = Scheduler(**RULES, now=0.0, silent_tag="unknown"), []
    scheduler.tags.on_change = lambda *change: told.append(change)
    for tag in ("a", "b", "unknown"):
        scheduler.activity(request(scheduler, tag), 0.0)
    scheduler.tick(60.0)
    scheduler.pause({tags.ALL: tags.Pause(60.0)}, 60.0)
    scheduler.tags.touch(scheduler.tags.get("c", 60.0), 60.0)
    assert told.pop() == ("c", True, 1, 0)
    assert told[:2] == [("a", True, 1, 15), ("b", True, 2, 10)]
    assert sorted(told[2:], key=lambda change: -change[2]) == told[2:]
    assert {(tag, active) for tag, active, *_ in told[2:]} == {
        *[("a", False), ("b", False)]
    }


def test_tag_in_use_is_not_forgotten_to_make_room_nor_one_that_waits(monkeypatch):
    monkeypatch.setattr(tags, "_MAX_REMEMBERED", 3)
    scheduler = Scheduler(**RULES | {"capacity": 1}, now=0.0)
    held, waiting = request(scheduler, "held"), Ticket()
    assert not scheduler.request(waiting, "waits", 0.0)
    for n in range(5):
        scheduler.tags.touch(scheduler.tags.get(f"tag{n}", float(n)), float(n))
        assert {"held", "waits"} <= scheduler.tag_states.keys()
        assert len(scheduler.tag_states) == scheduler.tags.active == 3
    assert [*scheduler.release(held, 70.0)] == [waiting]


def test_idle_tag_that_is_forgotten_to_make_room_was_not_active(monkeypatch):
    monkeypatch.setattr(tags, "_MAX_REMEMBERED", 2)
    scheduler = make()
    for tag in "ab":
        scheduler.release(request(scheduler, tag), 0.0)
    scheduler.tick(61.0)
    request(scheduler, "c", 62.0)
    assert (scheduler.tags.active, len(scheduler.tag_states)) == (1, 2)


def test_tag_of_which_no_look_is_due_is_not_forgotten_to_make_room(monkeypatch):
    monkeypatch.setattr(tags, "_MAX_REMEMBERED", 1)
    scheduler = Scheduler(**RULES, now=0.0, silent_tag="unknown")
    check_valid(scheduler, [request(scheduler, tag) for tag in ("unknown", *"abc")])


def test_tag_that_worked_again_is_not_the_one_that_is_forgotten(monkeypatch):
    monkeypatch.setattr(tags, "_MAX_REMEMBERED", 3)
    scheduler = make()
    for now, tag in enumerate(["a", "b", "c", "a"]):
        scheduler.release(request(scheduler, tag, now), now)
    request(scheduler, "d", 5.0)
    assert scheduler.tag_states.keys() == {"a", "c", "d"}


def test_changed_options_do_not_make_an_idle_tag_be_forgotten_earlier():
    scheduler = make()
    scheduler.release(request(scheduler, "a"), 0.0)
    scheduler.tick(61.0)
    scheduler.reconfigure(**RULES, max_waiting=None, now=70.0)
    scheduler.tick(100.0)
    assert "a" in scheduler.tag_states


def test_dry_run_has_the_new_rules():
    scheduler = DryRunScheduler(**RULES, silent_tag=None, max_waiting=None, now=0.0)
    scheduler.reconfigure(**RULES | {"max_limit": 12}, max_waiting=3, now=0.0)
    held = [request(scheduler, "a") for _ in range(20)]
    by_rule = scheduler.rules.tag_states["a"]
    assert (by_rule.in_use, by_rule.waiting) == (12, 3)
    assert by_rule.counters.refusals == 5
    scheduler.set_capacity(2, 0.0)
    assert scheduler.rules.capacity == 2
    scheduler.tick(61.0)
    assert scheduler.rules.next_tick == scheduler.next_tick == 91.0
    scheduler.activity(held[-1], 0.0)
    for ticket in held:
        scheduler.release(ticket, 3.0)
    check_valid(scheduler.rules, [])
    assert by_rule.counters.wait.total == 3 * 3.0


def test_slot_for_which_any_caller_waits_is_not_moved_in_a_dry_run():
    rules = RULES | {"capacity": 1}
    scheduler = DryRunScheduler(**rules, silent_tag=None, max_waiting=None, now=0.0)
    held, waiting = request(scheduler, "a"), Ticket()
    assert not scheduler.request(waiting, "b", 0.0)
    assert scheduler.move(held, "c", 0.0) is None
    scheduler.pause({"b": tags.Pause(0.0)}, 0.0)
    scheduler.set_capacity(3, 0.0)
    assert scheduler.move(held, "c", 0.0) == []
    scheduler.set_capacity(1, 0.0)
    scheduler.pause({}, 0.0)
    assert [*scheduler.release(held, 0.0)] == [waiting]


def test_activity_is_the_twins_too():
    scheduler = DryRunScheduler(
        **RULES, silent_tag="unknown", max_waiting=None, now=0.0
    )
    ticket = request(scheduler, "unknown")
    scheduler.activity(ticket, 1.0)
    scheduler.admit(admitted := Ticket(), "a", 1.0)
    assert scheduler.rules.in_use == 2
    scheduler.release(admitted, 1.0)
    assert scheduler.rules.in_use == 1
    assert scheduler.rules.tag_states["unknown"].active
    assert scheduler.move(ticket, "a", 2.0) is not None
    states = scheduler.rules.tag_states
    assert (states["unknown"].checkouts, states["a"].checkouts) == (0, 2)
    scheduler.set_capacity(0, 2.0)
    assert scheduler.move(ticket, "b", 2.0) is None
    assert "b" not in scheduler.rules.tag_states
    with pytest.raises(NotImplementedError):
        scheduler.impose(20, {}, 9, 0.0)
