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

from collections.abc import Callable, Iterable
from typing import Any

from opentelemetry.metrics import (
    CallbackOptions,
    Meter,
    MeterProvider,
    Observation,
    get_meter_provider,
)

from .pool.fair_queue_pool import metrics_source
from .pool.snapshot import Source
from .stats import PoolStats

__all__ = ["instrument"]

_PREFIX = "db.client.connection."
_OWN_PREFIX = "sqla_fairpool.tag."
_POOL_NAME = _PREFIX + "pool.name"
_STATE = _PREFIX + "state"
_TAG = "sqla_fairpool.tag"

#: What a :class:`.Source` calls durations, the convention's name, and its help.
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
    source.keep_durations()
    meter = provider.get_meter("sqla_fairpool")
    for name, unit, text, read in _FIGURES:
        meter.create_observable_up_down_counter(
            _PREFIX + name, [_observe(source, read)], unit, text
        )
    for name, unit, text, read in _OWN_FIGURES:
        meter.create_observable_up_down_counter(
            _OWN_PREFIX + name, [_observe(source, read)], unit, text
        )
    meter.create_observable_counter(
        _PREFIX + "timeouts",
        [_observe(source, _by_tag("timeouts")), _record_durations(source, meter)],
        "{timeout}",
        "Connection timeouts",
    )


#: Called for each export.
_Callback = Callable[[CallbackOptions], Iterable[Observation]]

#: From a pool to its numbers, each with attributes beside the pool's name.
_Read = Callable[[PoolStats], Iterable[tuple[float, dict[str, str]]]]


def _observe(source: Source, read: _Read) -> _Callback:
    def observe(options: CallbackOptions) -> Iterable[Observation]:
        pool = source.read()
        for number, attributes in () if pool is None else read(pool):
            yield Observation(number, {_POOL_NAME: source.name, **attributes})

    return observe


def _record_durations(source: Source, meter: Meter) -> _Callback:
    """Return what records, in histograms, what has happened since the last export."""
    histograms = {
        kind: meter.create_histogram(_PREFIX + name, "s", text)
        for kind, name, text in _DURATIONS
    }

    def record(options: CallbackOptions) -> Iterable[Observation]:
        for kind, tag, durations in source.take_durations():
            attributes = {_POOL_NAME: source.name, _TAG: tag}
            for seconds in durations:
                histograms[kind].record(seconds, attributes)
        return ()

    return record


def _of_pool(attribute: str) -> _Read:
    return lambda pool: [(getattr(pool, attribute), {})]


def _by_tag(attribute: str) -> _Read:
    return lambda pool: [
        (getattr(tag, attribute), {_TAG: tag.name}) for tag in pool.tags
    ]


def _count(pool: PoolStats) -> Iterable[tuple[float, dict[str, str]]]:
    yield pool.idle, {_STATE: "idle"}
    for tag in pool.tags:
        yield tag.connections, {_STATE: "used", _TAG: tag.name}


def _would_wait(pool: PoolStats) -> Iterable[tuple[float, dict[str, str]]]:
    for tag in pool.tags:
        if tag.would_wait is not None:
            yield tag.would_wait.count, {_TAG: tag.name}


def _would_refuse(pool: PoolStats) -> Iterable[tuple[float, dict[str, str]]]:
    for tag in pool.tags:
        if tag.would_refuse is not None:
            yield tag.would_refuse, {_TAG: tag.name}


#: Name, unit, help, and how the numbers are read.
_FIGURES: tuple[tuple[str, str, str, _Read], ...] = (
    ("count", "{connection}", "Connections by state", _count),
    ("max", "{connection}", "Most open connections allowed", _of_pool("capacity")),
    ("idle.max", "{connection}", "Most idle connections allowed", _of_pool("size")),
    ("idle.min", "{connection}", "Fewest idle connections", _of_pool("min_idle")),
    ("pending_requests", "{request}", "Waiting requests", _by_tag("waiting")),
)

#: Likewise, of what the conventions have no name for.
_OWN_FIGURES: tuple[tuple[str, str, str, _Read], ...] = (
    ("weight", "1", "Relative entitlement of a tag", _by_tag("weight")),
    ("reserved", "{connection}", "Kept for a tag alone", _by_tag("reserved")),
    ("usage", "s", "Connection-seconds of a tag, decayed", _by_tag("usage")),
    ("would_wait", "{request}", "Would have waited, in a dry run", _would_wait),
    ("would_refuse", "{request}", "Would have been refused", _would_refuse),
)
