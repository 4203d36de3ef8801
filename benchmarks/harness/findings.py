"""What was found: figures, tables and plots as plain data, ready for JSON.

Rules of this file: data only. The keys of the dictionaries are what the JSON file
has; a change of them raises `SCHEMA`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from .figures import Figure, Target, percentile

__all__ = [
    "SCHEMA",
    "Bar",
    "Bars",
    "Distribution",
    "Distributions",
    "Findings",
    "Lines",
    "Plot",
    "Report",
    "Section",
    "Series",
    "Table",
    "role_of",
]

#: The version of the JSON file's form.
SCHEMA = 1


def role_of(name: str) -> str:
    """Return the role of a pool in a plot, which decides its colour.

    It is ``ours``, the ``base`` of comparisons, or ``other``; scrapers, which are no
    pools, are ``a``, ``b`` and ``c``.
    """
    if "Fair" in name:
        return "ours"
    return "base" if "QueuePool" in name and "LIFO" not in name else "other"


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    name: str
    points: tuple[tuple[float, float], ...]
    role: str = "other"


@dataclass(frozen=True)
class Lines:
    """Lines over an axis."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    #: Draw steps: a value holds until the next one.
    steps: bool = False
    #: Draw areas, one on top of the other. For series with the same x values.
    stacked: bool = False
    log_x: bool = False
    #: Least top of the y axis, so that plots side by side have the same.
    y_top: float = 0.0
    #: Least end of the x axis.
    x_end: float = 0.0
    #: Vertical lines with a text each.
    marks: tuple[tuple[float, str], ...] = ()
    #: Horizontal lines with a text each.
    levels: tuple[tuple[float, str], ...] = ()
    kind: str = "lines"


@dataclass(frozen=True)
class Bar:
    """One bar; `low` to `high` is the middle half of the rounds."""

    name: str
    value: float
    low: float
    high: float
    role: str = "other"
    remark: str = ""

    @classmethod
    def of(
        cls, name: str, value: float, low: float, high: float, remark: str = ""
    ) -> Bar:
        """Return a bar in the colour of the pool of this name."""
        return cls(name, value, low, high, role_of(name), remark)


@dataclass(frozen=True)
class Bars:
    """Bars from zero, one below the other."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    #: Where a line is drawn across, with its text.
    level: tuple[float, str] | None = None
    kind: str = "bars"


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
    histogram: tuple[tuple[float, int], ...]
    role: str = "other"
    remark: str = ""

    @classmethod
    def of(cls, name: str, seconds: Iterable[float], remark: str = "") -> Distribution:
        """Sum up `seconds`; what is less than a microsecond counts as one."""
        values = [max(value, 1e-6) for value in seconds]
        classes: dict[int, int] = {}
        for value in values:
            number = math.floor(math.log10(value) * PER_DECADE)
            classes[number] = classes.get(number, 0) + 1
        histogram = ((10.0 ** (n / PER_DECADE), classes[n]) for n in sorted(classes))
        p50, p99 = percentile(values, 50), percentile(values, 99)
        return cls(
            name,
            len(values),
            p50,
            p99,
            max(values),
            tuple(histogram),
            role_of(name),
            remark,
        )


@dataclass(frozen=True)
class Distributions:
    """Distributions of times, one below the other, on a logarithmic axis."""

    title: str
    rows: tuple[Distribution, ...]
    kind: str = "distributions"


Plot: TypeAlias = Lines | Bars | Distributions


@dataclass(frozen=True)
class Table:
    """A table; cells are texts or numbers."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str | float, ...], ...]


@dataclass(frozen=True)
class Findings:
    """What one measurement has found."""

    figures: tuple[Figure, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    #: Paragraphs for the reader of the plots.
    notes: tuple[str, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        return Findings(
            self.figures + other.figures,
            self.plots + other.plots,
            self.tables + other.tables,
            self.notes + other.notes,
        )


@dataclass(frozen=True)
class Section:
    """A scenario, and what was found in it."""

    name: str
    title: str
    #: What was done, in a paragraph.
    text: str
    findings: Findings
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        found = self.findings
        return {
            "name": self.name,
            "title": self.title,
            "text": self.text,
            "seconds": round(self.seconds, 1),
            "figures": [figure.as_dict() for figure in found.figures],
            "plots": [asdict(plot) for plot in found.plots],
            "tables": [asdict(table) for table in found.tables],
            "notes": list(found.notes),
        }


@dataclass
class Report:
    """One run of the command."""

    #: Machine, versions, server and options.
    about: Mapping[str, Any]
    sections: list[Section] = field(default_factory=list)
    #: Targets for which there should be figures.
    targets: Sequence[Target] = ()
    #: Why the run ended early, if it did.
    cut_short: str = ""
    seconds: float = 0.0

    @property
    def figures(self) -> list[Figure]:
        """All figures that have a target; of a target not measured, an empty one."""
        found = [f for s in self.sections for f in s.findings.figures if f.target]
        missing = [t for t in self.targets if t not in {f.target for f in found}]
        return found + [Figure(t.what, t.beside, (), t) for t in missing]

    @property
    def met(self) -> int:
        """How many of the figures are as they should be."""
        return sum(figure.verdict == "met" for figure in self.figures)

    @property
    def ok(self) -> bool:
        """All targets have been measured and are met."""
        return self.met == len(self.figures)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "schema": SCHEMA,
            "about": dict(self.about),
            "seconds": round(self.seconds, 1),
            "cut_short": self.cut_short,
            "targets": [figure.as_dict() for figure in self.figures],
            "sections": [section.as_dict() for section in self.sections],
        }
