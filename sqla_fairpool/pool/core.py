"""The checkout path: how a caller gets a connection and gives it back.

Rules of this file:

* A checkout and a checkin of what is kept warm (see :mod:`.warm`) need no lock. All
  else is done in a section of it (see :mod:`.transitions`), and opening after it.
* A checkout is bound to a variable of its caller before its state changes, and is given
  up where an exception is caught, KeyboardInterrupt included. One that is lost all
  the same (dropped between our return and the next line of SQLAlchemy) gives its slot
  back when it is deallocated.
"""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from ..options import PoolOptions
from ..scheduling.dry_run import DryRunScheduler
from ..scheduling.scheduler import Scheduler
from ..scheduling.ticket import FREE, LineFull
from . import sqlalchemy_private
from .checkout import Checkout, Opener, Record
from .connections import Connections, LedgerSlots, Member, Slots
from .housekeeping import Housekeeping
from .lock import PoolLock
from .nested import NestedCheckouts
from .opening import Opening
from .pausing import Pausing
from .physical import PhysicalConnections
from .transitions import Transitions
from .waiters import Waiter
from .waiting import Waiting

_numbers = itertools.count(1)

#: Why connections are closed.
_CLOSURES = (
    *("detached", "disposed", "invalidated"),
    *("overflow", "recycled", "resized", "unused"),
)

#: Long checkouts that are noted before they are booked, which takes the lock: so many
#: that it happens rarely, so few that the list is no burden.
_LONG_HOLDS_KEPT = 256


class PoolCore:
    """What a pool and its successors (``recreate()``) have in common.

    :param waiter_class: how callers sleep.
    :param use_lifo: hand out the record that came back last, not first.
    :param member: the pool's side of a ledger, None without one.
    """

    def __init__(
        self,
        options: PoolOptions,
        waiter_class: type[Waiter],
        use_lifo: bool,
        clock: Callable[[], float],
        member: Member | None,
    ) -> None:
        #: Tells it from others in this process.
        self.number = next(_numbers)
        self._waiter_class = waiter_class
        self._use_lifo = use_lifo
        #: Its side of a ledger, if it has one.
        self.member = member
        self.clock = clock
        #: Tags that others are to see before any caller has asked under them.
        self.announced: dict[str, None] = {}
        self.logger: Any = logging.getLogger(__name__)
        self.here = waiter_class.here
        # With a callback: only such a reference is sure to be cleared before the
        # finalisers of a cycle run (CPython changed this in 3.15).
        self.alive = weakref.ref(self, lambda ref: None)
        self.lock = PoolLock(clock, waiter_class.can_wait)
        self._begin(options)
        _living.add(self)

    def _begin(self, options: PoolOptions) -> None:
        """Make the parts, at first and in the child of a fork."""
        self.scheduler = (Scheduler if options.enforce else DryRunScheduler)(
            **options.rules(), silent_tag=options.default_tag, now=self.clock()
        )
        self.connections = Connections(self._use_lifo)
        existing = PhysicalConnections(
            weakref.WeakMethod(self.connection_ended), self._waiter_class.may_block
        )
        shared = self.scheduler, self.connections, existing
        if self.member is None:
            self.slots = Slots(options.capacity, *shared)
        else:
            self.slots = LedgerSlots(self.member, self.lock, *shared)
            self.scheduler.impose(0, {}, 0, self.clock())
        self.state = Transitions(
            options, self.here, self.lock, self.scheduler, self.connections, self.slots
        )
        self.warm = self.state.warm
        #: The tag of those that may borrow. A server that knows the tag of a session
        #: would not be told that it has changed.
        self._may_borrow = None if options.server_tag else options.default_tag
        self.nested = NestedCheckouts(self.state)
        self.housekeeping = Housekeeping(self.state, self._use_lifo)
        self._waiting = Waiting(self.state, self.housekeeping, self._waiter_class)
        self.opening = Opening(
            self.state, self.housekeeping, self._waiting, self._waiter_class
        )
        self.tells_server = False
        self.pausing = Pausing(self.state, self.housekeeping, self._waiter_class)
        #: Connections closed, by reason.
        self.closures = Counter(dict.fromkeys(_CLOSURES, 0))
        #: A connection was opened on a server that takes writes.
        self.has_written = False

    def log_to(self, logger: Any) -> None:
        """Write what an operator is to read to a pool's logger."""
        self.logger = self.state.event_log.logger = logger

    @property
    def options(self) -> PoolOptions:
        return self.state.options

    # -- checkout --------------------------------------------------------------------

    def checkout(
        self, tag: str, opener: Opener, timeout: float | None = None
    ) -> Record:
        """Return a record charged to `tag`, waiting for it if need be.

        :param timeout: what the caller's options say, None for the pool's.
        """
        housekeeping = self.housekeeping
        if housekeeping.owner is not opener.generation:
            if self.lock.in_section():
                return self.nested.lend(Checkout(self), tag, opener)
            self.lock.run(housekeeping.hand_over, opener.generation)
        records = self.warm.by_tag.get(tag)
        if not records and tag == self._may_borrow:
            records = self.warm.latest
        if not records:
            return self._acquire(tag, opener, timeout)
        try:
            record = records.pop(self.connections.end)
        except IndexError:  # another thread was faster
            return self._acquire(tag, opener, timeout)
        now = self.clock()
        checkout = record.fair.checkout
        tag_state, scheduler = checkout.tag_state, self.scheduler
        if (
            scheduler.waiting
            or now >= housekeeping.next_visit
            or tag_state.in_use > tag_state.safe_ceiling.value
            or not (tag_state.prompt or tag_state.silent)
        ):
            # The slot is not this tag's to keep any more, or there is work to do.
            self.warm.put(tag_state.tag, record)
            return self._acquire(tag, opener, timeout)
        checkout.warm = False
        checkout.holder = self.here.caller
        checkout.since = now
        if tag_state.tag == tag:
            checkout.again += 1
            if tag_state.prompt:
                tag_state.last_activity = now
        elif not self.warm.borrow(record, tag):
            return self._acquire(tag, opener, timeout)
        return record

    def _acquire(self, tag: str, opener: Opener, timeout: float | None) -> Record:
        """:meth:`checkout` under the lock: the scheduler is asked for a slot."""
        lock = self.lock
        if lock.busy_in is not None and lock.in_section():
            return self.nested.lend(Checkout(self), tag, opener)
        begun: list[Checkout] = []  # where it is found after an interrupt
        try:
            since = lock.run(self._request, begun, tag)
            checkout = begun[0]
            checkout.asked = since, timeout
            record = checkout.record
            if record is None:
                return self._obtain(checkout, opener, since, timeout)
            checkout.record = None
            return record
        except LineFull:
            raise self._waiting.too_many(tag) from None
        except BaseException:
            if not begun:
                raise
            checkout = begun[0]
            if checkout.state is FREE and checkout is not self.state.watcher:
                raise  # it timed out or was refused, and has left its line
            try:
                self.give_up(checkout)
            except BaseException:  # a second interrupt
                self.give_up(checkout)
                raise
            raise

    def _request(self, begun: list[Checkout], tag: str, now: float) -> float:
        """Ask for a slot; join the line if there is none. Returns the time."""
        connections, state = self.connections, self.state
        if now >= self.housekeeping.next_visit:
            self.housekeeping.look_around(now)
        if state.options.server_tag:
            connections.prefer(tag)
        record = connections.pop()
        try:
            checkout = None if record is None else record.fair.checkout
            if checkout is None or checkout.spent:
                checkout = Checkout(self)
            begun.append(checkout)
            if self.nested.loans:  # of what would have been popped here
                self.nested.admit(now)
            granted = self.scheduler.request(checkout, tag, now)
            checkout.holder = self.here.caller
            if granted:
                state.grant(checkout, record)
            else:
                self._waiting.join_line(checkout, tag, now)
        finally:
            if record is not None and record.fair.checkout.record is not record:
                record.fair.checkout = Checkout(self)
                connections.put_back(record)  # last: from here on it may be lent
        return now

    def _obtain(
        self, checkout: Checkout, opener: Opener, since: float, timeout: float | None
    ) -> Record:
        """Return the record for a checkout, once it has a slot."""
        waiter = checkout.waiter
        if waiter is not None:
            self._waiting.wait(checkout, waiter, since, timeout)
        record = checkout.record
        if record is None:
            record = self.opening.open(checkout, opener)
            if not self.scheduler.knows(checkout):
                # The process was forked meanwhile: not of this accounting.
                checkout.state, checkout.may_keep = FREE, False
            elif self.options.min_idle and not opener.generation.warmed_up:
                checkout.record = record  # where `give_up` finds it
                self.opening.warm_up_apart(self, opener)
        checkout.record = None
        return record

    def give_up(self, checkout: Checkout) -> None:
        """Leave the line, or pass on what was granted in the same instant."""
        if checkout.orphaned:
            return  # its connection is being opened: see `Checkout.adopt`
        checkout.spent = True  # its caller may give it up once more
        self.lock.run(self._give_up, checkout)
        checkout.may_keep = False  # nor is it kept warm if its record comes back

    def _give_up(self, checkout: Checkout, now: float) -> None:
        has_waited = self.scheduler.cancel(checkout)
        self.state.leave_line(checkout)  # if not before: then it was interrupted
        if not has_waited:
            record, checkout.record = checkout.record, None
            self.state.take_back(checkout, record, True, now)

    # -- checkin ---------------------------------------------------------------------

    def checkin(self, record: Record) -> None:
        """Take a record back for the pool that opened it, also by the collector."""
        fair = record.fair
        checkout, scheduler = fair.checkout, self.scheduler
        tag_state, waiting = checkout.tag_state, scheduler.waiting
        if (
            waiting
            or checkout.warm
            or not checkout.may_keep
            or checkout.borrowed
            or not (tag_state.prompt or tag_state.silent)
            or (
                record.dbapi_connection is None
                and not self.slots.is_over(fair.physical)
            )
        ):
            opener = sqlalchemy_private.pool_of(record)
            keep = opener.generation is self.housekeeping.owner
            self._release(checkout, record, keep)
            return
        now = self.clock()
        held = now - checkout.since
        checkout.held += held
        if held > checkout.notable:
            checkout.note(held)
            if len(checkout.long_holds) >= _LONG_HOLDS_KEPT:
                checkout.may_keep = False  # they are booked when it comes back
        fair.idle_since = now
        if tag_state.prompt:
            tag_state.last_activity = now
        checkout.warm = True
        warm = self.warm
        try:
            records = warm.by_tag[tag_state.tag]
        except KeyError:
            records = warm.of(tag_state.tag)
        warm.latest = records
        # Listed before, so that an interrupt leaves no record that is not found;
        # and after, if a section has looked in between.
        if not records.listed:
            records.list()
        records.append(record)
        if not records.listed:
            records.list()
        if scheduler.waiting:  # since it was looked at above
            self.lock.visit()

    def _release(self, checkout: Checkout, record: Record | None, keep: bool) -> None:
        """Take a record back under the lock, or a checkout that has lost its record."""
        lock = self.lock
        if lock.busy_in is None or not lock.in_section():
            lock.run(self.state.take_back, checkout, record, keep)
        elif not (self.nested.loans and self.nested.end(checkout)):
            work = partial(self.state.take_back, checkout, record, keep)
            lock.inbox.append(work)

    def lost(self, checkout: Checkout) -> None:
        """Take back the slot of a checkout that was dropped with its record."""
        checkout.warm = False  # it may have been about to be taken
        self._release(checkout, None, False)

    # -- while it is out -------------------------------------------------------------

    def move(self, checkout: Checkout, tag: str) -> bool:
        """Charge a checkout to another tag, if that one is next; tell if it was."""
        if self.nested.loans and self.lock.in_section():
            loan = self.nested.of(checkout)
            if loan is not None:
                loan.tag = tag
                return True
        return self.lock.run(self.state.move, checkout, tag)

    def activity(self, checkout: Checkout) -> None:
        """Note that the holder of a checkout works, though its tag is not active."""
        if not self.lock.in_section():  # else: a finaliser's statement, let it pass
            self.lock.run(self.scheduler.activity, checkout)

    def connection_ended(self) -> None:
        """A connection is over, so that another one may be opened. From any thread."""
        with self.lock.mutex:
            if self.slots.is_paid_by_a_checkout() and not self.lock.in_section():
                return  # what is kept warm stays so
        self.lock.do(self._recount_ended)

    def _recount_ended(self, now: float) -> None:
        self.state.recount(now)
        self.slots.recounted()

    # -- fork ------------------------------------------------------------------------

    def after_fork(self) -> None:
        """In a forked child: an empty pool; what is open belongs to the parent."""
        for record in list(self.connections.all):
            record.fair.checkout.state = FREE
            record.fair.checkout.may_keep = False
            sqlalchemy_private.disown(record)
        self.slots.existing.disown()
        self.lock.reset()
        failures = self.slots.existing.failures
        self._begin(self.options)
        self.slots.existing.failures = failures
        self.log_to(self.logger)
        self.slots.after_fork()


_living: weakref.WeakSet[PoolCore] = weakref.WeakSet()


def _after_fork() -> None:
    for core in list(_living):
        core.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
