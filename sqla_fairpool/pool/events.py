"""What a pool hears of: its connections that are closed, and the engine's URL.

Rule of this file: hooks are set on one pool, and on the dialect object of its engine,
which belongs to that engine and those derived from it; nothing else in the process is
touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.pool import Pool

from ..ledger.drivers import has_private_memory, warn_of_memory
from ..scheduling.ticket import GRANTED
from . import sqlalchemy_private
from .core import PoolCore
from .failover import note_mode

__all__ = ["await_url", "observe", "warn_of_private_memory"]


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
        note_mode(core, getattr(pool, "_dialect", None), dbapi_connection, record)

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
