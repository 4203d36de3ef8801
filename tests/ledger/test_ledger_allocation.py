"""The allocation over processes, against its definition."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_fairpool.ledger.allocation import Limits, Line, allocate
from sqla_fairpool.scheduling import policy
from sqla_fairpool.scheduling.limits import LimitsByTag, TagLimits

TERMS = Limits(capacity=20, soft_limit=10, max_limit=15)


class Party(NamedTuple):
    owned: int = 0
    stalled: bool = False
    tags: Mapping[str, Line] = MappingProxyType({})
    pressed: bool = False


def wanting(place=1, owned=0, stalled=False, **tags):
    """A member that waits for so much under each tag, and holds nothing of it."""
    lines = {tag: Line(0, n, True, place) for tag, n in tags.items()}
    return Party(owned, stalled, tags=lines)


def holding(place=1, owned=0, stalled=False, **tags):
    lines = {tag: Line(n, 0, True, place) for tag, n in tags.items()}
    return Party(owned, stalled, tags=lines)


def targets(parties, places=None, limits=TERMS):
    return allocate(parties, places or {}, limits).targets


# -- the four scenarios, with a process for each scraper --------------------------


@pytest.mark.parametrize(
    ("demands", "expected"),
    [
        ({"layer1_5": 99}, [15]),
        ({"layer1_5": 99, "layer3": 99}, [10, 10]),
        ({"layer1_5": 99, "layer2": 99, "layer3": 99}, [7, 7, 6]),
        ({"layer1_5": 99, "layer2": 0, "layer3": 99}, [10, 0, 10]),
    ],
)
def test_four_scenarios(demands, expected):
    parties = {}
    for n, (tag, wanted) in enumerate(demands.items()):
        parties[f"m{n}"] = Party(tags={tag: Line(0, wanted, wanted > 0, n + 1)})
    assert list(targets(parties).values()) == expected


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


def test_a_tag_that_went_idle_leaves_only_what_it_still_holds():
    parties = {
        "a": wanting(layer1_5=99),
        "b": Party(5, tags={"layer2": Line(5, 0, False, 1)}),
        "c": wanting(layer3=99),
    }
    assert targets(parties) == {"a": 8, "b": 5, "c": 7}


def test_processes_under_one_tag_share_its_share():
    parties = {"a": wanting(x=99), "b": wanting(place=2, x=99), "c": wanting(y=99)}
    assert targets(parties) == {"a": 5, "b": 5, "c": 10}


def test_what_one_process_does_not_want_is_the_others_of_its_tag():
    parties = {"a": wanting(x=2), "b": wanting(place=2, x=99), "c": wanting(y=99)}
    assert targets(parties) == {"a": 2, "b": 8, "c": 10}


def test_a_process_has_the_sum_over_its_tags():
    parties = {"a": wanting(x=99, y=99), "b": wanting(z=99)}
    found = allocate(parties, {"x": 1, "y": 2, "z": 3}, TERMS)
    assert found.targets == {"a": 14, "b": 6}
    assert found.claims == {("x", "a"): 7, ("y", "a"): 7, ("z", "b"): 6}


# -- ceilings -------------------------------------------------------------------------


def test_ceilings_count_the_active_tags_of_all_members():
    alone = allocate({"a": wanting(x=1)}, {}, TERMS)
    assert alone.ceilings == {"x": 15}
    assert alone.newcomer == 10
    two = allocate({"a": wanting(x=1), "b": wanting(y=1)}, {}, TERMS)
    assert two.ceilings == {"x": 10, "y": 10}


def test_a_local_rise_has_room_without_a_new_allocation():
    found = allocate({"a": wanting(x=2), "b": wanting(place=2, x=1)}, {}, TERMS)
    assert found.limits == {("x", "a"): 8, ("x", "b"): 7}


def test_a_tag_that_wants_nothing_now_may_start_at_once():
    quiet = Party(tags={"x": Line(0, 0, True, 0)})
    found = allocate({"a": quiet, "b": wanting(x=99)}, {}, TERMS)
    assert found.limits["x", "a"] == 1


# -- the line --------------------------------------------------------------------


def test_with_more_members_than_slots_the_first_are_asked_for_the_last():
    limits = Limits(3, 3, 3)
    parties = {f"m{n}": wanting(place=n, x=1) for n in range(5)}
    found = allocate(parties, {}, limits)
    assert found.targets == {"m0": 1, "m1": 1, "m2": 1, "m3": 0, "m4": 0}
    assert found.asked == {("x", "m0"), ("x", "m1")}
    assert found.starved == {"x": {"m3", "m4"}}


def test_with_more_tags_than_slots_the_first_tags_are_asked():
    limits = Limits(2, 2, 2)
    parties = {f"m{n}": wanting(**{f"t{n}": 9}) for n in range(3)}
    found = allocate(parties, {"t1": 1, "t2": 2, "t0": 3}, limits)
    assert found.targets == {"m1": 1, "m2": 1, "m0": 0}
    assert found.asked_tags == {"t1"}
    assert found.asked == {("t1", "m1")}


def test_nobody_is_asked_while_everybody_has_something():
    parties = {f"m{n}": wanting(place=n, x=9) for n in range(10)}
    found = allocate(parties, {}, TERMS)
    assert not found.asked
    assert found.unmet == 0  # the ceiling is the limit, not the slots
    assert found.presses("m0", {"x": Line()})


# -- what nobody claims, and the stalled -----------------------------------------------


def test_unclaimed_slots_stay_where_they_are():
    parties = {"a": holding(owned=9, x=2), "b": wanting(y=8)}
    assert targets(parties) == {"a": 9, "b": 8}


def test_unclaimed_slots_go_when_somebody_is_short_of_them():
    parties = {
        "a": holding(owned=14, x=2),
        "b": holding(owned=4, z=1),
        "c": wanting(y=8),
    }
    assert targets(parties) == {"a": 8, "b": 4, "c": 8}


def test_a_stalled_member_counts_with_what_it_has():
    stopped = Party(7, True, {"x": Line(5, 90, True, 1)})
    found = allocate({"a": stopped, "b": wanting(y=99), "c": wanting(z=99)}, {}, TERMS)
    assert found.targets == {"a": 7, "b": 7, "c": 6}
    assert not found.asked


def test_what_a_stalled_member_holds_counts_for_its_tag():
    stopped = Party(6, True, {"x": Line(6, 90, True, 1)})
    parties = {"a": stopped, "b": wanting(place=2, x=99), "c": wanting(y=99)}
    assert targets(parties) == {"a": 6, "b": 4, "c": 10}


# -- the definition, on whatever there is --------------------------------------------

LINES = st.builds(
    Line,
    st.integers(0, 12),
    st.integers(0, 12),
    st.booleans(),
    st.integers(0, 9),
    st.integers(0, 9),
)
PARTIES = st.dictionaries(
    st.sampled_from("ABCDEFGH"),
    st.builds(
        Party,
        st.integers(0, 6),
        st.booleans(),
        st.dictionaries(st.sampled_from("xyzuvw"), LINES, max_size=4),
    ),
    max_size=8,
)
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


@given(boards())
def test_stalled_members_have_what_they_have(board):
    parties, places, limits = board
    found = allocate(parties, places, limits)
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


@given(boards())
def test_nobody_gives_up_what_nobody_claims(board):
    parties, places, limits = board
    found = allocate(parties, places, limits)
    given_up = [m for m, p in parties.items() if found.targets[m] < p.owned]
    if given_up:
        assert sum(found.targets.values()) == limits.capacity


@given(boards(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(board, random):
    parties, places, limits = board
    shuffled = [*parties.items()]
    random.shuffle(shuffled)
    one, other = (allocate(p, places, limits) for p in (parties, dict(shuffled)))
    assert one.targets == other.targets
    assert one.claims == other.claims
    assert one.limits == other.limits
    assert one.asked == other.asked


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
