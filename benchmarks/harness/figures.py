"""Figures: what was measured in some rounds, and what it should be.

Rules of this file: numbers in, numbers and text out. It knows no pool and no clock.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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


# -- what the figures should be, by the name under which a measurement reports them


def _most(bound: float, what: str, beside: str = "-") -> Target:
    return Target(what, beside, bound, at_most=True)


def _least(bound: float, what: str, beside: str = "-") -> Target:
    return Target(what, beside, bound, at_most=False)


_THREE = "three QueuePools of 10"
_BURSTY = "three bursty scrapers on 20 connections"
_LIFTED = "the same with soft_limit and max_limit at 20"
_CYCLE = "uncontended checkout + checkin, time"

#: The design's targets, and those of the description.
TARGETS: dict[str, Target] = {
    # -- static against dynamic, on real tables
    "alone: throughput": _least(
        1.40, "one active scraper: workflows per second", "QueuePool of 10"
    ),
    "alone: latency": _most(
        0.72, "one active scraper: mean latency of a workflow", "QueuePool of 10"
    ),
    "alone: unused": _most(0.25, "one active scraper: unused connections", _THREE),
    "bursts: throughput": _least(0.98, f"{_BURSTY}: workflows per second", _THREE),
    "bursts: latency": _most(1.05, f"{_BURSTY}: p95 latency", _THREE),
    "bursts, lifted: throughput": _least(
        0.98, f"{_LIFTED}: workflows per second", _THREE
    ),
    "bursts, lifted: latency": _most(1.05, f"{_LIFTED}: p95 latency", _THREE),
    "shift: wake": _most(
        1.5, "a scraper wakes up: until its first connection", "a workflow"
    ),
    # What the pool promises is 1; the rest is for threads to wake and be seen.
    "shift: idle": _most(
        1.05,
        "a scraper goes idle: until another's ceiling has risen and is used",
        "idle_timeout + reallocation_interval",
    ),
    # -- the pool alone
    "uncontended": _most(0.95, _CYCLE, "QueuePool"),
    "floor": _most(1.20, _CYCLE, "floor"),
    "hold": _least(
        1.0, "200 threads, 20 connections, 5 ms hold: throughput", "QueuePool"
    ),
    "no hold": _least(
        0.8, "40 threads, 20 connections, no hold: throughput", "QueuePool"
    ),
    "fair 200": _least(0.99, "200 threads, 20 connections, 5 ms hold: Jain index"),
    "fair 7679": _least(0.99, "100 threads, 10 connections, 10 ms hold: Jain index"),
    "light": _most(1.5, "light tag beside a flood of 200: p99 wait", "hold"),
    "light, full": _most(1.5, "the same, the flood may use every connection", "hold"),
    "light, connection": _most(3.0, "the same, tags set on the connection", "hold"),
    "spread": _most(
        1.1, "500 threads, 40 connections, 5 ms hold: p99 / p50 of the waits"
    ),
    "tags": _most(1.3, "checkout + checkin with 10,000 tags, time", "10 tags"),
    "waiters": _most(1.3, "release + request with 10,000 waiters, time", "10 waiters"),
    "statement": _most(1.02, "SELECT 1 on PostgreSQL, time", "QueuePool"),
    # -- the measuring
    "generator: cost": _most(
        0.15, "the crowd's own part of an uncontended cycle, time", "QueuePool"
    ),
}

# All pools at the same work, on PostgreSQL.
for _side in ("threads", "tasks"):
    _crowd = f"110 {_side} on 10 connections, 5 ms hold"
    TARGETS |= {
        f"{_side}: jain": _least(0.99, f"{_crowd}: Jain index over {_side}"),
        f"{_side}: spread": _most(1.1, f"{_crowd}: p99 / p50 of the waits"),
        f"{_side}: tags": _least(
            0.99, f"five tags with 50 to 6 {_side} each: Jain index over tags"
        ),
        f"{_side}: light": _most(
            1.5, f"a light tag beside a flood of 109 {_side}: p99 wait", "hold"
        ),
    }


def figure(
    key: str, values: Sequence[float], beside: str = "-", remark: str = ""
) -> Figure:
    """Return a figure: for the target of this name, or else what `key` says itself."""
    if key in TARGETS:
        target = TARGETS[key]
        return Figure(target.what, target.beside, tuple(values), target, remark)
    return Figure(key, beside, tuple(values), remark=remark)
