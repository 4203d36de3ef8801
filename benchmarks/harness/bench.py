"""What a measurement is given, and the results of contenders that took turns."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from .database import BenchError, Database
from .findings import (
    CLAIMED,
    Bar,
    Bars,
    Distribution,
    Distributions,
    Figure,
    Finding,
    figure,
    interleave,
    pairwise,
)

_T = TypeVar("_T")

#: What is computed of a result: the name of an attribute, or a function.
Metric = str | Callable[[Any], float]


class Runs(dict[Any, list[Any]]):
    """By the contender's name, the results of its rounds. The first one is ours."""

    def of(self, name: Any, metric: Metric = float) -> list[float]:
        compute = attrgetter(metric) if isinstance(metric, str) else metric
        return [compute(result) for result in self[name]]

    def each(self, metric: Metric = float) -> dict[Any, list[float]]:
        return {name: self.of(name, metric) for name in self}

    def value(
        self, key: str, metric: Metric = float, name: Any = None, remark: str = ""
    ) -> Figure:
        name = next(iter(self)) if name is None else name
        return figure(key, self.of(name, metric), remark=remark)

    def ratio(
        self,
        key: str,
        metric: Metric = float,
        over: Any = None,
        of: Any = None,
        beside: str = "",
        remark: str = "",
    ) -> Figure:
        """Return a figure of one contender over another, round by round."""
        names = list(self)
        of = names[0] if of is None else of
        over = names[1] if over is None else over
        ratios = pairwise(self.of(of, metric), self.of(over, metric))
        return figure(key, ratios, beside or str(over), remark)

    def bars(
        self,
        title: str,
        unit: str,
        metric: Metric = float,
        remarks: Mapping[str, str] | None = None,
        level: tuple[float, str] | None = None,
    ) -> Bars:
        bars = []
        for name, values in self.each(metric).items():
            found = Figure("", "", values)
            remark = (remarks or {}).get(name, "")
            bars.append(Bar(name, found.median, *found.spread, remark))
        return Bars(title, unit, tuple(bars), level)

    def waits(
        self,
        title: str,
        of: Metric | Callable[[Any], Sequence[float]] = "all_waits",
        remark: Callable[[Sequence[Any]], str] = lambda outcomes: "",
    ) -> Distributions:
        get = attrgetter(of) if isinstance(of, str) else of
        rows = []
        for name, found in self.items():
            waits = [wait for each in found for wait in get(each)]
            rows.append(Distribution.of(name, waits, remark(found)))
        return Distributions(title, rows)

    def medians(self, metric: Metric, form: str, others: bool = False) -> str:
        """Say what the medians are; of all but ours, if `others`."""
        each = list(self.each(metric).items())[1 if others else 0 :]
        return "; ".join(f"{n} {statistics.median(v):{form}}" for n, v in each)


class Bench:
    """One run of the benchmarks."""

    def __init__(
        self,
        *,
        short: bool = False,
        database: Database | None = None,
        on_step: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.short = short
        self._database = database
        self._on_step = on_step

    @property
    def database(self) -> Database:
        if self._database is None:
            raise BenchError("this measurement needs a database")
        return self._database

    def pick(self, full: _T, short: _T) -> _T:
        return short if self.short else full

    def interleave(
        self,
        what: str,
        contenders: Mapping[Any, Any],
        rounds: int,
        run: Callable[[Any], Any] = lambda contender: contender(),
    ) -> Runs:
        """Run the contenders in turn, by a function of one, telling of each turn."""
        turns = count()

        def turn(name: Any) -> Any:
            number = next(turns) // len(contenders) + 1
            self._on_step(f"{what}: {name}, {number} of {rounds}")
            return run(contenders[name])

        told = {name: partial(turn, name) for name in contenders}
        return Runs(interleave(told, rounds))


#: By the scenarios' names: their titles, and what is done, in a paragraph.
TEXTS: dict[str, tuple[str, str]] = {
    name: (title, " ".join(text.split()))
    for name, title, text in re.findall(
        r"## (\w+): (.+)\n\n((?:.+\n)+)",
        (Path(__file__).parents[1] / "scenarios" / "texts.md").read_text("utf-8"),
    )
}

#: A measurement: a generator of what it finds. It cleans up after itself.
Part = Callable[[Bench], Iterator[Finding]]


@dataclass(frozen=True)
class Scenario:
    name: str
    title: str
    #: What is done, in a paragraph.
    text: str
    parts: tuple[Part, ...]
    #: Names of the targets that its figures are compared with.
    targets: tuple[str, ...] = ()
    #: Measurements that only the full form has.
    more: tuple[Part, ...] = ()
    #: Sessions of a database that it needs at a time; 0 for no database.
    sessions: int = 0

    def run(self, bench: Bench) -> list[Finding]:
        parts = self.parts if bench.short else self.parts + self.more
        return [found for part in parts for found in part(bench)]


def scenario(
    name: str, *parts: Part, more: Sequence[Part] = (), sessions: int = 0
) -> Scenario:
    """Return a scenario with its texts and its targets."""
    claims = tuple(CLAIMED.get(name, ()))
    return Scenario(name, *TEXTS[name], parts, claims, tuple(more), sessions)
