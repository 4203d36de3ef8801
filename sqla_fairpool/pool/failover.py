"""``failover_guard``: a server that is not the one to write to any more.

A primary that was demoted goes on to serve the connections that it has, and refuses
what they write. That is a disconnect here, and so is a server that shuts down: the pool
replaces all connections of that age, and the address may lead to another server now.

Rules of this file:

* SQLAlchemy's event ``handle_error`` decides, on the dialect of the pool's engine.
* Who wants to read only is left alone: a session whose default is that as it opens, a
  transaction that is read-only by SQLAlchemy's execution option, a pool that has never
  had a connection on which it could write.
* PostgreSQL (14 and later) reports what it takes, and the drivers keep the last report:
  to read it takes no round trip. MySQL is asked as a connection is opened.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Dialect, ExceptionContext

from . import sqlalchemy_private
from .core import PoolCore
from .physical import PhysicalConnection, driver_of
from .server_tag import parameter

__all__ = ["note_mode", "watch_errors"]

#: What a server takes: writes; reads because it follows another one; reads because the
#: session is to do no more by default. None: it is not known.
WRITES, FOLLOWS, READS = "writes", "follows", "reads"

#: What is set on a dialect: the pool's core, weakly.
_CORE = "_sqla_fairpool_core"

#: PostgreSQL's codes: read_only_sql_transaction; admin_shutdown and crash_shutdown.
_READ_ONLY, _SHUT_DOWN = "25006", {"57P01", "57P02"}

#: MySQL's: ER_OPTION_PREVENTS_STATEMENT, of which read-only is one, ER_READ_ONLY_MODE;
#: ER_SERVER_SHUTDOWN.
_PREVENTED, _READ_ONLY_MODE, _MYSQL_SHUT_DOWN = 1290, 1836, 1053

#: What is to be replaced: all connections of that age, or the one.
_ALL, _ONE = "all", "one"

_MYSQL = ("mysql", "mariadb")


def note_mode(core: PoolCore, dialect: Any, dbapi_connection: Any, record: Any) -> None:
    """Note what the server takes as a connection is opened."""
    if core.options.failover_guard:
        mode = _mode(dialect, dbapi_connection)
        record.fair.physical.mode = mode
        if mode is WRITES:
            core.has_written = True


def _mode(dialect: Any, dbapi_connection: Any) -> str | None:
    name = getattr(dialect, "name", None)
    if name == "postgresql":
        return _reported(driver_of(dbapi_connection))
    if name not in _MYSQL:
        return None
    try:
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute("SELECT @@global.read_only")
            read_only = str(cursor.fetchone()[0]).upper()
        finally:
            cursor.close()
    except Exception:
        return None  # a proxy that knows no such variable
    return WRITES if read_only in ("0", "OFF") else FOLLOWS


def _reported(driver_connection: Any) -> str | None:
    """Return what PostgreSQL has told a driver, None if it did not."""
    if parameter(driver_connection, "default_transaction_read_only") == "on":
        return READS
    follows = parameter(driver_connection, "in_hot_standby")
    return {"on": FOLLOWS, "off": WRITES}.get(follows or "")


def watch_errors(dialect: Dialect, core: PoolCore) -> None:
    """Hear of the errors of a dialect's connections, for the pool that it has now."""
    is_watched = hasattr(dialect, _CORE)
    setattr(dialect, _CORE, core.alive)
    if not is_watched:
        event.listen(dialect, "handle_error", _handle_error)


def _handle_error(context: ExceptionContext) -> None:
    core: PoolCore | None = getattr(context.dialect, _CORE)()
    error = context.original_exception
    if core is None or not isinstance(error, Exception):
        return  # an interrupt tells nothing of the server
    if context.connection is None and not context.is_pre_ping:
        return  # it could not be opened
    if not context.is_disconnect and core.options.failover_guard:
        what = _to_replace(context, core)
        if what is not None:
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = what is _ALL
    if context.is_disconnect:
        core.opening.reconnects.lost(error)


def _to_replace(context: ExceptionContext, core: PoolCore) -> str | None:
    """Return which connections are of no use any more, None for none."""
    connection, error = context.connection, context.original_exception
    if connection is None:
        return None
    record: Any = sqlalchemy_private.record_of(connection)
    fair = getattr(record, "fair", None)
    if fair is None:
        return None  # another class of pool
    if context.dialect.name == "postgresql":
        code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if code in _SHUT_DOWN:
            return _ALL
        is_meant = connection.get_execution_options().get("postgresql_readonly")
        if code != _READ_ONLY or is_meant:
            return None
        now = _reported(driver_of(record.dbapi_connection))
        return _of_read_only(fair.physical, now, core.has_written)
    if context.dialect.name in _MYSQL:
        number = getattr(error, "errno", None) or (error.args or (None,))[0]
        if number == _MYSQL_SHUT_DOWN:
            return _ALL
        if number == _READ_ONLY_MODE or (
            number == _PREVENTED and re.search("read.only", str(error), re.IGNORECASE)
        ):
            return _of_read_only(fair.physical, FOLLOWS, core.has_written)
    return None


def _of_read_only(
    physical: PhysicalConnection, now: str | None, has_written: bool
) -> str | None:
    """Return what to replace when a connection takes no writes.

    :param now: what its server takes now.
    :param has_written: a connection of the pool could be written on.
    """
    before = physical.mode
    if before is WRITES:
        # Else it is the transaction that takes none, as its user has told the server.
        return _ALL if now in (FOLLOWS, READS) else None
    if before is FOLLOWS:
        return _ONE if has_written and now is FOLLOWS else None
    return _ONE if before is None else None
