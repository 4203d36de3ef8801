"""What was found: figures, tables and plots as plain data, ready for JSON.

Rules of this file: numbers in, data out; it knows no pool and no clock. The keys of the
dictionaries are what the JSON file has; a change of them raises `SCHEMA`.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

#: The version of the JSON file's form.
SCHEMA = 2

# -- figures: what was measured in some rounds, and what it should be ------------------

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


# -- plots and tables ------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]
    #: Decides the colour (``a``, ``b``, ``c``: scrapers); by default the name does.
    role: str = ""


@dataclass(frozen=True)
class Lines:
    title: str
    x: str
    y: str
    series: Sequence[Series]
    #: Draw steps: a value holds until the next one.
    steps: bool = False
    #: Draw areas, one on top of the other. For series with the same x values.
    stacked: bool = False
    log_x: bool = False
    #: Least top of the y axis, and least end of the x axis: plots side by side have
    #: the same.
    y_top: float = 0.0
    x_end: float = 0.0
    #: Vertical lines with a text each.
    marks: Sequence[tuple[float, str]] = ()
    #: Horizontal lines with a text each.
    levels: Sequence[tuple[float, str]] = ()


@dataclass(frozen=True)
class Bar:
    """One bar; `low` to `high` is the middle half of the rounds."""

    name: str
    value: float
    low: float
    high: float
    remark: str = ""


@dataclass(frozen=True)
class Bars:
    title: str
    unit: str
    bars: Sequence[Bar]
    #: Where a line is drawn across, with its text.
    level: tuple[float, str] | None = None


#: Classes of a histogram to each power of ten.
PER_DECADE = 12


@dataclass(frozen=True)
class Distribution:
    """How some times are distributed. Seconds."""

    name: str
    count: int
    p50: float
    p99: float
    most: float
    #: Pairs of a class's lower bound and how many are in it; a class spans a
    #: twelfth of a power of ten.
    histogram: Sequence[tuple[float, int]]
    remark: str = ""

    @classmethod
    def of(cls, name: str, seconds: Iterable[float], remark: str = "") -> Distribution:
        values = [max(value, 1e-6) for value in seconds]
        classes = Counter(math.floor(math.log10(v) * PER_DECADE) for v in values)
        histogram = [(10.0 ** (n / PER_DECADE), classes[n]) for n in sorted(classes)]
        p50, p99 = percentile(values, 50), percentile(values, 99)
        return cls(name, len(values), p50, p99, max(values), histogram, remark)


@dataclass(frozen=True)
class Distributions:
    title: str
    rows: Sequence[Distribution]


Plot: TypeAlias = Lines | Bars | Distributions


@dataclass(frozen=True)
class Table:
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str | float]]


#: What a measurement finds; a text is a paragraph for the reader of the plots.
Finding: TypeAlias = Figure | Plot | Table | str


@dataclass(frozen=True)
class Section:
    """A scenario, what was done in it (a paragraph), and what was found."""

    name: str
    title: str
    text: str
    findings: Sequence[Finding]
    seconds: float = 0.0

    def of(self, *kinds: type) -> list[Any]:
        return [found for found in self.findings if isinstance(found, kinds)]

    def as_dict(self) -> dict[str, Any]:
        plots = self.of(Lines, Bars, Distributions)
        return {
            "name": self.name,
            "title": self.title,
            "text": self.text,
            "seconds": round(self.seconds, 1),
            "figures": [figure.as_dict() for figure in self.of(Figure)],
            "plots": [{"kind": type(p).__name__.lower(), **asdict(p)} for p in plots],
            "tables": [asdict(table) for table in self.of(Table)],
            "notes": self.of(str),
        }


@dataclass
class Report:
    #: Machine, versions, server and options.
    about: Mapping[str, Any]
    sections: list[Section] = field(default_factory=list)
    #: Targets for which there should be figures.
    targets: Iterable[Target] = ()
    #: Why the run ended early, if it did.
    cut_short: str = ""
    seconds: float = 0.0

    @property
    def figures(self) -> list[Figure]:
        """All figures that have a target; of a target not measured, an empty one."""
        found = [f for s in self.sections for f in s.of(Figure) if f.target]
        missing = [t for t in self.targets if t not in {f.target for f in found}]
        return found + [Figure(t.what, t.beside, (), t) for t in missing]

    @property
    def met(self) -> int:
        return sum(figure.verdict == "met" for figure in self.figures)

    @property
    def ok(self) -> bool:
        return self.met == len(self.figures)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "about": dict(self.about),
            "seconds": round(self.seconds, 1),
            "cut_short": self.cut_short,
            "targets": [figure.as_dict() for figure in self.figures],
            "sections": [section.as_dict() for section in self.sections],
        }
