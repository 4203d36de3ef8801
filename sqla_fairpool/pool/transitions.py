"""What changes in a section of the pool's lock.

Rules of this file:

* Every method is called in a section, and leaves the scheduler, the records and the
  slots in step with each other. Wake-ups and closing are left for after the lock.
* A section takes an idle record before it decides (see :mod:`.connections`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, cast

from ..diagnosis import TaskHere, ThreadHere
from ..diagnosis.capture import Others, Out
from ..diagnosis.event_log import EventLog, LeakWatch
from ..options import PoolOptions
from ..scheduling import policy
from ..scheduling.scheduler import Scheduler
from ..scheduling.ticket import GRANTED, Ticket
from . import sqlalchemy_private
from .checkout import Checkout, Record
from .connections import Connections, Slots
from .lock import PoolLock
from .physical import PhysicalConnection
from .waiters import Waiter
from .warm import WarmCache


class Transitions:
    """The parts of a pool that change together."""

    def __init__(
        self,
        options: PoolOptions,
        here: ThreadHere | TaskHere,
        lock: PoolLock,
        scheduler: Scheduler,
        connections: Connections,
        slots: Slots,
    ) -> None:
        #: Those in force.
        self.options = options
        #: Tells which thread or task is asking.
        self.here = here
        self.lock = lock
        #: Calls a function in a section, with the time.
        self.run = lock.run
        self.scheduler = scheduler
        self.connections = connections
        self.slots = slots
        self.warm = WarmCache(
            lock, scheduler, self._give_up_warm, self._charge_borrowed
        )
        self.event_log = EventLog(lock.deferred)
        self.leaks: LeakWatch | None = None
        #: The waiting checkout whose caller wakes up for what is due.
        self.watcher: Checkout | None = None
        #: Those that wait until nothing is out, see :mod:`.pausing`.
        self.drainers: list[Waiter] = []
        scheduler.tags.on_change = (
            self.event_log.changed
            if slots.sees_all_callers
            else self.event_log.will_change
        )

    # -- granting --------------------------------------------------------------------

    def deliver(self, granted: Sequence[Ticket], record: Record | None = None) -> None:
        """Give the granted this record, then idle ones, then none: those open one."""
        for checkout in cast(Sequence[Checkout], granted):
            if record is None:
                record = self.connections.pop()
            self.grant(checkout, record)
            record = None
            if checkout is self.watcher:
                self.pass_the_watch()
            if checkout.waiter is not None:  # else: interrupted as it joined the line
                self.lock.wake_ups.append(checkout.waiter.wake)
            checkout.waiter = None  # the last thing: now its caller may look

    def grant(self, checkout: Checkout, record: Record | None) -> None:
        """Complete a checkout that was granted, or moved to another tag."""
        checkout.may_keep = (
            # Without overflow there is a place for every record that comes back.
            self.options.max_overflow == 0
            and not self.slots.pressed
            and self.options.enforce  # a dry run hears of every checkout
        )
        checkout.reported = checkout.borrowed = False
        if record is not None:
            record.fair.checkout = checkout
            checkout.record = record

    def move(self, checkout: Checkout, tag: str, now: float) -> bool:
        """Charge a checkout to another tag, if that one is next; tell if it was."""
        granted = self.scheduler.move(checkout, tag, now)
        if granted is None:
            return False
        self.grant(checkout, None)
        self.deliver(granted)
        return True

    def leave_line(self, checkout: Checkout) -> None:
        """Note that a waiting checkout has left its line without a slot."""
        if checkout is self.watcher:
            self.pass_the_watch()

    def pass_the_watch(self) -> None:
        """Let another caller wake up for what is due: the newest will wait longest."""
        newest = cast("Checkout | None", self.scheduler.lines.newest())
        self.watcher = newest
        if newest is not None and newest.waiter is not None:
            self.lock.wake_ups.append(newest.waiter.wake)

    def wake_all(self, now: float) -> None:
        """Wake all callers that wait, to look for themselves."""
        for checkout in self.checkouts_waiting():
            if checkout.waiter is not None:
                self.lock.wake_ups.append(checkout.waiter.wake)

    def checkouts_waiting(self) -> list[Checkout]:
        """Return the checkouts that wait for a slot."""
        return [
            cast(Checkout, ticket)
            for tag_state in self.scheduler.lines
            for ticket in tag_state.waiters or ()
        ]

    # -- what a diagnosis asks for -----------------------------------------------------

    @property
    def logger(self) -> Any:
        return self.event_log.logger

    def count_idle(self) -> tuple[int, int]:
        """Return the records in the pool, and how many of them are open."""
        return len(self.connections.idle), self.connections.count_open()

    def allotment(self) -> tuple[int | None, str | None, Callable[[], Others]]:
        """Return what a ledger allots, and why it is no more; None without one."""
        return self.slots.describe()

    def checkouts_out(self) -> list[Out]:
        """Return what is out or being opened, the first time or again."""
        opening = [c for c in self.connections.opening if c.state is GRANTED]
        found = {checkout: Out.of(checkout, opening=True) for checkout in opening}
        for record in self.connections.all:
            checkout = record.fair.checkout
            if checkout.state is GRANTED:
                is_opening = checkout in found
                found[checkout] = Out.of(
                    checkout,
                    opening=is_opening or record.dbapi_connection is None,
                    unclaimed=not is_opening and sqlalchemy_private.is_dropped(record),
                )
        return list(found.values())

    # -- coming back -----------------------------------------------------------------

    def _give_up_warm(self, record: Record, now: float) -> None:
        """Release the slot of a record that was kept warm."""
        checkout = record.fair.checkout
        checkout.warm = False
        granted = self.scheduler.vacate(checkout, now)
        if granted:
            self.deliver(granted, record)
        else:
            self.connections.idle.append(record)
            self.drain(now)

    def _charge_borrowed(self, checkout: Checkout) -> None:
        """Charge what its caller has borrowed to the default tag, from its start on."""
        self.move(checkout, self.options.default_tag, checkout.since)

    def take_back(
        self, checkout: Checkout, record: Record | None, keep: bool, now: float
    ) -> None:
        """Release a slot; hand the record on, keep it or have it closed."""
        scheduler, connections = self.scheduler, self.connections
        if (
            checkout.state is not GRANTED
            or checkout.warm
            or not scheduler.knows(checkout)
        ):
            return  # back already, or checked out before a fork
        if checkout.reported and self.leaks is not None:
            self.lock.deferred.append(self.leaks.returned(checkout, now))
        idle = len(connections.idle)
        full = (
            idle >= self.options.pool_size
            or scheduler.in_use + idle > scheduler.capacity
        )
        is_open = False
        if record is not None:
            is_open = record.dbapi_connection is not None
            keep = keep and not record.fair.doomed
            if is_open and (not keep or (full and not scheduler.wanted(checkout))):
                record.fair.close_reason = "overflow" if keep else "disposed"
                # Its slot is free when it is closed, not before.
                self.lock.deferred.append(partial(self._close_and_release, record))
                return
        if not is_open:
            self.part_with(record, now)
            keep = keep and self.slots.keeps_hollow_records
        granted = scheduler.release(checkout, now)
        is_idle = False
        if granted:
            self.deliver(granted, record if keep else None)
        elif record is not None and keep and not full:
            record.fair.idle_since = now
            connections.idle.append(record)
            is_idle = True
        self.slots.returned(idle=is_idle)
        self._wake_drainers()

    def _wake_drainers(self) -> None:
        if self.drainers:
            self.lock.wake_ups.extend(waiter.wake for waiter in self.drainers)

    def _close_and_release(self, record: Record) -> None:
        """Close a record, and then take its slot back. Called after the lock."""
        try:
            record.close()  # logs what goes wrong, and raises interrupts only
        finally:
            self.lock.run(self.take_back, record.fair.checkout, None, False)

    def part_with(self, record: Record | None, now: float) -> None:
        """Before a slot is released whose connection has not come back with it.

        What is left of it at the server has to be paid for from now on.
        """
        slots = self.slots
        if record is not None:
            record.fair.physical.opening = False
            slots.detached(record.fair.physical)
        else:
            slots.existing.end_abandoned()
        if slots.frozen:
            slots.allotted = min(slots.allotted, slots.there() - 1)
        self.deliver(self.scheduler.set_capacity(slots.usable(1), now))

    # -- how many there may be -------------------------------------------------------

    def recount(self, now: float) -> None:
        """Let as many slots be granted as there may be connections."""
        slots = self.slots
        if slots.frozen:
            slots.allotted = min(slots.allotted, slots.there())
        self.deliver(self.scheduler.set_capacity(slots.usable(), now))
        self._wake_drainers()

    def drain(self, now: float) -> None:
        """Have the oldest idle records closed if a limit has fallen below them."""
        idle = self.connections.idle
        while (
            len(idle) > self.options.pool_size
            or self.scheduler.in_use + len(idle) > self.slots.allotted
        ):
            oldest = next(iter(idle), None)
            if oldest is None:
                return  # the rest is out
            self.retire(oldest, now, "resized")

    def retire(self, record: Record, now: float, reason: str) -> None:
        """Have an idle record closed. Its slot is out of use until that is over."""
        if self.connections.remove(record):
            record.fair.close_reason = reason
            self.lock.deferred.append(record.close)
            self.recount(now)

    # -- a ledger's ------------------------------------------------------------------

    def allot(
        self, slots: int, ceilings: Mapping[str, int], other: int, *more: Any
    ) -> None:
        """Set how many connections there may be, and what each tag may have.

        :param more: of a :meth:`.Scheduler.impose` what is left; the time at last.
        """
        *rest, now = more
        self.slots.allotted = slots
        self.slots.frozen = False
        self.slots.has_surplus = self.slots.there() > slots
        if self.slots.has_surplus:
            self.connections.release_soon(now)
        usable = self.slots.usable()
        self.deliver(self.scheduler.impose(usable, ceilings, other, now, *rest))
        self.drain(now)

    @property
    def awaits_the_ledger(self) -> bool:
        """There may be something to be logged, when the ledger was read."""
        log = self.event_log
        return log.has_changes or (self.scheduler.waiting > 0 and not log.exhausted)

    def read(self, others: Others, now: float) -> None:
        """Log what has changed, with what the ledger tells of other processes."""
        log, options, scheduler = self.event_log, self.options, self.scheduler
        tag_states = scheduler.tag_states.values()
        active = others.active_tags.union(a.tag for a in tag_states if a.active)
        limits = options.soft_limit, options.max_limit
        log.change(len(active), policy.ceiling(max(len(active) - 1, 0), *limits))
        waits = next((a.tag for a in tag_states if a.waiting), None)
        is_full = scheduler.in_use + others.number >= options.capacity
        if waits is not None and is_full and not log.exhausted:
            holders = [(a.tag, a.in_use) for a in tag_states if a.in_use]
            log.begin(waits, now, options.capacity, holders, others.holders)

    def freeze(self, now: float) -> None:
        """Let those connections be used that there are, until the next `allot`."""
        self.slots.frozen = True
        self.recount(now)

    def press(self, pressed: bool, now: float) -> None:
        """Have the ledger hear when a connection falls idle, or not any more."""
        self.slots.pressed = pressed
        if pressed:
            self.connections.release_soon(now)

    def bury(self, lost: Collection[PhysicalConnection], now: float) -> None:
        """Forget connections whose slots are in the ledger's quarantine now."""
        for physical in lost:
            if self.slots.existing.release(physical):
                self.slots.allotted = max(self.slots.allotted - 1, 0)
        self.recount(now)
