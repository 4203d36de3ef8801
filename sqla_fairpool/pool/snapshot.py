"""From the pool's live state to the frozen snapshot of :mod:`.stats`."""

from __future__ import annotations

from operator import attrgetter, itemgetter
from typing import Any

from ..scheduling import policy
from ..scheduling.account import Account
from ..stats import PoolStats, Summary, TagStats
from .core import PoolCore

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


def snapshot(core: PoolCore) -> PoolStats:
    """Copy the counters in one hold of the lock; compute the rest after it."""
    options = core.options
    with core.lock.section() as now:
        scheduler = core.scheduler
        in_use, waiting = scheduler.in_use, scheduler.waiting
        records, idle = len(core.connections.idle), core.connections.count_open()
        active = scheduler.roster.active
        copies = [
            (scheduler.ceiling(account), _waiting_since(account), *_figures(account))
            for account in scheduler.roster.accounts.values()
        ]
        # What the checkouts that are out have counted and not yet handed in.
        pending = [
            (
                checkout.account.tag,
                checkout.since,
                checkout.again,
                checkout.held,
                checkout.held_max,
            )
            for checkout in core.connections.granted()
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
        strategy=policy.strategy(active, options.soft_limit, options.max_limit),
        tags=_rows(copies, pending, options.capacity, now),
    )


def _waiting_since(account: Account) -> float | None:
    """Return since when the first in a tag's line waits."""
    return next(iter(account.waiters)).since if account.waiters else None


def _rows(
    copies: list[tuple[Any, ...]],
    pending: list[tuple[str, float, int, float, float]],
    capacity: int,
    now: float,
) -> tuple[TagStats, ...]:
    copies.sort(key=itemgetter(2))
    # An idle tag does not count, whatever it still holds.
    demands = [min(copy[4] + copy[5], copy[0]) if copy[3] else 0 for copy in copies]
    shares = policy.standing_shares([c[4] for c in copies], demands, capacity)
    more: dict[str, list[tuple[float, int, float, float]]] = {}
    for tag, since, again, held, held_max in pending:
        more.setdefault(tag, []).append((since, again, held, held_max))
    rows = (
        _row(copy, share, more.get(copy[2], []), now)
        for copy, share in zip(copies, shares, strict=True)
    )
    return tuple(row for row in rows if row)


def _row(
    copy: tuple[Any, ...],
    share: int,
    more: list[tuple[float, int, float, float]],
    now: float,
) -> TagStats | None:
    limit, line_since, tag, active, in_use, waiting, last, checkouts, *rest = copy
    timeouts, wait_total, wait_max, hold_total, hold_max = rest
    if not (active or in_use or waiting or checkouts or timeouts):
        return None  # the default tag, when everybody said later who he is
    for _, again, held, held_max in more:
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
        idle_for=_seconds(last, now),
        waiting_for=_seconds(line_since, now),
        held_for=_seconds(min((since for since, *_ in more), default=None), now),
        checkouts=checkouts,
        timeouts=timeouts,
        wait_time=Summary(checkouts, wait_total, wait_max),
        hold_time=Summary(checkouts - in_use, hold_total, hold_max),
    )


def _seconds(since: float | None, now: float) -> float | None:
    return None if since is None else max(now - since, 0.0)
