"""How many connections there may be now, and which there are.

Rules of this file:

* Nothing is counted up and down: what is out of use is derived from the set of physical
  connections, each from before it is opened until its session has ended.
* There are two kinds: a fixed number of slots, and slots that a ledger allots. What
  differs between them is a method here, so that no caller asks which kind it has.
* Guarded by the pool's lock, unless a method says otherwise.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from sqlalchemy import exc

from ..options import BadOption, PoolOptions
from ..scheduling.scheduler import Scheduler
from .connections import Connections
from .lock import PoolLock
from .physical import PhysicalConnection, PhysicalConnections

__all__ = ["LedgerSlots", "Member", "Reservation", "Slots"]

#: With the capacity, what the members of a ledger agree on.
TERMS = ("soft_limit", "max_limit", "idle_timeout", "reallocation_interval", "tags")


class Member(Protocol):
    """What the slots ask of the pool's side of a ledger. Called without the lock."""

    @property
    def refusal(self) -> exc.SQLAlchemyError | None: ...
    @property
    def trouble(self) -> str | None: ...
    def ring(self, tag: str | None = None) -> None: ...
    def note_loop(self) -> None: ...
    def before_opening(self) -> None: ...
    def after_fork(self) -> None: ...


class Reservation:
    """The right to open one connection ahead, for as long as this object lives."""


class Slots:
    """A fixed number of slots.

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
    #: Why no caller may have a connection, if so.
    refusal: exc.SQLAlchemyError | None = None

    def __init__(
        self,
        allotted: int,
        scheduler: Scheduler,
        connections: Connections,
        existing: PhysicalConnections,
    ) -> None:
        #: How many connections there may be.
        self.allotted = allotted
        #: Only the connections that there are may be used: each that is closed is one
        #: less.
        self.frozen = False
        self.existing = existing
        self._scheduler = scheduler
        self._connections = connections
        # Connections that are about to be opened ahead.
        self.reserved: weakref.WeakSet[Reservation] = weakref.WeakSet()

    # -- numbers ---------------------------------------------------------------------

    def in_pool(self) -> int:
        """Return how many connections are out, or idle and open."""
        return self._scheduler.in_use + self._connections.count_open()

    def out_of_use(self) -> int:
        """Return how many slots no caller can have: no checkout pays for them."""
        idle = {id(record) for record in list(self._connections.idle)}
        return self.existing.apart(idle, self._connections.left) + len(self.reserved)

    def there(self) -> int:
        """Return how many connections there are."""
        return self.in_pool() + len(self._connections.left) + self.out_of_use()

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
        if not physical.ending:
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
        """A connection is about to be opened. No lock.

        :raises CheckoutTimeout: if it may not be.
        """

    def refuse_other_terms(self, before: PoolOptions, options: PoolOptions) -> None:
        """Raise if options may not be changed so."""

    def describe(self) -> tuple[int | None, str | None]:
        """Return what a ledger allots, and why it is no more; None without one."""
        return None, None

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
        self._lock = lock
        existing.on_lost = member.ring

    @property
    def refusal(self) -> exc.SQLAlchemyError | None:  # type: ignore[override]
        return self.member.refusal

    def is_over(self, physical: PhysicalConnection) -> bool:
        return False

    def is_paid_by_a_checkout(self) -> bool:
        return False

    def detached(self, physical: PhysicalConnection) -> None:
        pass  # it counts until it is closed

    def returned(self, *, idle: bool) -> None:
        if (idle and self.pressed) or self.there() > self.allotted:
            self._lock.wake_ups.append(self.member.ring)

    def recounted(self) -> None:
        self._lock.wake_ups.append(self.member.ring)

    def wanted(self, tag: str) -> None:
        self._lock.wake_ups.append(lambda: self.member.ring(tag))

    def before_creating(self) -> None:
        self.member.note_loop()

    def before_opening(self) -> None:
        self.member.before_opening()

    def refuse_other_terms(self, before: PoolOptions, options: PoolOptions) -> None:
        for name in ("capacity", *TERMS):
            agreed, value = getattr(before, name), getattr(options, name)
            if value != agreed:
                raise BadOption(name, value, f"{agreed}, as agreed with the ledger")

    def describe(self) -> tuple[int | None, str | None]:
        return self.allotted, self.member.trouble

    def after_fork(self) -> None:
        self.member.after_fork()
