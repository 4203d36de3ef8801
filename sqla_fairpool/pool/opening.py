"""How connections are opened: for a checkout, in the place of a lost one, and ahead.

Rules of this file:

* A connection exists from before it is opened (see :mod:`.physical`), and its checkout
  has a slot for it; one that is opened ahead (``min_idle``) has a slot that is out of
  use meanwhile. Opening itself is not done under the lock.
* What was begun is finished, though the caller's task is cancelled: the next caller
  needs the connection if this one has gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from sqlalchemy import exc

from ..scheduling.tags import ALL
from ..scheduling.ticket import GRANTED, LineFull, TagState
from ..tagging import outside_of_blocks
from .checkout import Checkout, Core, Generation, Opener, Record, RecordState
from .connections import Reservation
from .housekeeping import Housekeeping
from .physical import PhysicalConnection, PhysicalConnections
from .sqlalchemy_private import pool_of
from .transitions import Transitions
from .waiters import TaskWaiter, Waiter
from .waiting import Waiting

#: Seconds that opening ahead waits for slots of a ledger: other processes may need them
#: more, so what there is in a moment has to do.
_PATIENCE = 2.0


class Reopening:
    """The owner of a connection that is opened in the place of a lost one."""

    def __init__(
        self, existing: PhysicalConnections, physical: PhysicalConnection, record: Any
    ) -> None:
        self._existing = existing
        self._physical = physical
        self._pool = pool_of(record)

    @property
    def orphaned(self) -> bool:
        """The caller has gone: the record may be opened again, beside this one."""
        return self._physical.orphaned

    @orphaned.setter
    def orphaned(self, value: bool) -> None:
        self._physical.orphaned = value

    def abandon(self) -> None:
        """No waiter is this owner's."""

    def adopt(self, connection: Any) -> None:
        """Close what was opened for nobody."""
        physical = self._physical
        physical.opening = physical.orphaned = False  # no record's, so it is apart
        if connection is None:
            self._existing.ended_soon(physical)
        else:
            self._existing.opened(physical, connection)
            close = partial(self._pool._close_connection, connection, terminate=True)
            TaskWaiter.run_apart(close)  # a thread leaves no orphans


class Opening:
    """Opens the connections of a pool, and keeps `min_idle` of them open."""

    def __init__(
        self,
        state: Transitions,
        housekeeping: Housekeeping,
        waiting: Waiting,
        waiter_class: type[Waiter],
    ) -> None:
        self._state = state
        self._housekeeping = housekeeping
        self._waiting = waiting
        self._waiter_class = waiter_class
        self.reconnects = waiting.reconnects

    def open(self, checkout: Checkout, opener: Opener) -> Record:
        """Open a connection for a checkout that has a slot."""
        if self._state.slots.frozen:
            record = self._request_again(checkout)
            if record is not None:
                return record
        create = partial(self._create, checkout, opener)
        run = partial(self._waiter_class.run_through, create, checkout)
        return cast(Record, self.reconnects.paced(run, checkout))

    def _create(self, checkout: Checkout, opener: Opener) -> Record:
        state, tag_state = self._state, checkout.tag_state
        began, record = state.lock.clock(), None
        try:
            state.slots.before_creating()
            with state.lock.mutex:
                state.connections.opening.add(checkout)
            made = cast(Record, opener._create_connection())
            try:
                state.slots.after_opening(made.fair.physical)
            except BaseException:
                made.close()
                raise
            record = made
            record.fair.checkout = checkout
            record.fair.physical.opening = False
            return record
        finally:
            with state.lock.mutex:
                state.connections.opening.discard(checkout)
                if record is not None:
                    state.connections.add(record, checkout)
                self._count(tag_state, began, record is not None)

    def open_for_record(
        self, core: Core, invoke: Callable[[Any], Any], record: Any
    ) -> Any:
        """Open a record's connection: its first one (timed elsewhere), or another.

        :param invoke: the pool's creator, made to take a record.
        """
        fair: RecordState | None = getattr(record, "fair", None)  # None: a new record
        connect = partial(self._connect, core, invoke, record, fair)
        if fair is None:
            return connect()  # in its turn already
        self._make_sure_of_a_slot(fair.checkout)
        return self.reconnects.paced(connect, fair.checkout)

    def _connect(
        self,
        core: Core,
        invoke: Callable[[Any], Any],
        record: Any,
        fair: RecordState | None,
    ) -> Any:
        state = self._state
        state.slots.before_opening()
        began, existing = state.lock.clock(), state.slots.existing
        physical = PhysicalConnection(record)
        if fair is None:
            record.fair = RecordState(physical, Checkout(core))
        else:
            fair.physical = physical
        connection, connect = None, partial(invoke, record)
        if fair is not None:  # else what was begun is run through as a whole
            run = self._waiter_class.run_through
            connect = partial(run, connect, Reopening(existing, physical, record))
        try:
            with existing.opening(physical):
                with outside_of_blocks():
                    connection = connect()
                existing.opened(physical, connection)
        finally:
            if fair is not None:
                self._count(fair.checkout.tag_state, began, connection is not None)
        return connection

    def _make_sure_of_a_slot(self, checkout: Checkout) -> None:
        """Before a connection is opened in the place of one that was lost.

        The session of the one before may not be over, or the pool may have fewer slots
        now. Then this one would be one too many, and its caller waits for a slot again.
        """
        state = self._state
        while checkout.state is GRANTED and state.scheduler.knows(checkout):
            with state.lock.mutex:  # no section: what is kept warm stays so
                if state.slots.has_room():
                    return
            record = self._request_again(checkout)
            if record is None:
                return
            record.fair.checkout = Checkout(checkout.core)
            record.fair.close_reason = "invalidated"
            record.close()
            state.lock.visit()

    def _request_again(self, checkout: Checkout) -> Record | None:
        """Give a slot back and ask for another one; return the record with it."""
        try:
            since = self._state.lock.run(self._release_and_request, checkout)
            waiter = checkout.waiter
            if waiter is not None:
                self._waiting.wait(checkout, waiter, since, None)
        except BaseException:
            checkout.core.give_up(checkout)
            raise
        record, checkout.record = checkout.record, None
        return record

    def _release_and_request(self, checkout: Checkout, now: float) -> float:
        state, tag = self._state, checkout.tag_state.tag
        state.part_with(None, now)
        state.deliver(state.scheduler.release(checkout, now))
        try:
            granted = state.scheduler.request(checkout, tag, now)
        except LineFull:
            raise self._waiting.too_many(tag) from None
        if granted:
            state.grant(checkout, None)
        else:
            self._waiting.join_line(checkout, tag, now)
        return now

    def _count(self, tag_state: TagState, began: float, is_open: bool) -> None:
        """Count a connection that was opened for a tag, or could not be."""
        lock = self._state.lock
        with lock.mutex:
            if is_open:
                tag_state.counters.create.add(lock.clock() - began)
            else:
                tag_state.counters.create_failures += 1

    # -- ahead -------------------------------------------------------------------------

    def warm_up(self, core: Core, opener: Opener) -> int:
        """Open connections until there are `min_idle`; return how many were opened."""
        generation = opener.generation
        if self._housekeeping.owner is not generation:
            self._state.run(self._housekeeping.hand_over, generation)
        generation.warmed_up = True
        if self._state.slots.on_request_only:
            return self._check_out_ahead(core, opener)
        opened = 0
        while self._housekeeping.owner is generation and self._open_ahead(opener):
            opened += 1
        return opened

    def warm_up_apart(self, core: Core, opener: Opener) -> None:
        """:meth:`warm_up`, while the caller that has opened the first one goes on."""
        opener.generation.warmed_up = True
        self._waiter_class.run_apart(partial(self._try_to_warm_up, core, opener))

    def _try_to_warm_up(self, core: Core, opener: Opener) -> None:
        try:
            self.warm_up(core, opener)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            opener.logger.warning(
                "%d connections (min_idle) could not be opened ahead: %s",
                self._state.options.min_idle,
                error,
            )

    def _check_out_ahead(self, core: Core, opener: Opener) -> int:
        """Open them where slots are given to checkouts alone."""
        existing, options = self._state.slots.existing, self._state.options
        out: list[Record] = []
        opened = 0
        try:
            while len(out) < options.min_idle:
                before = len(existing)
                out.append(core.checkout(options.default_tag, opener, _PATIENCE))
                opened += len(existing) > before
        except exc.TimeoutError:
            pass
        finally:
            for record in out:
                core.checkin(record)
        return opened

    def _open_ahead(self, opener: Opener) -> bool:
        """Open one more connection if one is wanted; tell if one was."""
        lock = self._state.lock
        slot = lock.run(self._reserve)
        if slot is None:
            return False
        began, record = lock.clock(), None
        try:
            opened = self.reconnects.paced(opener._create_connection, None)
            record = cast(Record, opened)
            record.fair.idle_since = lock.run(self._count_opening, began)
        finally:
            lock.run(self._add_idle, slot, record, opener.generation)
        return True

    def _reserve(self, now: float) -> Reservation | None:
        """Reserve a slot for one more connection, if one is wanted and free."""
        state = self._state
        idle, slots, scheduler = state.connections.idle, state.slots, state.scheduler
        # Among those out of use are the ones that others open at this moment.
        there = slots.in_pool() + slots.out_of_use()
        is_paused = ALL in scheduler.tags.pauses
        if there >= state.options.min_idle or slots.frozen or is_paused:
            return None
        hollow = [r for r in list(idle) if r.dbapi_connection is None]
        if hollow:
            state.connections.remove(hollow[0])  # the new one takes its place
        if scheduler.in_use + len(idle) >= scheduler.capacity:
            return None
        slot = Reservation()
        slots.reserved.add(slot)
        state.recount(now)
        return slot

    def _count_opening(self, began: float, now: float) -> float:
        """Count one that belongs to no tag, so it counts for the default tag."""
        tags, options = self._state.scheduler.tags, self._state.options
        tags.get(options.default_tag, now).counters.create.add(now - began)
        return now

    def _add_idle(
        self,
        slot: Reservation,
        record: Record | None,
        generation: Generation,
        now: float,
    ) -> None:
        """Put a new connection, or none, into the pool, and its slot into use."""
        state, owner = self._state, self._housekeeping.owner
        state.slots.reserved.discard(slot)
        if record is not None:
            record.fair.physical.opening = False
            state.connections.all.add(record)
            state.connections.idle.append(record)  # it pays for itself
        granted = state.scheduler.set_capacity(state.slots.usable(), now)
        if record is None or not state.connections.remove(record):
            state.deliver(granted)
        elif granted and generation is owner:
            state.deliver(granted, record)
        else:
            state.deliver(granted)
            state.connections.idle.append(record)
            if generation is owner:
                state.drain(now)
            else:
                state.retire(record, now, "disposed")  # another one has taken over
