"""The allocation over processes, against its definition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_fairpool.ledger.allocation import allocate
from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.demand import State
from sqla_fairpool.ledger.rows import Limits, Member, Session, Terms, dump
from sqla_fairpool.ledger.rows import TagDemand as Line
from sqla_fairpool.ledger.store import LedgerError
from sqla_fairpool.ledger.transaction import has_news, renew, settle
from sqla_fairpool.scheduling import policy
from sqla_fairpool.scheduling.ticket import LimitsByTag, TagLimits

TERMS = Limits(capacity=20, soft_limit=10, max_limit=15)


class Party(NamedTuple):
    owned: int = 0
    stalled: bool = False
    tags: Mapping[str, Line] = MappingProxyType({})
    pressed: bool = False


def wanting(place=1, owned=0, **tags):
    """A member that waits for so much under each tag, and holds nothing of it."""
    return Party(owned, tags={tag: Line(0, n, n > 0, place) for tag, n in tags.items()})


def holding(owned, in_use, waiting=0, stalled=False, active=True, tag="x"):
    """A member that holds so much under a tag."""
    return Party(owned, stalled, {tag: Line(in_use, waiting, active, 1)})


# -- what each member is to have --------------------------------------------------

FOUR_SCENARIOS = [
    ([wanting(a=99)], [15]),
    ([wanting(a=99), wanting(2, c=99)], [10, 10]),
    ([wanting(a=99), wanting(2, b=99), wanting(3, c=99)], [7, 7, 6]),
    ([wanting(a=99), wanting(2, b=0), wanting(3, c=99)], [10, 0, 10]),
]
OF_SEVERAL_PROCESSES = [
    ([wanting(x=99), wanting(2, x=99), wanting(y=99)], [5, 5, 10]),
    # What one does not want is the others' of its tag.
    ([wanting(x=2), wanting(2, x=99), wanting(y=99)], [2, 8, 10]),
    # A tag that went idle leaves only what it still holds.
    ([wanting(a=99), holding(5, 5, active=False), wanting(c=99)], [8, 5, 7]),
    # What nobody claims stays where it is, until somebody is short of it.
    ([holding(9, 2), wanting(y=8)], [9, 8]),
    ([holding(14, 2), holding(4, 1, tag="z"), wanting(y=8)], [8, 4, 8]),
    # One that is stalled counts with what it has, also for its tag.
    ([holding(7, 5, 90, stalled=True), wanting(y=99), wanting(z=99)], [7, 7, 6]),
    ([holding(6, 6, 90, stalled=True), wanting(2, x=99), wanting(y=99)], [6, 4, 10]),
]


def test_weights_and_maxima_count_over_all_members():
    tags = {"api": TagLimits(weight=3.0), "reports:*": TagLimits(max=2)}
    limits = Limits(20, 20, 20, LimitsByTag(tags))
    parties = {
        "m0": wanting(1, api=9),
        "m1": wanting(2, api=99, web=99),
        "m2": wanting(3, **{"reports:a": 9, "jobs": 99}),
        "m3": wanting(4, **{"reports:a": 9}),
    }
    found = allocate(parties, {"api": 1, "web": 2, "jobs": 3, "reports:a": 4}, limits)
    assert found.shares["reports:a"] == found.ceilings["reports:a"] == 2
    assert [found.shares[tag] for tag in ("api", "web", "jobs")] == [10, 4, 4]


HEALTH = LimitsByTag({"health": TagLimits(reserved=2)})
QUIET = Line(0, 0, True, 1)
BUSY = Line(1, 0, True, 5)


@pytest.mark.parametrize(
    ("health", "claims", "kept_free"),
    [
        # No member works under it: its slots stay free.
        ({}, {}, 2),
        # The one that does has them, wanted or not; the first in line, of several.
        ({"A": QUIET}, {"A": 2}, 0),
        ({"A": QUIET, "B": QUIET}, {"A": 1, "B": 1}, 0),
        ({"A": QUIET._replace(place=9), "B": BUSY}, {"A": 1, "B": 1}, 0),
        ({"A": QUIET, "B": Line(2, 0, True, 9)}, {"B": 2}, 0),
        # Above its reserve it is a tag as others are.
        ({"A": Line(9, 0, True, 1)}, {"A": 9}, 0),
    ],
)
def test_reserved_slots_are_claimed_under_their_tag_only(health, claims, kept_free):
    parties = {m: Party(tags={"web": Line(0, 99, True, 3)}) for m in "AB"}
    for member, line in health.items():
        parties[member] = Party(tags={**parties[member].tags, "health": line})
    found = allocate(parties, {}, Limits(20, 20, 20, HEALTH))
    got = {m: n for (tag, m), n in found.claims.items() if tag == "health"}
    assert (got, found.kept_free) == (claims, kept_free)
    assert found.shares["web"] == 20 - max(sum(claims.values()), 2)
    assert sum(found.targets.values()) == 20 - kept_free
    reserves = {m: n for (tag, m), n in found.reserves.items() if n}
    assert sum(reserves.values()) == 2 - kept_free


def test_reserved_slots_of_a_stalled_member_are_not_kept_twice():
    parties = {"A": holding(2, 2, stalled=True, tag="health"), "B": wanting(web=99)}
    found = allocate(parties, {}, Limits(20, 20, 20, HEALTH))
    assert (found.shares["web"], found.kept_free) == (18, 0)


def test_rest_of_a_reserve_goes_to_those_that_want_less():
    tags = LimitsByTag({"health": TagLimits(reserved=3)})
    quiet = Party(tags={"health": QUIET._replace(place=2)})
    for parties in (
        {"A": Party(tags={"health": QUIET}), "B": wanting(2, health=2)},
        {"A": stalled(1, 1), "B": quiet},
    ):
        found = allocate(parties, {}, Limits(20, 20, 20, tags))
        assert found.claimed == {"A": 1, "B": 2}


def stalled(owned, in_use, tag="health"):
    return holding(owned, in_use, stalled=True, tag=tag)


@pytest.mark.parametrize(
    ("parties", "capacity", "kept_free", "reserves"),
    [
        # What a stalled member lacks of a reserve is kept for it by no member.
        ({"A": stalled(1, 1)}, 20, 1, {}),
        ({"A": stalled(1, 1), "B": wanting(2, health=0)}, 20, 0, {"A": 0, "B": 1}),
        # Nothing is left to be kept.
        ({"A": stalled(2, 2, "web")}, 2, 0, {}),
        ({"A": stalled(2, 2, "web")}, 3, 1, {}),
        # What nobody claims stays where it is, but for what is kept.
        ({"A": Party(20)}, 20, 2, {}),
    ],
)
def test_what_is_reserved_is_kept_beside_what_cannot_be_moved(
    parties, capacity, kept_free, reserves
):
    found = allocate(parties, {}, Limits(capacity, 20, 20, HEALTH))
    assert found.kept_free == kept_free
    assert found.reserves == {("health", m): n for m, n in reserves.items()}
    owned = sum(party.owned for party in parties.values())
    assert sum(found.targets.values()) <= max(owned, capacity) - kept_free
    assert found.targets["A"] == min(parties["A"].owned, capacity - kept_free)


@pytest.mark.parametrize(
    ("tags", "capacity", "soft", "ceilings", "newcomer"),
    [
        # At least one, whatever is reserved for others.
        (HEALTH, 2, 2, {"health": 2, "web": 1}, 1),
        (HEALTH, 5, 4, {"health": 4, "web": 3}, 3),
        (LimitsByTag({}), 2, 9, {"web": 9}, 9),
    ],
)
def test_ceilings_leave_room_for_what_is_reserved(
    tags, capacity, soft, ceilings, newcomer
):
    parties = {"A": wanting(web=99), "B": Party(tags={"idle": Line(0, 0, True)})}
    found = allocate(parties, {}, Limits(capacity, soft, soft, tags))
    del found.ceilings["idle"]
    assert (found.ceilings, found.newcomer) == (ceilings, newcomer)


def test_a_tag_without_a_place_is_before_those_that_have_one():
    parties = {"m": wanting(a=9, b=9)}
    assert allocate(parties, {"a": 1}, Limits(1, 1, 1)).shares == {"a": 0, "b": 1}


def test_tags_are_asked_where_a_member_waits_of_those_that_answer():
    quiet = Party(tags={"b": Line(0, 0, True, 2), "a": Line(0, 0, True, 9)})
    parties = {"A": wanting(a=1), "B": wanting(b=1), "C": quiet}
    found = allocate(parties, {"a": 1, "b": 2}, Limits(1, 1, 1))
    assert (found.asked_tags, found.asked) == ({"a"}, {("a", "A")})
    parties["A"] = stalled(1, 1, "a")
    found = allocate(parties, {"a": 1, "b": 2}, Limits(1, 1, 1))
    assert (found.asked_tags, found.asked) == (set(), set())


def keeps(owned, kept, wants=0, busy=0, limit=20):
    """A member that keeps so many slots for health, and wants others for web."""
    health = Line(0, 0, True, 1, limit, kept)
    web = Line(busy, wants - busy, True, 1, limit)
    return Member(1, owned=owned, tags={"health": health, "web": web})


@pytest.mark.parametrize(
    ("owned", "kept", "more", "expected"),
    [
        *[(5, 0, 0, {"health": 2}), (4, 1, 1, {"health": 2}), (4, 0, 0, {})],
        *[(4, 1, 0, {"health": 1}), (0, 0, 1, {"health": 1}), (1, 2, 0, {"health": 1})],
    ],
)
def test_slots_that_a_member_keeps_for_a_tag(owned, kept, more, expected):
    members = {"A": keeps(owned, kept, wants=3)}
    plan = allocate(members, {}, Limits(20, 20, 20, HEALTH))
    assert plan.claimed == {"A": 5}
    assert plan.kept_at("A", members["A"], more) == expected


@pytest.mark.parametrize(
    ("kept", "free", "expected"),
    [
        *[(1, 1, {"A": 1}), (1, 2, {"A": 1, "B": 1}), (0, 2, {"A": 2})],
        *[(2, 1, {"B": 1}), (0, 3, {"A": 2, "B": 1})],
    ],
)
def test_what_lacks_of_a_reserve_is_granted_first(kept, free, expected):
    members = {"A": keeps(5, kept, wants=9, busy=5), "B": keeps(0, 0, wants=9)}
    tags = members["B"].tags
    members["B"] = replace(members["B"], tags={"web": tags["web"]})
    plan = allocate(members, {}, Limits(20, 20, 20, HEALTH))
    assert plan.grants(members, free) == expected
    members["A"] = keeps(4, 0, wants=3, busy=3)
    plan = allocate(members, {}, Limits(20, 20, 20, HEALTH))
    assert plan.grants(members, 2) == {"A": 1, "B": 1}


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        (keeps(5, 2, 3), {}),
        (keeps(5, 1, 3), {"A": "limit"}),
        (keeps(4, 1, 3), {}),
        (keeps(5, 2, 3, limit=1), {"A": "limit"}),
        (keeps(0, 0, 3, limit=1), {}),
        (replace(keeps(5, 2, 3), stalled=True), {"A": "stalled"}),
        (replace(keeps(21, 2, 3)), {"A": "give 20"}),
    ],
)
def test_members_that_are_to_look_and_why(member, expected):
    plan = allocate({"A": member}, {}, Limits(20, 20, 20, HEALTH))
    assert plan.due({"A": member}) == expected


def test_members_that_hold_the_last_slots_are_told_that_it_is_their_turn():
    members = {n: Member(1, tags={"x": Line(0, 1, True, 1)}) for n in "ab"}
    members["a"] = replace(members["a"], owned=1)
    plan = allocate(members, {}, Limits(1, 1, 1))
    told = members["a"].tags["x"]._replace(limit=plan.limits["x", "a"])
    members["a"] = replace(members["a"], tags={"x": told})
    assert plan.due(members) == {"a": "turn"}
    assert plan.due({**members, "a": replace(members["a"], owned=0)}) == {}


def test_tag_within_its_reserve_is_not_asked_to_yield():
    parties = {
        "A": wanting(health=1),
        **{f"m{n}": wanting(**{f"t{n}": 9}) for n in range(3)},
    }
    places = {"health": 1, "t0": 2, "t1": 3, "t2": 4}
    found = allocate(parties, places, Limits(4, 4, 4, HEALTH))
    assert found.asked_tags == {"t0", "t1"}


@pytest.mark.parametrize("free", range(8))
def test_free_slots_that_are_reserved_go_to_the_tag_they_are_kept_for(free):
    wants = Line(0, 9, True, 1)
    parties = {
        "A": Party(12 - free, tags={"web": Line(9, 9, True, 1), "health": QUIET}),
        "B": Party(0, tags={"web": wants}),
    }
    members = {m: Member(1, owned=p.owned, tags=p.tags) for m, p in parties.items()}
    limits = LimitsByTag({"health": TagLimits(reserved=2), "z": TagLimits(reserved=1)})
    found = allocate(members, {}, Limits(12, 12, 12, limits))
    grants = found.grants(members, free)
    assert found.kept_free == 1
    # Two for A's health, one stays free, and B gets of the rest only.
    missing = min(2, found.targets["A"] - (12 - free)) if free else 0
    assert grants.get("B", 0) <= max(free - max(missing, 0) - 1, 0)


def test_random_boards_keep_what_is_reserved():
    random = Random(15)
    for _ in range(300):
        reserves = {t: random.randint(0, 2) for t in random.sample("xyzuvw", 3)}
        capacity = sum(reserves.values()) + random.randint(1, 20)
        weights = {t: random.choice([0.5, 1.0, 3.0]) for t in "xyzuvw"}
        own = {
            t: TagLimits(
                weight=weights[t],
                reserved=reserves.get(t, 0),
                max=random.choice([None, max(reserves.get(t, 0), 1), capacity]),
            )
            for t in "xyzuvw"
        }
        members = {
            m: Party(
                tags={
                    t: Line(random.randint(0, 5), random.randint(0, 5), True, n)
                    for n, t in enumerate(random.sample("xyzuvw", random.randint(0, 4)))
                }
            )
            for m in "ABCD"
        }
        most = random.randint(1, capacity)
        limits = Limits(capacity, random.randint(1, most), most, LimitsByTag(own))
        found = allocate(members, {}, limits)
        claimed, wants = Counter(), Counter()
        for (tag, member), n in found.claims.items():
            claimed[tag] += n
            assert found.limits[tag, member] >= n
        for party in members.values():
            for tag, line in party.tags.items():
                wants[tag] += line.wants
        known = {t for p in members.values() for t in p.tags}
        kept = {t: n for t, n in reserves.items() if t not in known}
        assert found.kept_free == sum(kept.values())
        demand = {
            t: max(min(wants[t], found.ceilings[t]), reserves.get(t, 0)) for t in known
        }
        there = capacity - found.kept_free
        assert claimed.total() == min(there, sum(demand.values()))
        for tag in known:
            assert claimed[tag] >= reserves.get(tag, 0)
            assert found.ceilings[tag] <= max(own[tag].max or capacity, 1)
            for other in known:
                if claimed[tag] < demand[tag] and claimed[other] > reserves.get(
                    other, 0
                ):
                    had = (claimed[other] - 1) / weights[other]
                    assert had <= claimed[tag] / weights[tag]
        for tag in known & reserves.keys():
            got = [found.reserves.get((tag, m), 0) for m in members]
            assert sum(got) == min(reserves[tag], claimed[tag])
        assert sum(found.targets.values()) <= there


@pytest.mark.parametrize(("parties", "expected"), FOUR_SCENARIOS + OF_SEVERAL_PROCESSES)
def test_targets(parties, expected):
    found = allocate(dict(zip("ABC", parties, strict=False)), {}, TERMS)
    assert [*found.targets.values()] == expected
    assert not found.asked


def test_a_process_has_the_sum_over_its_tags():
    parties = {"a": wanting(x=99, y=99), "b": wanting(z=99)}
    found = allocate(parties, {"x": 1, "y": 2, "z": 3}, TERMS)
    assert found.targets == {"a": 14, "b": 6}
    assert found.claims == {("x", "a"): 7, ("y", "a"): 7, ("z", "b"): 6}


def test_ceilings_count_the_active_tags_of_all_members():
    alone = allocate({"a": wanting(x=1)}, {}, TERMS)
    assert (alone.ceilings, alone.newcomer) == ({"x": 15}, 10)
    assert alone.starved == {}
    two = allocate({"a": wanting(x=1), "b": wanting(y=1)}, {}, TERMS)
    assert two.ceilings == {"x": 10, "y": 10}


def test_a_local_rise_has_room_without_a_new_allocation():
    found = allocate({"a": wanting(x=2), "b": wanting(2, x=1)}, {}, TERMS)
    assert found.limits == {("x", "a"): 8, ("x", "b"): 7}
    quiet = Party(tags={"x": Line(0, 0, True, 0)})
    found = allocate({"a": quiet, "b": wanting(x=99)}, {}, TERMS)
    assert found.limits["x", "a"] == 1


# -- the line --------------------------------------------------------------------


def test_with_more_members_than_slots_the_first_are_asked_for_the_last():
    parties = {f"m{n}": wanting(n, x=1) for n in range(5)}
    found = allocate(parties, {}, Limits(3, 3, 3))
    assert found.targets == {"m0": 1, "m1": 1, "m2": 1, "m3": 0, "m4": 0}
    assert found.asked == {("x", "m0"), ("x", "m1")}
    assert found.starved == {"x": {"m3", "m4"}}


def test_with_more_tags_than_slots_those_that_have_one_are_asked():
    parties = {f"m{n}": wanting(**{f"t{n}": 9}) for n in range(3)}
    found = allocate(parties, {"t1": 1, "t2": 2, "t0": 3}, Limits(2, 2, 2))
    assert found.targets == {"m1": 1, "m2": 1, "m0": 0}
    assert found.asked_tags == {"t1", "t2"}
    assert found.asked == {("t1", "m1"), ("t2", "m2")}


def test_slots_of_a_stalled_member_that_no_tag_uses_are_nobodys():
    parties = {"A": Party(2, stalled=True), "B": wanting(x=9)}
    assert allocate(parties, {}, Limits(2, 2, 2)).shares == {"x": 0}


def test_nobody_is_asked_while_everybody_has_something():
    found = allocate({f"m{n}": wanting(n, x=9) for n in range(10)}, {}, TERMS)
    assert not found.asked
    assert found.unmet == 0  # the ceiling is the limit, not the slots
    assert found.presses("m0", {"y": Line(), "x": Line()})
    assert not found.presses("m0", {"y": Line()})


# -- the definition, on whatever there is --------------------------------------------

numbers, more = st.integers(0, 9), st.integers(0, 12)
LINES = st.builds(Line, more, more, st.booleans(), numbers, numbers)
MEMBERS = st.builds(
    Party,
    st.integers(0, 6),
    st.booleans(),
    st.dictionaries(st.sampled_from("xyzuvw"), LINES, max_size=4),
)
PARTIES = st.dictionaries(st.sampled_from("ABCDEFGH"), MEMBERS, max_size=8)
PLACES = st.dictionaries(st.sampled_from("xyzuvw"), st.integers(1, 9))


@st.composite
def boards(draw):
    """A board that can be: not more owned than there is."""
    parties = draw(PARTIES)
    owned = sum(party.owned for party in parties.values())
    capacity = draw(st.integers(max(owned, 1), owned + 20))
    most = draw(st.integers(1, capacity))
    soft = draw(st.integers(1, most))
    return parties, draw(PLACES), Limits(capacity, soft, most)


@given(boards())
def test_targets_never_add_up_to_more_than_there_is(board):
    parties, places, limits = board
    found = allocate(parties, places, limits)
    assert found.targets.keys() == parties.keys()
    assert sum(found.targets.values()) <= limits.capacity
    assert all(found.targets[m] >= found.claimed[m] for m in parties)
    # Nobody gives up what nobody claims.
    if any(found.targets[m] < p.owned for m, p in parties.items()):
        assert sum(found.targets.values()) == limits.capacity
    for member, party in parties.items():
        if party.stalled:
            assert found.targets[member] == party.owned
            assert not {pair for pair in found.asked if pair[1] == member}


@given(boards())
def test_claims_are_what_the_policy_says(board):
    """Word for word: shares over tags, then over each tag's members."""
    parties, places, limits = board
    parties = {m: p._replace(stalled=False) for m, p in parties.items()}
    found = allocate(parties, places, limits)
    pairs = [(t, m, line) for m, p in parties.items() for t, line in p.tags.items()]
    tags = {t for t, _, _ in pairs}
    active = {t for t, _, line in pairs if line.active}
    order = sorted(tags, key=lambda t: (places.get(t, 0), t))
    demands = []
    for tag in order:
        ceiling = policy.ceiling(
            len(active - {tag}), limits.soft_limit, limits.max_limit
        )
        assert found.ceilings[tag] == ceiling
        demands.append(min(sum(x.wants for t, _, x in pairs if t == tag), ceiling))
    shares = policy.fair_shares(demands, limits.capacity)
    assert [found.shares[tag] for tag in order] == shares
    assert found.unmet == sum(demands) - sum(shares)
    for tag, share in zip(order, shares, strict=True):
        line = sorted((x.place, m, x.wants) for t, m, x in pairs if t == tag)
        expected = policy.fair_shares([wants for _, _, wants in line], share)
        claims = [found.claims.get((tag, m), 0) for _, m, _ in line]
        assert claims == expected
        room = [found.limits[tag, m] for _, m, _ in line]
        wants = [w for _, _, w in line]
        assert all(r >= c for r, c in zip(room, claims, strict=True))
        inside = [r for r, w in zip(room, wants, strict=True) if w]
        assert sum(inside) <= max(found.ceilings[tag], share)


@given(boards(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(board, random):
    parties, places, limits = board
    shuffled = [*parties.items()]
    random.shuffle(shuffled)
    one, other = (allocate(p, places, limits) for p in (parties, dict(shuffled)))
    for name in ("targets", "claims", "limits", "asked"):
        assert getattr(one, name) == getattr(other, name)


@given(boards(), st.integers(1, 50))
def test_who_gets_less_than_it_wants_gains_nothing_by_wanting_more(board, more):
    """So how long a line is need not be known exactly while all are saturated."""
    parties, places, limits = board
    before = allocate(parties, places, limits)
    for member, party in parties.items():
        for tag, line in party.tags.items():
            if not party.stalled and before.claims.get((tag, member), 0) < line.wants:
                grown = line._replace(waiting=line.waiting + more)
                changed = party._replace(tags={**party.tags, tag: grown})
                after = allocate({**parties, member: changed}, places, limits)
                assert after.claims == before.claims


@given(boards())
def test_who_has_nothing_is_somebody_elses_turn(board):
    """As many are asked to yield as get nothing; no one of those that do."""
    parties, places, limits = board
    found = allocate(parties, places, limits)
    for tag, member in found.asked:
        assert found.claims[tag, member] >= 1
    for tag, share in found.shares.items():
        line = {m: p.tags[tag] for m, p in parties.items() if tag in p.tags}
        empty = [
            m
            for m, x in line.items()
            if x.waiting and not parties[m].stalled and not found.claims.get((tag, m))
        ]
        holders = [
            m for m in line if found.claims.get((tag, m)) and not parties[m].stalled
        ]
        asked = [m for t, m in found.asked if t == tag]
        if tag not in found.asked_tags:
            assert len(asked) == (min(len(empty), len(holders)) if share else 0)


def test_a_thousand_processes_and_a_hundred_tags_are_divided_exactly():
    parties = {
        f"m{n:04}": Party(tags={f"t{n % 100}": Line(0, 3, True, n + 1)})
        for n in range(1000)
    }
    found = allocate(parties, {}, Limits(250, 125, 188))
    assert sum(found.targets.values()) == 250
    assert set(found.shares.values()) == {2, 3}
    assert set(found.targets.values()) == {0, 1}


def test_a_member_that_is_stalled_is_asked_for_nothing():
    parties = {
        "m0": holding(1, 1, 9, stalled=True),
        "m1": holding(1, 1, 9),
        "m2": wanting(2, x=9),
    }
    plan = allocate(parties, {}, Limits(2, 2, 2))
    assert {member for _, member in plan.asked} == {"m1"}


def test_an_empty_ledger_has_limits_of_nobody():
    book = Book({})
    book.tell()
    assert (book.set_by, book.pauses, book.server, book.bells) == (None, {}, None, [])
    with pytest.raises(LedgerError, match="no process has joined"):
        _ = book.terms
    book.join("a", {}, Terms(9, 9, 9, 60.0, 30.0), server="s")
    assert book.server == "s"


def joined(capacity=9, **owned):
    """A book of members that own so many."""
    book = Book({})
    for key, number in owned.items():
        book.join(key, {"host": "h", "pid": key}, Terms(capacity, 9, 9, 60.0, 30.0))
        book.write(key, replace(book.members[key], owned=number))
    return book


def test_a_row_that_changes_is_a_sign_of_life_and_one_that_does_not_is_none():
    book = joined(a=0)
    state = State(0, {}, frozenset(), (), None)
    before = book.members["a"].beat
    settle(book, "a", state, {"x": Line(0, 2, True)}, 0)
    assert book.members["a"].beat == before + 1
    assert book.members["a"].tags["x"].place > 0, "a place in the line"
    settle(book, "a", state, {"x": Line(0, 2, True)}, 0)
    assert book.members["a"].beat == before + 1
    settle(book, "a", state, {"x": Line(0, 2, True)}, 0, sign=True)
    assert book.members["a"].beat == before + 2


def test_all_slots_of_a_member_can_go_into_quarantine():
    book = joined(a=2)
    assert book.quarantine("a", [None, Session(1, 1)]) == [None, Session(1, 1)]
    assert (book.owned, book.quarantined) == (0, 2)


def test_four_of_the_members_are_named_to_one_that_differs():
    book = joined(a=0, b=0, c=0, d=0)
    assert "(members: h:a, h:b, h:c, h:d)" in str(book._difference(None))
    book = joined(a=0, b=0, c=0, d=0, e=0)
    assert "h:c, h:d and 1 more)" in str(book._difference(None))


def test_a_pause_is_new_once():
    book = joined(a=0)
    for who, expected in (({"host": "h"}, True), ({"host": "i"}, False)):
        assert book.pause("x", who) is expected
        assert book.meta.pauses == {"x": {"host": "h"}}
    for expected in (True, False):
        assert book.pause("x", None) is expected
        assert book.pauses == {}


OTHER_TERMS = Terms(7, 9, 9, 60.0, 30.0)


@pytest.mark.parametrize(
    ("alone", "terms", "leads", "set_by"),
    [
        (True, OTHER_TERMS, False, "new"),
        (True, None, False, "a"),
        (False, OTHER_TERMS, False, "a"),
        (False, OTHER_TERMS, True, "new"),
        (False, None, True, "a"),
    ],
)
def test_who_has_set_the_terms(alone, terms, leads, set_by):
    book = joined(a=0)
    terms = terms or book.terms
    if alone:
        book.leave("a", 0)
    book.join("b", {"pid": "new"}, terms, leads=leads)
    assert book.set_by["pid"] == set_by
    asked = None if set_by == "new" or terms == book.terms else "capacity=7"
    assert book.members["b"].who.get("asked") == asked


def test_terms_of_rows_that_say_nobody_are_set_by_the_first():
    book = joined(a=0)
    book.meta = replace(book.meta, set_by={})
    book.join("b", {"pid": "b"}, book.terms)
    assert not book.set_by
    book.leave("a", 0), book.leave("b", 0)
    book.join("c", {"pid": "c"}, book.terms)
    assert book.set_by == {"pid": "c"}


def test_one_that_leaves_keeps_slots_for_what_is_open_and_not_in_quarantine():
    book = joined(a=5)
    book.quarantine("a", [Session(1, 1)], open_=4)
    book.leave("unknown", 3)
    book.leave("a", 3, [Session(1, 1), Session(2, 1)])
    slots = [(gone.slots, gone.sessions) for gone in book.gone.values()]
    assert slots == [(1, (Session(1, 1),)), (2, (Session(2, 1),))]
    assert not book.members


def test_one_that_leaves_for_another_server_gives_its_slots_to_those_that_wait():
    book = joined(capacity=2, a=2, b=0)
    book.meta = replace(book.meta, server="here", fresh=False)
    row = replace(book.members["b"], tags={"x": Line(0, 1, True, 1)})
    book.write("b", row)
    state = State(0, {}, frozenset(), (), "there")
    assert renew(book, "a", state, {}, 0, None, None) is None
    assert (book.members["b"].owned, book.members["b"].granted) == (1, 1)
    assert book.bells == ["b"]


def test_rows_that_have_changed_are_not_those_of_the_dead_or_the_stalled():
    book = joined(a=1, b=2)
    texts = dict(book.texts)
    book.write("a", replace(book.members["a"], beat=9))
    book.stall(texts)
    assert {k: m.stalled for k, m in book.members.items()} == {"a": False, "b": True}
    assert book.reap(texts) == []
    assert book.reap({"b": book.texts["b"]}) == [2]
    assert (list(book.members), book.quarantined) == (["a"], 2)


def test_of_a_copy_the_terms_and_the_dead_are_kept():
    book = joined(a=1, b=2, c=0)
    other = replace(book.meta, protocol=0)
    book.meta, own = other, book.meta
    assert not book.restore(["a"])
    assert list(book.members) == ["a", "b", "c"]
    book.meta = own
    assert book.restore(["a"])
    assert [gone.slots for gone in Book(dict(book._rows)).gone.values()] == [2]
    assert (book.members, book.texts, book.terms) == ({}, {}, own.terms)
    assert book.is_fresh
    assert book.restore([])
    assert Book({"meta": "nonsense"}).restore([])


def test_terms_of_members_of_another_version_are_not_changed():
    book = joined(a=1)
    book.meta = replace(book.meta, protocol=0)
    with pytest.raises(LedgerError, match="older version"):
        book.change(pauses={})
    book.leave("a", 0)
    book.change(pauses={})


# -- one transaction -------------------------------------------------------------------


def settled(book, key, demand, open_=0, allowed=0, lost=(), **more):
    state = State(open_, {}, frozenset(), lost, None)
    return settle(book, key, state, demand, allowed, **more)


def test_only_what_is_wanted_or_active_is_posted_and_has_a_place_if_it_is_wanted():
    tags = '{"health": {"reserved": 2}}'
    book = Book({})
    book.join("a", {}, Terms(9, 9, 9, 60.0, 30.0, tags))
    demand = {"health": Line(active=True), "web": Line(active=True), "idle": Line()}
    settled(book, "a", demand | {"busy": Line(0, 1, True)})
    lines = book.members["a"].tags
    assert [*lines] == ["health", "web", "busy"]
    has_place = {tag: line.place > 0 for tag, line in lines.items()}
    assert has_place == {"health": True, "web": False, "busy": True}
    places = dict(book.places), lines["busy"].place
    settled(book, "a", {"busy": Line(0, 2, True), "health": Line(active=True)})
    assert book.members["a"].tags["busy"].place == places[1]
    written = Book(dict(book._rows)).places
    assert written == {tag: places[0][tag] for tag in ("health", "busy")}


def test_what_is_open_has_a_slot_before_others_get_theirs():
    book = joined(4, a=2, b=0)
    assert settled(book, "a", {}, 3, 3).covered
    assert book.members["a"].owned == 3
    book.quarantine("a", [Session(1, 1)], open_=2)
    assert book.members["a"].owned == 2
    told = settled(book, "a", {}, 3, 3, (Session(1, 1),))
    assert (told.covered, told.buried) == (True, (Session(1, 1),))
    assert book.members["a"].owned == 2
    told = settled(book, "b", {}, 2, 2)
    assert (told.covered, book.members["b"].owned) == (False, 1)


def test_what_may_be_opened_is_not_given_back_but_for_what_was_lost():
    book = joined(9, a=5, b=0)
    settled(book, "b", {"x": Line(0, 9, True)})
    lost = Session(1, 1)
    assert settled(book, "a", {}, 1, 3, (lost,)).buried == (lost,)
    assert (book.members["a"].owned, book.quarantined) == (2, 1)


def test_turn_of_a_member_and_of_a_tag():
    """Who yields goes to the end of its line; its tag too, if that one was asked."""
    book = joined(1, a=1, b=0)
    for key, tag in ("a", "x"), ("b", "x"):
        told = settled(book, key, {tag: Line(key == "a", 1, True)}, int(key == "a"), 1)
    assert (told.asked, told.turns, told.due) == (frozenset(), 1, None)
    assert book.bells == ["a"]
    places = dict(book.places)
    told = settled(book, "a", {"x": Line(1, 1, True)}, 1, 1)
    assert (told.asked, told.due) == ({"x"}, "turn")
    told = settled(book, "a", {"x": Line(1, 1, True)}, 1, 0, ready=["x"])
    assert (told.asked, told.target, book.places) == (frozenset(), 0, places)
    book.leave("b", 0)
    book.join("c", {}, book.terms)
    settled(book, "c", {"y": Line(0, 1, True)})
    settled(book, "a", {"x": Line(1, 1, True)}, 1, 0, ready=["x"])
    assert book.places["x"] > book.places["y"]


def time_by_weight(weights, slots):
    """What each has of the time if none has more than a slot: the definition."""
    low, high = 0.0, max(1 / weight for weight in weights)
    for _ in range(60):
        rate = (low + high) / 2
        filled = sum(min(1.0, weight * rate) for weight in weights)
        low, high = (rate, high) if filled < slots else (low, rate)
    return [min(1.0, weight * low) for weight in weights]


@pytest.mark.parametrize("seed", [0, 3, 4, 5])
def test_turns_of_more_tags_than_slots_are_had_by_weight_over_all_members(seed):
    random = Random(seed)
    number, rounds = random.randint(4, 12), 80
    slots = random.randint(1, number - 1)
    weights = {f"t{n}": random.choice([0.5, 1.0, 1.0, 2.0, 3.0]) for n in range(number)}
    tags = dump({tag: {"weight": weight} for tag, weight in weights.items()})
    where = {tag: random.sample("abc", random.choice([1, 1, 2])) for tag in weights}
    book = Book({})
    wants = {m: {t: Line(0, 9, True) for t in where if m in where[t]} for m in "abc"}
    for key, wanted in wants.items():
        book.join(key, {}, Terms(slots, slots, slots, 60.0, 30.0, tags))
        settled(book, key, wanted)
    had = Counter()
    for turn in range(rounds + number):
        holders = {pair: pair[0] for pair in book.allocation().claims}
        had.update(holders.values() if turn >= number else ())
        while asked := book.allocation().asked & holders.keys():
            tag, key = min(asked)
            del holders[tag, key]
            settled(book, key, wants[key], ready=[tag])
    expected = time_by_weight([*weights.values()], slots)
    times = [had[tag] / rounds for tag in weights]
    assert sum(times) == pytest.approx(slots)
    assert times == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("weight", "place", "after", "newcomer"),
    [
        *[(1.0, 9500, 10500, 10502), (3.0, 9500, 9834, 10502)],
        *[(0.5, 9500, 11500, 10502), (5e-324, 9500, 10**9 + 9500, 10502)],
        # One that was quiet for many turns is ahead of others by one.
        *[(1.0, 8500, 9500, 10003), (1.0, 9, 9000, 10003)],
    ],
)
def test_tag_goes_back_by_a_turn_over_its_weight(weight, place, after, newcomer):
    book, tags = Book({}), dump({"y": {"weight": weight}})
    book.join("a", {}, Terms(1, 1, 1, 60.0, 30.0, tags))
    demand = {tag: Line(0, 1, True) for tag in "xy"}
    settled(book, "a", demand)
    book.meta = replace(book.meta, next_place=10000)
    book.places |= {"x": 20000, "y": place}
    settled(book, "a", demand, ready=["y"])
    settled(book, "a", demand | {"new": Line(0, 1, True)})
    assert (book.places["y"], book.places["new"]) == (after, newcomer)


def test_one_that_needs_no_more_gives_back_what_it_does_not_claim():
    for keep, expected in ((False, 5), (True, 2)):
        book = joined(9, a=5)
        told = settled(book, "a", {"x": Line(1, 1, True)}, 1, 0, keep=keep)
        assert (told.target, book.members["a"].owned) == (expected, expected)


def test_ceiling_of_a_tag_under_which_only_others_work_is_what_they_leave():
    for wants, ceiling in ((3, 6), (9, 1), (0, 9)):
        book = joined(9, a=0, b=0)
        settled(book, "a", {"x": Line(wants, 0, True)})
        told = settled(book, "b", {"y": Line()})
        assert (told.bounds.ceilings, told.bounds.other) == ({"x": ceiling}, 9)


def test_what_others_have_used_is_told_where_tags_wait_and_slots_lack():
    for capacity, used in ((2, {"x": {"b": 3.0}}), (9, {})):
        book = joined(capacity, a=0, b=0, c=0)
        both = {"x": Line(1, 1, True, used=3.0), "y": Line(1, 1, True, used=4.0)}
        settled(book, "b", both)
        settled(book, "c", {"x": Line(1, 0, True)})
        told = settled(book, "a", {"x": Line(0, 1, True), "y": Line(1, 0, True)})
        assert told.bounds.elsewhere == used


@pytest.mark.parametrize(
    ("why", "before", "expected"),
    [
        *[(None, None, False), ("limit", None, True), ("limit", "limit", True)],
        *[("turn", "turn", False), ("turn", None, True), (None, "turn", False)],
    ],
)
def test_news_for_a_member(why, before, expected):
    book = joined(9, a=0)
    told = replace(settled(book, "a", {}), due=before)
    rows = {**book._rows, "due": dump({"a": why} if why else {})}
    assert has_news(rows, "a", told) is expected
    book.write("a", replace(book.members["a"], beat=99))
    assert has_news(dict(book._rows), "a", told)
