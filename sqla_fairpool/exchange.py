"""Where connections change hands: the lock, the idle records, the waiting callers.

Rules of this file:

* One lock. It guards the scheduler, the idle records and the two boxes. No I/O,
  no wake-up, no logging and no caller's code happens while it is held: what a
  transition leaves to do goes into the outbox and is done after the lock.
* A record is returned by its user, or by the collector: then in the middle of
  anything, also of our own critical section on the same thread. The lock is
  re-entrant, so that this cannot deadlock, and `_busy` tells the second comer
  that he must not touch anything: he puts the record into the inbox, and the
  first one deals with it before he leaves.
* A ticket is bound to a variable of its owner before its state changes, and is
  given back by whoever sees an exception, KeyboardInterrupt included. A seat
  that is lost all the same (dropped between our return and its next owner's
  first line) gives its slot back when it is deallocated.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from sqlalchemy import exc
from sqlalchemy.pool import ConnectionPoolEntry

from . import _private
from .account import FREE, GRANTED, Account, LineFull, Ticket
from .errors import CheckoutTimeout, TooManyWaiting, describe_holders
from .options import PoolOptions
from .scheduler import Scheduler
from .waiters import Waiter

__all__ = ["Exchange", "Opener", "Record", "Seat"]


class Record(ConnectionPoolEntry):
    """For the type checker: a connection record with the seat that we put on it."""

    seat: Seat


class Opener(Protocol):
    """Who opens another connection; a pool."""

    def _create_connection(self) -> ConnectionPoolEntry: ...


class Seat(Ticket):
    """A ticket with what belongs to it on this side.

    A record keeps its seat, which serves one checkout after the other; a caller
    that has to wait brings a new one.
    """

    __slots__ = ("__weakref__", "exchange", "record", "waiter")

    def __init__(self, exchange: Exchange) -> None:
        self.state = FREE
        self.exchange = exchange
        #: What was handed over, until the owner picks it up.
        self.record: Record | None = None
        #: How to wake the owner, until the slot was handed over.
        self.waiter: Waiter | None = None

    def __del__(self) -> None:
        if self.state is GRANTED:
            self.exchange.lost(self)


class Exchange:
    """The accounting and the open connections of a pool and its successors.

    :param waiter_class: how callers sleep.
    :param use_lifo: hand out the record that came back last, not first.
    :param clock: seconds on a steadily rising scale.
    """

    def __init__(
        self,
        options: PoolOptions,
        waiter_class: Callable[[], Waiter],
        use_lifo: bool,
        clock: Callable[[], float],
    ) -> None:
        self.options = options
        self.clock = clock
        self._waiter_class = waiter_class
        self._use_lifo = use_lifo
        self._pool_size = options.pool_size
        self._begin()
        _living.add(self)

    def _begin(self) -> None:
        #: Guards everything below; see the head of this file.
        self.lock = threading.RLock()
        self._busy = False
        # What came back while the lock's holder was busy: (seat, record, keep).
        self._inbox: deque[tuple[Seat, Record | None, bool]] = deque()
        # What is left to do after the lock.
        self._outbox: deque[Callable[[], object]] = deque()
        # Records in the pool, the one that came back first on the left.
        self._idle: deque[Record] = deque()
        # Every record there is, for the child of a fork.
        self._records: weakref.WeakSet[Record] = weakref.WeakSet()
        # The waiting seat whose owner wakes up for the next reallocation.
        self._watch: Seat | None = None
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

    # -- checkout and checkin --------------------------------------------------

    def checkout(self, tag: str, opener: Opener) -> Record:
        """Return a record charged to `tag`, waiting for it if need be.

        :raises CheckoutTimeout: after the options' ``timeout``.
        :raises TooManyWaiting: if the caller may not even wait.
        """
        now = self.clock()
        record = seat = None
        try:
            with self.lock:
                if self._busy:
                    _refuse_finaliser()
                self._busy = True
                try:
                    scheduler = self.scheduler
                    if now >= scheduler.next_tick:
                        self._deliver(scheduler.tick(now), None)
                    if self._idle:
                        record = self._idle[-1 if self._use_lifo else 0]
                        seat = record.seat
                        if scheduler.request(seat, tag, now):
                            if self._use_lifo:
                                self._idle.pop()
                            else:
                                self._idle.popleft()
                        else:
                            record.seat = Seat(self)
                            record = None
                            self._line_up(seat)
                    else:
                        seat = Seat(self)
                        if not scheduler.request(seat, tag, now):
                            self._line_up(seat)
                    if self._inbox:
                        self._empty_inbox(now)
                finally:
                    self._busy = False
            if self._outbox:
                self._flush()
            if record is None:
                record = self._wait_or_open(seat, now, opener)
            return record
        except LineFull:
            self._flush()
            raise self._too_many_waiting(tag) from None
        except BaseException:
            if seat is not None:
                self._give_up(seat)
            raise

    def checkin(self, record: Record, keep: bool = True) -> None:
        """Take a record back, from its user or from the collector.

        :param keep: False to close its connection.
        """
        now = self.clock()
        with self.lock:
            if self._busy:
                self._inbox.append((record.seat, record, keep))
                return
            self._busy = True
            try:
                seat = record.seat
                if (
                    keep
                    and not self.scheduler.waiting
                    and len(self._idle) < self._pool_size
                    and seat.state is GRANTED
                ):
                    self.scheduler.release(seat, now)
                    self._idle.append(record)
                else:
                    self._take_back(seat, record, keep, now)
                if self._inbox:
                    self._empty_inbox(now)
            finally:
                self._busy = False
        if self._outbox:
            self._flush()

    def lost(self, seat: Seat) -> None:
        """Take the slot of a seat back whose owner has vanished with the record."""
        now = self.clock()
        with self.lock:
            # Also when nobody is busy: one road for what the collector returns.
            self._inbox.append((seat, None, False))
            if self._busy:
                return
        with self.section():
            pass

    def move(self, seat: Seat, tag: str) -> bool:
        """Charge a checked-out seat to another tag, if that one is next."""
        with self.section() as now:
            granted = self.scheduler.move(seat, tag, now)
            if granted is None:
                return False
            self._deliver(granted, None)
            return True

    def activity(self, seat: Seat) -> None:
        """Note that the holder of a seat works, though its tag is not active."""
        with self.lock:
            if not self._busy:  # else: a finaliser's statement, of no account
                self.scheduler.activity(seat, self.clock())

    def close_idle(self) -> None:
        """Close the connections that are in the pool.

        Until each is closed, a slot is kept out of use for it, so that there are
        never more connections than the capacity.
        """
        with self.section() as now:
            records = list(self._idle)
            self._idle.clear()
            left = self.scheduler.capacity - len(records)
            self.scheduler.set_capacity(left, now)
        try:
            while records:
                self._close_then(self._one_slot_more, records.pop())
        finally:
            for record in records:  # an interrupt: the next visitor goes on
                close = partial(self._close_then, self._one_slot_more, record)
                self._outbox.append(close)

    def _one_slot_more(self, record: Record) -> None:
        with self.section() as now:
            capacity = self.scheduler.capacity + 1
            self._deliver(self.scheduler.set_capacity(capacity, now), None)

    @property
    def idle_count(self) -> int:
        """Records in the pool."""
        return len(self._idle)

    def count_idle(self) -> tuple[int, int]:
        """Return the records in the pool, and how many of them are open."""
        open_ones = [r for r in self._idle if r.dbapi_connection is not None]
        return len(self._idle), len(open_ones)

    # -- the parts, under the lock ---------------------------------------------

    @contextmanager
    def section(self) -> Iterator[float]:
        """A critical section off the hot path; gives the time."""
        with self.lock:
            if self._busy:
                _refuse_finaliser()
            self._busy = True
            try:
                now = self.clock()
                yield now
                if self._inbox:
                    self._empty_inbox(now)
            finally:
                self._busy = False
        if self._outbox:
            self._flush()

    def _empty_inbox(self, now: float) -> None:
        while self._inbox:
            seat, record, keep = self._inbox.popleft()
            self._take_back(seat, record, keep, now)

    def _take_back(
        self, seat: Seat, record: Record | None, keep: bool, now: float
    ) -> None:
        """Free the seat's slot; hand the record on, keep it or have it closed."""
        if seat.state is not GRANTED or not self.scheduler.knows(seat):
            return  # back already, or checked out before a fork
        is_open = record is not None and record.dbapi_connection is not None
        full = len(self._idle) >= self._pool_size
        if is_open and (not keep or (full and not self.scheduler.wanted(seat))):
            # Its slot is free when it is closed, not before.
            self._outbox.append(partial(self._close_then, self._closed, record))
            return
        granted = self.scheduler.release(seat, now)
        if granted:
            self._deliver(granted, record if keep else None)
        elif record is not None and keep and not full:
            self._idle.append(record)

    def _deliver(self, granted: Sequence[Ticket], record: Record | None) -> None:
        """Give the granted their records: this one, then idle ones, then none.

        Who gets none opens a connection himself.
        """
        for seat in granted:
            assert isinstance(seat, Seat)
            assert seat.waiter is not None
            if record is None and self._idle:
                record = self._idle.pop() if self._use_lifo else self._idle.popleft()
            if record is not None:
                record.seat = seat
                seat.record, record = record, None
            if seat is self._watch:
                self._pass_the_watch()
            self._outbox.append(seat.waiter.wake)
            seat.waiter = None  # the last thing: now its owner may look

    def _line_up(self, seat: Seat) -> None:
        seat.waiter = self._waiter_class()
        if self._watch is None:
            self._watch = seat

    def _pass_the_watch(self) -> None:
        """Let another waiter wake up for the reallocation.

        The newest, because it will wait longest: else the watch would change hands
        with every grant, and each time a caller would be woken for that alone.
        """
        newest = self.scheduler.newest_waiter()
        assert newest is None or isinstance(newest, Seat)
        self._watch = newest
        if newest is not None and newest.waiter is not None:
            self._outbox.append(newest.waiter.wake)

    # -- the parts, without the lock -------------------------------------------

    def _flush(self) -> None:
        """Do what was left to do after the lock."""
        while True:
            try:
                todo = self._outbox.popleft()
            except IndexError:
                return
            try:
                todo()
            except BaseException:
                self._flush()
                raise

    def _close_then(self, after: Callable[[Record], None], record: Record) -> None:
        try:
            record.close()
        finally:
            after(record)

    def _closed(self, record: Record) -> None:
        with self.section() as now:
            self._take_back(record.seat, None, False, now)

    def _wait_or_open(self, seat: Seat, since: float, opener: Opener) -> Record:
        """Return the record for a seat that has none, once it has a slot."""
        waiter = seat.waiter
        if waiter is not None:
            self._wait(seat, waiter, since)
        record = seat.record
        if record is None:
            record = opener._create_connection()  # type: ignore[assignment]
            assert record is not None
            record.seat = seat
            self._records.add(record)
            if not self.scheduler.knows(seat):
                seat.state = FREE  # the process was forked meanwhile
        seat.record = None
        return record

    def _wait(self, seat: Seat, waiter: Waiter, since: float) -> None:
        timeout = self.options.timeout
        deadline = math.inf if timeout is None else since + timeout
        now = since
        while True:
            until = deadline
            if self._watch is seat:
                until = min(until, self.scheduler.next_tick)
            waiter.wait(None if until == math.inf else until - now)
            if seat.waiter is None:
                return
            with self.section() as now:
                self._deliver(self.scheduler.tick(now), None)
                if now >= deadline and seat.waiter is not None:
                    message, holders = self._expire(seat, now)
                    break
        raise CheckoutTimeout(
            f"{message}; {describe_holders([(a.tag, a.in_use) for a in holders])}",
            seat.account.tag,
            now - since,
        )

    def _expire(self, seat: Seat, now: float) -> tuple[str, list[Account]]:
        """End a wait under the lock; return what the error says, and the accounts."""
        scheduler, account = self.scheduler, seat.account
        message = (
            f"checkout timed out after {now - seat.since:.2f}s: tag {account.tag!r} "
            f"in_use={account.in_use} ceiling={scheduler.ceiling(account)} "
            f"waiting={account.waiting} place={scheduler.place(seat)}; "
            f"pool in_use={scheduler.in_use}/{self.options.capacity} "
            f"idle={len(self._idle)}"
        )
        scheduler.expire(seat)
        if seat is self._watch:
            self._pass_the_watch()
        return message, list(scheduler.roster.accounts.values())

    def _too_many_waiting(self, tag: str) -> TooManyWaiting:
        scheduler = self.scheduler
        return TooManyWaiting(
            f"too many waiting: tag {tag!r} refused, waiting={scheduler.waiting} "
            f"max_waiting={self.options.max_waiting}; "
            f"pool in_use={scheduler.in_use}/{self.options.capacity}",
            tag,
        )

    def _give_up(self, seat: Seat) -> None:
        """Leave the line, or pass on what was granted in the same instant."""
        with self.section() as now:
            if self.scheduler.cancel(seat):
                if seat is self._watch:
                    self._pass_the_watch()
            else:
                record, seat.record = seat.record, None
                self._take_back(seat, record, True, now)

    # -- fork --------------------------------------------------------------------

    def begin_again(self) -> None:
        """In a forked child: an empty pool; what is open belongs to the parent."""
        for record in list(self._records):
            record.seat.state = FREE
            _private.disown(record)
        self._begin()


def _refuse_finaliser() -> None:
    raise exc.InvalidRequestError(
        "the pool was called by a finaliser in the middle of its own bookkeeping; "
        "only returning a connection is possible there"
    )


_living: weakref.WeakSet[Exchange] = weakref.WeakSet()


def _begin_again_all() -> None:
    for exchange in list(_living):
        exchange.begin_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_again_all)
