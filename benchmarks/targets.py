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
    "shift: wake": _at_most(
        "a scraper wakes up: until its first connection", "a workflow", 1.5
    ),
    # What the pool promises is 1; the rest is for threads to wake and be seen.
    "shift: idle": _at_most(
        "a scraper goes idle: until another's ceiling has risen and is used",
        "idle_timeout + reallocation_interval",
        1.05,
    ),
    # -- all pools at the same work, on PostgreSQL
    "threads: jain": _at_least(
        "110 threads on 10 connections, 5 ms hold: Jain index over threads", "-", 0.99
    ),
    "threads: spread": _at_most(
        "110 threads on 10 connections, 5 ms hold: p99 / p50 of the waits", "-", 1.1
    ),
    "threads: tags": _at_least(
        "five tags with 50 to 6 threads each: Jain index over tags", "-", 0.99
    ),
    "threads: light": _at_most(
        "a light tag beside a flood of 109 threads: p99 wait", "hold", 1.5
    ),
    "tasks: jain": _at_least(
        "110 tasks on 10 connections, 5 ms hold: Jain index over tasks", "-", 0.99
    ),
    "tasks: spread": _at_most(
        "110 tasks on 10 connections, 5 ms hold: p99 / p50 of the waits", "-", 1.1
    ),
    "tasks: tags": _at_least(
        "five tags with 50 to 6 tasks each: Jain index over tags", "-", 0.99
    ),
    "tasks: light": _at_most(
        "a light tag beside a flood of 109 tasks: p99 wait", "hold", 1.5
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
    "spread": _at_most(
        "500 threads, 40 connections, 5 ms hold: p99 / p50 of the waits", "-", 1.1
    ),
    "tags": _at_most("checkout + checkin with 10,000 tags, time", "10 tags", 1.3),
    "waiters": _at_most(
        "release + request with 10,000 waiters, time", "10 waiters", 1.3
    ),
    "statement": _at_most("SELECT 1 on PostgreSQL, time", "QueuePool", 1.02),
    # -- the measuring
    "generator: cost": _at_most(
        "the crowd's own part of an uncontended cycle, time", "QueuePool", 0.15
    ),
}
