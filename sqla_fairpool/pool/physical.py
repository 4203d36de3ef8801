"""The connections of a pool that exist at the server, and how they end.

Rules of this file:

* A connection exists from before it is opened until its session at the server has
  ended, in whatever way.
* Nothing is counted up and down. Which slot pays for a connection is found by looking:
  that of its checkout, one of the pool in which it lies idle, or none. The last are
  *apart*: detached, being closed, or closed and not over at the server.
* A weak reference tells when a driver's connection is garbage, and its session is ended
  then. So what stays apart is in use.
* What is called by a finaliser takes no lock.
"""

from __future__ import annotations

import contextlib
import sys
import time
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.util import await_only

from ..scheduling.ticket import GRANTED
from .endings import ENDED, OPEN, UNKNOWN, SocketCopy, silence, stop_statement, watcher
from .sqlalchemy_private import in_greenlet

if TYPE_CHECKING:
    from ..ledger.rows import Session

#: Seconds in which a server ends a session as a rule: it takes one or two milliseconds.
#: What takes longer is not waited for by the thread that closes.
_GOODBYE = 0.5

#: Seconds after which a session counts as ended that the server has not ended, where
#: there is no ledger through which it could be asked.
_GIVE_UP = 10.0


def driver_of(dbapi_connection: Any) -> Any:
    """Return the driver's connection, from behind SQLAlchemy's adapter for asyncio."""
    return getattr(dbapi_connection, "driver_connection", dbapi_connection)


#: Seconds after which the end of a closed connection must have been looked at.
_OVERDUE = _GOODBYE + _GIVE_UP + 1.0


class PhysicalConnection:
    """One connection to the server."""

    __slots__ = (
        "__weakref__",
        "_driver",
        "_kept",
        "_record",
        "ending",
        "lost",
        "mode",
        "opening",
        "orphaned",
        "session",
        "socket",
    )

    def __init__(self, record: Any) -> None:
        self._record: weakref.ref[Any] = weakref.ref(record)
        self._driver: weakref.ref[Any] | None = None
        # The driver's connection itself, where it cannot be referred to weakly.
        self._kept: Any = None
        #: It is being opened.
        self.opening = True
        #: Its caller has gone while it is opened in the place of a lost one.
        self.orphaned = False
        #: Since when it is closed by the client, though the server may not have ended
        #: the session; 0.0 before.
        self.ending = 0.0
        #: This process cannot learn when the session ends.
        self.lost = False
        #: What the server calls it, if that is known.
        self.session: Session | None = None
        self.socket: SocketCopy | None = None
        #: What its server took when it was opened, see :mod:`.events`.
        self.mode: str | None = None

    @property
    def driver(self) -> Any:
        """The driver's connection, None before it is opened and when it is gone."""
        return self._kept if self._driver is None else self._driver()

    def attach(
        self,
        driver: Any,
        gone: Callable[[], Callable[[PhysicalConnection], None] | None],
    ) -> None:
        """Note the driver's connection; call `gone` when it is garbage."""
        self.socket = SocketCopy.of(driver)
        this = weakref.ref(self)

        def collected(_: object) -> None:
            physical, call = this(), gone()
            if physical is not None and call is not None:
                call(physical)

        try:
            self._driver = weakref.ref(driver, collected)
        except TypeError:  # sqlite3
            self._kept = driver

    def record(self) -> Any:
        """The record that has it now, None if none has."""
        record = self._record()
        if record is None or record.fair.physical is not self:
            return None
        return record if self.opening or record.dbapi_connection is not None else None

    def is_abandoned(self) -> bool:
        """Tell if one that cannot be watched weakly is closed, or in no use."""
        if self._kept is None:
            return False
        try:
            _ = getattr(self._kept, "total_changes", None)
        except Exception:
            return True  # sqlite3's, closed
        return sys.getrefcount(self._kept) <= _references_of_its_own()


@cache
def _references_of_its_own() -> int:
    """Return how many references there are to a sqlite3 connection in no use."""
    import sqlite3  # some builds of Python are without

    holder = PhysicalConnection(cast(Any, _references_of_its_own))
    holder._kept = sqlite3.connect(":memory:")
    number = sys.getrefcount(holder._kept)
    holder._kept.close()
    return number


class PhysicalConnections(set[PhysicalConnection]):
    """Those of a pool. To iterate is to iterate over a copy.

    :param changed: returns what is called, without a lock, when one has ended.
    :param may_block: closing may wait for the server, as a thread does.
    """

    def __init__(
        self, changed: Callable[[], Callable[[], None] | None], may_block: bool
    ) -> None:
        super().__init__()
        self._changed = changed
        self._may_block = may_block
        #: Those that are lost are the ledger's to look after. None without one.
        self.on_lost: Callable[[], None] | None = None
        #: Errors after which it is known that no session has begun.
        self.failures: tuple[type[BaseException], ...] = (BaseException,)

    def __iter__(self) -> Iterator[PhysicalConnection]:
        return iter(frozenset(self))

    def apart(self, idle: Container[int]) -> list[PhysicalConnection]:
        """Return those that no checkout pays for, nor lie in the pool. O(connections).

        :param idle: ids of the records in the pool.
        """
        found = []
        for physical in self:
            record = physical.record()
            if (
                record is None
                or physical.ending
                or physical.orphaned
                or (
                    not (physical.opening or id(record) in idle)
                    and record.fair.checkout.state is not GRANTED
                )
            ):
                found.append(physical)
        return found

    def detached(self) -> int:
        """Return how many are open and have left the pool."""
        return sum(p.record() is None and not p.ending for p in self)

    # -- opening ------------------------------------------------------------------

    @contextlib.contextmanager
    def opening(self, physical: PhysicalConnection) -> Iterator[None]:
        """Count one that is being opened, unless that fails.

        If it is interrupted, the server may have begun a session, and ends it soon.
        """
        try:
            self.add(physical)
            yield
        except BaseException as error:
            if physical.orphaned:
                pass  # it goes on
            elif isinstance(error, self.failures):
                self.discard(physical)
            else:
                self.ended_soon(physical)
            raise

    def ended_soon(self, physical: PhysicalConnection) -> None:
        """Count one whose opening was interrupted as ended after a moment."""
        physical.ending = time.monotonic()
        watcher.watch(None, _GOODBYE, lambda _: self.ended(physical))

    def opened(self, physical: PhysicalConnection, dbapi_connection: Any) -> None:
        """Note the connection that was opened."""
        gone = weakref.WeakMethod(self._is_gone)
        physical.attach(driver_of(dbapi_connection), gone)

    def of(self, dbapi_connection: Any) -> PhysicalConnection | None:
        """Return what stands for a DBAPI connection, None if it is not of this pool."""
        driver = driver_of(dbapi_connection)
        return next((p for p in self if p.driver is driver), None)

    # -- ending -------------------------------------------------------------------

    def close(self, dbapi_connection: Any, close: Callable[[], None]) -> None:
        """Close a connection; it is over when the server has ended the session."""
        physical = self.of(dbapi_connection)
        if physical is None:
            close()
            return
        try:
            stop_statement(physical.driver)
            close()
        finally:
            self.closed(physical)

    def closed(
        self,
        physical: PhysicalConnection,
        *,
        may_wait: bool = True,
        in_thread: bool = False,
    ) -> None:
        """Note that the client has closed it; wait for the server for a moment."""
        physical.opening = False
        line = physical.socket
        if line is None:
            self.ended(physical)
            return
        if physical.ending or physical not in self:
            return
        state = None
        try:
            physical.ending = time.monotonic()
            line.hang_up()  # the copy would keep the connection up
            if in_thread or (may_wait and self._may_block):
                state = line.look(_GOODBYE)
            elif may_wait and in_greenlet():
                state = await_only(line.look_in_loop(_GOODBYE))
        finally:
            if state is None:  # interrupted, or not where a caller can wait
                watcher.watch(line, _GOODBYE, lambda s: self._conclude(physical, s))
            else:
                self._conclude(physical, state)

    def _conclude(self, physical: PhysicalConnection, state: str) -> None:
        if state is ENDED:
            self.ended(physical)
        elif self.on_lost is not None:
            physical.lost = True
            self.on_lost()
        elif state is OPEN and physical.socket is not None:
            watcher.watch(physical.socket, _GIVE_UP, lambda _: self.ended(physical))
        else:
            self.ended(physical)  # there is nothing more to find out

    def ended(self, physical: PhysicalConnection) -> None:
        """Its session is over."""
        if physical in self:
            self.discard(physical)
            if physical.socket is not None:
                physical.socket.close()
            if (changed := self._changed()) is not None:
                changed()

    def release(self, physical: PhysicalConnection) -> bool:
        """Let go of a connection that is not this pool's business any more."""
        there = physical in self
        self.discard(physical)
        return there

    def hang_up(self, physical: PhysicalConnection) -> None:
        """End a session without the driver: its loop may be gone, or blocked.

        Called in a thread of ours, which waits for the server.
        """
        if physical.socket is None and hasattr(physical.driver, "stop"):
            physical.driver.stop()  # aiosqlite: the end of its thread
        self.closed(physical, in_thread=True)

    def _is_gone(self, physical: PhysicalConnection) -> None:
        """End it: no object refers to the driver's any more. Called by a finaliser."""
        if physical in self and not physical.ending:
            self.closed(physical, may_wait=False)

    def end_abandoned(self) -> None:
        """End those that are garbage, where only a look can tell."""
        now = time.monotonic()
        for physical in self:
            if physical.orphaned:
                continue
            if physical.ending:  # one that is lost, until it is buried
                overdue = now - physical.ending > _OVERDUE
                if overdue and not physical.lost:  # its watcher was interrupted
                    self._conclude(physical, UNKNOWN)
                continue
            # Without a driver's connection: its opening was interrupted twice.
            is_garbage = physical.driver is None or physical.is_abandoned()
            if is_garbage and physical.record() is None:
                self.ended(physical)

    # -- for the ledger -------------------------------------------------------------

    def sessions(self) -> list[Session]:
        """Return the sessions that exist, as far as they are known."""
        return [p.session for p in self if p.session is not None]

    def lost_ones(self) -> Sequence[PhysicalConnection]:
        """Return those whose end this process cannot learn."""
        return [p for p in self if p.lost]

    def disown(self) -> None:
        """In a forked child: forget them all, and let go of the parent's sockets."""
        for physical in self:
            if physical.socket is not None:
                physical.socket.close()
            silence(physical.driver)
        self.clear()
