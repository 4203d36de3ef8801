"""The scheduler as a script of transitions, with the promises checked throughout."""

from __future__ import annotations

import dis
import gc
import sys
from unittest.mock import Mock

import pytest
from support.invariants import check_valid

from sqla_fairpool.scheduling import tags
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.ticket import FREE, GRANTED, WAITING, Ticket


class Script:
    """A scheduler on a virtual clock, every transition followed by the check.

    :param capacity: the limits, too, unless others are given.
    """

    def __init__(self, capacity=None, **options):
        defaults = {"capacity": 20, "soft_limit": 10, "max_limit": 15}
        if capacity is not None:
            defaults = dict.fromkeys(defaults, capacity)
        defaults |= {"idle_timeout": 60.0, "reallocation_interval": 30.0}
        self.now = 1000.0
        self.scheduler = Scheduler(**{**defaults, "now": self.now, **options})
        self.out = []

    @property
    def tags(self):
        return self.scheduler.tags

    def is_active(self, tag):
        return self.tags.tag_states[tag].active

    def _granted(self, tickets):
        self.out += tickets
        check_valid(self.scheduler, self.out)
        return list(tickets)

    def request(self, tag):
        ticket = Ticket()
        granted = self.scheduler.request(ticket, tag, self.now)
        self._granted([ticket] if granted else [])
        return ticket

    def requests(self, tag, number):
        return [self.request(tag) for _ in range(number)]

    def release(self, ticket):
        self.out.remove(ticket)
        return self._granted(self.scheduler.release(ticket, self.now))

    def release_one(self, tag):
        """The tag's oldest holder returns its slot and asks again."""
        ticket = next(t for t in self.out if t.tag_state.tag == tag)
        granted = self.release(ticket)
        self.request(tag)
        return granted

    def cancel(self, ticket):
        done = self.scheduler.cancel(ticket)
        self._granted([])
        return done

    def move(self, ticket, tag):
        granted = self.scheduler.move(ticket, tag, self.now)
        self._granted(granted or [])
        return granted is not None

    def advance(self, seconds):
        self.now += seconds
        return self._granted(self.scheduler.tick(self.now))

    def held(self, tag):
        tag_state = self.tags.tag_states.get(tag)
        return tag_state.in_use if tag_state else 0

    def all_held(self):
        return {tag: a.in_use for tag, a in self.tags.tag_states.items() if a.in_use}

    def churn(self, *tags, rounds=60):
        """All holders of the tags return and ask again, a few times over."""
        for _ in range(rounds):
            for tag in tags:
                if self.held(tag):
                    self.release_one(tag)


def three_at_once():
    """Three tags that want all they can get, after some turns."""
    script = Script()
    for tag in ("layer1_5", "layer2", "layer3"):
        script.requests(tag, 40)
    script.churn("layer1_5", "layer2", "layer3")
    return script


def test_tags_that_want_all_get_15_or_10_each_or_7_7_6():
    script = Script()
    script.requests("layer1_5", 40)
    assert script.all_held() == {"layer1_5": 15}
    script.requests("layer3", 40)
    script.churn("layer1_5", "layer3")
    assert script.all_held() == {"layer1_5": 10, "layer3": 10}
    assert sorted(three_at_once().all_held().values()) == [6, 7, 7]


def test_share_of_a_tag_that_goes_idle_is_free_for_all():
    script = three_at_once()
    for ticket in list(script.tags.tag_states["layer2"].waiters):
        assert script.cancel(ticket)
    for ticket in [t for t in script.out if t.tag_state.tag == "layer2"]:
        script.release(ticket)
    # At once, without waiting for the reallocation: no tag wants its share.
    assert script.all_held() == {"layer1_5": 10, "layer3": 10}
    script.advance(61.0)
    assert script.is_active("layer2") is False
    assert script.all_held() == {"layer1_5": 10, "layer3": 10}


def test_last_of_two_tags_rises_to_15_when_the_other_goes_idle():
    script = Script()
    script.requests("a", 40)
    lone = script.request("b")
    script.release(lone)
    script.churn("a")
    assert script.held("a") == 10
    assert script.advance(59.0) == []
    granted = script.advance(31.0)
    assert len(granted) == 5
    assert script.held("a") == 15


def test_limits_fall_at_once_and_the_excess_drains():
    script = Script()
    first = script.requests("a", 15)
    script.requests("b", 5)
    assert (script.held("a"), script.held("b")) == (15, 5)
    waiting = script.requests("a", 3)
    for ticket in first[:5]:
        assert script.release(ticket) == []
    assert script.held("a") == 10
    assert script.release(first[5]) == [waiting[0]]


def test_freed_slot_goes_to_the_tag_that_holds_least():
    script = Script(capacity=6, soft_limit=4, max_limit=6)
    a = script.requests("a", 4)
    b = script.request("b")
    script.request("c")
    wait_a, wait_b = script.request("a"), script.request("b")
    assert script.release(a[0]) == [wait_b]
    assert script.release(b) == [script.out[-1]]
    assert wait_a.state is GRANTED


def test_ticket_is_cancelled_once_and_not_after_its_grant():
    script = Script(1)
    holder = script.request("a")
    first, second = script.requests("a", 2)
    assert script.cancel(first)
    assert first.state is FREE
    assert script.cancel(first) is False
    assert script.release(holder) == [second]
    assert script.cancel(second) is False
    assert second.state is GRANTED


def test_ticket_whose_line_an_interrupt_kept_from_being_noted_is_cancelled(monkeypatch):
    script = Script(1)
    holder, ticket = script.request("a"), Ticket()
    with monkeypatch.context() as patch:
        patch.setattr(
            script.scheduler.lines, "begun", Mock(side_effect=KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            script.scheduler.request(ticket, "b", script.now)
    assert script.cancel(ticket)
    waiting = script.request("b")
    assert script.release(holder) == [waiting]


def test_second_release_is_refused_and_changes_nothing():
    script = Script()
    ticket = script.request("a")
    script.release(ticket)
    with pytest.raises(AssertionError, match="released a ticket that is free"):
        script.scheduler.release(ticket, script.now)
    check_valid(script.scheduler, [])


def test_capacity_can_fall_and_rise():
    script = Script(4)
    holders = script.requests("a", 4)
    waiting = script.requests("a", 2)
    script.scheduler.set_capacity(2, script.now)
    assert script.release(holders[0]) == []
    assert script.release(holders[1]) == []
    assert script.release(holders[2]) == [waiting[0]]
    granted = script.scheduler.set_capacity(4, script.now)
    assert list(granted) == [waiting[1]]


# -- activity ------------------------------------------------------------------


def test_statement_keeps_a_tag_active_and_wakes_up_an_idle_one():
    script = Script()
    ticket = script.request("a")
    for _ in range(5):
        script.now += 50.0
        script.scheduler.activity(ticket, script.now)
        script.advance(0.0)
        assert script.is_active("a")
    script.advance(91.0)
    assert not script.is_active("a")
    script.requests("b", 30)
    assert script.held("b") == 15
    script.scheduler.activity(ticket, script.now)
    assert script.scheduler.ceiling(script.tags.tag_states["b"]) == 10


def test_tag_with_a_waiter_stays_active():
    script = Script(1)
    script.request("a")
    script.request("b")
    script.advance(1000.0)
    assert script.is_active("b")
    assert not script.is_active("a")


def test_idleness_is_looked_for_at_the_interval_only():
    script = Script(idle_timeout=1.0, reallocation_interval=30.0)
    script.release(script.request("a"))
    script.advance(29.0)
    assert script.tags.active == 1
    script.advance(1.0)
    assert script.tags.active == 0


def test_waiting_and_returning_are_no_activity_of_the_silent_tag():
    script = Script(silent_tag="unknown")
    script.requests("a", 30)
    assert script.held("a") == 15
    ticket = script.request("unknown")
    assert script.tags.active == 1
    script.release(ticket)
    assert script.tags.active == 1
    ticket = script.request("unknown")
    script.scheduler.activity(ticket, script.now)
    assert script.tags.active == 2


# -- moving to another tag -----------------------------------------------------


def test_moved_ticket_is_charged_to_the_new_tag_alone():
    script = Script(silent_tag="unknown")
    ticket = script.request("unknown")
    assert script.move(ticket, "a")
    assert (script.held("unknown"), script.held("a")) == (0, 1)
    tag_states = script.tags.tag_states
    assert (tag_states["unknown"].checkouts, tag_states["a"].checkouts) == (0, 1)
    assert not tag_states["unknown"].active
    script.release(ticket)


def test_move_is_refused_at_the_ceiling():
    script = Script(silent_tag="unknown")
    script.requests("a", 15)
    ticket = script.request("unknown")
    assert script.move(ticket, "a") is False
    assert (script.held("unknown"), script.held("a")) == (1, 15)


def test_move_frees_room_below_the_old_tags_ceiling():
    script = Script(capacity=4, soft_limit=2, max_limit=3)
    a = script.requests("a", 2)
    script.request("b")
    waiting = script.request("a")
    assert waiting.state is WAITING
    assert script.move(a[0], "b")
    assert waiting.state is GRANTED


@pytest.mark.parametrize("part", ["_is_next", "ceiling"])
def test_move_that_is_interrupted_leaves_the_slot_where_it_was(monkeypatch, part):
    """While others wait, it is tried as a release and another request."""
    script = Script(capacity=4, soft_limit=2, max_limit=3)
    script.request("b")
    moved, *_ = script.requests("a", 3)
    with monkeypatch.context() as patch:
        patch.setattr(script.scheduler, part, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            script.scheduler.move(moved, "b", script.now)
    check_valid(script.scheduler, script.out)
    assert (script.held("a"), script.held("b")) == (2, 1)


# -- memory and cost -----------------------------------------------------------


def test_million_tags_leave_bounded_state():
    script = Script()
    scheduler, ticket = script.scheduler, Ticket()
    for n in range(1_000_000):
        scheduler.request(ticket, f"tag{n}", script.now)
        scheduler.release(ticket, script.now)
    assert len(script.tags.tag_states) <= tags._MAX_REMEMBERED
    assert len(script.tags._review._heap) <= 2 * tags._MAX_REMEMBERED + 100
    check_valid(scheduler, [])


def test_idle_tags_are_forgotten_after_a_while():
    script = Script()
    for n in range(100):
        script.release(script.request(f"tag{n}"))
    script.advance(61.0)
    assert len(script.tags.tag_states) == 100
    assert script.tags.active == 0
    script.advance(301.0)
    assert not script.tags.tag_states
    assert not script.tags._review


def test_tag_that_holds_a_slot_is_not_forgotten():
    script = Script()
    ticket = script.request("a")
    script.advance(10_000.0)
    script.advance(10_000.0)
    assert script.held("a") == 1
    assert script.release(ticket) == []
    assert ticket.tag_state.active, "a checkin is activity"


def calls(function):
    """Count the Python and C function calls that `function` makes."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what a collection calls is not counted
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.parametrize("step", ["request", "release", "cancel"])
def test_cost_of_a_step_grows_at_most_with_the_logarithm(step):
    def cost(tags):
        script = Script()
        tickets = [Ticket() for _ in range(tags)]
        for n, ticket in enumerate(tickets):
            script.scheduler.request(ticket, f"tag{n}", script.now)
        if step == "request":
            new = Ticket()
            return calls(lambda: script.scheduler.request(new, "tag3", script.now))
        if step == "release":
            return calls(lambda: script.scheduler.release(tickets[3], script.now))
        return calls(lambda: script.scheduler.cancel(tickets[tags // 2]))

    # Comparisons inside heapq are its own; what is counted is what we call.
    assert cost(10_000) <= cost(100) + 2


def test_cost_of_a_step_does_not_grow_with_the_line():
    def cost(waiters):
        script = Script(1)
        tickets = [Ticket() for _ in range(waiters + 1)]
        for ticket in tickets:
            script.scheduler.request(ticket, "a", script.now)
        return (
            calls(lambda: script.scheduler.cancel(tickets[waiters // 2])),
            calls(lambda: script.scheduler.release(tickets[0], script.now)),
        )

    assert cost(10_000) == cost(10)


# -- signals -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transition", "fields"),
    [
        (Scheduler._grant, {"in_use", "state"}),
        (Scheduler.vacate, {"in_use", "state"}),
        (tags.Tags._set_active, {"active", "prompt", "value"}),
    ],
)
def test_no_signal_is_handled_between_counters_that_belong_together(transition, fields):
    """CPython looks for signals at calls and backward jumps, and 3.10 at each jump."""
    code = list(dis.get_instructions(transition))
    stores = [
        n
        for n, instruction in enumerate(code)
        if instruction.opname == "STORE_ATTR" and instruction.argval in fields
    ]
    assert len(stores) > len(fields)
    between = [instruction.opname for instruction in code[stores[0] : stores[-1]]]
    assert not [name for name in between if "CALL" in name or "JUMP" in name]
