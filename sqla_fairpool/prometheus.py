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
from collections.abc import Callable, Iterable
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
from .pool.metrics import HistogramCopy, PoolMetrics, Source, TagMetrics

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
        yield from _gauges(pools)
        yield from _gauges_by_tag(pools)
        yield from _counters(pools)
        yield from _histograms(pools)


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, FairPoolCollector] = (
    weakref.WeakKeyDictionary()
)


def _gauges(pools: list[PoolMetrics]) -> Iterable[Metric]:
    connections = GaugeMetricFamily(
        _PREFIX + "connections",
        "Connections that are used, or idle in the pool",
        labels=("pool", "state"),
    )
    for pool in pools:
        connections.add_metric((pool.name, "used"), pool.used)
        connections.add_metric((pool.name, "idle"), pool.idle)
    yield connections
    figures: list[tuple[str, str, Callable[[PoolMetrics], float]]] = [
        ("connections_max", "Most connections there may be", lambda p: p.capacity),
        ("pending_requests", "Callers that wait", lambda p: p.waiting),
    ]
    for name, text, read in figures:
        family = GaugeMetricFamily(_PREFIX + name, text, labels=("pool",))
        for pool in pools:
            family.add_metric((pool.name,), read(pool))
        yield family


def _gauges_by_tag(pools: list[PoolMetrics]) -> Iterable[Metric]:
    figures: list[tuple[str, str, Callable[[TagMetrics], float]]] = [
        ("tag_active", "1 if the tag counts in the division", lambda t: t.active),
        ("tag_connections", "Connections the tag holds", lambda t: t.connections),
        ("tag_connections_max", "Most the tag may hold now", lambda t: t.limit),
        ("tag_pending_requests", "Callers that wait", lambda t: t.waiting),
    ]
    for name, text, read in figures:
        family = GaugeMetricFamily(_PREFIX + name, text, labels=("pool", "tag"))
        for pool in pools:
            for tag in pool.tags:
                family.add_metric((pool.name, tag.tag), read(tag))
        yield family


def _counters(pools: list[PoolMetrics]) -> Iterable[Metric]:
    checkouts = CounterMetricFamily(
        _PREFIX + "checkouts", "Checkouts granted", labels=("pool", "tag")
    )
    failures = CounterMetricFamily(
        _PREFIX + "checkout_failures",
        "Checkouts that gave up: timeout, refused (max_waiting), deadlock",
        labels=("pool", "tag", "reason"),
    )
    opening = CounterMetricFamily(
        _PREFIX + "connect_failures",
        "Connections that could not be opened",
        labels=("pool", "tag"),
    )
    closures = CounterMetricFamily(
        _PREFIX + "connections_closed",
        "Connections closed, by reason",
        labels=("pool", "reason"),
    )
    for pool in pools:
        for tag in pool.tags:
            labels = (pool.name, tag.tag)
            checkouts.add_metric(labels, tag.checkouts)
            failures.add_metric((*labels, "timeout"), tag.timeouts)
            failures.add_metric((*labels, "refused"), tag.refusals)
            failures.add_metric((*labels, "deadlock"), tag.deadlocks)
            opening.add_metric(labels, tag.create_failures)
        for reason, count in sorted(pool.closures.items()):
            closures.add_metric((pool.name, reason), count)
    yield from (checkouts, failures, opening, closures)


def _histograms(pools: list[PoolMetrics]) -> Iterable[Metric]:
    figures: list[tuple[str, str, Callable[[TagMetrics], HistogramCopy]]] = [
        ("wait_seconds", "Until a checkout had its slot", lambda t: t.wait_time),
        ("hold_seconds", "Until a connection came back", lambda t: t.hold_time),
        ("connect_seconds", "To open a connection", lambda t: t.create_time),
    ]
    for name, text, read in figures:
        family = HistogramMetricFamily(_PREFIX + name, text, labels=("pool", "tag"))
        for pool in pools:
            for tag in pool.tags:
                copy = read(tag)
                buckets = [(_bound(bound), count) for bound, count in copy.buckets]
                family.add_metric((pool.name, tag.tag), buckets, copy.total)
        yield family


def _bound(bound: float) -> str:
    return "+Inf" if bound == float("inf") else repr(bound)
