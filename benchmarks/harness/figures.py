"""Figures: what was measured in some rounds, and what it should be.

Rules of this file: numbers in, numbers and text out. It knows no pool and no clock.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_Name = TypeVar("_Name")


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that `percent` of all do not exceed.

    The nearest-rank definition: always one of the values, nothing in between.
    """
    line = sorted(values)
    if not line:
        raise ValueError("no values")
    if not 0 < percent <= 100:
        raise ValueError(f"percent={percent} is not in (0, 100]")
    return line[math.ceil(percent / 100 * len(line)) - 1]


def interleave(
    contenders: Mapping[_Name, Callable[[], _T]], rounds: int
) -> dict[_Name, list[_T]]:
    """Run the contenders in turn, A B C A B C ..., and return their results.

    A machine that is slower for a while, being warm or busy, slows all of them
    and not the one whose turn it was.
    """
    results: dict[_Name, list[_T]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            results[name].append(run())
    return results


def pairwise(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class Target:
    what: str
    beside: str
    bound: float
    #: The figure should be the bound or less; else the bound or more.
    at_most: bool

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:.2f}"


@dataclass(frozen=True)
class Figure:
    """What was measured in one or more rounds; in none if it was not run."""

    what: str
    beside: str
    values: Sequence[float] = ()
    target: Target | None = None
    #: Other figures of the same run, for the reader of the table.
    remark: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        return percentile(self.values, 25), percentile(self.values, 75)

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        if not self.values:
            return "not run"
        return "met" if self.target.met(self.median) else "NOT MET"

    def as_dict(self) -> dict[str, object]:
        return {
            "what": self.what,
            "beside": self.beside,
            "median": self.median if self.values else None,
            "spread": list(self.spread) if self.values else None,
            "rounds": len(self.values),
            "target": str(self.target) if self.target else None,
            "verdict": self.verdict,
            "remark": self.remark,
        }


# -- what the figures should be --------------------------------------------------------


#: By the name under which a measurement reports them: the design's targets, and those
#: of the description.
TARGETS: dict[str, Target] = {}
#: By scenario, the names of those that it always has figures for.
CLAIMED: dict[str, list[str]] = {}

_FILE = Path(__file__).with_name("targets.csv").read_text(encoding="utf-8")
for _row in csv.DictReader(_FILE.splitlines()):
    _sign, _bound = _row["target"].split()
    _target = Target(_row["what"], _row["beside"], float(_bound), _sign == "<=")
    TARGETS[_row["name"]] = _target
    CLAIMED.setdefault(_row["scenario"], []).append(_row["name"])


def figure(
    key: str, values: Sequence[float], beside: str = "-", remark: str = ""
) -> Figure:
    """Return a figure: for the target of this name, or else what `key` says itself."""
    if key in TARGETS:
        target = TARGETS[key]
        return Figure(target.what, target.beside, tuple(values), target, remark)
    return Figure(key, beside, tuple(values), remark=remark)
