"""``min_idle``: connections that are opened before a caller needs them.

Rule of this file: a connection that is opened ahead has a slot that is out of use
meanwhile, so there are never more connections than the capacity.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import cast

from sqlalchemy import exc

from .checkout import Core, Generation, Opener, Record
from .housekeeping import Housekeeping
from .slots import Reservation
from .transitions import Transitions
from .waiters import Waiter

__all__ = ["OpeningAhead"]

#: Seconds that opening ahead waits for slots of a ledger: other processes may need them
#: more, so what there is in a moment has to do.
_PATIENCE = 2.0


class OpeningAhead:
    """Keeps `min_idle` connections open."""

    __slots__ = ("_housekeeping", "_state", "_waiter_class")

    def __init__(
        self,
        state: Transitions,
        housekeeping: Housekeeping,
        waiter_class: type[Waiter],
    ) -> None:
        self._state = state
        self._housekeeping = housekeeping
        self._waiter_class = waiter_class

    def warm_up(self, core: Core, opener: Opener) -> int:
        """Open connections until there are `min_idle`; return how many were opened.

        Those that are checked out count. Raises what opening raises.
        """
        generation = opener.generation
        if self._housekeeping.owner is not generation:
            self._housekeeping.hand_over(generation)
        generation.warmed_up = True
        if self._state.slots.on_request_only:
            return self._check_out_ahead(core, opener)
        return self._open_ahead(opener)

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
                core.checkin(record, opener.generation)
        return opened

    def _open_ahead(self, opener: Opener) -> int:
        generation, lock = opener.generation, self._state.lock
        opened = 0
        while self._housekeeping.owner is generation:
            slot = lock.run(self._reserve)
            if slot is None:
                break
            record = None
            try:
                began = lock.clock()
                record = cast(Record, opener._create_connection())
                record.fair.idle_since = lock.run(self._count_opening, began)
                opened += 1
            finally:
                lock.run(self._add_idle, slot, record, generation)
        return opened

    def _reserve(self, now: float) -> Reservation | None:
        """Reserve a slot for one more connection, if one is wanted and free."""
        state = self._state
        idle, slots, scheduler = state.connections.idle, state.slots, state.scheduler
        # Among those out of use are the ones that others open at this moment.
        there = slots.in_pool() + slots.out_of_use()
        if there >= state.options.min_idle or slots.frozen:
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
        scheduler, options = self._state.scheduler, self._state.options
        tag_state = scheduler.tags.get(options.default_tag, now)
        tag_state.counters.create.add(now - began)
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
