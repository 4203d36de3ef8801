"""The pool's figures for Prometheus (``pip install 'sqla-fairpool[prometheus]'``).

::

    from sqla_fairpool.prometheus import register

    register(engine)

Every series has the label ``pool``, the engine's ``pool_logging_name`` or else a
number; what is counted by tag has ``tag`` as well: the first hundred tags by name, all
others together as ``other``.

In ``prometheus_client``'s multiprocess mode the processes write what they count to
files, and custom collectors, of which this is one, are left out of them. Let each
process serve a port of its own, or push a registry of its own to a gateway; or have
``sqla-fairpool monitor --prometheus`` serve what all processes of a ledger tell.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, core
from prometheus_client.registry import Collector

from .ledger.overview import Overview
from .pool.snapshot import Source, metrics_source
from .scheduling.counters import MAX_COUNTED_TAGS, OTHER
from .scheduling.tags import ALL
from .stats import LedgerStats, PoolStats, Summary, TagStats
from .threads import make_lock

__all__ = ["FairPoolCollector", "register"]

#: What each name begins with.
_PREFIX = "sqla_fairpool_"


def register(engine: Any, registry: CollectorRegistry = REGISTRY) -> None:
    """Export the figures of an engine's pool.

    :param engine: an engine, an asyncio engine, or a pool.
    :param registry: where to. Default: ``prometheus_client``'s own.
    :raises sqlalchemy.exc.ArgumentError: if its pool is not a fair one.
    """
    source = metrics_source(engine)
    collector = _collectors.get(registry)
    if collector is None:
        collector = _collectors[registry] = FairPoolCollector()
        registry.register(collector)
    collector.add(source)


class FairPoolCollector(Collector):
    """Collects from any number of pools; one that is gone is left out."""

    def __init__(self) -> None:
        self._sources: list[Source] = []

    def add(self, source: Source) -> None:
        """Collect from one more pool, once."""
        known = [s.core() for s in self._sources]
        if source.core() not in known:
            self._sources.append(source)

    def collect(self) -> Iterable[core.Metric]:
        """Return all series, as they are now."""
        pools = [pool for pool in (s.read() for s in self._sources) if pool]
        self._sources = [s for s in self._sources if s.core() is not None]
        yield from _families(pools)


class OverviewCollector(Collector):
    """Collects from all processes of a ledger, as if they had one pool.

    :param name: the ledger's name, for the label ``pool``.
    :param look: returns what is to be seen now; None while that is nothing.
    """

    def __init__(self, name: str, look: Callable[[], Overview | None]) -> None:
        self._name, self._look = name, look
        self._lock = make_lock()
        # What each process has told last, and the sums, with those that have ended: a
        # counter must not fall. By tag.
        self._told: dict[tuple[str, int | None], Counter[str]] = {}
        self._sums: dict[str, Counter[str]] = {}

    def collect(self) -> Iterable[core.Metric]:
        """Return the series, as they are now."""
        overview = self._look()
        up = core.GaugeMetricFamily(
            _PREFIX + "ledger_up", "1 if the ledger can be read", labels=("pool",)
        )
        up.add_metric((self._name,), overview is not None)
        yield up
        yield from _families([] if overview is None else [self._pool(overview)])

    def _pool(self, overview: Overview) -> PoolStats:
        """Return an overview as the figures of a pool, and its ledger's."""
        with self._lock:
            rows = self._rows(overview)
        limits, owned = overview.limits, sum(p.slots for p in overview.processes)
        free = limits.capacity - limits.quarantined - owned
        slots = {"owned": owned, "free": max(free, 0)}
        slots["quarantined"] = limits.quarantined
        return PoolStats(
            size=limits.size,
            capacity=limits.capacity,
            checked_out=overview.checked_out,
            available=overview.available,
            overflow=overview.overflow,
            idle=max(overview.open - overview.checked_out, 0),
            waiting=overview.waiting,
            utilization=overview.utilization,
            strategy=overview.strategy,
            tags=tuple(rows),
            name=self._name,
            paused_for=0.0 if ALL in overview.paused else None,
            paused_tags=tuple(sorted(overview.paused.keys() - {ALL})),
            ledger=LedgerStats(slots, len(overview.processes)),
        )

    def _rows(self, overview: Overview) -> Iterator[TagStats]:
        """Return a row for each tag, with what is counted of it over time."""
        numbers = {process.number for process in overview.processes}
        self._told = {key: c for key, c in self._told.items() if key[1] in numbers}
        by_name: dict[str, list[TagStats]] = {}
        for row in overview.scrapers:
            is_known = row.name in self._sums or len(self._sums) < MAX_COUNTED_TAGS
            name = row.name if row.name and is_known else OTHER
            by_name.setdefault(name, []).append(row)
            sums = self._sums.setdefault(name, Counter())
            for process, part in row.parts:
                key = row.name, process.number
                told = Counter({n: getattr(part, n) for n in _COUNTED})
                before = self._told.get(key, Counter())
                sums += told - before
                self._told[key] = before | told
        for name, sums in self._sums.items():
            rows = by_name.get(name, [])
            limit = max((row.limit for row in rows), default=overview.limits.max_limit)
            counted: dict[str, Any] = {n: sums[n] for n in _COUNTED}
            yield replace(TagStats.merged(name, rows), limit=limit, **counted)


#: Counters that the processes of a ledger tell.
_COUNTED = ("checkouts", "timeouts")


def _families(pools: Collection[PoolStats]) -> Iterator[core.Metric]:
    """Return the series of these pools, without the figures that are not known."""
    for (kind, *labels), figures in _FIGURES.items():
        for name, text, rows in figures:
            family = kind(_PREFIX + name, text, labels=("pool", *labels))
            for pool in pools:
                for values, *row in rows(pool):
                    if row[0] is not None:
                        family.add_metric((pool.name, *values), *row)
            if family.samples or not name.startswith("would"):
                yield family


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, FairPoolCollector] = (
    weakref.WeakKeyDictionary()
)


#: From a pool to rows: labels beside the pool's, and what `add_metric` takes.
_Rows = Callable[[PoolStats], Iterable[tuple[Any, ...]]]


def _pool(attribute: str) -> _Rows:
    return lambda pool: [((), getattr(pool, attribute))]


def _tag(attribute: str) -> _Rows:
    return lambda pool: [((tag.name,), getattr(tag, attribute)) for tag in pool.tags]


def _ledger(attribute: str) -> _Rows:
    return lambda pool: [((), getattr(pool.ledger, attribute, None))]


def _histogram(attribute: str) -> _Rows:
    return lambda pool: [
        ((tag.name,), *_buckets(getattr(tag, attribute))) for tag in pool.tags
    ]


def _handovers(pool: PoolStats) -> Iterable[tuple[Any, ...]]:
    return [((), *_buckets(getattr(pool.ledger, "handover_time", None)))]


def _buckets(summary: Summary | None) -> tuple[Any, ...]:
    if summary is None or not summary.buckets:
        return (None,)
    # repr of infinity is "inf", and Prometheus has "+Inf".
    named = [(repr(b).replace("inf", "+Inf"), n) for b, n in summary.buckets]
    return named, summary.total


def _slots(pool: PoolStats) -> Iterable[tuple[Any, ...]]:
    slots = {} if pool.ledger is None else pool.ledger.slots
    return [((state,), count) for state, count in slots.items()]


def _connections(pool: PoolStats) -> Iterable[tuple[Any, ...]]:
    return (("used",), pool.checked_out), (("idle",), pool.idle)


def _paused(pool: PoolStats) -> Iterable[tuple[Any, ...]]:
    return [((), pool.paused_for is not None)]


def _paused_tags(pool: PoolStats) -> Iterable[tuple[Any, ...]]:
    # Also those of which nothing is known but that.
    known = {tag.name for tag in pool.tags}.union(pool.paused_tags)
    return [((tag,), tag in pool.paused_tags) for tag in sorted(known)]


def _closures(pool: PoolStats) -> Iterable[tuple[Any, ...]]:
    return [((reason,), count) for reason, count in sorted(pool.closures.items())]


#: The reason of a failed checkout, and its counter of :class:`.TagStats`.
_FAILURES = {"timeout": "timeouts", "refused": "refusals", "deadlock": "deadlocks"}


def _failures(pool: PoolStats) -> Iterator[tuple[Any, ...]]:
    for tag in pool.tags:
        for reason, attribute in _FAILURES.items():
            yield (tag.name, reason), getattr(tag, attribute)


#: For each kind and its labels beside the pool's: name, help, and the rows.
_FIGURES: dict[tuple[Any, ...], tuple[tuple[str, str, _Rows], ...]] = {
    (core.GaugeMetricFamily, "state"): (
        ("connections", "Connections that are used, or idle in the pool", _connections),
        (
            "ledger_slots",
            "Slots of the ledger: owned (here), others, free, quarantined",
            _slots,
        ),
    ),
    (core.CounterMetricFamily, "reason"): (
        ("connections_closed", "Connections closed, by reason", _closures),
    ),
    (core.GaugeMetricFamily,): (
        ("connections_max", "Most connections there may be", _pool("capacity")),
        ("pending_requests", "Callers that wait", _pool("waiting")),
        ("paused", "1 while no checkout is served", _paused),
        ("ledger_members", "Pools that share the ledger", _ledger("members")),
    ),
    (core.CounterMetricFamily,): (
        (
            "ledger_transactions",
            "Transactions in the ledger's store",
            _ledger("transactions"),
        ),
        (
            "ledger_away_seconds",
            "For how long the ledger could not be reached",
            _ledger("away_time"),
        ),
    ),
    (core.HistogramMetricFamily,): (
        (
            "ledger_handover_seconds",
            "Until a slot came that was another pool's",
            _handovers,
        ),
    ),
    (core.GaugeMetricFamily, "tag"): (
        ("tag_active", "1 if the tag counts in the division", _tag("active")),
        ("tag_connections", "Connections the tag holds", _tag("connections")),
        ("tag_connections_max", "Most the tag may hold now", _tag("limit")),
        ("tag_pending_requests", "Callers that wait", _tag("waiting")),
        ("tag_paused", "1 while no checkout of the tag is served", _paused_tags),
        ("tag_weight", "Its relative entitlement", _tag("weight")),
        ("tag_connections_own_max", "A maximum of its own", _tag("max")),
        ("tag_connections_reserved", "Kept for the tag alone", _tag("reserved")),
        ("tag_usage_seconds", "Connection-seconds, decayed", _tag("usage")),
    ),
    (core.CounterMetricFamily, "tag"): (
        ("checkouts", "Checkouts granted", _tag("checkouts")),
        (
            "connect_failures",
            "Connections that could not be opened",
            _tag("create_failures"),
        ),
        (
            "would_refuse",
            "Checkouts that would have been refused",
            _tag("would_refuse"),
        ),
    ),
    (core.CounterMetricFamily, "tag", "reason"): (
        (
            "checkout_failures",
            "Checkouts that gave up: timeout, refused (max_waiting), deadlock",
            _failures,
        ),
    ),
    (core.HistogramMetricFamily, "tag"): (
        ("wait_seconds", "Until a checkout had its slot", _histogram("wait_time")),
        ("hold_seconds", "Until a connection came back", _histogram("hold_time")),
        ("connect_seconds", "To open a connection", _histogram("create_time")),
        (
            "would_wait_seconds",
            "How long checkouts would have waited by the rules, in a dry run",
            _histogram("would_wait"),
        ),
    ),
}
