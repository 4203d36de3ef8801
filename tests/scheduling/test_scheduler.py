"""The scheduler as a script of transitions, with the promises checked throughout."""

from __future__ import annotations

import dis
import sys

import pytest

from sqla_fairpool.scheduling import tags as roster
from sqla_fairpool.scheduling.account import FREE, GRANTED, WAITING, LineFull, Ticket
from sqla_fairpool.scheduling.scheduler import Scheduler


class Desk:
    """A scheduler on a virtual clock, every transition followed by the check."""

    def __init__(self, **options):
        defaults = {
            "capacity": 20,
            "soft_limit": 10,
            "max_limit": 15,
            "idle_timeout": 60.0,
            "reallocation_interval": 30.0,
        }
        self.now = 1000.0
        self.scheduler = Scheduler(**{**defaults, "now": self.now, **options})
        self.out = []

    def _granted(self, tickets):
        self.out += tickets
        self.scheduler.check_valid(self.out)
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
        ticket = next(t for t in self.out if t.account.tag == tag)
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
        account = self.scheduler.roster.accounts.get(tag)
        return account.in_use if account else 0

    def churn(self, *tags, rounds=60):
        """All holders of the tags return and ask again, a few times over."""
        for _ in range(rounds):
            for tag in tags:
                if self.held(tag):
                    self.release_one(tag)


def test_tag_that_is_alone_gets_15_of_20():
    desk = Desk()
    desk.requests("layer1_5", 40)
    assert desk.held("layer1_5") == 15


def test_two_tags_get_10_each():
    desk = Desk()
    desk.requests("layer1_5", 40)
    desk.requests("layer3", 40)
    desk.churn("layer1_5", "layer3")
    assert (desk.held("layer1_5"), desk.held("layer3")) == (10, 10)


def test_three_tags_get_7_7_6():
    desk = Desk()
    for tag in ("layer1_5", "layer2", "layer3"):
        desk.requests(tag, 40)
    desk.churn("layer1_5", "layer2", "layer3")
    held = [desk.held(tag) for tag in ("layer1_5", "layer2", "layer3")]
    assert sorted(held) == [6, 7, 7]


def test_share_of_a_tag_that_goes_idle_is_everybodys():
    desk = Desk()
    for tag in ("layer1_5", "layer2", "layer3"):
        desk.requests(tag, 40)
    desk.churn("layer1_5", "layer2", "layer3")
    waiting = list(desk.scheduler.roster.accounts["layer2"].waiters)
    for ticket in waiting:
        assert desk.cancel(ticket)
    for ticket in [t for t in desk.out if t.account.tag == "layer2"]:
        desk.release(ticket)
    # At once, without waiting for the reallocation: nobody wants its share.
    assert [desk.held(t) for t in ("layer1_5", "layer2", "layer3")] == [10, 0, 10]
    desk.advance(61.0)
    assert desk.scheduler.roster.accounts["layer2"].active is False
    assert [desk.held(t) for t in ("layer1_5", "layer2", "layer3")] == [10, 0, 10]


def test_last_of_two_tags_rises_to_15_when_the_other_goes_idle():
    desk = Desk()
    desk.requests("a", 40)
    lone = desk.request("b")
    desk.release(lone)
    desk.churn("a")
    assert desk.held("a") == 10
    assert desk.advance(59.0) == []
    granted = desk.advance(31.0)
    assert len(granted) == 5
    assert desk.held("a") == 15


def test_limits_fall_at_once_and_the_excess_drains():
    desk = Desk()
    first = desk.requests("a", 15)
    desk.requests("b", 5)
    assert (desk.held("a"), desk.held("b")) == (15, 5)
    waiting = desk.requests("a", 3)
    for ticket in first[:5]:
        assert desk.release(ticket) == []
    assert desk.held("a") == 10
    assert desk.release(first[5]) == [waiting[0]]


def test_freed_slot_goes_to_the_tag_that_holds_least():
    desk = Desk(capacity=6, soft_limit=4, max_limit=6)
    a = desk.requests("a", 4)
    b = desk.request("b")
    desk.request("c")
    wait_a, wait_b = desk.request("a"), desk.request("b")
    assert desk.release(a[0]) == [wait_b]
    assert desk.release(b) == [desk.out[-1]]
    assert wait_a.state is GRANTED


def test_on_a_tie_the_longest_waiting_is_next():
    desk = Desk(capacity=2, soft_limit=2, max_limit=2)
    holder, _ = desk.request("x"), desk.request("y")
    late, early = "a", "b"
    first = desk.request(early)
    second = desk.request(late)
    assert desk.release(holder) == [first]
    assert second.state is WAITING


def test_line_is_first_in_first_out():
    desk = Desk(capacity=1, soft_limit=1, max_limit=1)
    holder = desk.request("a")
    line = desk.requests("a", 5)
    for expected in line:
        assert desk.release(holder) == [expected]
        holder = expected


def test_cancelled_ticket_leaves_no_trace():
    desk = Desk(capacity=1, soft_limit=1, max_limit=1)
    holder = desk.request("a")
    line = desk.requests("a", 3)
    assert desk.cancel(line[0])
    assert line[0].state is FREE
    assert desk.cancel(line[0]) is False
    assert desk.release(holder) == [line[1]]


def test_cancel_after_the_grant_says_so():
    desk = Desk(capacity=1, soft_limit=1, max_limit=1)
    holder = desk.request("a")
    waiting = desk.request("a")
    desk.release(holder)
    assert desk.cancel(waiting) is False
    assert waiting.state is GRANTED


def test_second_release_is_refused_and_changes_nothing():
    desk = Desk()
    ticket = desk.request("a")
    desk.release(ticket)
    with pytest.raises(AssertionError, match="released a ticket that is free"):
        desk.scheduler.release(ticket, desk.now)
    desk.scheduler.check_valid([])


def test_max_waiting_refuses_one_more():
    desk = Desk(capacity=1, soft_limit=1, max_limit=1, max_waiting=2)
    desk.requests("a", 3)
    with pytest.raises(LineFull):
        desk.request("b")
    desk.scheduler.check_valid()
    assert desk.scheduler.waiting == 2


def test_capacity_can_fall_and_rise():
    desk = Desk(capacity=4, soft_limit=4, max_limit=4)
    holders = desk.requests("a", 4)
    waiting = desk.requests("a", 2)
    desk.scheduler.set_capacity(2, desk.now)
    assert desk.release(holders[0]) == []
    assert desk.release(holders[1]) == []
    assert desk.release(holders[2]) == [waiting[0]]
    granted = desk.scheduler.set_capacity(4, desk.now)
    assert list(granted) == [waiting[1]]


# -- activity ------------------------------------------------------------------


def test_statement_keeps_a_tag_active():
    desk = Desk()
    ticket = desk.request("a")
    for _ in range(5):
        desk.now += 50.0
        desk.scheduler.activity(ticket, desk.now)
        desk.advance(0.0)
        assert ticket.account.active
    desk.advance(91.0)
    assert not ticket.account.active


def test_statement_wakes_up_an_idle_tag():
    desk = Desk()
    ticket = desk.request("a")
    desk.advance(91.0)
    desk.requests("b", 30)
    assert desk.held("b") == 15
    desk.scheduler.activity(ticket, desk.now)
    assert desk.scheduler.ceiling(desk.scheduler.roster.accounts["b"]) == 10


def test_tag_with_a_waiter_stays_active():
    desk = Desk(capacity=1, soft_limit=1, max_limit=1)
    desk.request("a")
    desk.request("b")
    desk.advance(1000.0)
    assert desk.scheduler.roster.accounts["b"].active
    assert not desk.scheduler.roster.accounts["a"].active


def test_idleness_is_looked_for_at_the_interval_only():
    desk = Desk(idle_timeout=1.0, reallocation_interval=30.0)
    desk.release(desk.request("a"))
    desk.advance(29.0)
    assert desk.scheduler.roster.active == 1
    desk.advance(1.0)
    assert desk.scheduler.roster.active == 0


def test_waiting_and_returning_are_no_activity_of_the_silent_tag():
    desk = Desk(silent_tag="unknown")
    desk.requests("a", 30)
    assert desk.held("a") == 15
    ticket = desk.request("unknown")
    assert desk.scheduler.roster.active == 1
    desk.release(ticket)
    assert desk.scheduler.roster.active == 1
    ticket = desk.request("unknown")
    desk.scheduler.activity(ticket, desk.now)
    assert desk.scheduler.roster.active == 2


# -- moving to another tag -----------------------------------------------------


def test_moved_ticket_is_charged_to_the_new_tag_alone():
    desk = Desk(silent_tag="unknown")
    ticket = desk.request("unknown")
    assert desk.move(ticket, "a")
    assert (desk.held("unknown"), desk.held("a")) == (0, 1)
    accounts = desk.scheduler.roster.accounts
    assert (accounts["unknown"].checkouts, accounts["a"].checkouts) == (0, 1)
    assert not accounts["unknown"].active
    desk.release(ticket)


def test_move_is_refused_at_the_ceiling():
    desk = Desk(silent_tag="unknown")
    desk.requests("a", 15)
    ticket = desk.request("unknown")
    assert desk.move(ticket, "a") is False
    assert (desk.held("unknown"), desk.held("a")) == (1, 15)


def test_move_does_not_overtake_the_line_of_its_tag():
    desk = Desk(capacity=2, soft_limit=2, max_limit=2, silent_tag="unknown")
    ticket, _ = desk.request("unknown"), desk.request("x")
    desk.request("a")
    assert desk.move(ticket, "a") is False


def test_move_does_not_overtake_a_tag_that_holds_less():
    desk = Desk(capacity=3, soft_limit=2, max_limit=3, silent_tag="unknown")
    desk.request("a")
    desk.request("x")
    ticket = desk.request("unknown")
    desk.request("light")
    assert desk.move(ticket, "a") is False
    assert desk.release(ticket)[0].account.tag == "light"


def test_move_frees_room_below_the_old_tags_ceiling():
    desk = Desk(capacity=4, soft_limit=2, max_limit=3)
    a = desk.requests("a", 2)
    desk.request("b")
    waiting = desk.request("a")
    assert waiting.state is WAITING
    assert desk.move(a[0], "b")
    assert waiting.state is GRANTED


# -- memory and cost -----------------------------------------------------------


def test_million_tags_leave_bounded_state():
    desk = Desk()
    scheduler, ticket = desk.scheduler, Ticket()
    for n in range(1_000_000):
        scheduler.request(ticket, f"tag{n}", desk.now)
        scheduler.release(ticket, desk.now)
    assert len(scheduler.roster.accounts) <= roster._MAX_REMEMBERED
    assert len(scheduler.roster._review._heap) <= 2 * roster._MAX_REMEMBERED + 100
    scheduler.check_valid([])


def test_idle_tags_are_forgotten_after_a_while():
    desk = Desk()
    for n in range(100):
        desk.release(desk.request(f"tag{n}"))
    desk.advance(61.0)
    assert len(desk.scheduler.roster.accounts) == 100
    assert desk.scheduler.roster.active == 0
    desk.advance(301.0)
    assert not desk.scheduler.roster.accounts
    assert not desk.scheduler.roster._review


def test_tag_that_holds_a_slot_is_not_forgotten():
    desk = Desk()
    ticket = desk.request("a")
    desk.advance(10_000.0)
    desk.advance(10_000.0)
    assert desk.held("a") == 1
    assert desk.release(ticket) == []
    assert ticket.account.active, "a checkin is activity"


def calls(function):
    """Count the Python and C function calls that `function` makes."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("step", ["request", "release", "cancel"])
def test_cost_of_a_step_grows_at_most_with_the_logarithm(step):
    def cost(tags):
        desk = Desk()
        tickets = [Ticket() for _ in range(tags)]
        for n, ticket in enumerate(tickets):
            desk.scheduler.request(ticket, f"tag{n}", desk.now)
        if step == "request":
            new = Ticket()
            return calls(lambda: desk.scheduler.request(new, "tag3", desk.now))
        if step == "release":
            return calls(lambda: desk.scheduler.release(tickets[3], desk.now))
        return calls(lambda: desk.scheduler.cancel(tickets[tags // 2]))

    # Comparisons inside heapq are its own; what is counted is what we call.
    assert cost(10_000) <= cost(100) + 2


def test_cost_of_a_step_does_not_grow_with_the_line():
    def cost(waiters):
        desk = Desk(capacity=1, soft_limit=1, max_limit=1)
        tickets = [Ticket() for _ in range(waiters + 1)]
        for ticket in tickets:
            desk.scheduler.request(ticket, "a", desk.now)
        return (
            calls(lambda: desk.scheduler.cancel(tickets[waiters // 2])),
            calls(lambda: desk.scheduler.release(tickets[0], desk.now)),
        )

    assert cost(10_000) == cost(10)


# -- signals -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transition", "fields"),
    [
        (Scheduler._grant, {"in_use", "state"}),
        (Scheduler.vacate, {"in_use", "state"}),
        (roster.Roster._set_active, {"active", "prompt", "common_ceiling"}),
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
