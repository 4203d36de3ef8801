"""What is done with a pool's connections while no caller asks for one.

They are closed when they were not used for a while (``idle_connection_ttl``), closed or
left behind when another pool takes over, and become fewer when the pool is made
smaller. (For those that are opened ahead see :mod:`.opening_ahead`.)

Rules of this file:

* There is no background thread. What is due is done by the next caller, and a checkout
  only compares the time with `next_visit`.
* A connection that is closed has a slot that is out of use meanwhile, so there are
  never more connections than the capacity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from ..options import PoolOptions
from ..scheduling.ticket import GRANTED
from .checkout import Generation
from .transitions import Transitions

__all__ = ["Housekeeping"]

#: Looks at the idle connections within one ``idle_connection_ttl``. Each costs a few
#: microseconds; a connection is closed that much late at most.
_LOOKS = 4


class Housekeeping:
    """What is due, and when.

    :param use_lifo: hand out the record that came back last in any case.
    """

    __slots__ = ("_next_look", "_state", "_use_lifo", "next_visit", "owner")

    def __init__(self, state: Transitions, use_lifo: bool) -> None:
        self._state = state
        self._use_lifo = use_lifo
        #: The pool whose connections are kept.
        self.owner = Generation()
        self.plan(state.lock.clock())

    # -- what is due -----------------------------------------------------------------

    def plan(self, now: float) -> None:
        """Note when something is due, by the options in force."""
        ttl = self._state.options.idle_connection_ttl
        self._next_look = math.inf if ttl is None else now + ttl / _LOOKS
        # What is to fall idle must not be handed out in turn.
        self._state.connections.hand_out(last_first=self._use_lifo or ttl is not None)
        self.plan_visit()

    def plan_visit(self) -> None:
        """Note when a caller has to look around."""
        #: When a caller has to look around.
        self.next_visit = min(self.next_duty, self._state.event_log.next_look)

    @property
    def next_duty(self) -> float:
        """When a caller has to look around for which another one is woken.

        Not for the event log: while that one waits, the pool is as exhausted as before.
        """
        return min(self._state.scheduler.next_tick, self._next_look)

    def look_around(self, now: float) -> None:
        """Do what is due: idle tags, unused connections. Caller is in a section."""
        if now < self.next_visit:
            return
        state = self._state
        state.deliver(state.scheduler.tick(now))
        state.slots.existing.end_abandoned()
        if now >= self._next_look:
            self._close_unused(now)
            self.plan(now)
        if now >= state.event_log.next_look:
            state.event_log.look(now, state.scheduler.waiting, state.scheduler.arrivals)
        self.plan_visit()

    def _close_unused(self, now: float) -> None:
        """Have the connections closed that were not used for too long."""
        state = self._state
        ttl = cast(float, state.options.idle_connection_ttl)
        unused = [
            record
            for record in list(state.connections.idle)
            if now - record.fair.idle_since >= ttl
            and record.dbapi_connection is not None
        ]
        spare = state.slots.in_pool() - state.options.min_idle
        unused.sort(key=lambda record: record.fair.idle_since)
        for record in unused[: max(spare, 0)]:
            state.retire(record, now, "unused")

    # -- changed options -------------------------------------------------------------

    def reconfigure(
        self, changes: Mapping[str, Any]
    ) -> tuple[PoolOptions, PoolOptions]:
        """Change options; return those before and those in force now.

        :raises sqlalchemy.exc.ArgumentError: for a bad value; nothing is changed.
        """
        return self._state.lock.run(self._reconfigure, changes)

    def _reconfigure(
        self, changes: Mapping[str, Any], now: float
    ) -> tuple[PoolOptions, PoolOptions]:
        state = self._state
        before = state.options
        options = before.changed(changes)
        state.slots.refuse_other_terms(before, options)
        state.options = options
        state.connections.release_soon()
        state.slots.allotted += options.capacity - before.capacity
        # Slots that are out of use for a moment stay so.
        granted = state.scheduler.reconfigure(
            **options.rules(), usable=state.slots.usable(), now=now
        )
        state.deliver(granted)
        state.drain(now)
        self.plan(now)
        if options.min_idle > before.min_idle:
            self.owner.warmed_up = False
        # The caller that has the watch looks at the new times.
        state.pass_the_watch()
        return before, options

    # -- one pool after the other ----------------------------------------------------

    def doom(self) -> None:
        """Have what is out now closed when it comes back."""
        self._state.lock.run(self._doom)

    def _doom(self, now: float) -> None:
        connections = self._state.connections
        for record in list(connections.all):
            if record.fair.checkout.state is GRANTED:
                record.fair.doomed = True
        connections.release_soon()

    def hand_over(self, generation: Generation) -> None:
        """Let another pool take over: what lies here is not for it."""
        former = self._state.lock.run(self._hand_over, generation)
        if former is not generation and former.disposed:
            self.close_left(former)

    def _hand_over(self, generation: Generation, now: float) -> Generation:
        """Return the pool that was in use before."""
        connections = self._state.connections
        former = self.owner
        if former is generation:
            return former
        former.left = []
        while (record := connections.pop()) is not None:
            former.left.append(record)
        connections.left.update(former.left)
        connections.release_soon()  # to be closed when they come back
        self.owner = generation
        generation.warmed_up = False
        return former

    def make_room(self) -> None:
        """Before opening: close what a former pool has left, if it is in the way."""
        slots, left = self._state.slots, self._state.connections.left
        record = None
        with self._state.lock.mutex:
            if slots.there() > slots.allotted:
                try:
                    record = left.pop()
                except KeyError:
                    pass  # the former pool was collected meanwhile
        if record is not None:
            record.fair.close_reason = "disposed"
            record.close()

    def close_left(self, generation: Generation) -> None:
        """Close what a former pool has left."""
        while generation.left:
            record = generation.left.pop()
            with self._state.lock.mutex:
                self._state.connections.left.discard(record)
            record.fair.close_reason = "disposed"
            record.close()

    def close_idle(self) -> None:
        """Close the connections that are in the pool."""
        self._state.lock.run(self._close_idle)

    def _close_idle(self, now: float) -> None:
        for record in list(self._state.connections.idle):
            self._state.retire(record, now, "disposed")

    def hang_up_surplus(self) -> None:
        """End sessions that are too many, without the drivers and their loop.

        Those are idle, or wait to be closed by a loop that does not run.
        """
        state = self._state
        with state.lock.section() as now:
            state.drain(now)
            idle = {id(record) for record in list(state.connections.idle)}
            surplus = [
                physical
                for physical in state.slots.existing
                if (record := physical.record()) is not None
                and not physical.opening
                and id(record) not in idle
                and record not in state.connections.left
                and record.fair.checkout.state is not GRANTED
            ]
        for physical in surplus:
            state.slots.existing.hang_up(physical)
