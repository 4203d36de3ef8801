"""The pool's figures for OpenTelemetry (``pip install 'sqla-fairpool[otel]'``).

::

    from sqla_fairpool.opentelemetry import instrument

    instrument(engine)

Names, units and attributes are those of the semantic conventions for database client
connection pools; what is counted by tag has the attribute ``sqla_fairpool.tag`` as
well: the first hundred tags by name, all others together as ``other``. A ledger's names
begin with ``sqla_fairpool.ledger``: the conventions have none for it.

Durations are kept until the next export, at most the last 100,000 of each tag and
kind, and recorded then; nothing is called at a checkout. They are handed out once, so
a pool is instrumented for one provider.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from opentelemetry.metrics import (
    CallbackOptions,
    Meter,
    MeterProvider,
    Observation,
    get_meter_provider,
)

from .pool.snapshot import Source, metrics_source
from .stats import PoolStats

__all__ = ["instrument"]

_PREFIX = "db.client.connection."
_POOL_NAME = _PREFIX + "pool.name"
_STATE = _PREFIX + "state"
_TAG = "sqla_fairpool.tag"
_LEDGER = "sqla_fairpool.ledger."

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
    meter = provider.get_meter("sqla_fairpool", _version())
    for create, figures in (
        (meter.create_observable_up_down_counter, _FIGURES),
        (meter.create_observable_counter, _COUNTERS),
    ):
        for first, rows in figures.items():
            for name, unit, text, read in rows:
                create(first + name, [_observe(source, read)], unit, text)
    meter.create_observable_counter(
        _PREFIX + "timeouts",
        [_observe(source, _tags("timeouts")), _record_durations(source, meter)],
        "{timeout}",
        "Connection timeouts",
    )


def _version() -> str | None:
    try:
        return version("sqla-fairpool")
    except PackageNotFoundError:  # a checkout on the path
        return None


#: Called for each export.
_Callback = Callable[[CallbackOptions], Iterable[Observation]]

#: From a pool to its numbers, each with attributes beside the pool's name.
_Numbers = Iterable[tuple[float | None, dict[str, str]]]
_Read = Callable[[PoolStats], _Numbers]


def _observe(source: Source, read: _Read) -> _Callback:
    def observe(options: CallbackOptions) -> Iterable[Observation]:
        pool = source.read()
        for number, attributes in () if pool is None else read(pool):
            if number is not None:  # it is known
                yield Observation(number, {_POOL_NAME: source.name, **attributes})

    return observe


def _record_durations(source: Source, meter: Meter) -> _Callback:
    """Return what records, in histograms, what has happened since the last export."""
    histograms = {
        kind: meter.create_histogram(_PREFIX + name, "s", text)
        for kind, name, text in _DURATIONS
    }
    handovers = meter.create_histogram(
        _LEDGER + "handover_time", "s", "The time until a slot of another pool came"
    )

    def record(options: CallbackOptions) -> Iterable[Observation]:
        for kind, tag, durations in source.take_durations():
            attributes = {_POOL_NAME: source.name, _TAG: tag}
            for seconds in durations:
                histograms[kind].record(seconds, attributes)
        for seconds in source.take_handovers():
            handovers.record(seconds, {_POOL_NAME: source.name})
        return ()

    return record


def _pool(attribute: str) -> _Read:
    return lambda pool: [(getattr(pool, attribute), {})]


def _tags(attribute: str) -> _Read:
    return lambda pool: [
        (getattr(tag, attribute), {_TAG: tag.name}) for tag in pool.tags
    ]


def _paused(pool: PoolStats) -> _Numbers:
    return [(float(pool.paused_for is not None), {})]


def _paused_tags(pool: PoolStats) -> _Numbers:
    known = {tag.name for tag in pool.tags}.union(pool.paused_tags)
    return [(float(tag in pool.paused_tags), {_TAG: tag}) for tag in sorted(known)]


def _count(pool: PoolStats) -> _Numbers:
    yield pool.idle, {_STATE: "idle"}
    for tag in pool.tags:
        yield tag.connections, {_STATE: "used", _TAG: tag.name}


def _would_wait(pool: PoolStats) -> _Numbers:
    for tag in pool.tags:
        waits = None if tag.would_wait is None else tag.would_wait.count
        yield waits, {_TAG: tag.name}


def _ledger(attribute: str) -> _Read:
    return lambda pool: [(getattr(pool.ledger, attribute, None), {})]


def _slots(pool: PoolStats) -> _Numbers:
    slots = {} if pool.ledger is None else pool.ledger.slots
    return [(count, {_LEDGER + "state": state}) for state, count in slots.items()]


#: By the beginning of their names: the rest, unit, help, and how the numbers are read.
_Figures = Mapping[str, Iterable[tuple[str, str, str, _Read]]]

_FIGURES: _Figures = {
    _PREFIX: (
        ("count", "{connection}", "Connections by state", _count),
        ("max", "{connection}", "Most open connections allowed", _pool("capacity")),
        ("idle.max", "{connection}", "Most idle connections allowed", _pool("size")),
        ("idle.min", "{connection}", "Fewest idle connections", _pool("min_idle")),
        ("pending_requests", "{request}", "Waiting requests", _tags("waiting")),
    ),
    _LEDGER: (
        ("slots", "{slot}", "Slots of the ledger by state", _slots),
        ("members", "{pool}", "Pools that share it", _ledger("members")),
    ),
    # The conventions have no names for these.
    "sqla_fairpool.": (("paused", "1", "1 while no checkout is served", _paused),),
    _TAG + ".": (
        ("paused", "1", "1 while no checkout of the tag is served", _paused_tags),
        ("weight", "1", "Relative entitlement of a tag", _tags("weight")),
        ("max", "{connection}", "A maximum of a tag's own", _tags("max")),
        ("reserved", "{connection}", "Kept for a tag alone", _tags("reserved")),
        ("usage", "s", "Connection-seconds of a tag, decayed", _tags("usage")),
        ("would_wait", "{request}", "Would have waited, in a dry run", _would_wait),
        ("would_refuse", "{request}", "Would have been refused", _tags("would_refuse")),
    ),
}

_DONE, _AWAY = _ledger("transactions"), _ledger("away_time")

#: Likewise, of what only rises.
_COUNTERS: _Figures = {
    _LEDGER: (
        ("transactions", "{transaction}", "Transactions in the ledger's store", _DONE),
        ("away_time", "s", "For how long the ledger could not be reached", _AWAY),
    )
}
