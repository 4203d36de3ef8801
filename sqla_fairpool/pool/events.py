"""How often connections are closed, and why; how long it takes to open them again.

SQLAlchemy's pool events tell that a connection is closed, and some of the reasons; the
others are noted on the record (`Record.reason`) by whoever has it closed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.pool import Pool

from ..tagging import outside_of_blocks
from . import sqlalchemy_private
from .desk import Desk

if TYPE_CHECKING:
    from .exchange import Exchange

__all__ = ["observe", "open_for_record"]


def observe(pool: Pool, desk: Desk) -> None:
    """Count at `desk` what happens to the connections of `pool`."""

    @event.listens_for(pool, "connect")
    def on_connect(dbapi_connection: Any, record: Any) -> None:
        if hasattr(record, "seat"):  # whose ticket pays for it
            record.physical.opening = False

    @event.listens_for(pool, "close")
    def on_close(dbapi_connection: Any, record: Any) -> None:
        reason = record.__dict__.pop("reason", None)
        old = sqlalchemy_private.expired(pool, record)
        desk.count_closure(reason or ("recycled" if old else "invalidated"))

    @event.listens_for(pool, "close_detached")
    def on_close_detached(dbapi_connection: Any) -> None:
        desk.count_closure("detached")


def open_for_record(
    exchange: Exchange, invoke: Callable[[Any], Any], record: Any
) -> Any:
    """Open a record's connection, which exists from before that, and time it.

    Those that are opened for a new record are timed by whoever needs them.

    :param invoke: the pool's creator, made to take a record. It is what a record calls
      (``Pool._invoke_creator``); nothing public is called before and after a connection
      is opened.
    """
    seat = getattr(record, "seat", None)
    if seat is not None:
        exchange.open_again(seat)
    if exchange.share is not None:
        exchange.share.before_opening()
    began = exchange.clock()
    with exchange.connections.opening(record) as physical:
        try:
            with outside_of_blocks():
                connection = invoke(record)
        except BaseException:
            if seat is not None:
                exchange.count_opening(seat.account, None)
            raise
        exchange.connections.opened(physical, connection)
    if seat is not None:
        exchange.count_opening(seat.account, exchange.clock() - began)
    return connection
