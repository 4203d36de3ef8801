"""What is done with a pool's connections while no caller asks for one.

They are closed when they were not used for a while (``idle_connection_ttl``) and when
another pool takes over, and become fewer when the pool is made smaller. Each one is
replaced somewhat before ``pool_recycle`` (``recycle_jitter``). (For those that are
opened ahead see :mod:`.opening`.)

Rules of this file:

* There is no background thread. What is due is done by the next caller, and a checkout
  only compares the time with `next_visit`.
* A connection that is closed has a slot that is out of use meanwhile, so there are
  never more connections than the capacity.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from ..options import PoolOptions
from ..scheduling.ticket import GRANTED
from .checkout import Generation, Record
from .physical import PhysicalConnection
from .transitions import Transitions

#: Looks at the idle connections within one ``idle_connection_ttl``. Each costs a few
#: microseconds; a connection is closed that much late at most.
_LOOKS = 4


class Housekeeping:
    """What is due, and when.

    :param use_lifo: hand out the record that came back last in any case.
    """

    def __init__(self, state: Transitions, use_lifo: bool) -> None:
        self._state = state
        self._use_lifo = use_lifo
        #: The pool whose connections are kept.
        self.owner = Generation()
        self._next_recycling = math.inf
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
        self.next_visit = min(
            self.next_duty, self._state.event_log.next_look, self._next_recycling
        )

    @property
    def next_duty(self) -> float:
        """When a caller that waits is woken to look around: not for the event log."""
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
        if now >= self._next_recycling:
            self._recycle(now)
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

    # -- lifetimes -------------------------------------------------------------------

    def note_lifetime(self, record: Record, recycle: float) -> None:
        """Note when a new connection is to be replaced. No section.

        :param recycle: the seconds after which SQLAlchemy replaces it in any case.
        """
        jitter = self._state.options.recycle_jitter
        if recycle > 0 and jitter:
            lifetime = recycle * (1.0 - jitter * random.random())
            with self._state.lock.mutex:
                due = record.fair.recycle_at = self._state.lock.clock() + lifetime
                self._next_recycling = min(self._next_recycling, due)
                self.plan_visit()

    def _recycle(self, now: float) -> None:
        """Have those replaced at their next checkout whose time has come."""
        self._next_recycling = math.inf
        for record in list(self._state.connections.all):
            if record.fair.recycle_at <= now:
                record.fair.recycle_at = math.inf
                self._state.lock.deferred.append(partial(_replace, record))
            self._next_recycling = min(self._next_recycling, record.fair.recycle_at)

    # -- changed options -------------------------------------------------------------

    def reconfigure(
        self, changes: Mapping[str, Any], now: float
    ) -> tuple[PoolOptions, PoolOptions]:
        """Change options, all or none; return those before and those in force now."""
        state = self._state
        before = state.options
        self._put_in_force(state.slots.change(before, before.changed(changes)), now)
        return before, state.options

    def adopt(self, terms: Mapping[str, Any], now: float) -> None:
        """Have the limits of a ledger in force. Caller is in a section."""
        self._put_in_force(self._state.options.with_terms(terms), now)

    def _put_in_force(self, options: PoolOptions, now: float) -> None:
        state = self._state
        before, state.options = state.options, options
        state.connections.release_soon(now)
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

    # -- one pool after the other ----------------------------------------------------

    def doom(self, now: float) -> None:
        """Have what is out now closed when it comes back. Caller is in a section."""
        connections = self._state.connections
        for record in list(connections.all):
            if record.fair.checkout.state is GRANTED:
                record.fair.doomed = True
        connections.release_soon(now)

    def hand_over(self, generation: Generation, now: float) -> None:
        """Let another pool take over: what lies here is not for it, and is closed.

        Caller is in a section.
        """
        if self.owner is not generation:
            self.close_idle(now)
            # To be closed when they come back.
            self._state.connections.release_soon(now)
            self.owner = generation
            generation.warmed_up = False

    def close_idle(self, now: float) -> None:
        """Have the idle connections closed. Caller is in a section."""
        for record in list(self._state.connections.idle):
            self._state.retire(record, now, "disposed")

    def hang_up_surplus(self) -> None:
        """End idle sessions that are too many, without the drivers and their loop."""
        for physical in self._state.lock.run(self._surplus):
            self._state.slots.existing.hang_up(physical)

    def _surplus(self, now: float) -> list[PhysicalConnection]:
        self._state.drain(now)
        apart = self._state.slots.apart()
        return [p for p in apart if p.record() is not None and not p.ending]


def _replace(record: Record) -> None:
    """Have a record's connection replaced at its next checkout."""
    if record.dbapi_connection is not None:
        record.fair.close_reason = "recycled"
        record.invalidate(soft=True)
