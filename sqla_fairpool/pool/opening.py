"""How connections are opened: for a checkout, and in the place of one that was lost.

Rules of this file:

* A connection exists from before it is opened (see :mod:`.physical`), and its checkout
  has a slot for it. Opening itself is not done under the lock.
* What was begun is finished, though the caller's task is cancelled: the next caller
  needs the connection if this one has gone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from ..scheduling.ticket import GRANTED, LineFull, TagState
from ..tagging import outside_of_blocks
from .checkout import Checkout, Core, Opener, Record, RecordState
from .physical import PhysicalConnection
from .transitions import Transitions
from .waiters import Waiter
from .waiting import Waiting

__all__ = ["Opening"]


class Opening:
    """Opens the connections of a pool."""

    __slots__ = ("_state", "_waiter_class", "_waiting")

    def __init__(
        self, state: Transitions, waiting: Waiting, waiter_class: type[Waiter]
    ) -> None:
        self._state = state
        self._waiting = waiting
        self._waiter_class = waiter_class

    def open(self, checkout: Checkout, opener: Opener) -> Record:
        """Open a connection for a checkout that has a slot."""
        if self._state.slots.frozen:
            record = self._request_again(checkout)
            if record is not None:
                return record
        create = partial(self._create, checkout, opener)
        return cast(Record, self._waiter_class.run_through(create, checkout))

    def _create(self, checkout: Checkout, opener: Opener) -> Record:
        state, tag_state = self._state, checkout.tag_state
        began, record = state.lock.clock(), None
        try:
            state.slots.before_creating()
            with state.lock.mutex:
                state.connections.opening.add(checkout)
            record = cast(Record, opener._create_connection())
            record.fair.checkout = checkout
            record.fair.physical.opening = False
            return record
        finally:
            took = None if record is None else state.lock.clock() - began
            with state.lock.mutex:
                state.connections.opening.discard(checkout)
                if record is not None:
                    state.connections.all.add(record)
                self._count(tag_state, took)

    def open_for_record(
        self, core: Core, invoke: Callable[[Any], Any], record: Any
    ) -> Any:
        """Open a record's connection: its first one, or another.

        Those of new records are timed by :meth:`open`.

        :param invoke: the pool's creator, made to take a record. It is what a record
          calls (``Pool._invoke_creator``); nothing public is called before and after a
          connection is opened.
        """
        fair: RecordState | None = getattr(record, "fair", None)  # None: a new record
        if fair is not None:
            self._make_sure_of_a_slot(fair.checkout)
        state = self._state
        state.slots.before_opening()
        began, existing = state.lock.clock(), state.slots.existing
        physical = PhysicalConnection(record)
        if fair is None:
            record.fair = RecordState(physical, Checkout(core))
        else:
            fair.physical = physical
        with existing.opening(physical):
            try:
                with outside_of_blocks():
                    connection = invoke(record)
            except BaseException:
                if fair is not None:
                    self._count(fair.checkout.tag_state, None)
                raise
            existing.opened(physical, connection)
        if fair is not None:
            self._count(fair.checkout.tag_state, state.lock.clock() - began)
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
        """Give a slot back and ask for another one under the same tag.

        Returns the record that came with it, if one did.
        """
        since = self._state.lock.run(self._release_and_request, checkout)
        waiter = checkout.waiter
        if waiter is not None:
            self._waiting.wait(checkout, waiter, since, None)
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

    def _count(self, tag_state: TagState, seconds: float | None) -> None:
        """Count a connection that was opened for a tag, or None if it could not be."""
        with self._state.lock.mutex:
            if seconds is None:
                tag_state.counters.create_failures += 1
            else:
                tag_state.counters.create.add(seconds)
