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
from sqla_fairpool.ledger.rows import Limits, Member, Session, Terms
from sqla_fairpool.ledger.rows import TagDemand as Line
from sqla_fairpool.ledger.transaction import settle
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


def test_tag_within_its_reserve_is_not_asked_to_yield():
    parties = {
        "A": wanting(health=1),
        **{f"m{n}": wanting(**{f"t{n}": 9}) for n in range(3)},
    }
    places = {"health": 1, "t0": 2, "t1": 3, "t2": 4}
    found = allocate(parties, places, Limits(4, 4, 4, HEALTH))
    assert found.asked_tags == {"t0"}


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


def test_with_more_tags_than_slots_the_first_tags_are_asked():
    parties = {f"m{n}": wanting(**{f"t{n}": 9}) for n in range(3)}
    found = allocate(parties, {"t1": 1, "t2": 2, "t0": 3}, Limits(2, 2, 2))
    assert found.targets == {"m1": 1, "m2": 1, "m0": 0}
    assert found.asked_tags == {"t1"}
    assert found.asked == {("t1", "m1")}


def test_nobody_is_asked_while_everybody_has_something():
    found = allocate({f"m{n}": wanting(n, x=9) for n in range(10)}, {}, TERMS)
    assert not found.asked
    assert found.unmet == 0  # the ceiling is the limit, not the slots
    assert found.presses("m0", {"x": Line()})


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
    assert Book({}).set_by is None


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


def test_a_member_is_told_of_a_limit_that_binds_it_anew():
    known = {"x": Line(2, 3, True, 1, limit=2)}
    plan = allocate({"a": Party(5, tags=known)}, {}, TERMS)
    members = {"a": Member(1, {}, 5, tags=known)}
    assert plan.due(members, 0) == {"a": "limit"}
    told = {"x": known["x"]._replace(limit=plan.limits["x", "a"])}
    assert plan.due({"a": Member(1, {}, 5, tags=told)}, 0) == {}
