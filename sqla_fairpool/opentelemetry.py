"""The pool's figures for OpenTelemetry (``pip install 'sqla-fairpool[otel]'``).

::

    from sqla_fairpool.opentelemetry import instrument

    instrument(engine)

Names, units and attributes are those of the semantic conventions for database client
connection pools; what is counted by tag has the attribute ``sqla_fairpool.tag`` as
well: the first hundred tags by name, all others together as ``other``.

Durations are kept until the next export, at most the last 100,000 of each tag and
kind, and recorded then; nothing is called at a checkout. They are handed out once, so
a pool is instrumented for one provider.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any

from opentelemetry.metrics import (
    CallbackOptions,
    Histogram,
    Meter,
    MeterProvider,
    Observation,
    get_meter_provider,
)

from .pool.fair_queue_pool import metrics_source
from .pool.metrics import PoolMetrics, Source
from .scheduling.counters import Meter as TagMeter

__all__ = ["instrument"]

_PREFIX = "db.client.connection."
_POOL_NAME = _PREFIX + "pool.name"
_STATE = _PREFIX + "state"
_TAG = "sqla_fairpool.tag"

#: Durations kept between two exports; a minute's worth of a very busy tag.
_KEPT = 100_000

#: Our histogram of a tag's meter, and the convention's.
_DURATIONS = (
    ("wait", "wait_time", "The time it took to obtain a connection from the pool"),
    ("hold", "use_time", "The time between borrowing a connection and returning it"),
    ("create", "create_time", "The time it took to create a new connection"),
)


def instrument(engine: Any, meter_provider: MeterProvider | None = None) -> None:
    """Export the figures of an engine's pool, once.

    :param engine: an engine, an asyncio engine, or a pool.
    :param meter_provider: where to. Default: the global one.
    :raises sqlalchemy.exc.ArgumentError: if its pool is not a fair one.
    """
    source = metrics_source(engine)
    provider = meter_provider or get_meter_provider()
    _Instruments(source, provider.get_meter("sqla_fairpool"))


class _Instruments:
    """The instruments of one pool."""

    def __init__(self, source: Source, meter: Meter) -> None:
        self._source = source
        self._histograms = [
            (ours, meter.create_histogram(_PREFIX + name, "s", text))
            for ours, name, text in _DURATIONS
        ]
        # Checkouts by tag that had not to wait, as far as they are recorded.
        self._at_once: dict[str, int] = {}
        self._keep_durations()
        self._observe(meter)

    def _keep_durations(self) -> None:
        core = self._source.core()
        assert core is not None
        with core.lock.section():
            meters = core.scheduler.roster.meters
            meters.on_new.append(_keep)
            for tag, meter in meters.by_tag.items():
                _keep(tag, meter)
                self._at_once[tag] = meter.at_once

    def _observe(self, meter: Meter) -> None:
        gauges: list[tuple[str, str, str, Callable[[PoolMetrics], Observations]]] = [
            ("count", "{connection}", "Connections by state", _count),
            ("max", "{connection}", "Most open connections allowed", _max),
            (
                "idle.max",
                "{connection}",
                "Most idle open connections allowed",
                _idle_max,
            ),
            ("idle.min", "{connection}", "Fewest idle open connections", _idle_min),
            ("pending_requests", "{request}", "Waiting requests", _pending),
        ]
        for name, unit, text, read in gauges:
            meter.create_observable_up_down_counter(
                _PREFIX + name, [self._callback(read)], unit, text
            )
        meter.create_observable_counter(
            _PREFIX + "timeouts",
            [self._callback(_timeouts), self._record_durations],
            "{timeout}",
            "Connection timeouts",
        )

    def _callback(
        self, read: Callable[[PoolMetrics], Observations]
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> Iterable[Observation]:
            pool = self._source.read()
            if pool is None:
                return
            for number, attributes in read(pool):
                yield Observation(number, {_POOL_NAME: pool.name, **attributes})

        return observe

    def _record_durations(self, options: CallbackOptions) -> Iterable[Observation]:
        """Record what has happened since the last export."""
        core = self._source.core()
        if core is None:
            return ()
        taken: list[tuple[Histogram, str, Iterable[float]]] = []
        with core.lock.section():
            for tag, meter in core.scheduler.roster.meters.by_tag.items():
                more = meter.at_once - self._at_once.get(tag, 0)
                self._at_once[tag] = meter.at_once
                zeros = repeat(0.0, min(more, _KEPT))
                taken.append((self._histograms[0][1], tag, zeros))
                for ours, histogram in self._histograms:
                    durations = getattr(meter, ours)
                    if durations.raw:
                        taken.append((histogram, tag, durations.raw))
                        durations.raw = deque(maxlen=_KEPT)
        for histogram, tag, values in taken:
            attributes = {_POOL_NAME: self._source.name, _TAG: tag}
            for seconds in values:
                histogram.record(seconds, attributes)
        return ()


Observations = Iterator[tuple[int, dict[str, str]]]


def _keep(tag: str, meter: TagMeter) -> None:
    for ours, _, _ in _DURATIONS:
        getattr(meter, ours).raw = deque(maxlen=_KEPT)


def _count(pool: PoolMetrics) -> Observations:
    yield pool.idle, {_STATE: "idle"}
    for tag in pool.tags:
        yield tag.connections, {_STATE: "used", _TAG: tag.tag}


def _max(pool: PoolMetrics) -> Observations:
    yield pool.capacity, {}


def _idle_max(pool: PoolMetrics) -> Observations:
    yield pool.size, {}


def _idle_min(pool: PoolMetrics) -> Observations:
    yield pool.min_idle, {}


def _pending(pool: PoolMetrics) -> Observations:
    for tag in pool.tags:
        yield tag.waiting, {_TAG: tag.tag}


def _timeouts(pool: PoolMetrics) -> Observations:
    for tag in pool.tags:
        yield tag.timeouts, {_TAG: tag.tag}
