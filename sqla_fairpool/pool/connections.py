"""The records of a pool, and how many connections there may be now.

Rules of this file:

* All of it is guarded by the pool's lock, unless a method says otherwise. But a signal
  handler may take an idle record in the middle of a section of the same thread (see
  :mod:`.nested`): a section takes a record before it decides, and iterates over copies.
* Nothing is counted up and down: what is out of use is derived from the set of physical
  connections, each from before it is opened until its session has ended.
* There are two kinds of slots: a fixed number, and those that a ledger allots. What
  differs between them is a method here, so that no caller asks which kind it has.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import exc

from ..diagnosis.capture import Others
from ..options import PoolOptions
from ..scheduling.counters import Histogram
from ..scheduling.scheduler import Scheduler
from ..scheduling.ticket import GRANTED
from .checkout import TOLD, Checkout, Record
from .lock import PoolLock
from .physical import PhysicalConnection, PhysicalConnections

if TYPE_CHECKING:
    from ..stats import LedgerStats


class Connections:
    """Records: all of them, and those that lie idle.

    :param use_lifo: hand out the record that came back last, not first.
    """

    def __init__(self, use_lifo: bool) -> None:
        #: Records in the pool, the one that came back first on the left.
        self.idle: deque[Record] = deque()
        #: Every record there is.
        self.all: weakref.WeakSet[Record] = weakref.WeakSet()
        #: Checkouts for which a connection is opened. Weak: one that an interrupted
        #: caller has dropped gives its slot back.
        self.opening: weakref.WeakSet[Checkout] = weakref.WeakSet()
        #: When :meth:`release_soon` was called last.
        self.released_at = -math.inf
        self.hand_out(last_first=use_lifo)

    def hand_out(self, *, last_first: bool) -> None:
        """Set which of the records that came back is the next."""
        #: Where the next one is: -1 or 0, as an index.
        self.end = -1 if last_first else 0
        self._take = self.idle.pop if last_first else self.idle.popleft

    def pop(self) -> Record | None:
        """Take the idle record that is next, None if there is none."""
        try:
            return self._take()
        except IndexError:
            return None

    def prefer(self, tag: str) -> None:
        """Make a record the next one that the server knows under `tag`, if there is."""
        for record in list(self.idle):
            if record.info.get(TOLD) == tag and self.remove(record):
                self.put_back(record)
                return

    def remove(self, record: Record) -> bool:
        """Take an idle record; tell if it was there."""
        try:
            self.idle.remove(record)
        except ValueError:
            return False  # a signal handler took it a moment ago
        return True

    def put_back(self, record: Record) -> None:
        """Undo :meth:`pop`."""
        if self.end:
            self.idle.append(record)
        else:
            self.idle.appendleft(record)

    def add(self, record: Record, checkout: Checkout) -> None:
        """Note a new record, and what those that are out were told while it opened."""
        self.all.add(record)
        if checkout.asked is not None and checkout.asked[0] <= self.released_at:
            checkout.may_keep = False

    def count_open(self) -> int:
        """Return how many idle records have a connection."""
        return len([r for r in list(self.idle) if r.dbapi_connection is not None])

    def granted(self) -> list[Checkout]:
        """Return the checkouts whose records are out."""
        checkouts = [record.fair.checkout for record in self.all]
        return [checkout for checkout in checkouts if checkout.state is GRANTED]

    def release_soon(self, now: float) -> None:
        """Have what is out now looked at when it comes back, and not be kept warm."""
        self.released_at = now
        for checkout in self.granted():
            checkout.may_keep = False


class Member(Protocol):
    """What the slots ask of the pool's side of a ledger. Called without the lock."""

    @property
    def refusal(self) -> exc.SQLAlchemyError | None: ...
    @property
    def handovers(self) -> Histogram: ...
    def stats(self) -> LedgerStats: ...
    @property
    def trouble(self) -> str | None: ...
    def ring(self, tag: str | None = None) -> None: ...
    def lead(self, terms: Mapping[str, Any]) -> None: ...
    def note_loop(self) -> None: ...
    def before_opening(self) -> None: ...
    def after_opening(self, physical: PhysicalConnection) -> None: ...
    def after_fork(self) -> None: ...
    def others(self) -> Others: ...


class Reservation:
    """The right to open one connection ahead, for as long as this object lives."""


class Slots:
    """A fixed number of slots.

    :param allotted: how many connections there may be.
    :param existing: the connections that there are.
    """

    #: A record without a connection is kept: the next checkout opens one in its place.
    keeps_hollow_records = True
    #: A caller that waits can only be served by callers of this process.
    sees_all_callers = True
    #: A signal handler in the middle of a section may open one more connection.
    can_open_in_section = True
    #: They are given to checkouts alone, so what is opened ahead is checked out.
    on_request_only = False
    #: Others need slots: what falls idle is given back.
    pressed = False
    #: The allotment fell below what there is: what is released is given back.
    has_surplus = False
    #: Only the connections that there are may be used: each closed one is one less.
    frozen = False
    #: Why no caller may have a connection, if so.
    refusal: exc.SQLAlchemyError | None = None

    def __init__(
        self,
        allotted: int,
        scheduler: Scheduler,
        connections: Connections,
        existing: PhysicalConnections,
    ) -> None:
        self.allotted = allotted
        self.existing = existing
        self._scheduler = scheduler
        self._connections = connections
        #: Connections that are about to be opened ahead.
        self.reserved: weakref.WeakSet[Reservation] = weakref.WeakSet()

    def in_pool(self) -> int:
        """Return how many connections are out, or idle and open."""
        return self._scheduler.in_use + self._connections.count_open()

    def apart(self) -> list[PhysicalConnection]:
        """Return the connections that no checkout pays for, nor lie in the pool."""
        idle = {id(record) for record in list(self._connections.idle)}
        return self.existing.apart(idle)

    def out_of_use(self) -> int:
        """Return how many slots no caller can have: no checkout pays for them."""
        return len(self.apart()) + len(self.reserved)

    def there(self) -> int:
        """Return how many connections there are."""
        return self.in_pool() + self.out_of_use()

    def usable(self, leaving: int = 0) -> int:
        """Return how many slots may be in use now.

        Those out of use count, unless they are beyond what is allotted: a caller that
        has a connection, or takes one that is there, opens none.

        :param leaving: slots in use that are about to be released without a connection.
        """
        there = self.in_pool() - leaving
        return min(self.allotted, max(self.allotted - self.out_of_use(), there))

    def has_room(self) -> bool:
        """Tell if a connection may be opened in the place of one that was lost."""
        return self.there() <= self.allotted and not self.frozen

    # -- what differs with a ledger --------------------------------------------------

    def is_over(self, physical: PhysicalConnection) -> bool:
        """Tell if nothing is left of a lost connection that needs a slot. No lock."""
        return physical not in self.existing

    def is_paid_by_a_checkout(self) -> bool:
        """Tell if an end that was noticed just now needs no section."""
        return self._scheduler.capacity == self.allotted

    def detached(self, physical: PhysicalConnection) -> None:
        """A connection has left the pool without being closed: not ours any more."""
        if not (physical.ending or physical.orphaned):
            self.existing.release(physical)

    def returned(self, *, idle: bool) -> None:
        """A slot was released; `idle`: its connection lies idle now."""

    def recounted(self) -> None:
        """A connection that had ended was counted anew."""

    def wanted(self, tag: str) -> None:
        """A caller waits under a tag."""

    def before_creating(self) -> None:
        """A record is about to be made. No lock."""

    def before_opening(self) -> None:
        """A connection is about to be opened: raise if it may not be. No lock."""

    def after_opening(self, physical: PhysicalConnection) -> None:
        """A record was made: raise if its connection may not be used. No lock."""

    def change(self, before: PoolOptions, options: PoolOptions) -> PoolOptions:
        """Return the options that may be in force now, of those that are asked for."""
        self.allotted += options.capacity - before.capacity
        return options

    def describe(self) -> tuple[int | None, str | None, Callable[[], Others]]:
        """Return what a ledger allots, and why it is no more; None without one.

        And what returns what it tells of others, without the lock.
        """
        return None, None, Others

    def after_fork(self) -> None:
        """Begin anew in a forked child. No lock."""


class LedgerSlots(Slots):
    """As many slots as a ledger allots to this process; none at first.

    :param member: the pool's side of the ledger.
    """

    keeps_hollow_records = False
    sees_all_callers = False
    can_open_in_section = False
    on_request_only = True

    def __init__(
        self,
        member: Member,
        lock: PoolLock,
        scheduler: Scheduler,
        connections: Connections,
        existing: PhysicalConnections,
    ) -> None:
        super().__init__(0, scheduler, connections, existing)
        self.member = member
        self._wake_ups = lock.wake_ups
        existing.on_lost = member.ring

    @property
    def refusal(self) -> exc.SQLAlchemyError | None:  # type: ignore[override]  # read only
        return self.member.refusal

    def is_over(self, physical: PhysicalConnection) -> bool:
        return False

    def is_paid_by_a_checkout(self) -> bool:
        return False

    def detached(self, physical: PhysicalConnection) -> None:
        pass  # it counts until it is closed

    def returned(self, *, idle: bool) -> None:
        if self.has_surplus:
            self.has_surplus = self.there() > self.allotted
        if self.has_surplus or (idle and self.pressed):
            self.recounted()

    def recounted(self) -> None:
        self._wake_ups.append(self.member.ring)

    def wanted(self, tag: str) -> None:
        self._wake_ups.append(lambda: self.member.ring(tag))

    def change(self, before: PoolOptions, options: PoolOptions) -> PoolOptions:
        if options.terms == before.terms:
            return options
        # They are the ledger's: in force here once they are in force there.
        self._wake_ups.append(partial(self.member.lead, options.terms))
        return options.with_terms(before.terms)

    def describe(self) -> tuple[int | None, str | None, Callable[[], Others]]:
        return self.allotted, self.member.trouble, self.member.others

    def before_creating(self) -> None:
        self.member.note_loop()

    def before_opening(self) -> None:
        self.member.before_opening()

    def after_opening(self, physical: PhysicalConnection) -> None:
        self.member.after_opening(physical)

    def after_fork(self) -> None:
        self.member.after_fork()
