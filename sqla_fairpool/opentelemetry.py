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

from collections.abc import Callable, Iterable
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
_OWN_PREFIX = "sqla_fairpool.tag."
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
        (meter.create_observable_up_down_counter, _OWN_FIGURES),
        (meter.create_observable_counter, _COUNTERS),
    ):
        for name, unit, text, read in figures:
            create(name, [_observe(source, read)], unit, text)
    meter.create_observable_counter(
        _PREFIX + "timeouts",
        [_observe(source, _by_tag("timeouts")), _record_durations(source, meter)],
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


def _of_pool(attribute: str) -> _Read:
    return lambda pool: [(getattr(pool, attribute), {})]


def _by_tag(attribute: str) -> _Read:
    def read(pool: PoolStats) -> Iterable[tuple[Any, dict[str, str]]]:
        found = [(getattr(tag, attribute), {_TAG: tag.name}) for tag in pool.tags]
        return [one for one in found if one[0] is not None]

    return read


def _paused(pool: PoolStats) -> Iterable[tuple[float, dict[str, str]]]:
    return [(float(pool.paused_for is not None), {})]


def _paused_tags(pool: PoolStats) -> Iterable[tuple[float, dict[str, str]]]:
    known = {tag.name for tag in pool.tags}.union(pool.paused_tags)
    return [(float(tag in pool.paused_tags), {_TAG: tag}) for tag in sorted(known)]


def _count(pool: PoolStats) -> Iterable[tuple[float, dict[str, str]]]:
    yield pool.idle, {_STATE: "idle"}
    for tag in pool.tags:
        yield tag.connections, {_STATE: "used", _TAG: tag.name}


def _would_wait(pool: PoolStats) -> Iterable[tuple[float, dict[str, str]]]:
    for tag in pool.tags:
        if tag.would_wait is not None:
            yield tag.would_wait.count, {_TAG: tag.name}


def _of_ledger(attribute: str) -> _Read:
    def read(pool: PoolStats) -> Iterable[tuple[float, dict[str, str]]]:
        number = getattr(pool.ledger, attribute, None)
        return () if number is None else [(number, {})]

    return read


def _slots(pool: PoolStats) -> Iterable[tuple[float, dict[str, str]]]:
    slots = {} if pool.ledger is None else pool.ledger.slots
    return [(count, {_LEDGER + "state": state}) for state, count in slots.items()]


#: Name, unit, help, and how the numbers are read.
_Figures = tuple[tuple[str, str, str, _Read], ...]

_FIGURES: _Figures = (
    (_PREFIX + "count", "{connection}", "Connections by state", _count),
    (
        _PREFIX + "max",
        "{connection}",
        "Most open connections allowed",
        _of_pool("capacity"),
    ),
    (
        _PREFIX + "idle.max",
        "{connection}",
        "Most idle connections allowed",
        _of_pool("size"),
    ),
    (
        _PREFIX + "idle.min",
        "{connection}",
        "Fewest idle connections",
        _of_pool("min_idle"),
    ),
    (
        _PREFIX + "pending_requests",
        "{request}",
        "Waiting requests",
        _by_tag("waiting"),
    ),
    (_LEDGER + "slots", "{slot}", "Slots of the ledger by state", _slots),
    (_LEDGER + "members", "{pool}", "Pools that share it", _of_ledger("members")),
)

#: Likewise, of what only rises.
_COUNTERS: _Figures = (
    (
        _LEDGER + "transactions",
        "{transaction}",
        "Transactions in the ledger's store",
        _of_ledger("transactions"),
    ),
    (
        _LEDGER + "away_time",
        "s",
        "For how long the ledger could not be reached",
        _of_ledger("away_time"),
    ),
)

#: Likewise, of what the conventions have no name for.
_OWN_FIGURES: _Figures = (
    ("sqla_fairpool.paused", "1", "1 while no checkout is served", _paused),
    (
        _OWN_PREFIX + "paused",
        "1",
        "1 while no checkout of the tag is served",
        _paused_tags,
    ),
    (_OWN_PREFIX + "weight", "1", "Relative entitlement of a tag", _by_tag("weight")),
    (
        _OWN_PREFIX + "max",
        "{connection}",
        "A maximum of a tag's own",
        _by_tag("max"),
    ),
    (
        _OWN_PREFIX + "reserved",
        "{connection}",
        "Kept for a tag alone",
        _by_tag("reserved"),
    ),
    (
        _OWN_PREFIX + "usage",
        "s",
        "Connection-seconds of a tag, decayed",
        _by_tag("usage"),
    ),
    (
        _OWN_PREFIX + "would_wait",
        "{request}",
        "Would have waited, in a dry run",
        _would_wait,
    ),
    (
        _OWN_PREFIX + "would_refuse",
        "{request}",
        "Would have been refused",
        _by_tag("would_refuse"),
    ),
)
