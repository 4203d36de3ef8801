"""What the benchmarks make of their numbers: known values, and a fraud is caught."""

from __future__ import annotations

import pytest

from benchmarks import figures
from benchmarks.targets import TARGETS
from sqla_fairpool.scheduling import policy

Figure, Target = figures.Figure, figures.Target


# -- fairness -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["fair 200", "fair 7679"])
@pytest.mark.parametrize(
    "amounts",
    [
        [964] * 10 + [0] * 90,  # issue 7679
        [100] * 98 + [0] * 2,  # two starve, the others are all equal
        [120] * 50 + [80] * 50,  # half of them get half as much again
    ],
)
def test_unfair_division_does_not_meet_the_target(key, amounts):
    assert not TARGETS[key].met(policy.jain(amounts))


def test_division_that_differs_by_one_meets_the_target():
    assert TARGETS["fair 7679"].met(policy.jain([97] * 50 + [98] * 50))


# -- percentiles and rounds -----------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "value"), [(1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentile_of_one_to_a_hundred(percent, value):
    assert figures.percentile(range(100, 0, -1), percent) == value


def test_percentile_is_one_of_the_values():
    assert figures.percentile([3.0, 1.0], 50) == 1.0
    assert figures.percentile([3.0, 1.0], 51) == 3.0
    assert figures.percentile([4.0], 99) == 4.0


def test_p99_shows_one_long_wait_in_fifty():
    assert figures.percentile([0.001] * 49 + [1.0], 99) == 1.0


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1], 0), ([1], 101)])
def test_percentile_that_is_not_defined_is_refused(values, percent):
    with pytest.raises(ValueError, match=r"no values|is not in"):
        figures.percentile(values, percent)


def test_contenders_take_turns():
    turns = []

    def contender(name):
        def run():
            turns.append(name)
            return len(turns)

        return run

    results = figures.interleave({name: contender(name) for name in "ABC"}, 3)
    assert "".join(turns) == "ABCABCABC"
    assert results == {"A": [1, 4, 7], "B": [2, 5, 8], "C": [3, 6, 9]}


def test_ratios_are_those_of_the_same_round():
    # The machine was ten times slower in the second round: no matter.
    assert figures.pairwise([2.0, 20.0], [1.0, 10.0]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="shorter"):
        figures.pairwise([1.0, 2.0], [1.0])


# -- targets and the table ------------------------------------------------------------

AT_MOST = Target("cost", "QueuePool", 0.95, True)
AT_LEAST = Target("throughput", "QueuePool", 0.8, False)


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
    assert figure.median == 0.9
    assert figure.spread == (0.8, 1.0)
    assert figure.verdict == "met"


def test_one_lucky_round_meets_no_target():
    assert Figure("", "", (0.1, 1.2, 1.3), AT_MOST).verdict == "NOT MET"


def test_table_shows_each_figure_with_its_verdict():
    lines = figures.render(
        [
            Figure("cost", "QueuePool", (0.5,), AT_MOST, "a remark"),
            Figure("throughput", "QueuePool", (0.7, 0.7), AT_LEAST),
            Figure("something else", "floor", (3.0,)),
        ],
        [AT_MOST, AT_LEAST],
    )
    cells = [line.split() for line in lines]
    assert cells[1] == ["cost", "QueuePool", "<=", "0.95", "0.500", "met"]
    assert cells[2] == ["a", "remark"]
    assert cells[3][:5] == ["throughput", "QueuePool", ">=", "0.80", "0.700"]
    assert cells[3][-2:] == ["NOT", "MET"]
    assert cells[4] == ["something", "else", "floor", "3.000"]
    assert len(lines) == 5


def test_target_that_was_not_measured_is_named():
    lines = figures.render([Figure("cost", "QueuePool", (0.5,), AT_MOST)], [AT_LEAST])
    assert lines[-1].startswith("throughput")
    assert lines[-1].endswith("not run")


def test_figure_goes_into_json():
    entry = Figure("cost", "QueuePool", (0.5, 0.7), AT_MOST, "why").as_dict()
    assert entry == {
        "what": "cost",
        "beside": "QueuePool",
        "median": pytest.approx(0.6),
        "spread": [0.5, 0.7],
        "rounds": 2,
        "target": "<= 0.95",
        "verdict": "met",
        "remark": "why",
    }
