"""What happens to connections in the pool while nobody asks for one.

They are opened ahead (`min_idle`), closed when nobody has used them for a while
(`idle_connection_ttl`), closed or left behind when another pool takes over, and
become fewer when the pool is made smaller.

Rules of this file:

* There is no background thread, but for the moment in which connections are opened
  ahead. What is due is done by the next visitor, and the common path of a checkout only
  compares the time with `next_visit`.
* A connection that is being opened ahead or closed has a slot: that is kept out
  of use meanwhile, so there are never more connections than the capacity.
"""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from sqlalchemy import exc

from ..options import BadOption, PoolOptions
from ..scheduling.account import GRANTED
from .checkout import Generation, Opener, Record, Seat
from .desk import Desk, Reservation

__all__ = ["Upkeep"]

#: Seconds that opening ahead waits for slots of a ledger.
_PATIENCE = 2.0

#: With the capacity, what the members of a ledger agree on.
TERMS = ("soft_limit", "max_limit", "idle_timeout", "reallocation_interval")

#: Looks at the idle connections within one ``idle_connection_ttl``. Each costs a
#: few microseconds; a connection is closed a look's distance late at most.
_LOOKS = 4


class Upkeep(Desk):
    """The desk, with what is done there between two callers."""

    __slots__ = ("_next_look", "next_visit")

    def _begin(self) -> None:
        super()._begin()
        self._plan(self.clock())

    # -- what is due ----------------------------------------------------------------

    def _plan(self, now: float) -> None:
        ttl = self.options.idle_connection_ttl
        self._next_look = math.inf if ttl is None else now + ttl / _LOOKS
        # What is to fall idle must not be handed out in turn.
        self._hand_out(last_first=self._use_lifo or ttl is not None)
        self._plan_visit()

    #: When somebody has to look around.
    next_visit: float

    def look_around(self, now: float) -> None:
        """Do what is due, if it is: idle tags, unused connections.

        Caller is in a section.
        """
        if now < self.next_visit:
            return
        self._deliver(self.scheduler.tick(now), None)
        self.connections.end_abandoned()
        if now >= self._next_look:
            self._close_unused(now)
            self._plan(now)
        if now >= self.journal.next_look:
            scheduler = self.scheduler
            self.journal.look(now, scheduler.waiting, scheduler.arrivals)
        self._plan_visit()

    @property
    def next_duty(self) -> float:
        """When somebody has to look around for whom a waiter is woken.

        Not for the journal: while he waits, the pool is as exhausted as before.
        """
        return min(self.scheduler.next_tick, self._next_look)

    def _plan_visit(self) -> None:
        self.next_visit = min(self.next_duty, self.journal.next_look)

    def keep_up(self) -> None:
        """Look around without coming for anything."""
        with self.section() as now:
            self.look_around(now)

    def _close_unused(self, now: float) -> None:
        """Have the connections closed that nobody has used for too long.

        When a connection was returned is not noted, to spare the common path. But
        when it was checked out is; if that is the same at two looks, nobody has
        used it in between.
        """
        ttl = cast(float, self.options.idle_connection_ttl)
        unused = []
        for record in list(self._idle):
            seen = getattr(record, "seen", None)
            if seen is None or seen[0] != record.seat.since:
                seen = record.seen = (
                    record.seat.since,
                    self._unused_since(record, now),
                )
            if now - seen[1] >= ttl and record.dbapi_connection is not None:
                unused.append(record)
        spare = self._open_connections() - self.options.min_idle
        unused.sort(key=lambda record: record.seen[1])
        for record in unused[: max(spare, 0)]:
            self._retire(record, now, "unused")

    def _unused_since(self, record: Record, now: float) -> float:
        """Return a time since which an idle record surely was not used.

        That is now; or, if its tag has been quiet for longer, since then.
        """
        account = getattr(record.seat, "account", None)
        if account is None or account.silent or account.last_activity is None:
            return now
        return cast(float, account.last_activity)

    def _open_connections(self) -> int:
        """Connections that are out, being opened or in the pool."""
        return self.scheduler.in_use + self.count_idle()[1]

    # -- opening ahead -----------------------------------------------------------

    def warm_up(self, opener: Opener) -> int:
        """Open connections until there are `min_idle`; return how many were opened.

        Those that are checked out count. Raises what opening raises.
        """
        generation = opener.generation
        if self.owner is not generation:
            self.hand_to(generation)
        generation.warm = True
        if self.share is not None:
            return self._check_out_ahead(opener)
        opened = 0
        while self.owner is generation and (slot := self._reserve()) is not None:
            record = None
            try:
                began = self.clock()
                record = cast(Record, opener._create_connection())
                # Nobody's in particular, so the default tag's.
                default = self.options.default_tag
                account = self.scheduler.roster.get(default, began)
                self.count_opening(account, self.clock() - began)
                record.seat = Seat(cast(Any, self))
                record.seat.since = self.clock()
                opened += 1
            finally:
                self._add_idle(slot, record, generation)
        return opened

    def _check_out_ahead(self, opener: Opener) -> int:
        """:meth:`warm_up` with a ledger, which gives slots to those who ask for them.

        Others may need them more: what there is in a moment has to do.
        """
        out: list[Record] = []
        opened = 0
        try:
            while len(out) < self.options.min_idle:
                before = len(self.connections)
                out.append(self.checkout(self.options.default_tag, opener, _PATIENCE))
                opened += len(self.connections) > before
        except exc.TimeoutError:
            pass
        finally:
            for record in out:
                self.checkin(record, opener.generation)
        return opened

    @abstractmethod
    def checkout(
        self, tag: str, opener: Opener, timeout: float | None = None
    ) -> Record: ...

    @abstractmethod
    def checkin(self, record: Record, generation: Generation) -> None: ...

    def _reserve(self) -> Reservation | None:
        """Reserve a slot for one more connection, if one is wanted and free."""
        with self.section() as now:
            scheduler = self.scheduler
            # Among those out of use are the ones that others open at this moment.
            there = self._open_connections() + self._out_of_use()
            if there >= self.options.min_idle or self._frozen:
                return None
            hollow = [r for r in list(self._idle) if r.dbapi_connection is None]
            if hollow and hollow[0] in self._idle:
                self._idle.remove(hollow[0])  # its place is taken by the new one
            if scheduler.in_use + len(self._idle) >= scheduler.capacity:
                return None
            slot = Reservation()
            self._reserved.add(slot)
            self._recount(now)
        return slot

    def _add_idle(
        self, slot: Reservation, record: Record | None, generation: Generation
    ) -> None:
        """Put a new connection, or none, into the pool, and its slot into use."""
        with self.section() as now:
            self._reserved.discard(slot)
            if record is not None:
                record.physical.opening = False
                self._records.add(record)
                self._idle.append(record)  # it pays for itself
            granted = self.scheduler.set_capacity(self._capacity(), now)
            if record is not None:
                self._idle.remove(record)
            if record is None:
                self._deliver(granted, None)
                return
            if granted and generation is self.owner:
                self._deliver(granted, record)
                return
            self._deliver(granted, None)
            self._idle.append(record)
            if generation is self.owner:
                self._drain(now)
            else:
                self._retire(record, now, "disposed")  # another pool has taken over

    def _first_use(self, opener: Opener) -> None:
        """Have `min_idle` connections opened, because the first one was."""
        opener.generation.warm = True
        self._waiter_class.run_apart(partial(self._open_ahead, opener))

    def _open_ahead(self, opener: Opener) -> None:
        try:
            self.warm_up(opener)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                raise
            opener.logger.warning(
                "%d connections (min_idle) could not be opened ahead: %s",
                self.options.min_idle,
                error,
            )

    # -- changed options --------------------------------------------------------------

    def reconfigure(
        self, changes: Mapping[str, Any]
    ) -> tuple[PoolOptions, PoolOptions]:
        """Change options; return those before and those in force now.

        :raises sqlalchemy.exc.ArgumentError: for a bad value; nothing is changed.
        """
        with self.section() as now:
            before = self.options
            options = before.changed(changes)
            if self.share is not None:
                self._refuse_other_terms(before, options)
            self.options = options
            self._pool_size = options.pool_size
            self._never_full = options.max_overflow == 0
            for seat in self.granted_seats():
                seat.may_warm = False  # to be looked at when it comes back
            self._allotted += options.capacity - before.capacity
            granted = self.scheduler.reconfigure(
                # Slots that are out of use for a moment stay so.
                capacity=self._capacity(),
                soft_limit=options.soft_limit,
                max_limit=options.max_limit,
                idle_timeout=options.idle_timeout,
                reallocation_interval=options.reallocation_interval,
                max_waiting=options.max_waiting,
                now=now,
            )
            self._deliver(granted, None)
            self._drain(now)
            self._plan(now)
            self.owner.warm = self.owner.warm and options.min_idle <= before.min_idle
            # Whoever waits looks at the new times.
            self._pass_the_watch()
        return before, options

    @staticmethod
    def _refuse_other_terms(before: PoolOptions, options: PoolOptions) -> None:
        """Raise if what the members of a ledger agree on would change."""
        for name in ("capacity", *TERMS):
            value = getattr(options, name)
            if value != getattr(before, name):
                raise BadOption(
                    name, value, f"{getattr(before, name)}, as agreed with the ledger"
                )

    # -- one pool after the other ---------------------------------------------------

    def doom(self) -> None:
        """Have what is out now closed when it comes back."""
        with self.section():
            for record in list(self._records):
                if record.seat.state is GRANTED:
                    record.doomed = True
                    record.seat.may_warm = False

    def hand_to(self, generation: Generation) -> None:
        """Let another pool take over: what lies here is not for it."""
        with self.section():
            former = self.owner
            if former is generation:
                return
            former.left = []
            while (record := self._pop_idle()) is not None:
                former.left.append(record)
            self._left.update(former.left)
            for seat in self.granted_seats():
                seat.may_warm = False  # to be closed when it comes back
            self.owner = generation
            generation.warm = False
        if former.disposed:
            self.close_left(former)

    def make_room(self) -> None:
        """Before opening: close what a former pool has left, if it is in the way."""
        record = None
        with self._lock:
            if self.connections_there() > self._allotted:
                try:
                    record = self._left.pop()
                except KeyError:
                    pass  # the former pool was collected meanwhile
        if record is not None:
            record.reason = "disposed"
            record.close()

    def close_left(self, generation: Generation) -> None:
        """Close what a former pool has left."""
        while generation.left:
            record = generation.left.pop()
            with self._lock:
                self._left.discard(record)
            record.reason = "disposed"
            record.close()

    def hang_up_surplus(self) -> None:
        """End sessions that are too many, without the drivers and their loop.

        Those are idle, or wait to be closed by a loop that does not run.
        """
        with self.section() as now:
            self._drain(now)
            idle = {id(record) for record in list(self._idle)}
            waiting = [
                physical
                for physical in self.connections
                if (record := physical.record()) is not None
                and not physical.opening
                and id(record) not in idle
                and record not in self._left
                and record.seat.state is not GRANTED
            ]
        for physical in waiting:
            self.connections.hang_up(physical)

    def close_idle(self) -> None:
        """Close the connections that are in the pool."""
        with self.section() as now:
            for record in list(self._idle):
                self._retire(record, now, "disposed")
