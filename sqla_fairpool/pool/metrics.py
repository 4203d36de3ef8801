"""The pool's counters for monitoring, as one frozen snapshot.

What :mod:`.prometheus` and :mod:`.opentelemetry` export, and what you would read to
feed another system.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from ..scheduling.counters import BOUNDS, OTHER, Histogram, Meter
from .core import PoolCore

__all__ = ["HistogramCopy", "PoolMetrics", "Source", "TagMetrics", "collect"]


@dataclass(frozen=True, slots=True)
class HistogramCopy:
    """Durations in seconds, counted by size."""

    #: (upper bound, durations up to it), the last bound being infinite; cumulated.
    buckets: tuple[tuple[float, int], ...]
    #: Sum of all durations.
    total: float

    @property
    def count(self) -> int:
        """Durations in all."""
        return self.buckets[-1][1]


@dataclass(frozen=True, slots=True)
class TagMetrics:
    """What one tag has and had. Counters never fall while the pool lives."""

    tag: str
    #: It counts in the division of the capacity. For ``other``: any of them.
    active: bool
    #: Slots it holds, its ceiling, and callers that wait.
    connections: int
    limit: int
    waiting: int
    #: Checkouts granted, and those that gave up, by reason.
    checkouts: int
    timeouts: int
    refusals: int
    deadlocks: int
    #: Connections that could not be opened.
    create_failures: int
    #: Until a checkout had its slot; those that had it at once are in the first
    #: bucket.
    wait_time: HistogramCopy
    #: Until the connection was returned.
    hold_time: HistogramCopy
    #: To open a connection.
    create_time: HistogramCopy


@dataclass(frozen=True, slots=True)
class PoolMetrics:
    """A pool at one moment."""

    #: What tells it from other pools of the process.
    name: str
    size: int
    capacity: int
    min_idle: int
    used: int
    idle: int
    waiting: int
    #: Connections closed, by reason; see :mod:`.lifetimes`.
    closures: Mapping[str, int]
    #: By tag: the first hundred by name, the others summed up as ``other``.
    tags: tuple[TagMetrics, ...]


class Source:
    """A pool to read from, as long as it is in use."""

    def __init__(self, core: PoolCore, name: str) -> None:
        # The core, because engine.dispose() makes another pool.
        self.core = weakref.ref(core)
        self.name = name

    def read(self) -> PoolMetrics | None:
        """Return its figures, None if it is gone."""
        core = self.core()
        return None if core is None else collect(core, self.name)


def collect(core: PoolCore, name: str) -> PoolMetrics:
    """Copy the counters in one hold of the lock. O(tags)."""
    options = core.options
    with core.lock.section():
        scheduler = core.scheduler
        meters = dict(scheduler.roster.meters.by_tag)
        live: dict[str, list[int]] = {}
        for account in scheduler.accounts.values():
            tag = account.tag if account.tag in meters else OTHER
            row = live.setdefault(tag, [0, 0, 0, 0])
            row[0] |= account.active
            row[1] += account.in_use
            row[2] = max(row[2], scheduler.ceiling(account))
            row[3] += account.waiting
        for checkout in core.connections.granted():  # counted and not handed in
            tag = checkout.account.tag if checkout.account.tag in meters else OTHER
            live[tag].append(checkout.again)
        tags = tuple(
            _copy(
                tag, meters[tag], live.get(tag, [0, 0, scheduler.roster.max_limit, 0])
            )
            for tag in sorted(meters)
        )
        idle = core.connections.count_open()
        return PoolMetrics(
            name=name,
            size=options.pool_size,
            capacity=options.capacity,
            min_idle=options.min_idle,
            used=scheduler.in_use,
            idle=idle,
            waiting=scheduler.waiting,
            closures=dict(core.closures),
            tags=tags,
        )


def _copy(tag: str, meter: Meter, live: list[int]) -> TagMetrics:
    active, connections, limit, waiting, *pending = live
    again = sum(pending)
    return TagMetrics(
        tag=tag,
        active=bool(active),
        connections=connections,
        limit=limit,
        waiting=waiting,
        checkouts=meter.checkouts + again,
        timeouts=meter.timeouts,
        refusals=meter.refusals,
        deadlocks=meter.deadlocks,
        create_failures=meter.create_failures,
        wait_time=_cumulated(meter.wait, at_once=meter.at_once + again),
        hold_time=_cumulated(meter.hold),
        create_time=_cumulated(meter.create),
    )


def _cumulated(histogram: Histogram, at_once: int = 0) -> HistogramCopy:
    count = at_once
    buckets = []
    for bound, more in zip((*BOUNDS, float("inf")), histogram.counts, strict=True):
        count += more
        buckets.append((bound, count))
    return HistogramCopy(tuple(buckets), histogram.total)
