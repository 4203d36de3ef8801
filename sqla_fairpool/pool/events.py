"""What a pool hears of: options, statements and the URL, connections that are closed.

Rule of this file: hooks are set on one pool, and on the dialect object of its engine,
which belongs to that engine and those derived from it; nothing else in the process is
touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, Dialect
from sqlalchemy.pool import Pool

from ..ledger.drivers import has_private_memory, warn_of_memory
from ..options import BadOption, PoolOptions
from ..scheduling.ticket import GRANTED
from . import sqlalchemy_private
from .checkout import RecordState
from .core import PoolCore
from .execution_options import follow
from .server_tag import tell

__all__ = ["await_url", "observe", "warn_of_private_memory", "watch_dialect"]


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


def watch_dialect(dialect: Dialect, options: PoolOptions) -> None:
    """Hear of the dialect's options and statements, and only of this one's."""
    if options.server_tag and dialect.name != "postgresql":
        raise BadOption(
            "server_tag", True, f"False, because {dialect.name} is not PostgreSQL"
        )
    if follow(dialect, options.tag_option, _retag):
        sqlalchemy_private.note_statements(dialect)


def _retag(connection: Connection, tag: str | None) -> None:
    """Charge a connection to the tag that was set on it, or have it wait there.

    If it is refused, it checks out again under its former tag when it is used next.
    """
    if connection.closed or tag is None:
        return
    record: Any = sqlalchemy_private.record_of(connection)
    fair: RecordState | None = getattr(record, "fair", None)
    if fair is None or fair.checkout.tag_state.tag == tag:
        return  # nothing to charge, or another class of pool
    core, options = fair.checkout.core, fair.checkout.core.options
    if connection.in_transaction():
        raise exc.InvalidRequestError(
            "This connection has already initialized a SQLAlchemy Transaction() "
            f"object via begin() or autobegin; {options.tag_option} may not be "
            "altered unless rollback() or commit() is called first."
        )
    try:
        if not core.move(fair.checkout, tag):
            sqlalchemy_private.check_out_again(connection)
        elif options.server_tag:
            _tell(connection)
    except BaseException as error:
        connection.invalidate(error)
        raise


def _tell(connection: Connection) -> None:
    """Tell the server the new tag of a connection, on another one if that fails."""
    record = sqlalchemy_private.record_of(connection)
    assert record is not None
    dialect = connection.dialect
    try:
        tell(record.dbapi_connection, record, dialect)
    except (exc.DisconnectionError, dialect.loaded_dbapi.Error) as error:
        connection.invalidate(error)
        sqlalchemy_private.check_out_again(connection)
