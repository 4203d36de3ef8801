"""The nouns of the exchange: records, the seats on them, whose they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy.pool import ConnectionPoolEntry

from ..diagnosis.callers import Caller, Location
from ..scheduling.account import FREE, GRANTED, Ticket
from .connections import PhysicalConnection
from .waiters import Waiter

if TYPE_CHECKING:
    from .exchange import Exchange

__all__ = ["Generation", "Opener", "Record", "Seat"]


#: Long checkouts that a seat notes before they are booked, which takes the lock. So
#: many that it happens rarely, so few that the list is no burden.
_LONG_HOLDS_KEPT = 256


class Record(ConnectionPoolEntry):
    """For the type checker: a connection record with what we put on it."""

    seat: Seat
    #: What is known of its connection, or of the last one that it had.
    physical: PhysicalConnection
    #: Present, and True: to be closed when it comes back.
    doomed: bool
    #: Present from when it is decided that it is closed: why.
    reason: str
    #: Present after the first look at it while it was idle: its last checkout's
    #: time, and since when that has been known to be the last one.
    seen: tuple[float, float]


class Opener(Protocol):
    """Who opens another connection; a pool."""

    generation: Generation
    logger: Any

    def _create_connection(self) -> ConnectionPoolEntry: ...


class Generation:
    """One of the pools that follow each other at an exchange (``recreate()``)."""

    __slots__ = ("disposed", "left", "warm")

    def __init__(self) -> None:
        #: What lay in the pool when the next one took over: not for use there.
        self.left: list[Record] = []
        #: It was told to close what lies in it.
        self.disposed = False
        #: Its ``min_idle`` connections have been opened.
        self.warm = False


class Seat(Ticket):
    """A ticket with what belongs to it on this side.

    A record keeps its seat, which serves one checkout after the other; a caller
    that has to wait brings a new one.
    """

    __slots__ = (
        "__weakref__",
        "alive",
        "exchange",
        "former",
        "holder",
        "loan",
        "may_warm",
        "orphaned",
        "record",
        "reported",
        "stack",
        "used",
        "waiter",
        "warm",
    )

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange
        #: Tells if the exchange is in use, or garbage together with this seat.
        self.alive = exchange.alive
        #: What was handed over, until the owner picks it up.
        self.record: Record | None = None
        #: The owner has gone while its connection is being opened.
        self.orphaned = False
        #: How to wake the owner, until the slot was handed over.
        self.waiter: Waiter | None = None
        #: Its record may be kept warm when it comes back.
        self.may_warm = False
        #: It is, among its tag's.
        self.warm = False
        #: Who asked for it, or was the last to use it. Stale while it is warm.
        self.holder: Caller | None = None
        #: When a statement was last executed, by whomever.
        self.used = -math.inf
        #: Where it was checked out, if that is noted, innermost first.
        self.stack: tuple[Location, ...] = ()
        #: It was reported as out for too long.
        self.reported = False
        #: The tag of a caller in the middle of a critical section of the same thread,
        #: until this checkout is accounted for; and the record's seat before.
        self.loan: str | None = None
        self.former: Seat | None = None

    def note(self, held: float) -> None:
        super().note(held)
        if len(self.long_holds) >= _LONG_HOLDS_KEPT:
            self.may_warm = False  # they are booked when it comes back

    def abandon(self) -> None:
        """Called by its waiter when its owner cannot be woken any more."""
        self.exchange.give_up(self)

    def adopt(self, record: Record | None) -> None:
        """Called by its waiter when that connection is open, or could not be opened."""
        self.orphaned = False
        self.record = record
        self.exchange.give_up(self)

    def __del__(self) -> None:
        # An interrupt may have left it without its fields.
        if getattr(self, "state", FREE) is GRANTED and self.alive() is not None:
            self.exchange.lost(self)
