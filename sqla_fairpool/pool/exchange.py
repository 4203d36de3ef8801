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
from functools import partial
from typing import cast

from ..diagnosis.callers import locations
from ..diagnosis.capture import Capture, capture
from ..diagnosis.deadlock import collect, holds_another, is_stuck
from ..diagnosis.leaks import LeakWatch
from ..errors import CheckoutTimeout, SelfDeadlock, TooManyWaiting
from ..scheduling.account import FREE, GRANTED, WAITING, LineFull
from ..tagging import context_timeout
from . import sqlalchemy_private
from .checkout import Generation, Opener, Record, Seat
from .housekeeping import Upkeep
from .server_tag import TOLD
from .share import Share
from .waiters import Waiter

__all__ = ["Exchange", "TracedExchange"]


class Exchange(Upkeep):
    """The desk, as callers meet it: they come, wait, take and return.

    Serves a pool and its successors.
    """

    __slots__ = ()

    def _begin(self) -> None:
        super()._begin()
        self.leaks = None
        _living.add(self)

    def checkout(
        self, tag: str, opener: Opener, timeout: float | None = None
    ) -> Record:
        """Return a record charged to `tag`, waiting for it if need be.

        :param timeout: how long the caller's options let it wait, None if they do
          not say.
        :raises CheckoutTimeout: after the options' ``timeout``.
        :raises TooManyWaiting: if the caller may not even wait.
        """
        if self.owner is not opener.generation:
            if self._in_section():
                return self._lend(tag, opener)
            self.hand_to(opener.generation)
        scheduler = self.scheduler
        try:
            account = scheduler.accounts[tag]
            record: Record | None = account.warm.pop(self._end)
        except LookupError:
            record = None
        if record is None:  # not in the clause above, to be no context of errors
            return self._checkout(tag, opener, timeout)
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
            return self._checkout(tag, opener, timeout)
        seat = record.seat
        seat.warm = False
        seat.again += 1
        seat.holder = self.here.caller
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
        if (
            waiting
            or seat.warm
            or not seat.may_warm
            or not account.prompt
            or (record.dbapi_connection is None and not self._is_over(record))
        ):
            self._checkin(seat, record, generation is self.owner)
            return
        now = self.clock()
        held = now - seat.since
        seat.held += held
        if held > seat.notable:
            seat.note(held)
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

    def _is_over(self, record: Record) -> bool:
        """Tell if nothing is left of the connection that a record has lost."""
        return self.share is None and record.physical not in self.connections

    def _checkout(self, tag: str, opener: Opener, timeout: float | None) -> Record:
        """`checkout` under the lock: a slot is needed from the scheduler."""
        now = self.clock()
        seat = None
        try:
            with self._lock:
                if self._busy:
                    return self._lend(tag, opener)
                self._busy = True
                try:
                    self._tidy(now)
                    if now >= self.next_visit:
                        self.look_around(now)
                    record = self._pop_idle()
                    if self._loans:  # of what would have been popped here
                        self._admit_loans(now)
                    if record is not None:
                        if self.options.server_tag:
                            record = self._prefer(tag, record)
                        seat = record.seat
                        used = seat.since
                        try:
                            granted = self.scheduler.request(seat, tag, now)
                        except BaseException:
                            self._put_back(record)
                            raise
                        if granted:
                            self._seat_owner(seat, record)
                        else:
                            record.seat = self._spare_seat()
                            record.seat.since = used
                            self._put_back(record)  # last: from here on it may be lent
                    else:
                        seat = self._spare_seat()
                        if self.scheduler.request(seat, tag, now):
                            self._seat_owner(seat, None)
                    seat.holder = self.here.caller
                    if seat.state is WAITING:
                        self._stand_in_line(seat, tag, now)
                    self._tidy(now)
                finally:
                    self._busy = False
            if self._bells or self._chores:
                self._flush()
            return self._wait_or_open(seat, now, opener, timeout)
        except LineFull:
            self._flush()
            raise self._too_many_waiting(tag) from None
        except BaseException:
            if seat is not None:
                try:
                    self.give_up(seat)
                except BaseException:  # a second interrupt
                    self.give_up(seat)
                    raise
            raise

    def _note_exhaustion(self, tag: str, now: float) -> None:
        """Let the log say that somebody waits because everything is in use."""
        scheduler = self.scheduler
        if scheduler.in_use < scheduler.capacity:
            return  # he waits for his own tag
        accounts = scheduler.roster.accounts.values()
        holders = [(a.tag, a.in_use) for a in accounts if a.in_use]
        self.journal.begin(tag, now, scheduler.capacity, holders)
        self._plan_visit()

    def _prefer(self, tag: str, record: Record) -> Record:
        """Exchange an idle record for one that the server knows under `tag`, if any."""
        if record.info.get(TOLD) == tag:
            return record
        for known in list(self._idle):
            if known.info.get(TOLD) == tag:
                try:
                    self._idle.remove(known)
                except ValueError:
                    continue  # lent a moment ago
                self._put_back(record)
                return known
        return record

    def _spare_seat(self) -> Seat:
        return self._spare_seats.pop() if self._spare_seats else Seat(self)

    def move(self, seat: Seat, tag: str) -> bool:
        """Charge a checked-out seat to another tag, if that one is next."""
        if seat.loan is not None and self._in_section():
            seat.loan = tag
            return True
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

    def _wait_or_open(
        self, seat: Seat, since: float, opener: Opener, timeout: float | None
    ) -> Record:
        """Return the record for a seat that has none, once it has a slot."""
        waiter = seat.waiter
        if waiter is not None:
            self._wait(seat, waiter, since, timeout)
        record = seat.record
        if record is None:
            if self._left:
                self.make_room()
            record = self._open(seat, opener)
            if not self.scheduler.knows(seat):
                # The process was forked meanwhile: not of this accounting.
                seat.state, seat.may_warm = FREE, False
            elif self.options.min_idle and not opener.generation.warm:
                seat.record = record  # where `give_up` finds it
                self._first_use(opener)
        seat.record = None
        return record

    def _open(self, seat: Seat, opener: Opener) -> Record:
        """Open a connection for a seat."""
        if self._frozen:
            record = self._ask_again(seat)
            if record is not None:
                return record
        # What was begun is finished: the next caller needs it if this one has gone.
        create = partial(self._create, seat, opener)
        return cast(Record, self._waiter_class.run_through(create, seat))

    def _create(self, seat: Seat, opener: Opener) -> Record:
        account, began = seat.account, self.clock()
        record = None
        try:
            if self.share is not None:
                self.share.note_loop()
            with self._lock:
                self._opening.add(seat)
            record = cast(Record, opener._create_connection())
            record.seat = seat
            record.physical.opening = False
            return record
        finally:
            took = None if record is None else self.clock() - began
            with self._lock:
                self._opening.discard(seat)
                if record is not None:
                    self._records.add(record)
                self.count_opening(account, took)

    def open_again(self, seat: Seat) -> None:
        """Before a connection is opened in the place of one that was lost.

        The session of the one before may not be over, or the pool may have fewer slots
        now. Then this one would be one too many, and its caller waits for a slot again.
        """
        while seat.state is GRANTED and self.scheduler.knows(seat):
            with self._lock:  # no section: what is kept warm stays so
                there = self.connections_there()
                if there <= self._allotted and not self._frozen:
                    return
            handed = self._ask_again(seat)
            if handed is None:
                return
            self._replace(handed, seat)

    def _replace(self, record: Record, seat: Seat) -> None:
        """Close a connection, so that its slot can be used for another one."""
        with self.section() as now:
            record.seat = Seat(self)
            record.seat.since = now
            record.reason = "invalidated"
            seat.record = None
        record.close()
        self.visit()

    def _ask_again(self, seat: Seat) -> Record | None:
        """Give a seat's slot back and ask for another one under the same tag.

        Returns the record that came with it, if one did.
        """
        with self.section() as now:
            tag = seat.account.tag
            self._part_with(None, now)
            self._deliver(self.scheduler.release(seat, now), None)
            try:
                granted = self.scheduler.request(seat, tag, now)
            except LineFull:
                raise self._too_many_waiting(tag) from None
            if not granted:
                self._stand_in_line(seat, tag, now)
            else:
                self._seat_owner(seat, None)
        waiter = seat.waiter
        if waiter is not None:
            self._wait(seat, waiter, now, None)
        record, seat.record = seat.record, None
        return record

    def _stand_in_line(self, seat: Seat, tag: str, now: float) -> None:
        """Prepare a seat that has to wait. Caller is in a section."""
        seat.waiter = self._waiter_class(seat)
        if self._watch is None:
            self._watch = seat
        if self.share is not None:
            self._bells.append(partial(self.share.ring, tag))
        elif not self.journal.exhausted:
            self._note_exhaustion(tag, now)

    def _wait(
        self, seat: Seat, waiter: Waiter, since: float, timeout: float | None
    ) -> None:
        if timeout is None:
            timeout = context_timeout()
        if timeout is None:
            timeout = self.options.timeout
        deadline = math.inf if timeout is None else since + timeout
        # With a ledger, callers of other processes may give way, who are not seen here.
        patience = math.inf if self.share is not None else self._patience()
        check = since + patience
        now = since
        while True:
            until = min(deadline, check)
            if self._watch is seat:
                until = min(until, self.next_duty)
            waiter.wait(None if until == math.inf else until - now)
            if seat.waiter is None:
                return
            if self.share is not None and self.share.refusal is not None:
                raise self.share.refusal
            with self.section() as now:
                self.look_around(now)
                if now >= deadline and seat.waiter is not None:
                    captured = self._expire(seat, now)
                    break
                if now < check:
                    continue
                if not holds_another(self, seat):
                    check = math.inf  # and it will not, while it waits
                    continue
                check = now + patience
            self._refuse_deadlock(seat, deadline)
        diagnosis = captured.diagnose(self.here.frames())
        raise CheckoutTimeout(
            f"checkout timed out after {diagnosis.waited:.2f}s: {diagnosis}; "
            f"advice: {diagnosis.advice}",
            diagnosis.tag,
            diagnosis.waited,
            diagnosis,
        )

    def _expire(self, seat: Seat, now: float) -> Capture:
        """End a wait under the lock; return how things were."""
        captured = capture(self, seat, now)
        self.scheduler.expire(seat)
        if seat is self._watch:
            self._pass_the_watch()
        return captured

    def _patience(self) -> float:
        """Return how long a caller waits before it is checked for a deadlock."""
        timeout = self.options.deadlock_timeout
        return math.inf if timeout is None else timeout

    def _refuse_deadlock(self, seat: Seat, deadline: float) -> None:
        """Raise if a waiting seat could only be served by callers that wait likewise.

        The seat leaves its line in the section that finds it stuck: of two callers that
        wait for each other, only one is refused.
        """
        with self.section():
            if not is_stuck(self, seat, deadline):
                return
        if not collect():
            return  # another thread collects at this moment: after the next interval
        with self.section() as now:
            if not is_stuck(self, seat, deadline):
                return
            captured = capture(self, seat, now)
            self.scheduler.cancel(seat)
            if seat is self._watch:
                self._pass_the_watch()
            seat.account.meter.deadlocks += 1
        diagnosis = captured.diagnose(self.here.frames())
        raise SelfDeadlock(
            f"checkout would wait for itself: {diagnosis}; advice: {diagnosis.advice}",
            diagnosis.tag,
            diagnosis.waited,
            diagnosis,
        )

    def _too_many_waiting(self, tag: str) -> TooManyWaiting:
        scheduler = self.scheduler
        with self._lock:
            scheduler.roster.meters.of(tag).refusals += 1
        return TooManyWaiting(
            f"too many waiting: tag {tag!r} refused, waiting={scheduler.waiting} "
            f"max_waiting={self.options.max_waiting}; "
            f"pool in_use={scheduler.in_use}/{self.options.capacity}",
            tag,
        )

    def give_up(self, seat: Seat) -> None:
        """Leave the line, or pass on what was granted in the same instant."""
        if seat.orphaned:
            return  # its connection is being opened: see `Seat.adopt`
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
            sqlalchemy_private.disown(record)
        self.connections.disown()
        self._begin()
        if self.share is not None:
            self.connections.on_lost = self.share.ring
            self.allot(0, {}, 0)
            if self.share.keeper is not None:
                self.share.keeper.after_fork()

    def join(self, share: Share) -> None:
        """Become the member of a ledger, with nothing allotted yet."""
        self.share = share
        self.connections.on_lost = share.ring
        self.allot(0, {}, 0)


class TracedExchange(Exchange):
    """Notes where connections are checked out, and reports those out for too long."""

    __slots__ = ()

    def _begin(self) -> None:
        super()._begin()
        assert self.options.leak_threshold is not None
        self.leaks = LeakWatch(self, self.options.leak_threshold)

    def checkout(
        self, tag: str, opener: Opener, timeout: float | None = None
    ) -> Record:
        assert self.leaks is not None
        self.leaks.start()
        stack = locations(self.here.frames())
        record = super().checkout(tag, opener, timeout)
        record.seat.stack = stack
        return record


_living: weakref.WeakSet[Exchange] = weakref.WeakSet()


def _begin_again_all() -> None:
    for exchange in list(_living):
        exchange.begin_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_again_all)
