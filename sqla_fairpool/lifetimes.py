"""How often connections are closed, and why; how long it takes to open them again.

SQLAlchemy's pool events tell that a connection is closed, and some of the reasons; the
others are noted on the record (`Record.reason`) by whoever has it closed.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from . import _private
from .desk import Desk
from .tagging import outside_of_blocks

__all__ = ["observe", "time_openings"]


def observe(pool: Pool, desk: Desk) -> None:
    """Count at `desk` what happens to the connections of `pool`."""

    @event.listens_for(pool, "close")
    def on_close(dbapi_connection: Any, record: Any) -> None:
        reason = record.__dict__.pop("reason", None)
        old = _private.expired(pool, record)
        desk.count_closure(reason or ("recycled" if old else "invalidated"))

    @event.listens_for(pool, "close_detached")
    def on_close_detached(dbapi_connection: Any) -> None:
        desk.count_closure("detached")


def time_openings(pool: Pool, desk: Desk) -> None:
    """Time the connections that are opened again for a record that had one.

    Those that are opened for a new record are timed by whoever needs them.
    """

    def opened(record: ConnectionPoolEntry, seconds: float | None) -> None:
        seat = getattr(record, "seat", None)
        if seat is not None:
            desk.count_opening(seat.account, seconds)

    _private.time_creator(pool, desk.clock, opened, outside_of_blocks)
