"""What the figures should be, by the name under which a measurement reports them."""

from __future__ import annotations

from collections.abc import Sequence

from .figures import Figure, Target


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
    """Return a figure: for the target of this name, or else what `key` says itself.

    :param beside: what it is compared with; a target has its own words for that.
    """
    if key in TARGETS:
        target = TARGETS[key]
        return Figure(target.what, target.beside, tuple(values), target, remark)
    return Figure(key, beside, tuple(values), remark=remark)
