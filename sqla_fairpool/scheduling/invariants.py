"""The promises of :mod:`.scheduler`, as a check. For tests and simulations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from .account import GRANTED, WAITING, Ticket
from .scheduler import Scheduler

__all__ = ["check_valid"]


def check_valid(
    scheduler: Scheduler, granted: Collection[Ticket] | None = None
) -> None:
    """Assert the invariants stated at the head of :mod:`.scheduler`. O(everything).

    :param granted: all granted tickets, if the caller knows them.
    """
    _check_tags(scheduler)
    ceiling = scheduler.ceiling
    accounts = list(scheduler.accounts.values())
    lines = [a for a in accounts if a.waiters]
    below = [a for a in lines if a.in_use < ceiling(a)]
    # 1, 2
    assert scheduler.in_use == sum(a.in_use for a in accounts)
    assert all(a.in_use >= 0 for a in accounts)
    assert scheduler.in_use <= max(scheduler.capacity, scheduler.drains_from)
    # 3
    full = scheduler.in_use >= scheduler.capacity
    assert full or not below, f"{below} wait for nothing"
    # 4
    assert scheduler.waiting == sum(a.waiting for a in accounts)
    assert set(scheduler.lines) == set(lines)
    for account in lines:
        assert account.waiters
        numbers = [ticket.number for ticket in account.waiters]
        assert numbers == sorted(numbers)
        assert all(t.state is WAITING for t in account.waiters)
        assert all(t.account is account for t in account.waiters)
    # 5
    assert scheduler.lines.next() is min(below, key=scheduler.lines.rank, default=None)
    # 6
    if granted is not None:
        assert all(ticket.state is GRANTED for ticket in granted)
        held = Counter(ticket.account for ticket in granted)
        assert held == Counter({a: a.in_use for a in accounts if a.in_use})


def _check_tags(scheduler: Scheduler) -> None:
    """Assert what the scheduler builds on."""
    roster = scheduler.roster
    accounts = roster.accounts.values()
    assert roster.active == sum(a.active for a in accounts)
    assert all(a.active for a in accounts if a.waiters and not a.silent)
    assert all(roster.is_reviewed(a) for a in accounts if a.active)
    assert all(a.prompt == (a.active and not a.silent) for a in accounts)
    common = roster.common_ceiling
    if roster.imposed is None:
        assert all(roster.ceiling(a) == common for a in accounts if a.active)
    else:
        assert all(roster.ceiling(a) >= common for a in accounts)
