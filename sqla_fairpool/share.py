"""A pool as the member of a ledger: its share of the slots of all processes.

The ledger's keeper lives in a thread of its own and talks to the store. What it
decides arrives here as two numbers: how many connections there may be in this
process, and the ceiling of each tag in it. What it asks for is how many there are, and
who wants more. A checkout never waits for the keeper while there is a slot for it.

Rules of this file:

* A connection counts from before it is opened until after it is closed. So a detached
  one keeps a slot out of use, until it is closed or nobody has it any more.
* The keeper's thread closes connections of threads. Those of tasks are closed where
  they can be, in their loop.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import event, exc
from sqlalchemy.pool import Pool
from sqlalchemy.util import greenlet_spawn

from .ledger.errors import LedgerError
from .ledger.local import TagDemand

if TYPE_CHECKING:
    from .exchange import Exchange

__all__ = ["Keeper", "Share"]


class Keeper(Protocol):
    """What a pool asks of a ledger's keeper."""

    #: Why the ledger cannot be reached or used, None if it can.
    trouble: str | None

    def ring(self, tag: str | None = None) -> None:
        """Look at the pool soon: somebody waits under `tag`, or something else."""

    def after_fork(self) -> None:
        """Begin anew in a forked child, which owns nothing."""

    def close(self) -> None:
        """Give back what is closed, and leave."""


class Share:
    """What a keeper may do to a pool, and the other way round.

    The keeper's thread calls :meth:`demand`, :meth:`allot`, :meth:`close_surplus` and
    :meth:`refuse`; the pool calls :meth:`ring`.
    """

    def __init__(self, exchange: Exchange) -> None:
        # Weak: a pool that nobody has any more ends, and its keeper with it.
        self._exchange = weakref.ref(exchange, self._pool_is_gone)
        self.keeper: Keeper | None = None
        #: Why nobody here may have a connection: what an operator has to mend.
        self.refusal: exc.SQLAlchemyError | None = None
        # The loop in which connections are closed, the last one that opened any.
        self._loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
        # What keeps count of detached connections, until each is closed.
        self._detached: dict[int, weakref.finalize[Any, Any]] = {}

    def _pool_is_gone(self, ref: object) -> None:
        if self.keeper is not None:
            self.keeper.ring()

    # -- for the pool ---------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """Why there can be no other share than this, None if there can."""
        return None if self.keeper is None else self.keeper.trouble

    def ring(self, tag: str | None = None) -> None:
        """Have the keeper look. Called without the lock.

        :param tag: under which somebody waits; None for another reason.
        """
        if self.keeper is not None:
            self.keeper.ring(tag)
        else:
            self.refuse(
                LedgerError(
                    "the pool has no database URL from which a default ledger would "
                    "follow: name a path as the ledger"
                )
            )

    def note_loop(self) -> None:
        """Remember where connections of tasks can be closed."""
        try:
            self._loop = weakref.ref(asyncio.get_running_loop())
        except RuntimeError:
            pass  # threads

    def watch(self, pool: Pool) -> None:
        """Keep count of the connections that leave a pool and stay open."""

        @event.listens_for(pool, "close")
        def on_close(dbapi_connection: Any, record: Any) -> None:
            record.gone = True  # so that it is not taken for detached

        @event.listens_for(pool, "connect")
        def on_connect(dbapi_connection: Any, record: Any) -> None:
            record.gone = False

        @event.listens_for(pool, "detach")
        def on_detach(dbapi_connection: Any, record: Any) -> None:
            self._await_the_end(dbapi_connection)

        @event.listens_for(pool, "close_detached")
        def on_close_detached(dbapi_connection: Any) -> None:
            finalizer = self._detached.pop(id(dbapi_connection), None)
            if finalizer is not None:
                finalizer()

    def _await_the_end(self, dbapi_connection: Any) -> None:
        """Have the slot of a detached connection back when that is no more."""
        try:
            finalizer = weakref.finalize(dbapi_connection, self._over)
        except TypeError:
            return  # a driver's object without weak references: at close() only
        finalizer.atexit = False
        self._detached[id(dbapi_connection)] = finalizer

    def _over(self) -> None:
        exchange = self._exchange()
        if exchange is not None:
            exchange.detached_is_over()

    # -- for the keeper -------------------------------------------------------------

    def demand(self) -> tuple[int, Mapping[str, TagDemand]]:
        """Return how many connections are open, and what is wanted by tag."""
        exchange = self._exchange()
        if exchange is None:
            if self.keeper is not None:
                self.keeper.close()  # nobody has the pool any more
            return 0, {}
        with exchange.section() as now:
            exchange.look_around(now)  # others want to know who is idle
            tags = {}
            for account in exchange.scheduler.accounts.values():
                peak, account.peak = account.peak, account.in_use
                if peak or account.waiting or account.active:
                    tags[account.tag] = TagDemand(peak, account.waiting, account.active)
            return exchange.settle(now), tags

    def allot(self, slots: int, ceilings: Mapping[str, int], other: int) -> None:
        """Set how many connections there may be, and the ceiling of each tag."""
        exchange = self._exchange()
        if exchange is not None:
            self.refusal = None
            exchange.allot(slots, ceilings, other)

    def close_surplus(self) -> None:
        """Close idle connections that are too many."""
        exchange = self._exchange()
        if exchange is None:
            return
        loop = self._loop() if self._loop is not None else None
        if loop is None or loop.is_closed():
            exchange.visit()
            return
        coroutine = greenlet_spawn(exchange.visit)
        try:
            asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError:  # closed in between
            coroutine.close()

    def freeze(self) -> None:
        """Let those connections be used that there are, and no other be opened."""
        exchange = self._exchange()
        if exchange is not None:
            exchange.freeze()

    def press(self, pressed: bool) -> None:
        """Ring when a connection falls idle, or do not any more."""
        exchange = self._exchange()
        if exchange is not None:
            exchange.press(pressed)

    def refuse(self, error: exc.SQLAlchemyError) -> None:
        """Raise an error in those who wait, and who come, until there is a share."""
        exchange = self._exchange()
        if exchange is not None:
            self.refusal = error
            exchange.wake_all()
