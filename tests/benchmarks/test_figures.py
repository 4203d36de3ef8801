"""What the benchmarks make of their numbers, and how the terminal shows them."""

from __future__ import annotations

import pytest

from benchmarks.harness.figures import (
    Figure,
    Target,
    interleave,
    pairwise,
    percentile,
)
from benchmarks.harness.targets import TARGETS
from benchmarks.report.view import figures_lines
from sqla_fairpool.scheduling import policy

AT_MOST = Target("cost", "QueuePool", 0.95, True)
AT_LEAST = Target("throughput", "QueuePool", 0.8, False)


@pytest.mark.parametrize("key", ["fair 200", "fair 7679"])
@pytest.mark.parametrize(
    ("amounts", "met"),
    [
        ([964] * 10 + [0] * 90, False),  # issue 7679
        ([100] * 98 + [0] * 2, False),  # two starve, the others are all equal
        ([120] * 50 + [80] * 50, False),  # half of them get half as much again
        ([97] * 50 + [98] * 50, True),
    ],
)
def test_unfair_division_does_not_meet_the_target(key, amounts, met):
    assert TARGETS[key].met(policy.jain(amounts)) is met


@pytest.mark.parametrize(
    ("values", "percent", "value"),
    [
        *((range(100, 0, -1), p, v) for p, v in ((1, 1), (50, 50), (99.5, 100))),
        ([3.0, 1.0], 50, 1.0),  # one of the values, nothing in between
        ([3.0, 1.0], 51, 3.0),
        ([4.0], 99, 4.0),
        ([0.001] * 49 + [1.0], 99, 1.0),  # one long wait in fifty shows
    ],
)
def test_percentile(values, percent, value):
    assert percentile(values, percent) == value


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1], 0), ([1], 101)])
def test_percentile_that_is_not_defined_is_refused(values, percent):
    with pytest.raises(ValueError, match=r"no values|is not in"):
        percentile(values, percent)


def test_contenders_take_turns():
    turns = []

    def contender(name):
        return lambda: turns.append(name) or len(turns)

    results = interleave({name: contender(name) for name in "ABC"}, 3)
    assert "".join(turns) == "ABCABCABC"
    assert results == {"A": [1, 4, 7], "B": [2, 5, 8], "C": [3, 6, 9]}


def test_ratios_are_those_of_the_same_round():
    # The machine was ten times slower in the second round: no matter.
    assert pairwise([2.0, 20.0], [1.0, 10.0]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="shorter"):
        pairwise([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (AT_MOST, 0.95, True),
        (AT_MOST, 0.951, False),
        (AT_LEAST, 0.8, True),
        (AT_LEAST, 0.799, False),
    ],
)
def test_bound_itself_is_met(target, value, met):
    assert target.met(value) is met


def test_figure_is_the_median_with_the_middle_half():
    figure = Figure("cost", "QueuePool", (0.9, 5.0, 0.8, 1.0, 0.7), AT_MOST)
    assert (figure.median, figure.spread, figure.verdict) == (0.9, (0.8, 1.0), "met")
    # One lucky round meets no target.
    assert Figure("", "", (0.1, 1.2, 1.3), AT_MOST).verdict == "NOT MET"


def test_table_shows_each_figure_with_its_verdict_and_remark():
    lines = figures_lines(
        [
            Figure("cost", "QueuePool", (0.5,), AT_MOST, "a remark"),
            Figure("throughput", "QueuePool", (0.7, 0.7), AT_LEAST),
            Figure("something else", "floor", (3.0,)),
            Figure("throughput", "QueuePool", (), AT_LEAST),
        ],
        100,
    )
    assert [line.split() for line in lines if line.strip()][2:] == [
        ["cost", "QueuePool", "<=", "0.95", "0.500", "met"],
        ["a", "remark"],
        ["throughput", "QueuePool", ">=", "0.80", "0.700", "NOT", "MET"],
        ["something", "else", "floor", "3.000"],
        ["throughput", "QueuePool", ">=", "0.80", "not", "run"],
    ]
