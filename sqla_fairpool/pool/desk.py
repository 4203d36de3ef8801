"""What is accounted of a pool, and done in its critical section.

Rules of this file:

* All that is here is guarded by the lock of :mod:`.section`: the scheduler, the idle
  records, the inbox.
* A record is returned by its user, or by the collector: then in the middle of anything,
  also of our own critical section on the same thread. Who comes second puts the record
  into the inbox, and the first one deals with it before he leaves.
* Whoever enters gives up what is kept warm (see :mod:`.exchange`), and again before he
  leaves.
* A signal handler may check out in the middle of a critical section on the same thread:
  it is *lent* an idle connection, or one more. The handler ends before the section goes
  on, and no other thread can enter, so a loan that is over by then leaves no trace; one
  that is not is accounted for at the end of the section. Therefore a section takes an
  idle record before it decides, and iterates over copies of `_idle`.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import Counter, deque
from collections.abc import (
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..diagnosis.callers import TaskHere, ThreadHere
from ..diagnosis.capture import Out
from ..diagnosis.event_log import EventLog
from ..options import PoolOptions
from ..scheduling.account import GRANTED, Account, Ticket
from ..scheduling.counters import Meter
from ..scheduling.scheduler import Scheduler
from . import sqlalchemy_private
from .checkout import Generation, Opener, Record, Seat
from .connections import Connections
from .lock import Section, refuse_inner_call
from .waiters import Owner, Waiter

if TYPE_CHECKING:
    from ..diagnosis.leaks import LeakWatch
    from .connections import PhysicalConnection
    from .share import Share

__all__ = ["Desk", "Reservation"]

_numbers = itertools.count(1)


class Reservation:
    """The right to open one connection ahead, as long as somebody has this object."""


class Desk(Section):
    """The accounting of a pool, the open connections in it, and their lock.

    :param waiter_class: how callers sleep.
    :param use_lifo: hand out the record that came back last, not first.
    :param clock: seconds on a steadily rising scale.
    """

    # Slots, because an object with more than thirty attributes is slow to read from
    # (CPython's SHARED_KEYS_MAX_SIZE).
    __slots__ = (
        "__weakref__",
        "_allotted",
        "_count_is_old",
        "_end",
        "_frozen",
        "_idle",
        "_inbox",
        "_left",
        "_listed",
        "_loans",
        "_never_full",
        "_opening",
        "_pool_size",
        "_pressed",
        "_records",
        "_reserved",
        "_spare_seats",
        "_take_idle",
        "_use_lifo",
        "_waiter_class",
        "_watch",
        "alive",
        "closures",
        "connections",
        "here",
        "journal",
        "leaks",
        "logger",
        "new_waiter",
        "number",
        "options",
        "owner",
        "scheduler",
        "share",
    )

    #: Who looks for what is out for too long, if anybody does.
    leaks: LeakWatch | None

    def __init__(
        self,
        options: PoolOptions,
        waiter_class: type[Waiter],
        use_lifo: bool,
        clock: Callable[[], float],
    ) -> None:
        #: The pool's part in a ledger, None without one.
        self.share: Share | None = None
        #: Tells it from others in this process.
        self.number = next(_numbers)
        self.options = options
        super().__init__(clock, waiter_class.can_wait)
        self._waiter_class = waiter_class
        #: Tells who is asking.
        self.here: ThreadHere | TaskHere = waiter_class.here
        #: Makes what a caller waits with.
        self.new_waiter: Callable[[Owner], Waiter] = waiter_class
        self._use_lifo = use_lifo
        self._pool_size = options.pool_size
        # Without overflow there is a place for every record that comes back.
        self._never_full = options.max_overflow == 0
        # With a callback: only such a reference is sure to be cleared before the
        # finalisers of a cycle run (CPython changed this in 3.15).
        self.alive = weakref.ref(self, lambda ref: None)
        self.logger: Any = logging.getLogger(__name__)
        self._begin()

    def log_to(self, logger: Any) -> None:
        """Write what an operator is to read to a pool's logger."""
        self.logger = self.journal.logger = logger

    def _begin(self) -> None:
        super()._begin()
        # What came back while the lock's holder was busy: (seat, record, keep).
        self._inbox: deque[tuple[Seat, Record | None, bool]] = deque()
        # Records in the pool, the one that came back first on the left.
        self._idle: deque[Record] = deque()
        self._hand_out(last_first=self._use_lifo)
        # What was lent in the middle of a critical section and is not back.
        self._loans: list[Seat] = []
        # The tags for which records may be kept warm.
        self._listed: deque[Account] = deque()
        # Seats that no record has, for those who have to wait.
        self._spare_seats: list[Seat] = []
        # Every record there is, for the child of a fork.
        self._records: weakref.WeakSet[Record] = weakref.WeakSet()
        # Seats whose owners open a connection for them. Weak: one that an interrupted
        # owner has dropped gives its slot back.
        self._opening: weakref.WeakSet[Seat] = weakref.WeakSet()
        # Whose records are kept, and what is left of those that came before.
        self.owner = Generation()
        self._left: weakref.WeakSet[Record] = weakref.WeakSet()
        # The waiting seat whose owner wakes up for the next reallocation.
        self._watch: Seat | None = None
        # How many connections there may be, those that there are, and those that are
        # about to be opened ahead.
        self._allotted = self.options.capacity
        self.connections = Connections(
            _unless_gone(self.alive), self._waiter_class.may_block
        )
        self._reserved: weakref.WeakSet[Reservation] = weakref.WeakSet()
        # One of them has ended since they were counted.
        self._count_is_old = False
        # Others go short: what falls idle is asked for.
        self._pressed = False
        # Only what there is may be used: each that is closed is one less.
        self._frozen = False
        self.scheduler = Scheduler(
            capacity=self.options.capacity,
            soft_limit=self.options.soft_limit,
            max_limit=self.options.max_limit,
            idle_timeout=self.options.idle_timeout,
            reallocation_interval=self.options.reallocation_interval,
            max_waiting=self.options.max_waiting,
            silent_tag=self.options.default_tag,
            now=self.clock(),
        )
        #: Connections closed, by reason.
        self.closures: Counter[str] = Counter()
        self.journal = EventLog(self._chores)
        self.journal.logger = self.logger
        self.scheduler.roster.on_change = self.journal.changed

    def _hand_out(self, *, last_first: bool) -> None:
        # Which of the records that came back is the next.
        self._end = -1 if last_first else 0
        self._take_idle = self._idle.pop if last_first else self._idle.popleft

    # -- what comes back ----------------------------------------------------------

    def _checkin(self, seat: Seat, record: Record | None, keep: bool) -> None:
        """Take a record back under the lock, or a seat that has lost its record."""
        now = self.clock()
        with self._lock:
            if self._busy:
                if seat.loan is not None:
                    self._end_loan(seat)
                else:
                    self._inbox.append((seat, record, keep))
                return
            self._busy = True
            try:
                self._take_back(seat, record, keep, now)
                self._tidy(now)
            finally:
                self._busy = False
        if self._bells or self._chores:
            self._flush()

    def lost(self, seat: Seat) -> None:
        """Take the slot of a seat back whose owner has vanished with the record."""
        seat.warm = False  # it may have been about to be taken
        self._checkin(seat, None, False)

    # -- in the middle of a critical section ---------------------------------------

    def _lend(self, tag: str, opener: Opener) -> Record:
        """Check out in the middle of a critical section of the same thread.

        :raises sqlalchemy.exc.InvalidRequestError: if there is nothing to lend.
        """
        if isinstance(self.here, TaskHere):
            refuse_inner_call("nothing can be awaited there")
        seat = Seat(cast(Any, self))
        seat.loan, seat.holder, seat.since = tag, self.here.caller, self.clock()
        # Not one of the scheduler's, which may be about to change.
        seat.account = Account(tag, 1.0, False, Meter())
        # First of all: another handler may come on top of this one.
        self._loans.append(seat)
        try:
            seat.record = record = self._pop_idle() or self._pop_warm()
            if record is not None:
                seat.former = record.seat
            else:
                # The section may have one in its hands, which is counted nowhere. With
                # a ledger, that would be asked: by a thread that needs this lock.
                there = self.connections_there() + len(self._loans)
                if there >= self._allotted or self.share is not None:
                    refuse_inner_call("no connection is idle")
                seat.record = record = cast(Record, opener._create_connection())
            record.seat = seat
            return record
        except BaseException:
            self._end_loan(seat)
            raise

    def _end_loan(self, seat: Seat) -> None:
        """Take back what was lent, as if nothing had been."""
        record, former = seat.record, seat.former
        seat.record = seat.former = seat.loan = None
        if record is not None and former is None:
            record.reason = "overflow"
            record.close()
        elif record is not None and former is not None:
            record.seat = former
            if former.state is GRANTED:
                self._list(former.account)
                former.account.warm.append(record)
                self._list(former.account)
            else:
                self._put_back(record)
        self._loans.remove(seat)  # last: until here its connection counts
        self._note_end()  # as one that is apart

    def _admit_loans(self, now: float) -> None:
        """Account for what was lent, and was not back when the handler had ended."""
        while self._loans:
            seat = self._loans.pop()
            record, former, tag = seat.record, seat.former, seat.loan
            assert record is not None and tag is not None
            seat.record = seat.former = seat.loan = None
            if former is not None and former.state is GRANTED:
                # It was warm, so it has a slot; that is the handler's tag's, if it may.
                former.warm, former.holder = False, seat.holder
                seat, record.seat = former, former
                self._deliver(self.scheduler.move(seat, tag, now) or (), None)
            else:
                self.scheduler.admit(seat, tag, now)
            self._seat_owner(seat, None)
            record.physical.opening = False
            self._records.add(record)
        self._recount(now)

    def _pop_idle(self) -> Record | None:
        """Take the idle record that is next, None if there is none."""
        try:
            return self._take_idle()
        except IndexError:
            return None

    def _pop_warm(self) -> Record | None:
        """Take a record that is kept warm, of whatever tag; None if there is none."""
        for account in list(self.scheduler.accounts.values()):
            try:
                return cast(Record, account.warm.pop())
            except IndexError:
                pass
        return None

    def _put_back(self, record: Record) -> None:
        """Undo :meth:`_pop_idle`."""
        if self._end:
            self._idle.append(record)
        else:
            self._idle.appendleft(record)

    # -- inside -------------------------------------------------------------------

    def _tidy(self, now: float) -> None:
        """Give up what is kept warm, empty the inbox."""
        while self._listed:
            account = self._listed[0]
            account.listed = False  # first: what comes after this is listed again
            while account.warm:
                try:
                    record = account.warm.pop(0)
                except IndexError:
                    break  # somebody was faster
                record.seat.warm = False
                granted = self.scheduler.vacate(record.seat, now)
                if granted:
                    self._deliver(granted, record)
                else:
                    self._idle.append(record)
                    self._drain(now)
            self._listed.popleft()  # last: an interrupt leaves it listed
        if self._loans:
            self._admit_loans(now)
        if self._count_is_old:
            self._count_is_old = False
            self._recount(now)
            if self.share is not None:
                self._bells.append(self.share.ring)
        while self._inbox:
            seat, returned, keep = self._inbox.popleft()
            self._take_back(seat, returned, keep, now)

    def _take_back(
        self, seat: Seat, record: Record | None, keep: bool, now: float
    ) -> None:
        """Free the seat's slot; hand the record on, keep it or have it closed."""
        if seat.loan is not None:
            self._admit_loans(now)
        if seat.state is not GRANTED or seat.warm or not self.scheduler.knows(seat):
            return  # back already, or checked out before a fork
        if seat.reported and self.leaks is not None:
            self._chores.append(self.leaks.returned(seat, now))
        idle = len(self._idle)
        full = (
            idle >= self._pool_size
            or self.scheduler.in_use + idle > self.scheduler.capacity
        )
        keep = keep and not getattr(record, "doomed", False)
        if (
            record is not None
            and record.dbapi_connection is not None
            and (not keep or (full and not self.scheduler.wanted(seat)))
        ):
            record.reason = "overflow" if keep else "disposed"
            # Its slot is free when it is closed, not before.
            self._chores.append(partial(self._close_then, self._closed, record))
            return
        hollow = record is None or record.dbapi_connection is None
        if hollow:
            self._part_with(record, now)
        # With a ledger a record without a connection is no use to anybody.
        keep = keep and not (hollow and self.share is not None)
        granted = self.scheduler.release(seat, now)
        if granted:
            self._deliver(granted, record if keep else None)
        elif record is not None and keep and not full:
            self._idle.append(record)
            if self._pressed and self.share is not None:
                self._bells.append(self.share.ring)
        if self.share is not None and self.connections_there() > self._allotted:
            self._bells.append(self.share.ring)  # others wait for what is too much

    def _part_with(self, record: Record | None, now: float) -> None:
        """Before a slot is released whose connection has not come back with it.

        It was closed, invalidated, detached or lost. What is left of it at the server
        has to be paid for from now on.
        """
        physical = getattr(record, "physical", None)
        if physical is not None:
            physical.opening = False
            if self.share is None and not physical.ending:
                self.connections.release(physical)  # detached: not ours any more
        else:
            self.connections.end_abandoned()
        if self._frozen:
            self._allotted = min(self._allotted, self.connections_there() - 1)
        self._deliver(self.scheduler.set_capacity(self._capacity(1), now), None)

    def _deliver(self, granted: Sequence[Ticket], record: Record | None) -> None:
        """Give the granted their records: this one, then idle ones, then none.

        Who gets none opens a connection himself.
        """
        for seat in cast(Sequence[Seat], granted):
            assert seat.waiter is not None
            if record is None:
                record = self._pop_idle()
            self._seat_owner(seat, record)
            record = None
            if seat is self._watch:
                self._pass_the_watch()
            self._bells.append(seat.waiter.wake)
            seat.waiter = None  # the last thing: now its owner may look

    def _seat_owner(self, seat: Seat, record: Record | None) -> None:
        """Complete a seat that was granted, or moved to another tag."""
        seat.may_warm = (
            self._never_full and not seat.account.silent and not self._pressed
        )
        seat.reported = False
        if record is not None:
            if record.seat is not seat:
                self._spare_seats.append(record.seat)
                record.seat = seat
            seat.record = record

    def _list(self, account: Account) -> None:
        """Have whoever comes next look for what is kept warm. Needs no lock."""
        account.listed = True
        self._listed.append(account)

    def _pass_the_watch(self) -> None:
        """Let another waiter wake up for the reallocation.

        The newest, because it will wait longest: else the watch would change hands
        with every grant, and each time a caller would be woken for that alone.
        """
        newest = self.scheduler.newest_waiter()
        assert newest is None or isinstance(newest, Seat)
        self._watch = newest
        if newest is not None and newest.waiter is not None:
            self._bells.append(newest.waiter.wake)

    # -- as the member of a ledger ---------------------------------------------------

    def allot(self, slots: int, ceilings: Mapping[str, int], other: int) -> None:
        """Set how many connections there may be, and the ceiling of each tag."""
        with self.section() as now:
            self._allotted = slots
            self._frozen = False
            if self.connections_there() > slots:
                for seat in self.granted_seats():
                    seat.may_warm = False  # to be looked at when it comes back
            capacity = self._capacity()
            self._deliver(self.scheduler.impose(capacity, ceilings, other, now), None)
            self._drain(now)

    @property
    def allotted(self) -> int:
        """How many connections there may be."""
        return self._allotted

    def freeze(self) -> None:
        """Let those connections be used that there are, until the next `allot`."""
        with self.section() as now:
            self._frozen = True
            self._allotted = min(self._allotted, self.settle(now))
            self.settle(now)

    def press(self, pressed: bool) -> None:
        """Ring for the ledger when a connection falls idle, or do not any more."""
        with self.section():
            self._pressed = pressed
            if pressed:
                for seat in self.granted_seats():
                    seat.may_warm = False

    def connections_there(self) -> int:
        """Return how many connections there are, from before their opening until after
        their closing. Caller is in a section.
        """
        there = self.scheduler.in_use + self.count_idle()[1]
        return there + len(self._left) + self._out_of_use()

    def settle(self, now: float) -> int:
        """Return :meth:`connections_there`; no more will be, but what is allotted.

        Caller is in a section.
        """
        self._deliver(self.scheduler.set_capacity(self._capacity(), now), None)
        return self.connections_there()

    def bury(self, lost: Collection[PhysicalConnection]) -> None:
        """Forget connections whose slots are the ledger's quarantine's now."""
        with self.section() as now:
            for physical in lost:
                if self.connections.release(physical):
                    self._allotted = max(self._allotted - 1, 0)
            self._recount(now)

    def wake_all(self) -> None:
        """Wake whoever waits, to look for himself."""
        with self.section():
            for seat in self.checkouts_waiting():
                if seat.waiter is not None:
                    self._bells.append(seat.waiter.wake)

    # -- closing ------------------------------------------------------------------

    def _drain(self, now: float) -> None:
        """Have idle records closed of which there are too many, the oldest first.

        There are none but after a limit has fallen.
        """
        while idle := list(self._idle):
            if (
                len(idle) <= self._pool_size
                and self.scheduler.in_use + len(idle) <= self._allotted
            ):
                return
            self._retire(idle[0], now, "resized")

    def _retire(self, record: Record, now: float, reason: str) -> None:
        """Have an idle record closed. Its slot is out of use until that is over."""
        try:
            self._idle.remove(record)
        except ValueError:
            return  # lent a moment ago
        record.reason = reason
        self._chores.append(record.close)
        self._recount(now)

    def connection_ended(self) -> None:
        """A connection is over, so that another one may be opened. From any thread."""
        with self._lock:
            full = self.scheduler.capacity == self._allotted
            if full and self.share is None and not self._busy:
                return  # a ticket has paid for it: what is kept warm stays so
        self._note_end()
        self.visit()

    def _is_unsettled(self) -> bool:
        return self._count_is_old

    def _note_end(self) -> None:
        """Have the next section count anew. From any thread, also in a section."""
        self._count_is_old = True
        self._bells.append(_do_nothing)  # so that somebody looks

    def _recount(self, now: float) -> None:
        """Let as many slots be granted as there may be connections."""
        if self._frozen:
            self._allotted = min(self._allotted, self.connections_there())
        self._deliver(self.scheduler.set_capacity(self._capacity(), now), None)

    def _out_of_use(self) -> int:
        """Return how many slots no caller can have: no ticket pays for them."""
        idle = {id(record) for record in list(self._idle)}
        return self.connections.apart(idle, self._left) + len(self._reserved)

    def _capacity(self, leaving: int = 0) -> int:
        """Return how many slots may be in use now.

        Those out of use count, unless they are beyond what is allotted: who has a
        connection, or takes one that is there, opens none.

        :param leaving: slots in use that are about to be released without anything
          to come back.
        """
        there = self.scheduler.in_use - leaving + self.count_idle()[1]
        return min(self._allotted, max(self._allotted - self._out_of_use(), there))

    def _close_then(self, after: Callable[[Record], None], record: Record) -> None:
        try:
            record.close()  # logs what goes wrong, and raises interrupts only
        finally:
            after(record)

    def _closed(self, record: Record) -> None:
        with self.section() as now:
            self._take_back(record.seat, None, False, now)

    def count_closure(self, reason: str) -> None:
        """Count a connection that is closed."""
        with self._lock:
            self.closures[reason] += 1

    def count_opening(self, account: Account, seconds: float | None) -> None:
        """Count a connection that was opened for a tag, or None if it could not be."""
        with self._lock:
            if seconds is None:
                account.meter.create_failures += 1
            else:
                account.meter.create.add(seconds)

    # -- figures ------------------------------------------------------------------

    @property
    def idle_count(self) -> int:
        """Records in the pool."""
        self.visit()
        return len(self._idle)

    @property
    def in_use(self) -> int:
        """Slots in use."""
        self.visit()
        return self.scheduler.in_use

    def count_idle(self) -> tuple[int, int]:
        """Return the records in the pool, and how many of them are open.

        Caller is in a section.
        """
        idle = list(self._idle)
        return len(idle), len([r for r in idle if r.dbapi_connection is not None])

    def granted_seats(self) -> list[Seat]:
        """Return the seats of the records that are out. Caller is in a section."""
        seats = [record.seat for record in self._records]
        return [seat for seat in seats if seat.state is GRANTED]

    def checkouts_waiting(self) -> list[Seat]:
        """Return the seats that wait for a slot. Caller is in a section."""
        return [
            cast(Seat, ticket)
            for account in self.scheduler.waiting_accounts()
            for ticket in account.waiters or ()
        ]

    def checkouts_out(self) -> list[Out]:
        """Return what is out or being opened, for a diagnosis. Caller is in a section.

        A record without a connection is out while another one is opened for it.
        """
        opening = [seat for seat in self._opening if seat.state is GRANTED]
        found = {seat: Out.of(seat, opening=True) for seat in opening}
        for record in self._records:
            seat = record.seat
            if seat.state is GRANTED:
                is_opening = seat in found
                is_dropped = sqlalchemy_private.is_dropped(record)
                found[seat] = Out.of(
                    seat,
                    opening=is_opening or record.dbapi_connection is None,
                    unclaimed=is_dropped and not is_opening,
                )
        return list(found.values())

    def allotment(self) -> tuple[int | None, str | None]:
        """Return what a ledger allots, and why it cannot be reached; None without."""
        if self.share is None:
            return None, None
        return self._allotted, self.share.trouble


def _do_nothing() -> None:
    """A bell that nobody hears."""


def _unless_gone(alive: weakref.ref[Desk]) -> Callable[[], None]:
    """Return what tells a desk, as long as it is in use, that a connection is over."""

    def changed() -> None:
        desk = alive()
        if desk is not None:
            desk.connection_ended()

    return changed
