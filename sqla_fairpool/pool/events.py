"""How often connections are closed, and why; how long it takes to open them again.

SQLAlchemy's pool events tell that a connection is closed, and some of the reasons; the
others are noted on the record (`RecordState.close_reason`) where it is closed.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

from ..scheduling.account import GRANTED
from . import sqlalchemy_private
from .core import PoolCore

__all__ = ["observe"]


def observe(pool: Pool, core: PoolCore) -> None:
    """Count what happens to the connections of a pool."""

    @event.listens_for(pool, "connect")
    def on_connect(dbapi_connection: Any, record: Any) -> None:
        if record.fair.checkout.state is GRANTED:  # which pays for it
            record.fair.physical.opening = False

    @event.listens_for(pool, "close")
    def on_close(dbapi_connection: Any, record: Any) -> None:
        reason, record.fair.close_reason = record.fair.close_reason, None
        old = sqlalchemy_private.expired(pool, record)
        core.count_closure(reason or ("recycled" if old else "invalidated"))

    @event.listens_for(pool, "close_detached")
    def on_close_detached(dbapi_connection: Any) -> None:
        core.count_closure("detached")
