"""How often connections are closed, and why; how long it takes to open them again.

SQLAlchemy's pool events tell that a connection is closed, and some of the reasons; the
others are noted on the record (`RecordState.close_reason`) where it is closed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

from ..scheduling.account import GRANTED
from ..tagging import outside_of_blocks
from . import sqlalchemy_private
from .checkout import Checkout, RecordState
from .core import PoolCore
from .physical import PhysicalConnection

__all__ = ["observe", "open_for_record"]


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


def open_for_record(core: PoolCore, invoke: Callable[[Any], Any], record: Any) -> Any:
    """Open a record's connection, which exists from before that, and time it.

    Those that are opened for a new record are timed by their callers.

    :param invoke: the pool's creator, made to take a record. It is what a record calls
      (``Pool._invoke_creator``); nothing public is called before and after a connection
      is opened.
    """
    fair: RecordState | None = getattr(record, "fair", None)  # None: a new record
    if fair is not None:
        core.open_again(fair.checkout)
    core.slots.before_opening()
    began = core.clock()
    physical = PhysicalConnection(record)
    if fair is None:
        record.fair = RecordState(physical, Checkout(core))
    else:
        fair.physical = physical
    existing = core.slots.existing
    with existing.opening(physical):
        try:
            with outside_of_blocks():
                connection = invoke(record)
        except BaseException:
            if fair is not None:
                core.count_opening(fair.checkout.account, None)
            raise
        existing.opened(physical, connection)
    if fair is not None:
        core.count_opening(fair.checkout.account, core.clock() - began)
    return connection
