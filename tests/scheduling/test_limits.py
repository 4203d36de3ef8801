"""Limits of a tag's own: found by name, and kept by the scheduler."""

from __future__ import annotations

import pytest
from support.invariants import check_valid

from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.ticket import (
    GRANTED,
    NO_LIMITS,
    WAITING,
    LimitsByTag,
    TagLimits,
    Ticket,
)


class Script:
    """A scheduler at one moment, every transition followed by the check."""

    def __init__(self, **options):
        rules = {"capacity": 20, "soft_limit": 10, "max_limit": 15}
        self.rules = {**rules, "idle_timeout": 60.0, "reallocation_interval": 30.0}
        self.rules.update(options)
        self.scheduler = Scheduler(**self.rules, now=0.0)

    def requests(self, tag, number):
        tickets = [Ticket() for _ in range(number)]
        for ticket in tickets:
            self.scheduler.request(ticket, tag, 0.0)
            check_valid(self.scheduler)
        return tickets

    def release(self, ticket):
        granted = self.scheduler.release(ticket, 0.0)
        check_valid(self.scheduler)
        return list(granted)

    def reconfigure(self, **changes):
        self.rules.update(changes)
        granted = self.scheduler.reconfigure(**self.rules, max_waiting=None, now=0.0)
        check_valid(self.scheduler)
        return list(granted)

    def held(self, tag):
        return self.scheduler.tag_states[tag].in_use


@pytest.mark.parametrize(
    ("tag", "weight"),
    [
        ("tenant:1", 2.0),
        ("tenant:vip:7", 3.0),
        ("tenant:vip:*", 3.0),
        ("tenant:vip:boss", 4.0),
        ("tenant:", 2.0),
        ("tenan", 1.0),
        ("api", 5.0),
        ("api2", 1.0),
    ],
)
def test_limits_of_a_tag_are_its_own_or_those_of_the_longest_beginning(tag, weight):
    limits = {"tenant:*": 2.0, "tenant:vip:*": 3.0, "tenant:vip:boss": 4.0, "api": 5.0}
    by_tag = LimitsByTag({k: TagLimits(weight=w) for k, w in limits.items()})
    assert by_tag.of(tag).weight == weight


def test_beginning_of_nothing_is_for_all_others():
    by_tag = LimitsByTag({"*": TagLimits(max=3), "a": TagLimits(weight=2.0)})
    assert by_tag.of("b").max == 3
    assert by_tag.of("a").max is None
    assert LimitsByTag({}).of("b") is NO_LIMITS


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("most", [2, 18])
def test_maximum_of_its_own_counts_alone_and_beside_others(others, most):
    script = Script(limits={"a": TagLimits(max=most)})
    script.requests("b", others)
    script.requests("a", 30)
    assert script.held("a") == most
    assert script.requests("c", 1)[0].state is GRANTED


def test_reserved_slot_is_kept_free_and_granted_at_once():
    script = Script(
        soft_limit=20, max_limit=20, limits={"health": TagLimits(reserved=1)}
    )
    flood = script.requests("web", 40)
    assert script.held("web") == 19
    for _ in range(3):
        ticket, more = script.requests("health", 2)
        assert (ticket.state, more.state) == (GRANTED, WAITING)
        script.scheduler.cancel(more)
        assert script.release(ticket) == []
    # The slot of another tag is for those that wait.
    assert script.release(flood[0]) == [flood[19]]


def test_slot_above_the_reserve_is_shared_with_all():
    script = Script(
        soft_limit=20, max_limit=20, limits={"health": TagLimits(reserved=1)}
    )
    health = script.requests("health", 2)
    web = script.requests("web", 40)
    assert script.held("web") == 18
    assert script.release(health[0]) == [web[18]]
    assert script.release(health[1]) == []
    assert script.held("web") == 19


def test_reserve_lets_its_tag_go_above_the_soft_limit():
    script = Script(soft_limit=2, limits={"a": TagLimits(reserved=4)})
    script.requests("a", 9)
    script.requests("b", 9)
    script.requests("a", 1)
    assert script.held("b") == 2
    assert script.held("a") >= 4


def test_reserve_given_to_a_full_pool_is_filled_by_what_comes_back():
    script = Script(capacity=4, soft_limit=4, max_limit=4)
    web = script.requests("web", 9)
    script.requests("health", 1)
    assert script.reconfigure(limits={"health": TagLimits(reserved=2)}) == []
    health = script.scheduler.tag_states["health"]
    assert [t.tag_state for t in script.release(web[0])] == [health]
    assert script.release(web[1]) == []
    assert script.release(web[2]) == [web[4]]


def test_limits_taken_away_let_those_go_on_that_waited_for_them():
    script = Script(limits={"a": TagLimits(max=1), "b": TagLimits(reserved=5)})
    waiting = script.requests("a", 3)[1:]
    assert script.reconfigure(limits={}) == waiting


def test_tag_below_its_reserve_takes_a_slot_that_another_tag_moves_to_it():
    script = Script(
        capacity=3, soft_limit=3, max_limit=3, limits={"a": TagLimits(reserved=1)}
    )
    web = script.requests("web", 5)
    assert script.held("web") == 2
    assert script.scheduler.move(web[0], "a", 0.0) == [web[2]]
    check_valid(script.scheduler)
    assert (script.held("a"), script.held("web")) == (1, 2)


def test_move_is_made_though_a_reserved_slot_is_granted_by_it_first():
    limits = {"a": TagLimits(reserved=1), "d": TagLimits(reserved=1)}
    script = Script(capacity=3, soft_limit=1, max_limit=1, limits=limits)
    first, second = script.requests("a", 2)
    assert script.scheduler.move(first, "b", 0.0) == [second]
    check_valid(script.scheduler)
    assert (script.held("a"), script.held("b")) == (1, 1)


def test_release_is_said_to_be_wanted_only_if_it_would_grant_another():
    script = Script(
        capacity=3, soft_limit=3, max_limit=3, limits={"a": TagLimits(reserved=1)}
    )
    (kept,) = script.requests("a", 1)
    web = script.requests("web", 3)
    assert not script.scheduler.wanted(kept)
    assert script.scheduler.wanted(web[0])


def test_any_release_is_wanted_by_a_tag_that_waits_below_its_reserve():
    script = Script(capacity=4)
    (api,), web = script.requests("api", 1), script.requests("web", 3)
    script.requests("health", 1)
    script.requests("web", 1)
    one = TagLimits(reserved=1)
    assert script.reconfigure(limits={"api": one, "health": one}) == []
    # One slot is kept free for health, but all four are in use: this drains.
    assert script.scheduler.wanted(api)
    assert script.scheduler.wanted(web[0])


def test_own_maximum_holds_where_ceilings_come_from_outside():
    script = Script(limits={"a": TagLimits(max=2), "b": TagLimits(max=9)})
    script.scheduler.impose(20, {"a": 8, "b": 4}, 6, 0.0)
    for tag in "abc":
        script.requests(tag, 12)
    assert [script.held(tag) for tag in "abc"] == [2, 4, 6]
