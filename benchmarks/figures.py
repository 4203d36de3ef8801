"""From rounds to figures, from figures to a table of targets, met or not.

Rules of this file: numbers in, numbers and text out. It knows no pool and no
clock, and imports nothing of this package, so that its own tests can load it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = [
    "Figure",
    "Target",
    "interleave",
    "pairwise",
    "percentile",
    "render",
]

_T = TypeVar("_T")
_Name = TypeVar("_Name", bound=Hashable)


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
    """Return the ratios of what was measured in the same round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class Target:
    """What a figure should be."""

    what: str
    beside: str
    bound: float
    #: The figure should be the bound or less; else the bound or more.
    at_most: bool

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:.2f}"

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON, in the form of a figure that was not measured."""
        return {
            "what": self.what,
            "beside": self.beside,
            "median": None,
            "spread": None,
            "rounds": 0,
            "target": str(self),
            "verdict": "not run",
            "remark": "",
        }


@dataclass(frozen=True)
class Figure:
    """What was measured, in one or more rounds."""

    what: str
    beside: str
    values: tuple[float, ...]
    target: Target | None = None
    #: Other figures of the same run, for whoever reads the table.
    remark: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The middle half of the rounds lies between these."""
        return percentile(self.values, 25), percentile(self.values, 75)

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "met" if self.target.met(self.median) else "NOT MET"

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return {
            "what": self.what,
            "beside": self.beside,
            "median": self.median,
            "spread": list(self.spread),
            "rounds": len(self.values),
            "target": str(self.target) if self.target else None,
            "verdict": self.verdict,
            "remark": self.remark,
        }


_HEADINGS = ("what", "beside", "target", "measured", "middle half", "")


def render(figures: Sequence[Figure], targets: Iterable[Target]) -> list[str]:
    """Return the lines of the table; a target without a figure is named as such."""
    rows: list[tuple[str, ...]] = [_HEADINGS]
    for figure in figures:
        low, high = figure.spread
        rows.append(
            (
                figure.what,
                figure.beside,
                str(figure.target or ""),
                f"{figure.median:.3f}",
                f"{low:.3f} .. {high:.3f}" if len(figure.values) > 1 else "",
                figure.verdict,
            )
        )
    measured = {figure.target for figure in figures}
    for target in targets:
        if target not in measured:
            rows.append((target.what, target.beside, str(target), "", "", "not run"))
    widths = [max(len(row[n]) for row in rows) for n in range(len(_HEADINGS))]
    remarks = ["", *(figure.remark for figure in figures)]
    lines = []
    for number, row in enumerate(rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if number < len(remarks) and remarks[number]:
            lines.append(f"    {remarks[number]}")
    return lines
