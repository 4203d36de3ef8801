"""Is a caller waiting for itself?

A checkout inside of another one can only be served if somebody else returns a
connection. It cannot when everybody who could waits likewise: that is a deadlock,
and lasts until the first of them has waited for his whole time-out.

Said the other way: a waiting caller *can go on* if a connection that would help it
is with somebody who does not wait, or who can go on. Who cannot is stuck; and since
others may only appear to be stuck (a connection that was handed to another thread
comes back without its first holder), :mod:`.reach` has the last word.
"""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Sequence

from . import _private
from .account import WAITING, Account
from .desk import Desk
from .inquiry import Scene, copy_scene
from .reach import held_by_others
from .scheduler import Scheduler
from .seats import Seat

__all__ = ["Guard"]

#: Time that goes by after a question to :mod:`.reach` was answered with "yes", in
#: its own length: at most a fiftieth of the time is spent asking.
_PAUSE = 50.0


class Guard:
    """Looks out for callers that wait for themselves."""

    def __init__(self, desk: Desk) -> None:
        self._desk = weakref.proxy(desk)
        self._references = desk.here.references
        # When another thread may be asked after again.
        self._next_question = -math.inf

    def suspects(self, seat: Seat) -> bool:
        """Tell if the caller of a waiting seat may have a connection already.

        False is certain. Whoever has one is its seat's `holder`, and that is a
        reference. Counting them takes no time, and nearly everybody who waits has
        nothing.
        """
        caller = seat.holder
        return (
            caller is not None
            and sys.getrefcount(caller) > self._references
            and self._desk.options.deadlock_guard
            and not _greenlets_are_threads()
        )

    def examine(self, seat: Seat, deadline: float) -> Scene | None:
        """Return how things are if a waiting seat waits for its own caller.

        :param deadline: until when it would wait.
        """
        desk = self._desk
        began = desk.clock()
        if began < self._next_question:
            return None
        with desk.section():
            stuck = _stuck_with(desk, seat, deadline)
            connections = [_private.handed_out(s) for s in desk.records_of(stuck)]
        if not stuck:
            return None
        callers = {s.holder for s in stuck if s.holder is not None}
        if held_by_others(connections, callers, desk.here.frames()):
            now = desk.clock()
            self._next_question = now + _PAUSE * (now - began)
            return None
        # Nobody may have them: dropped in a cycle, they wait for the collector.
        del connections
        gc.collect()
        with desk.section() as now:
            if not _stuck_with(desk, seat, deadline):
                return None  # somebody has given up, or something was collected
            return copy_scene(desk, seat, now)


def _greenlets_are_threads() -> bool:
    """Tell if what others do cannot be seen: greenlets' variables are nowhere."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")


def _stuck_with(desk: Desk, seat: Seat, deadline: float) -> Sequence[Seat]:
    """Return the seats for which a waiting seat waits in vain, if it is stuck.

    Caller is in a section.

    :param deadline: until when it waits.
    """
    scheduler = desk.scheduler
    if seat.state is not WAITING or scheduler.capacity != desk.options.capacity:
        return ()  # granted; or a slot is out of use for a moment
    out = desk.seats_out()
    helpful = _helpful(scheduler, seat, out)
    if not any(other.holder is seat.holder for other in out):
        return ()
    if _may_rise(scheduler, seat.account, deadline):
        return ()
    # One seat for each who waits: a thread or a task waits for one thing at a time.
    stuck = {s.holder: s for s in _waiting_seats(scheduler)}
    if any(other.holder not in stuck for other in helpful):
        return ()  # the common case, before anything that takes longer
    while True:
        able = [
            caller
            for caller, theirs in stuck.items()
            if any(s.holder not in stuck for s in _helpful(scheduler, theirs, out))
        ]
        if not able:
            break
        for caller in able:
            del stuck[caller]
    if seat.holder not in stuck:
        return ()
    return [other for other in out if other.holder in stuck]


def _helpful(scheduler: Scheduler, seat: Seat, out: Sequence[Seat]) -> Sequence[Seat]:
    """Return those of the seats that are out whose return would help a waiting one."""
    account = seat.account
    if account.in_use >= scheduler.ceiling(account):
        return [other for other in out if other.account is account]
    return out


def _waiting_seats(scheduler: Scheduler) -> list[Seat]:
    return [
        ticket
        for account in scheduler.waiting_accounts()
        for ticket in account.waiters or ()
        if isinstance(ticket, Seat) and ticket.state is WAITING
    ]


def _may_rise(scheduler: Scheduler, account: Account, deadline: float) -> bool:
    """Tell if the tag's ceiling may rise in time: others may fall idle."""
    roster = scheduler.roster
    if roster.active < 2 or account.in_use >= roster.max_limit:
        return False
    if scheduler.in_use >= scheduler.capacity:
        return False  # it would not help
    others = [a for a in roster.accounts.values() if a.active and a is not account]
    if any(other.waiters for other in others):
        return False  # stays active
    last = max((a.last_activity or -math.inf for a in others), default=-math.inf)
    return last + roster.idle_timeout <= deadline
