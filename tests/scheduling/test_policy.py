"""The rules, against their definitions."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_fairpool.scheduling import policy


def assert_max_min(shares, demands, capacity, weights):
    """The three statements of `policy.fair_shares`, whatever the algorithm."""
    assert all(0 <= s <= d for s, d in zip(shares, demands, strict=True))
    assert sum(shares) == min(capacity, sum(demands))
    unsatisfied = [i for i, s in enumerate(shares) if s < demands[i]]
    for i in unsatisfied:
        for j, share in enumerate(shares):
            if share:
                assert (share - 1) / weights[j] <= shares[i] / weights[i]


@pytest.mark.parametrize(
    ("problem", "shares"),
    [
        (([99, 99, 99], 20), [7, 7, 6]),
        (([99, 0, 99], 20), [10, 0, 10]),
        (([8, 10, 0], 20), [8, 10, 0]),
        (([2, 99, 99], 20), [2, 9, 9]),
        (([1, 5, 99], 20), [1, 5, 14]),
        (([], 20), []),
        (([3], 20), [3]),
        (([99] * 30, 20), [1] * 20 + [0] * 10),
        (([99, 99], 20, [3.0, 1.0]), [15, 5]),
        # Of those that have equally much the first is next, whatever their floors.
        (([9, 9], 3, [1.0, 1.0], [0, 1]), [2, 1]),
        (([9, 9], 3, [1.0, 1.0], [1, 0]), [2, 1]),
    ],
)
def test_fair_shares_of_known_problems(problem, shares):
    assert policy.fair_shares(*problem) == shares


def test_10000_random_problems_meet_the_definition_of_max_min():
    random.seed(7)
    for _ in range(10_000):
        n = random.randint(1, 12)
        demands = [random.randint(0, 30) for _ in range(n)]
        capacity = random.randint(0, 60)
        weights = [1.0] * n
        if random.random() < 0.5:
            weights = [random.choice([0.5, 1.0, 2.0, 3.0]) for _ in range(n)]
        shares = policy.fair_shares(demands, capacity, weights)
        assert_max_min(shares, demands, capacity, weights)


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(0, 500))
def test_equal_demands_get_shares_that_differ_by_one_at_most(demands, capacity):
    shares = policy.fair_shares(demands, capacity)
    assert_max_min(shares, demands, capacity, [1.0] * len(demands))
    by_demand = {}
    for demand, share in zip(demands, shares, strict=True):
        by_demand.setdefault(demand, []).append(share)
    assert all(max(group) - min(group) <= 1 for group in by_demand.values())


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12),
    st.integers(0, 100),
)
def test_floors_are_kept_and_only_the_rest_is_divided(parties, capacity):
    demands = [demand for demand, _ in parties]
    floors = [floor for _, floor in parties]
    shares = policy.fair_shares(demands, capacity, floors=floors)
    given_ = [s - f for s, f in zip(shares, floors, strict=True)]
    wanted = [max(d - f, 0) for d, f in parties]
    assert all(0 <= g <= w for g, w in zip(given_, wanted, strict=True))
    assert sum(given_) == min(max(capacity - sum(floors), 0), sum(wanted))
    for share, demand in zip(shares, demands, strict=True):
        if share < demand:
            assert all(s - 1 <= share for s, g in zip(shares, given_, strict=True) if g)


def test_definition_rejects_an_unfair_division():
    with pytest.raises(AssertionError):
        assert_max_min([8, 6, 6], [9, 9, 9], 20, [1.0] * 3)


def test_ceiling_is_the_soft_one_as_soon_as_another_tag_is_active():
    assert policy.ceiling(0, 10, 15) == 15
    assert policy.ceiling(1, 10, 15) == 10
    assert policy.ceiling(9, 10, 15) == 10


def test_next_is_the_tag_that_holds_least_then_used_least_per_weight_then_came_first():
    assert policy.rank(2, 1.0, 9.0, 9) < policy.rank(3, 1.0, 1.0, 1)
    assert policy.rank(3, 2.0, 9.0, 9) < policy.rank(2, 1.0, 1.0, 1)
    assert policy.rank(2, 1.0, 1.0, 9) < policy.rank(2, 1.0, 2.0, 1)
    assert policy.rank(4, 2.0, 2.0, 9) < policy.rank(2, 1.0, 2.0, 1)
    assert policy.rank(2, 1.0, 1.0, 1) < policy.rank(2, 1.0, 1.0, 2)


def test_tag_below_its_reserve_is_before_all_others():
    assert policy.rank(1, 1.0, 9.0, 9, 2) < policy.rank(0, 1.0, 0.0, 1)
    assert policy.rank(0, 1.0, 0.0, 1) < policy.rank(2, 1.0, 0.0, 1, 2)


@pytest.mark.parametrize(
    ("rule", "most", "reserved", "room", "ceiling"),
    [
        (10, None, 0, 20, 10),
        (15, 2, 0, 20, 2),
        (10, 18, 0, 20, 18),
        (15, None, 0, 12, 12),
        (10, 18, 0, 17, 17),
        (2, None, 4, 20, 4),
    ],
)
def test_own_ceiling_is_the_own_maximum_or_the_rule_within_what_is_not_reserved(
    rule, most, reserved, room, ceiling
):
    assert policy.own_ceiling(rule, most, reserved, room) == ceiling


@pytest.mark.parametrize(
    ("amounts", "index"),
    [
        ([5, 5, 5, 5], 1.0),
        ([7], 1.0),
        ([1, 0, 0, 0], 0.25),
        ([1, 1, 0, 0], 0.5),
        ([1, 2, 3], 36 / 42),
        ([10, 20, 30], 36 / 42),
        ([0, 0], 0.0),
    ],
)
def test_jain_index_of_known_amounts(amounts, index):
    assert policy.jain(amounts) == pytest.approx(index)


def test_jain_index_of_no_amounts_is_refused():
    with pytest.raises(ValueError, match="nobody"):
        policy.jain([])


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=8),
    st.integers(0, 40),
)
def test_standing_shares_are_fair_and_the_remainder_stays_where_it_is(
    parties, capacity
):
    in_use = [held for held, _ in parties]
    demands = [max(held, wants) for held, wants in parties]
    shares = policy.standing_shares(in_use, demands, capacity)
    assert sorted(shares) == sorted(policy.fair_shares(demands, capacity))
    for i, one in enumerate(shares):
        for j, other in enumerate(shares):
            if in_use[i] > in_use[j] and demands[i] >= demands[j]:
                assert one >= other


def test_seven_six_and_seven_in_use_is_what_is_fair():
    assert policy.standing_shares([7, 6, 7], [9, 9, 9], 20) == [7, 6, 7]


def assert_fair_with_reserves(shares, demands, capacity, weights, reserved):
    """The statements of `policy.standing_shares`, whatever the algorithm."""
    parties = range(len(demands))
    assert all(0 <= shares[i] <= demands[i] for i in parties)
    taken = sum(max(shares[i], reserved[i]) for i in parties)
    most = sum(max(demands[i], reserved[i]) for i in parties)
    assert taken == min(capacity, most)
    for i in parties:
        if shares[i] < demands[i]:
            assert shares[i] >= reserved[i]
            for j in parties:
                if shares[j] > reserved[j]:
                    assert (shares[j] - 1) / weights[j] <= shares[i] / weights[i]


@pytest.mark.parametrize(
    "problems", [500, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_random_problems_with_own_limits_meet_the_definition_of_a_share(problems):
    random.seed(15)
    for _ in range(problems):
        capacity = random.randint(1, 40)
        left, parties = capacity - 1, []
        soft = random.randint(1, capacity)
        for _ in range(random.randint(1, 12)):
            reserved = min(random.choice([0, 0, 0, 1, 3]), left)
            left -= reserved
            most = random.choice([None, None, random.randint(1, capacity)])
            if most is not None:
                most = max(most, reserved)
            weight = random.choice([0.5, 1.0, 1.0, 2.0, 3.0])
            active, waiting = random.random() < 0.8, random.randint(0, 30)
            parties.append((active, waiting, most, weight, reserved))
        room = {id(p): 1 + left + p[-1] for p in parties}
        tags = [
            policy.Party(
                active,
                0,
                waiting,
                policy.own_ceiling(soft, most, reserved, room[id(party)]),
                weight,
                reserved,
            )
            for party in parties
            for active, waiting, most, weight, reserved in [party]
        ]
        shares = policy.shares_of_tags(tags, capacity)
        demands = [min(t.waiting, t.ceiling) if t.active else 0 for t in tags]
        assert_fair_with_reserves(
            shares,
            demands,
            capacity,
            [t.weight for t in tags],
            [t.reserved for t in tags],
        )


def test_definition_rejects_a_share_of_what_is_reserved_for_another():
    with pytest.raises(AssertionError):
        assert_fair_with_reserves([5, 0], [9, 0], 5, [1.0, 1.0], [0, 1])
