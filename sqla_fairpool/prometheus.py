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
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
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

    def collect(self) -> Iterable[Metric]:
        """Return all series, as they are now."""
        pools = [pool for pool in (s.read() for s in self._sources) if pool]
        self._sources = [s for s in self._sources if s.core() is not None]
        yield from _of_pools(pools)
        yield from _of_tags(pools)
        yield from _of_dry_runs(pools)


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, FairPoolCollector] = (
    weakref.WeakKeyDictionary()
)


_Gauge, _Counter = GaugeMetricFamily, CounterMetricFamily

#: Kind, name, help, attribute of :class:`.PoolStats`.
_POOL_FIGURES = (
    (_Gauge, "connections_max", "Most connections there may be", "capacity"),
    (_Gauge, "pending_requests", "Callers that wait", "waiting"),
)

#: Kind, name, help, attribute of :class:`.TagStats`.
_TAG_FIGURES = (
    (_Gauge, "tag_active", "1 if the tag counts in the division", "active"),
    (_Gauge, "tag_connections", "Connections the tag holds", "connections"),
    (_Gauge, "tag_connections_max", "Most the tag may hold now", "limit"),
    (_Gauge, "tag_pending_requests", "Callers that wait", "waiting"),
    (_Gauge, "tag_weight", "Its relative entitlement", "weight"),
    (_Gauge, "tag_connections_reserved", "Kept for the tag alone", "reserved"),
    (_Gauge, "tag_usage_seconds", "Connection-seconds, decayed", "usage"),
    (_Counter, "checkouts", "Checkouts granted", "checkouts"),
    (
        _Counter,
        "connect_failures",
        "Connections that could not be opened",
        "create_failures",
    ),
)

#: Name, help, attribute of :class:`.TagStats`.
_TAG_HISTOGRAMS = (
    ("wait_seconds", "Until a checkout had its slot", "wait_time"),
    ("hold_seconds", "Until a connection came back", "hold_time"),
    ("connect_seconds", "To open a connection", "create_time"),
)

#: The reason of a failed checkout, and its counter of :class:`.TagStats`.
_FAILURES = {"timeout": "timeouts", "refused": "refusals", "deadlock": "deadlocks"}


def _of_pools(pools: list[PoolStats]) -> Iterator[Metric]:
    text = "Connections that are used, or idle in the pool"
    connections = _family(_Gauge, "connections", text, "state")
    text = "Connections closed, by reason"
    closures = _family(_Counter, "connections_closed", text, "reason")
    for pool in pools:
        connections.add_metric((pool.name, "used"), pool.checked_out)
        connections.add_metric((pool.name, "idle"), pool.idle)
        for reason, count in sorted(pool.closures.items()):
            closures.add_metric((pool.name, reason), count)
    yield from (connections, closures)
    for kind, name, text, attribute in _POOL_FIGURES:
        family = _family(kind, name, text)
        for pool in pools:
            family.add_metric((pool.name,), getattr(pool, attribute))
        yield family


def _of_tags(pools: list[PoolStats]) -> Iterator[Metric]:
    rows = [((pool.name, tag.name), tag) for pool in pools for tag in pool.tags]
    for kind, name, text, attribute in _TAG_FIGURES:
        family = _family(kind, name, text, "tag")
        for labels, tag in rows:
            family.add_metric(labels, getattr(tag, attribute))
        yield family
    text = "Checkouts that gave up: timeout, refused (max_waiting), deadlock"
    failures = _family(_Counter, "checkout_failures", text, "tag", "reason")
    for labels, tag in rows:
        for reason, attribute in _FAILURES.items():
            failures.add_metric((*labels, reason), getattr(tag, attribute))
    yield failures
    for name, text, attribute in _TAG_HISTOGRAMS:
        histogram = _family(HistogramMetricFamily, name, text, "tag")
        for labels, tag in rows:
            summary: Summary = getattr(tag, attribute)
            histogram.add_metric(labels, _buckets(summary), summary.total)
        yield histogram


def _of_dry_runs(pools: list[PoolStats]) -> Iterator[Metric]:
    rows = [
        ((pool.name, tag.name), tag.would_wait, tag.would_refuse)
        for pool in pools
        for tag in pool.tags
        if tag.would_wait is not None
    ]
    if not rows:
        return
    text = "How long checkouts would have waited that had to by the rules"
    waits = _family(HistogramMetricFamily, "would_wait_seconds", text, "tag")
    text = "Checkouts that would have been refused"
    refusals = _family(_Counter, "would_refuse", text, "tag")
    for labels, would_wait, would_refuse in rows:
        waits.add_metric(labels, _buckets(would_wait), would_wait.total)
        refusals.add_metric(labels, would_refuse)
    yield from (waits, refusals)


def _family(kind: Any, name: str, text: str, *labels: str) -> Any:
    return kind(_PREFIX + name, text, labels=("pool", *labels))


def _buckets(summary: Summary) -> list[tuple[str, int]]:
    return [
        ("+Inf" if bound == float("inf") else repr(bound), count)
        for bound, count in summary.buckets
    ]
