"""What the figures should be: the design's targets, and those of the description.

By the name under which a measurement reports.
"""

from __future__ import annotations

from .figures import Target

__all__ = ["TARGETS"]


def _at_most(what: str, beside: str, bound: float) -> Target:
    return Target(what, beside, bound, at_most=True)


def _at_least(what: str, beside: str, bound: float) -> Target:
    return Target(what, beside, bound, at_most=False)


TARGETS: dict[str, Target] = {
    # -- static against dynamic, on real tables
    "alone: throughput": _at_least(
        "one active scraper: workflows per second", "QueuePool of 10", 1.40
    ),
    "alone: latency": _at_most(
        "one active scraper: mean latency of a workflow", "QueuePool of 10", 0.72
    ),
    "alone: unused": _at_most(
        "one active scraper: unused connections", "three QueuePools of 10", 0.25
    ),
    "bursts: throughput": _at_least(
        "three bursty scrapers on 20 connections: workflows per second",
        "three QueuePools of 10",
        0.98,
    ),
    "bursts: latency": _at_most(
        "three bursty scrapers on 20 connections: p95 latency",
        "three QueuePools of 10",
        1.05,
    ),
    "bursts, lifted: throughput": _at_least(
        "the same with soft_limit and max_limit at 20: workflows per second",
        "three QueuePools of 10",
        0.98,
    ),
    "bursts, lifted: latency": _at_most(
        "the same with soft_limit and max_limit at 20: p95 latency",
        "three QueuePools of 10",
        1.05,
    ),
    # -- the pool alone
    "uncontended": _at_most("uncontended checkout + checkin, time", "QueuePool", 0.95),
    "floor": _at_most("uncontended checkout + checkin, time", "floor", 1.20),
    "hold": _at_least(
        "200 threads, 20 connections, 5 ms hold: throughput", "QueuePool", 1.0
    ),
    "no hold": _at_least(
        "40 threads, 20 connections, no hold: throughput", "QueuePool", 0.8
    ),
    "fair 200": _at_least(
        "200 threads, 20 connections, 5 ms hold: Jain index", "-", 0.99
    ),
    "fair 7679": _at_least(
        "100 threads, 10 connections, 10 ms hold: Jain index", "-", 0.99
    ),
    "light": _at_most("light tag beside a flood of 200: p99 wait", "hold", 1.5),
    "light, full": _at_most(
        "the same, the flood may use every connection", "hold", 1.5
    ),
    "light, connection": _at_most("the same, tags set on the connection", "hold", 3.0),
    "tags": _at_most("checkout + checkin with 10,000 tags, time", "10 tags", 1.3),
    "waiters": _at_most(
        "release + request with 10,000 waiters, time", "10 waiters", 1.3
    ),
    "statement": _at_most("SELECT 1 on PostgreSQL, time", "QueuePool", 1.02),
}
