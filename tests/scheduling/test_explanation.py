"""Why a tag has what it has: the facts, and the text."""

from __future__ import annotations

import json

import pytest

from sqla_fairpool.scheduling.explanation import explain, facts_of
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.tags import Pause
from sqla_fairpool.scheduling.ticket import TagLimits, Ticket


class Script:
    def __init__(self, **options):
        rules = {"capacity": 20, "soft_limit": 10, "max_limit": 15}
        rules |= {"idle_timeout": 60.0, "reallocation_interval": 30.0}
        self.scheduler = Scheduler(**{**rules, **options}, now=0.0)

    def requests(self, **numbers):
        for tag, number in numbers.items():
            for _ in range(number):
                self.scheduler.request(Ticket(), tag, 0.0)

    def explain(self, tag):
        return explain(facts_of(self.scheduler, tag, 10.0))


LIMITS = {
    "reports": TagLimits(max=2),
    "health": TagLimits(reserved=3),
    "huge": TagLimits(max=20),
}


@pytest.mark.parametrize(
    ("tag", "requests", "ceiling", "rule"),
    [
        ("a", {"a": 1}, 15, "max_limit"),
        ("a", {"a": 1, "b": 1}, 10, "soft_limit"),
        ("new", {"a": 1}, 10, "soft_limit"),
        ("new", {}, 15, "max_limit"),
        ("reports", {}, 2, "max"),
        ("huge", {"a": 1}, 17, "reserved for others"),
        ("health", {"a": 1}, 10, "soft_limit"),
    ],
)
def test_ceiling_and_the_rule_that_it_comes_from(tag, requests, ceiling, rule):
    script = Script(limits=LIMITS)
    script.requests(**requests)
    explanation = script.explain(tag)
    assert (explanation.ceiling, explanation.ceiling_rule) == (ceiling, rule)
    assert tag in str(explanation).splitlines()[0]


def test_reserve_may_be_above_the_soft_limit():
    script = Script(soft_limit=2, limits=LIMITS)
    script.requests(a=1, health=1)
    explanation = script.explain("health")
    assert (explanation.ceiling, explanation.ceiling_rule) == (3, "reserved")


def test_ceiling_may_be_given_by_a_ledger():
    script = Script(limits=LIMITS)
    script.scheduler.impose(10, {"a": 4}, 3, 0.0)
    assert script.explain("a").ceiling_rule == "ledger"
    assert script.explain("reports").ceiling_rule == "max"


def test_tag_in_line_is_told_its_place_and_who_is_before_it():
    script = Script(capacity=6, soft_limit=6, max_limit=6)
    script.requests(a=4, b=2, c=1)
    script.requests(a=1, b=1)
    explanation = script.explain("a")
    assert (explanation.place, explanation.waiting_tags) == (3, 3)
    assert [rival.name for rival in explanation.before] == ["c", "b"]
    assert explanation.returns_needed == 3
    assert explanation.fair_share == 3
    assert json.loads(json.dumps(explanation.as_dict()))["before"][0]["name"] == "c"
    assert str(explanation).splitlines() == [
        "a (active) has 4, 1 wait; it used 28.9 connection-seconds lately",
        "limit 6: soft_limit, 3 tags are active",
        "fair share 3 of 6: max-min among 3 active tags, by what they want now "
        "(weight 1)",
        "place 3 of 3 tags in line; before it: c (has 0, used 0.0), b (has 2, used "
        "14.4)",
        "one more: when 3 of any tag have come back",
    ]


def test_not_all_that_are_before_a_tag_are_named():
    script = Script(capacity=8, soft_limit=8, max_limit=8)
    script.requests(z=2, **dict.fromkeys("abcdef", 1))
    script.requests(z=1, **dict.fromkeys("abcdef", 1))
    stands = {tag: str(script.explain(tag)).splitlines()[3] for tag in "zea"}
    assert stands["z"].startswith("place 7 of 7 tags in line; before it: a (has 1")
    assert stands["z"].endswith("e (has 1, used 7.2) and 1 more")
    assert "more" not in stands["e"]
    assert stands["a"] == "place 1 of 7 tags in line"
    assert script.explain("a").free == 0
    script.scheduler.set_capacity(6, 0.0)
    assert script.explain("a").returns_needed == 1 + 2


@pytest.mark.parametrize(
    ("tag", "paused", "expected"),
    [
        ("a", "a", "one more: when it is resumed"),
        ("a", "b", "one more: when its own come back until it is below its limit"),
        ("b", "a", "one more: when a caller asks, and it is its turn"),
    ],
)
def test_what_one_more_needs(tag, paused, expected):
    script = Script(capacity=4, soft_limit=3, max_limit=3)
    script.requests(a=3, b=1)
    script.scheduler.pause({paused: Pause(0.0)}, 0.0)
    script.requests(a=1)
    assert str(script.explain(tag)).splitlines()[-1] == expected


def test_what_is_reserved_for_a_tag_is_in_its_explanation():
    script = Script(limits=LIMITS)
    assert "(weight 1, 3 reserved)" in str(script.explain("health"))


def test_tag_at_its_ceiling_is_told_that_only_its_own_connections_help():
    script = Script()
    script.requests(a=12)
    assert script.explain("a").free == 3
    script.requests(b=1)
    explanation = script.explain("a")
    assert explanation.place is explanation.returns_needed is None
    assert str(explanation).splitlines()[-1] == (
        "one more: when its own come back until it is below its limit, or when it "
        "is the only active tag (15)"
    )


def test_new_tag_is_explained_and_not_remembered():
    script = Script(limits=LIMITS)
    script.requests(a=1)
    explanation = script.explain("new")
    assert (explanation.free, explanation.active) == (10, False)
    assert list(script.scheduler.tag_states) == ["a"]
    assert str(explanation).startswith("new (idle) has 0")
    assert "limit 10: soft_limit, 1 tag is active" in str(explanation)
    assert "not in line; 0 tags wait below their limits" in str(explanation)
    assert "at once" in str(explanation)


def test_what_is_reserved_for_others_is_in_no_share():
    script = Script(soft_limit=20, max_limit=20, limits=LIMITS)
    script.requests(a=40)
    explanation = script.explain("a")
    assert (explanation.fair_share, explanation.shared) == (17, 17)
    assert (explanation.ceiling, explanation.ceiling_rule) == (
        17,
        "reserved for others",
    )
    script.requests(b=40)
    assert script.explain("b").fair_share == 8
    health = script.explain("health")
    assert (health.free, health.shared, health.fair_share) == (3, 20, 0)
    script.requests(health=1)
    assert script.explain("b").fair_share == 8
