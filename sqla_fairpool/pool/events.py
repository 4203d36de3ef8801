"""What a pool hears of: its connections that are closed, and the engine's URL.

Rule of this file: hooks are set on one pool, and on the dialect object of its engine,
which belongs to that engine and those derived from it; nothing else in the process is
touched.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.pool import Pool

from ..ledger.drivers import has_private_memory, warn_of_memory
from ..scheduling.ticket import GRANTED
from . import sqlalchemy_private
from .core import PoolCore
from .failover import note_mode

__all__ = ["await_url", "guard_first_connect", "observe", "warn_of_private_memory"]

#: Seconds that a fork waits for a first connect: a few statements, as a rule.
_FORK_WAITS = 5.0


def observe(pool: Pool, core: PoolCore) -> None:
    """Count what happens to the connections of a pool."""

    def count(reason: str) -> None:
        with core.lock.mutex:
            core.closures[reason] += 1

    @event.listens_for(pool, "connect")
    def on_connect(dbapi_connection: Any, record: Any) -> None:
        if record.fair.checkout.state is GRANTED:  # which pays for it
            record.fair.physical.opening = False
        core.housekeeping.note_lifetime(record, sqlalchemy_private.recycle(pool))

    def on_connected(dbapi_connection: Any, record: Any) -> None:
        note_mode(core, getattr(pool, "_dialect", None), dbapi_connection, record)

    @event.listens_for(pool, "first_connect")
    def on_first_connect(dbapi_connection: Any, record: Any) -> None:
        # After the user's own listeners, which may have sessions read only.
        event.listen(pool, "connect", on_connected)

    @event.listens_for(pool, "close")
    def on_close(dbapi_connection: Any, record: Any) -> None:
        reason, record.fair.close_reason = record.fair.close_reason, None
        old = sqlalchemy_private.expired(pool, record)
        count(reason or ("recycled" if old else "invalidated"))

    @event.listens_for(pool, "close_detached")
    def on_close_detached(dbapi_connection: Any) -> None:
        count("detached")


def await_url(dialect: Any, told: Callable[[URL], object]) -> None:
    """Have a function called when ``create_engine`` tells the dialect its URL.

    A pool is never told.
    """
    if isinstance(dialect, Dialect):
        on_connect_url = dialect.on_connect_url

        def hook(url: URL) -> Any:
            told(url)
            return on_connect_url(url)

        setattr(dialect, "on_connect_url", hook)  # noqa: B010  (a method, for mypy)


def warn_of_private_memory(pool: Any, dialect: Any) -> None:
    """Warn of a URL for which the pool is of no use.

    A creator of the user's opens what it likes, and a single connection does no harm.
    """
    by_url = str(getattr(pool._creator, "__module__", "")).startswith("sqlalchemy.")
    if by_url and pool.options.capacity > 1:
        name = type(pool).__name__

        def told(url: URL) -> None:
            if has_private_memory(dialect, url):
                warn_of_memory(f"{name} is of no use here")

        await_url(dialect, told)


# -- fork ------------------------------------------------------------------------------

# Held during the first connects of pools, by their number in this process.
_first_connects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def guard_first_connect(pool: Pool) -> None:
    """Have a fork wait until the first connect of a pool of threads is over.

    SQLAlchemy sets a dialect up in it, once and under a lock, which would be held for
    ever in a child that is forked meanwhile. A thread may fork in its own one.
    """
    lock = threading.RLock()
    _first_connects[id(lock)] = lock
    sqlalchemy_private.guard_first_connects(pool, lock)


def _before_fork() -> None:
    for lock in _first_connects.copy().values():
        lock.acquire(timeout=_FORK_WAITS)


def _after_fork() -> None:
    for lock in _first_connects.copy().values():
        with suppress(RuntimeError):  # not had in time, or made by another thread
            lock.release()


if hasattr(os, "register_at_fork"):
    # After the ledger's, which core imports, so that this one is called first: a first
    # connect may wait for a transaction.
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork,
        after_in_child=_after_fork,
    )
