"""From the pool's live state to the frozen snapshot of :mod:`.stats`."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from . import policy
from .exchange import Exchange
from .options import PoolOptions
from .stats import PoolStats, Summary, TagStats

__all__ = ["snapshot"]

# Read in one call per account, to hold the lock as short as possible.
_figures = attrgetter(
    "tag",
    "active",
    "in_use",
    "waiting",
    "last_activity",
    "checkouts",
    "timeouts",
    "wait_total",
    "wait_max",
    "hold_total",
    "hold_max",
)


def snapshot(exchange: Exchange) -> PoolStats:
    """Copy the counters in one hold of the lock; compute the rest after it."""
    options = exchange.options
    with exchange.section() as now:
        scheduler = exchange.scheduler
        in_use, waiting = scheduler.in_use, scheduler.waiting
        records, idle = exchange.count_idle()
        active = scheduler.roster.active
        copies = [
            (scheduler.ceiling(account), *_figures(account))
            for account in scheduler.roster.accounts.values()
        ]
        # What the seats that are out have counted and not yet handed in.
        pending = [
            (seat.account.tag, seat.again, seat.held, seat.held_max)
            for seat in exchange.granted_seats()
        ]
    return PoolStats(
        size=options.pool_size,
        capacity=options.capacity,
        checked_out=in_use,
        available=options.capacity - in_use,
        overflow=max(in_use + records - options.pool_size, 0),
        idle=idle,
        waiting=waiting,
        utilization=in_use / options.capacity,
        strategy=_strategy(active, options),
        tags=_rows(copies, pending, options.capacity, now),
    )


def _rows(
    copies: list[tuple[Any, ...]],
    pending: list[tuple[str, int, float, float]],
    capacity: int,
    now: float,
) -> tuple[TagStats, ...]:
    # The remainder of the division is shown with those who hold it.
    copies.sort(key=lambda copy: (-copy[3], copy[1]))
    # An idle tag does not count, whatever it still holds.
    demands = [min(copy[3] + copy[4], copy[0]) if copy[2] else 0 for copy in copies]
    shares = policy.fair_shares(demands, capacity)
    more: dict[str, list[tuple[int, float, float]]] = {}
    for tag, again, held, held_max in pending:
        more.setdefault(tag, []).append((again, held, held_max))
    rows = (
        _row(copy, share, more.get(copy[1], []), now)
        for copy, share in zip(copies, shares, strict=True)
    )
    return tuple(sorted((row for row in rows if row), key=lambda row: row.name))


def _row(
    copy: tuple[Any, ...],
    share: int,
    more: list[tuple[int, float, float]],
    now: float,
) -> TagStats | None:
    limit, tag, active, in_use, waiting, last, checkouts, timeouts, *times = copy
    wait_total, wait_max, hold_total, hold_max = times
    if not (active or in_use or waiting or checkouts or timeouts):
        return None  # the default tag, when everybody said later who he is
    for again, held, held_max in more:
        checkouts += again
        hold_total += held
        hold_max = max(hold_max, held_max)
    return TagStats(
        name=tag,
        active=active,
        connections=in_use,
        limit=limit,
        fair_share=share,
        waiting=waiting,
        idle_for=None if last is None else max(now - last, 0.0),
        checkouts=checkouts,
        timeouts=timeouts,
        wait_time=Summary(checkouts, wait_total, wait_max),
        hold_time=Summary(checkouts - in_use, hold_total, hold_max),
    )


def _strategy(active: int, options: PoolOptions) -> str:
    if active == 0:
        return f"nobody active: the first may have {options.max_limit}"
    if active == 1:
        return f"1 active: at most {options.max_limit}"
    return f"{active} active: equal shares, at most {options.soft_limit} each"
