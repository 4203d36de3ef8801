"""The scenarios of the demo, the verdict on them, and the report. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any

__all__ = [
    "SCENARIOS",
    "SCRAPERS",
    "Comparison",
    "LoadFigures",
    "Report",
    "Sample",
    "Scenario",
    "Seen",
    "Verdict",
    "counts_text",
    "judge",
]

SCRAPERS = ("layer1_5", "layer2", "layer3")


@dataclass(frozen=True)
class Scenario:
    """Who runs, and what each must get of 20 connections."""

    title: str
    scrapers: tuple[str, ...]
    #: Connections of each of `scrapers`; 0 for one that has gone idle.
    expected: tuple[int, ...]
    #: The division has a remainder, and it wanders: who has the larger numbers
    #: is not said.
    any_order: bool = False

    @property
    def running(self) -> frozenset[str]:
        """The scrapers that want connections."""
        return frozenset(
            name
            for name, count in zip(self.scrapers, self.expected, strict=True)
            if count
        )

    def counts(self, connections: Mapping[str, int]) -> tuple[int, ...]:
        """Return the counts of `scrapers` as they compare with `expected`."""
        counts = [connections.get(name, 0) for name in self.scrapers]
        return tuple(sorted(counts, reverse=True) if self.any_order else counts)


SCENARIOS = (
    Scenario("only layer1_5 is running", ("layer1_5",), (15,)),
    Scenario("layer1_5 and layer3", ("layer1_5", "layer3"), (10, 10)),
    Scenario("layer1_5, layer2 and layer3", SCRAPERS, (7, 7, 6), any_order=True),
    Scenario("then layer2 goes idle", SCRAPERS, (10, 0, 10)),
)


@dataclass(frozen=True)
class Sample:
    """Connections of each scraper at one moment, as pool and server see it."""

    pool: Mapping[str, int]
    server: Mapping[str, int]
    #: Tags that the pool counts in its division.
    active: frozenset[str]
    #: Sessions of the pool on the server, idle ones included.
    sessions: int


@dataclass(frozen=True)
class Seen:
    """What one side saw, over all samples of a scenario."""

    #: The median of each scraper's count, in the order of the scenario's scrapers
    #: (or, where any order will do, of the largest, second largest, ... count).
    median: tuple[int, ...]
    #: The most that each scraper had.
    most: Mapping[str, int]
    #: The most that all had together.
    most_in_all: int

    @classmethod
    def of(cls, scenario: Scenario, observed: Sequence[Mapping[str, int]]) -> Seen:
        """Sum up `observed`, which must not be empty."""
        names = sorted(set().union(scenario.scrapers, *observed))
        rows = [scenario.counts(connections) for connections in observed]
        return cls(
            median=tuple(median_low(column) for column in zip(*rows, strict=True)),
            most={name: max(c.get(name, 0) for c in observed) for name in names},
            most_in_all=max(sum(connections.values()) for connections in observed),
        )


@dataclass(frozen=True)
class Verdict:
    """How a scenario came out."""

    scenario: Scenario
    #: None when nothing was observed.
    pool: Seen | None
    server: Seen | None
    samples: int
    #: Seconds until the expected numbers stood, None if they never did.
    settled_after: float | None
    #: What is wrong; empty if nothing is.
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Everything came out as expected."""
        return not self.problems


def judge(
    scenario: Scenario,
    samples: Sequence[Sample],
    *,
    capacity: int,
    ceiling: int,
    settled_after: float | None,
    before: Sequence[Sample] = (),
) -> Verdict:
    """Compare what was observed with what the scenario expects.

    Medians, because between two transactions of a scraper the server sees one
    connection less for a moment; bounds must hold in every single sample.

    :param samples: those of the settled part.
    :param capacity: the most that all may have together, also before.
    :param ceiling: the most that one scraper may have in the settled part.
    :param before: the samples of the time until it had settled.
    """
    problems = []
    pool = server = None
    if settled_after is None:
        problems.append("did not settle in time")
    if not samples:
        problems.append("nothing was observed")
    else:
        pool = Seen.of(scenario, [sample.pool for sample in samples])
        server = Seen.of(scenario, [sample.server for sample in samples])
        for side, seen in (("pool", pool), ("server", server)):
            problems += _wrong_counts(scenario, side, seen, ceiling)
        wrong = {sample.active for sample in samples} - {scenario.running}
        problems += [f"pool: active was {_names(active)}" for active in wrong]
    everything = [*before, *samples]
    for side, totals in (
        ("pool", [sum(sample.pool.values()) for sample in everything]),
        ("server", [sum(sample.server.values()) for sample in everything]),
        ("server, idle sessions included", [s.sessions for s in everything]),
    ):
        most = max(totals, default=0)
        if most > capacity:
            problems.append(f"{side}: {most} in all, the capacity is {capacity}")
    return Verdict(scenario, pool, server, len(samples), settled_after, tuple(problems))


def _wrong_counts(scenario: Scenario, side: str, seen: Seen, ceiling: int) -> list[str]:
    problems = []
    if seen.median != scenario.expected:
        problems.append(
            f"{side}: {counts_text(seen.median)}, "
            f"expected {counts_text(scenario.expected)}"
        )
    for name, most in seen.most.items():
        limit = ceiling if name in scenario.running else 0
        if most > limit:
            problems.append(f"{side}: {name} had {most}, its ceiling is {limit}")
    return problems


def counts_text(counts: Sequence[int]) -> str:
    """Return ``7 / 7 / 6``."""
    return " / ".join(str(count) for count in counts)


def _names(tags: frozenset[str]) -> str:
    return ", ".join(sorted(tags)) or "nobody"


@dataclass(frozen=True)
class LoadFigures:
    """What a scraper's threads got from a pool. Times in seconds."""

    scraper: str
    threads: int
    checkouts: int
    checkouts_per_second: float
    wait_p99: float
    wait_longest: float
    #: That wait had not ended when the measurement did: it is longer than that.
    p99_still_waiting: bool
    longest_still_waiting: bool
    timeouts: int
    #: Threads that got no connection at all.
    never_served: int


@dataclass(frozen=True)
class Comparison:
    """One pool under a light and a heavy scraper."""

    pool: str
    #: Its options, but for the size.
    options: Mapping[str, Any]
    seconds: float
    scrapers: tuple[LoadFigures, ...]


@dataclass(frozen=True)
class Report:
    """Everything that a run of the demo found out."""

    #: What is known of the server.
    server: Mapping[str, Any]
    #: What the scenarios were played with.
    setup: Mapping[str, Any]
    verdicts: tuple[Verdict, ...]
    comparisons: tuple[Comparison, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """All scenarios came out as expected."""
        return all(verdict.ok for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        return {
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "server": dict(self.server),
            "setup": dict(self.setup),
            "scenarios": [_verdict_dict(verdict) for verdict in self.verdicts],
            "comparison": [asdict(comparison) for comparison in self.comparisons],
        }


def _verdict_dict(verdict: Verdict) -> dict[str, Any]:
    scenario = verdict.scenario
    return {
        "scenario": scenario.title,
        "scrapers": list(scenario.scrapers),
        "expected": list(scenario.expected),
        "any_order": scenario.any_order,
        "observed_pool": verdict.pool and asdict(verdict.pool),
        "observed_server": verdict.server and asdict(verdict.server),
        "samples": verdict.samples,
        "settled_after": verdict.settled_after,
        "ok": verdict.ok,
        "problems": list(verdict.problems),
    }
