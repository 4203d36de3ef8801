"""What the benchmarks make of their numbers, and how the terminal shows them."""

import pytest

from benchmarks.harness.findings import (
    TARGETS,
    Figure,
    Target,
    interleave,
    pairwise,
    percentile,
)
from benchmarks.report.view import figures_lines
from sqla_fairpool.scheduling import policy

AT_MOST = Target("cost", "QueuePool", 0.95, True)
AT_LEAST = Target("throughput", "QueuePool", 0.8, False)


@pytest.mark.parametrize(
    ("amounts", "met"),
    [
        ([964] * 10 + [0] * 90, False),  # issue 7679
        ([100] * 98 + [0] * 2, False),  # two starve, the others are all equal
        ([120] * 50 + [80] * 50, False),  # half of them get half as much again
        ([97] * 50 + [98] * 50, True),
    ],
)
def test_unfair_division_does_not_meet_the_target(amounts, met):
    for key in ("fair 200", "fair 7679"):
        assert TARGETS[key].met(policy.jain(amounts)) is met


@pytest.mark.parametrize(
    ("values", "percent", "value"),
    [
        *((range(100, 0, -1), p, v) for p, v in ((1, 1), (50, 50), (99.5, 100))),
        ([3.0, 1.0], 50, 1.0),  # one of the values, nothing in between
        ([3.0, 1.0], 51, 3.0),
        ([0.001] * 49 + [1.0], 99, 1.0),  # one long wait in fifty shows
    ],
)
def test_percentile(values, percent, value):
    assert percentile(values, percent) == value
    for values, percent in (([], 50), ([1], 0), ([1], 101)):
        with pytest.raises(ValueError, match=r"no values|is not in"):
            percentile(values, percent)


def test_contenders_take_turns_and_ratios_are_those_of_the_same_round():
    turns = []
    contenders = {n: lambda n=n: turns.append(n) or len(turns) for n in "ABC"}
    results = interleave(contenders, 3)
    assert "".join(turns) == "ABCABCABC"
    assert results == {"A": [1, 4, 7], "B": [2, 5, 8], "C": [3, 6, 9]}
    # The machine was ten times slower in the second round: no matter.
    assert pairwise([2.0, 20.0], [1.0, 10.0]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="shorter"):
        pairwise([1.0, 2.0], [1.0])


def test_figure_is_the_median_with_the_middle_half():
    figure = Figure("cost", "QueuePool", (0.9, 5.0, 0.8, 1.0, 0.7), AT_MOST)
    assert (figure.median, figure.spread, figure.verdict) == (0.9, (0.8, 1.0), "met")
    # One lucky round meets no target, and the bound itself is met.
    assert Figure("", "", (0.1, 1.2, 1.3), AT_MOST).verdict == "NOT MET"
    assert [AT_MOST.met(value) for value in (0.95, 0.951)] == [True, False]
    assert [AT_LEAST.met(value) for value in (0.8, 0.799)] == [True, False]


def test_table_shows_each_figure_with_its_verdict_and_remark():
    figures = [
        Figure("cost", "QueuePool", (0.5,), AT_MOST, "a remark"),
        Figure("throughput", "QueuePool", (0.7, 0.7), AT_LEAST),
        Figure("fairness", "-", (0.99, 0.98, 0.99), AT_LEAST),
        Figure("something else", "floor", (3.0,)),
        Figure("throughput", "QueuePool", (), AT_LEAST),
    ]
    lines = [" ".join(line.split()) for line in figures_lines(figures, 100)]
    assert [line for line in lines if line][2:] == [
        "cost, compared with QueuePool 0.95 or less 0.500 x met",
        "a remark",
        "throughput, compared with QueuePool 0.80 or more 0.700 x NOT MET",
        "fairness 0.80 or more 0.990 0.98..0.99 met",
        "something else, compared with floor 3.000 x",
        "throughput, compared with QueuePool 0.80 or more not run",
        "x: times what it is compared with; else an index, or as it says",
    ]
    # Eighty columns are enough, whatever it is.
    widest = [Figure(t.what, t.beside, (1234.5, 0.98765), t) for t in TARGETS.values()]
    for line in figures_lines(widest, 80):
        assert len(line) <= 80 and "…" not in line
