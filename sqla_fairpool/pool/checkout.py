"""One checkout's state, and what the pool notes on a record."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from sqlalchemy.pool import ConnectionPoolEntry

from ..diagnosis import Caller, Location, TaskHere, ThreadHere
from ..options import PoolOptions
from ..scheduling.ticket import FREE, GRANTED, Ticket
from .physical import PhysicalConnection
from .waiters import Waiter

#: Where the last tag is noted, in a record's ``info``, which a new connection empties:
#: the record that is preferred for the tag. Not what the server knows now.
TOLD = "sqla_fairpool_tag_told"

#: Where the time limits are noted that the server was told, in the same way.
TIMES_TOLD = "sqla_fairpool_times_told"


class Lender(Protocol):
    """What lends what is kept warm: see :mod:`.warm`."""

    def claim(self, checkout: Checkout, tag: str) -> bool: ...


class Core(Protocol):
    """What is asked of the pool's core."""

    #: Tells if it is in use, or garbage together with those that refer to it.
    alive: weakref.ref[Any]

    @property
    def clock(self) -> Callable[[], float]: ...
    @property
    def options(self) -> PoolOptions: ...
    @property
    def warm(self) -> Lender: ...
    @property
    def here(self) -> ThreadHere | TaskHere: ...

    def checkout(
        self, tag: str, opener: Opener, timeout: float | None = None
    ) -> Record: ...
    def checkin(self, record: Record) -> None: ...
    def give_up(self, checkout: Checkout) -> None: ...
    def lost(self, checkout: Checkout) -> None: ...
    def activity(self, checkout: Checkout) -> None: ...
    def move(self, checkout: Checkout, tag: str) -> bool: ...


class RecordState:
    """What the pool notes on a connection record."""

    __slots__ = (
        "checkout",
        "close_reason",
        "doomed",
        "idle_since",
        "physical",
        "recycle_at",
    )

    def __init__(self, physical: PhysicalConnection, checkout: Checkout) -> None:
        #: Its connection, or the last one that it had.
        self.physical = physical
        #: The one that it is out for, or was last; a free one before the first.
        self.checkout = checkout
        #: When it came back last.
        self.idle_since = -math.inf
        #: To be closed when it comes back.
        self.doomed = False
        #: Why it is closed, once that is decided.
        self.close_reason: str | None = None
        #: When its connection is to be replaced, so that not all end together.
        self.recycle_at = math.inf


class Record(ConnectionPoolEntry):
    """For the type checker: a connection record with what the pool puts on it."""

    fair: RecordState


class Opener(Protocol):
    """What opens another connection: a pool."""

    generation: Generation
    logger: Any

    def _create_connection(self) -> ConnectionPoolEntry: ...


class Generation:
    """One of the pools that follow each other over one core (``recreate()``)."""

    __slots__ = ("disposed", "warmed_up")

    def __init__(self) -> None:
        #: It was told to close what lies in it.
        self.disposed = False
        #: Its ``min_idle`` connections have been opened.
        self.warmed_up = False


class Checkout(Ticket):
    """One checkout, from when a slot is requested until it is released.

    While its record is warm, it serves further checkouts under the same tag. Once free,
    it serves the record's next checkout, unless it is spent. Its fields are its
    caller's until the slot is granted; after that the lock guards them.
    """

    __slots__ = (
        "__weakref__",
        "asked",
        "borrowed",
        "core",
        "holder",
        "may_keep",
        "orphaned",
        "record",
        "reported",
        "spent",
        "stack",
        "used",
        "waiter",
        "warm",
    )

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        #: When it was asked for, and how long it may wait, None for the pool's options;
        #: not of a checkout that was served by the warm cache.
        self.asked: tuple[float, float | None] | None = None
        #: The record that was handed over, until the caller picks it up.
        self.record: Record | None = None
        #: Not for another checkout: what refers to it may give it up late.
        self.spent = False
        #: The caller has gone while a connection is being opened for it.
        self.orphaned = False
        #: Wakes the caller; None when it does not wait, or once the slot is granted.
        self.waiter: Waiter | None = None
        #: The record may be kept warm when it comes back.
        self.may_keep = False
        #: It is kept warm.
        self.warm = False
        #: Its caller has said no tag yet, and it is charged to that which had it warm.
        self.borrowed = False
        #: Who asked for it, or used it last. Stale while it is warm.
        self.holder: Caller | None = None
        #: When a statement was last executed, by any caller.
        self.used = -math.inf
        #: Where it was checked out, innermost first; only with ``leak_threshold``.
        self.stack: tuple[Location, ...] = ()
        #: It was reported as out for too long.
        self.reported = False

    def abandon(self) -> None:
        """Give up: the caller cannot be woken any more. Called by the waiter."""
        self.core.give_up(self)

    def adopt(self, record: Record | None) -> None:
        """Take back what was opened for a caller that has gone. Called by the waiter.

        :param record: None if the connection could not be opened.
        """
        self.orphaned = False
        self.record = record
        self.core.give_up(self)

    def __del__(self) -> None:
        # It may lack its fields if an interrupt came while it was made.
        if getattr(self, "state", FREE) is GRANTED and self.core.alive() is not None:
            self.core.lost(self)
