"""Where connections change hands: checkout and checkin, waiting, the fork.

Rules of this file:

* While nobody waits, a record that comes back is *kept warm*: its slot stays with
  the tag, and the next checkout under that tag takes it from the tag's list
  without the lock. Whoever enters a critical section gives up first what is kept
  warm, so nobody misses a slot that somebody else keeps; and who puts a record
  there looks, after that, if somebody waits, so a waiter who saw the list empty is
  not forgotten.
* A seat is bound to a variable of its owner before its state changes, and is
  given back by whoever sees an exception, KeyboardInterrupt included. One that is
  lost all the same (dropped between our return and its next owner's first line)
  gives its slot back when it is deallocated.
"""

from __future__ import annotations

import math
import os
import weakref
from typing import cast

from . import _private
from .account import FREE, WAITING, Account, LineFull
from .desk import refuse_finaliser
from .errors import CheckoutTimeout, TooManyWaiting, describe_holders
from .seats import Generation, Opener, Record, Seat
from .upkeep import Upkeep
from .waiters import Waiter

__all__ = ["Exchange"]


class Exchange(Upkeep):
    """The desk, as callers meet it: they come, wait, take and return.

    Serves a pool and its successors.
    """

    def _begin(self) -> None:
        super()._begin()
        _living.add(self)

    def checkout(self, tag: str, opener: Opener) -> Record:
        """Return a record charged to `tag`, waiting for it if need be.

        :raises CheckoutTimeout: after the options' ``timeout``.
        :raises TooManyWaiting: if the caller may not even wait.
        """
        if self.owner is not opener.generation:
            self.hand_to(opener.generation)
        scheduler = self.scheduler
        try:
            account = scheduler.accounts[tag]
            record: Record | None = account.warm.pop(self._end)
        except LookupError:
            record = None
        if record is None:  # not in the clause above, to be no context of errors
            return self._checkout(tag, opener)
        now = self.clock()
        if (
            scheduler.waiting
            or now >= self.next_visit
            or account.in_use > scheduler.roster.common_ceiling
            or not account.prompt
        ):
            # The slot is not this tag's to keep any more, or there is work to do.
            self._list(account)
            account.warm.append(record)
            self._list(account)
            return self._checkout(tag, opener)
        seat = record.seat
        seat.warm = False
        seat.again += 1
        seat.since = account.last_activity = now
        return record

    def checkin(self, record: Record, generation: Generation) -> None:
        """Take a record back, from its user or from the collector.

        :param generation: the pool that opened it.
        """
        seat = record.seat
        account = seat.account
        scheduler = self.scheduler
        waiting = scheduler.waiting
        if waiting or seat.warm or not seat.may_warm or not account.prompt:
            self._checkin(seat, record, generation is self.owner)
            return
        now = self.clock()
        held = now - seat.since
        seat.held += held
        if held > seat.held_max:
            seat.held_max = held
        account.last_activity = now
        seat.warm = True
        # Listed before, so that an interrupt leaves no record where nobody looks;
        # and after, if somebody has looked in between.
        if not account.listed:
            self._list(account)
        account.warm.append(record)
        if not account.listed:
            self._list(account)
        if scheduler.waiting:
            self.visit()

    def _checkout(self, tag: str, opener: Opener) -> Record:
        """`checkout` under the lock: a slot is needed from the scheduler."""
        now = self.clock()
        seat = None
        try:
            with self._lock:
                if self._busy:
                    refuse_finaliser()
                self._busy = True
                try:
                    self._tidy(now)
                    if now >= self.next_visit:
                        self.look_around(now)
                    if self._idle:
                        record = self._idle[self._end]
                        seat = record.seat
                        used = seat.since
                        if self.scheduler.request(seat, tag, now):
                            self._take_idle()
                            self._seat_owner(seat, record)
                        else:
                            record.seat = self._spare_seat()
                            record.seat.since = used
                    else:
                        seat = self._spare_seat()
                        if self.scheduler.request(seat, tag, now):
                            self._seat_owner(seat, None)
                    if seat.state is WAITING:
                        seat.waiter = self._waiter_class(seat)
                        if self._watch is None:
                            self._watch = seat
                    self._tidy(now)
                finally:
                    self._busy = False
            if self._bells or self._chores:
                self._flush()
            return self._wait_or_open(seat, now, opener)
        except LineFull:
            self._flush()
            raise self._too_many_waiting(tag) from None
        except BaseException:
            if seat is not None:
                self.give_up(seat)
            raise

    def _spare_seat(self) -> Seat:
        return self._spare_seats.pop() if self._spare_seats else Seat(self)

    def move(self, seat: Seat, tag: str) -> bool:
        """Charge a checked-out seat to another tag, if that one is next."""
        with self.section() as now:
            granted = self.scheduler.move(seat, tag, now)
            if granted is None:
                return False
            self._seat_owner(seat, None)
            self._deliver(granted, None)
            return True

    def activity(self, seat: Seat) -> None:
        """Note that the holder of a seat works, though its tag is not active."""
        if not self._in_section():  # else: a finaliser's statement, let it pass
            with self.section() as now:
                self.scheduler.activity(seat, now)

    def _wait_or_open(self, seat: Seat, since: float, opener: Opener) -> Record:
        """Return the record for a seat that has none, once it has a slot."""
        waiter = seat.waiter
        if waiter is not None:
            self._wait(seat, waiter, since)
        record = seat.record
        if record is None:
            if self._left:
                self.make_room()
            record = cast(Record, opener._create_connection())
            record.seat = seat
            with self._lock:
                self._records.add(record)
            if not self.scheduler.knows(seat):
                # The process was forked meanwhile: not of this accounting.
                seat.state, seat.may_warm = FREE, False
            elif self.options.min_idle and not opener.generation.warm:
                seat.record = record  # where `give_up` finds it
                self._first_use(opener)
        seat.record = None
        return record

    def _wait(self, seat: Seat, waiter: Waiter, since: float) -> None:
        timeout = self.options.timeout
        deadline = math.inf if timeout is None else since + timeout
        now = since
        while True:
            until = deadline
            if self._watch is seat:
                until = min(until, self.next_visit)
            waiter.wait(None if until == math.inf else until - now)
            if seat.waiter is None:
                return
            with self.section() as now:
                self.look_around(now)
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

    def give_up(self, seat: Seat) -> None:
        """Leave the line, or pass on what was granted in the same instant."""
        with self.section() as now:
            if self.scheduler.cancel(seat):
                if seat is self._watch:
                    self._pass_the_watch()
            else:
                record, seat.record = seat.record, None
                self._take_back(seat, record, True, now)

    def begin_again(self) -> None:
        """In a forked child: an empty pool; what is open belongs to the parent."""
        for record in list(self._records):
            record.seat.state = FREE
            record.seat.may_warm = False
            _private.disown(record)
        self._begin()


_living: weakref.WeakSet[Exchange] = weakref.WeakSet()


def _begin_again_all() -> None:
    for exchange in list(_living):
        exchange.begin_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_again_all)
