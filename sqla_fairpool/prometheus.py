"""The pool's figures for Prometheus (``pip install 'sqla-fairpool[prometheus]'``).

::

    from sqla_fairpool.prometheus import register

    register(engine)

Every series has the label ``pool``, the engine's ``pool_logging_name`` or else a
number; what is counted by tag has ``tag`` as well: the first hundred tags by name, all
others together as ``other``.

In ``prometheus_client``'s multiprocess mode the processes write what they count to
files, and custom collectors, of which this is one, are left out of them. Let each
process serve a port of its own, or push a registry of its own to a gateway.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, core
from prometheus_client.registry import Collector

from .pool.fair_queue_pool import metrics_source
from .pool.snapshot import Source
from .stats import PoolStats, Summary

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
        for (kind, *labels), figures in _FIGURES.items():
            for name, text, rows in figures:
                family = kind(_PREFIX + name, text, labels=("pool", *labels))
                for pool in pools:
                    for values, *row in rows(pool):
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


def _would_refuse(pool: PoolStats) -> Iterable[tuple[Any, ...]]:
    return [
        ((tag.name,), tag.would_refuse)
        for tag in pool.tags
        if tag.would_refuse is not None
    ]


def _histogram(attribute: str) -> _Rows:
    def rows(pool: PoolStats) -> Iterator[tuple[Any, ...]]:
        for tag in pool.tags:
            summary: Summary | None = getattr(tag, attribute)
            if summary is None:  # not in a dry run
                continue
            # repr of infinity is "inf", and Prometheus has "+Inf".
            buckets = [(repr(b).replace("inf", "+Inf"), n) for b, n in summary.buckets]
            yield (tag.name,), buckets, summary.total

    return rows


def _connections(pool: PoolStats) -> Iterable[tuple[Any, ...]]:
    return (("used",), pool.checked_out), (("idle",), pool.idle)


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
    ),
    (core.CounterMetricFamily, "reason"): (
        ("connections_closed", "Connections closed, by reason", _closures),
    ),
    (core.GaugeMetricFamily,): (
        ("connections_max", "Most connections there may be", _pool("capacity")),
        ("pending_requests", "Callers that wait", _pool("waiting")),
    ),
    (core.GaugeMetricFamily, "tag"): (
        ("tag_active", "1 if the tag counts in the division", _tag("active")),
        ("tag_connections", "Connections the tag holds", _tag("connections")),
        ("tag_connections_max", "Most the tag may hold now", _tag("limit")),
        ("tag_pending_requests", "Callers that wait", _tag("waiting")),
        ("tag_weight", "Its relative entitlement", _tag("weight")),
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
        ("would_refuse", "Checkouts that would have been refused", _would_refuse),
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
