"""What a pool hears of its connections, and what it tells the server.

Rule of this file: hooks are set on one pool, and on the dialect object of its engine,
which belongs to that engine and those derived from it; nothing else in the process is
touched.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Dialect, ExceptionContext
from sqlalchemy.pool import Pool

from ..ledger.drivers import has_private_memory, warn_of_memory
from ..scheduling.ticket import GRANTED
from ..threads import make_lock
from . import sqlalchemy_private
from .checkout import TIMES_TOLD, TOLD
from .core import PoolCore
from .physical import PhysicalConnection, driver_of

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
        _note_mode(core, getattr(pool, "_dialect", None), dbapi_connection, record)

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


# -- what PostgreSQL is told of a tag: its name, its time limits -----------------------
#
# ``server_tag`` is the tag as ``application_name``, so that ``pg_stat_activity`` tells
# the scrapers apart. The server is told only if the session has another name. Which one
# it has is not remembered here, because a statement of the application may change it,
# or ``RESET ALL`` and ``DISCARD ALL``. PostgreSQL reports each change, and the drivers
# keep the last report: to read it takes no round trip. Of time limits
# (:class:`.TagLimits`) nothing is reported. They are told when a connection goes to a
# tag that has others, and with the name, in one statement.

#: PostgreSQL's names of the time limits.
_SETTINGS = {
    "statement_timeout": "statement_timeout",
    "idle_in_transaction_timeout": "idle_in_transaction_session_timeout",
    "lock_timeout": "lock_timeout",
}

#: The longest name that PostgreSQL keeps: NAMEDATALEN - 1.
_LONGEST = 63


def tell_on_checkout(pool: Pool) -> None:
    """Tell the server the tag of each connection that is checked out."""

    @event.listens_for(pool, "checkout")
    def checked_out(dbapi_connection: Any, record: Any, proxied: Any) -> None:
        tell(proxied.dbapi_connection, record, pool._dialect)


def tell(dbapi_connection: Any, record: Any, dialect: Any) -> None:
    """Tell the server whose connection this is, unless it knows.

    :raises sqlalchemy.exc.DisconnectionError: if the connection turns out to be
      dead; the pool opens another one then.
    """
    checkout = record.fair.checkout
    tag, times = checkout.tag_state.tag, checkout.tag_state.limits.times
    told = record.info.get(TIMES_TOLD, {})
    name = _as_name(tag) if checkout.core.options.server_tag else None
    driver_connection = dialect.get_driver_connection(dbapi_connection)
    if name is None or parameter(driver_connection, "application_name") == name:
        name = None
    # Where the name was lost, by RESET ALL say, so may be the rest.
    if name is not None or times != told:
        try:
            _say(dbapi_connection, name, *_changes(told, times))
        except dialect.loaded_dbapi.Error as error:
            if not dialect.is_disconnect(error, dbapi_connection, None):
                raise
            raise exc.DisconnectionError("found dead when told its tag") from error
    if told or times:
        record.info[TIMES_TOLD] = times
    record.info[TOLD] = tag


def _changes(told: Mapping[str, float], times: Mapping[str, float]) -> Iterator[str]:
    """Yield what sets the time limits, and sets those back that are over."""
    for name, setting in _SETTINGS.items():
        if name in times:
            milliseconds = max(round(times[name] * 1000), 1)
            yield f"set_config('{setting}', '{milliseconds}', false)"
        elif name in told:
            # As RESET does, which cannot stand in a statement with others.
            was = f"SELECT reset_val FROM pg_settings WHERE name = '{setting}'"
            yield f"set_config('{setting}', ({was}), false)"


def _as_name(tag: str) -> str:
    """Return a tag as PostgreSQL 16 and later would write it.

    That is ASCII, so that it can be said in every encoding, and is not changed by
    any server: the answer can be compared with what was said.
    """
    return tag.encode().decode("ascii", "backslashreplace")[:_LONGEST]


def parameter(driver_connection: Any, name: str) -> str | None:
    """Return what PostgreSQL last reported of a session's setting, None if unknown."""
    try:
        if hasattr(driver_connection, "get_settings"):  # asyncpg
            value = getattr(driver_connection.get_settings(), name)
        else:  # psycopg and psycopg2
            value = driver_connection.info.parameter_status(name)
    except Exception:
        return None  # another driver, or a connection that is closed, or not reported
    return value if isinstance(value, str) else None


def _say(dbapi_connection: Any, name: str | None, *settings: str) -> None:
    if name is not None:
        # Doubled quotes and backslashes: as PostgreSQL writes any string.
        literal = name.replace("\\", "\\\\").replace("'", "''")
        setting = f"set_config('application_name', E'{literal}', false)"
        settings = setting, *settings
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(f"SELECT {', '.join(settings)}")
        # Or the rollback at the checkin takes it back.
        dbapi_connection.commit()
    finally:
        cursor.close()


# -- ``failover_guard``: a server that is not the one to write to any more -------------
#
# A primary that was demoted goes on to serve the connections that it has, and refuses
# what they write. That is a disconnect here, and so is a server that shuts down: the
# pool replaces all connections of that age, and the address may lead to another server
# now. Who wants to read only is left alone: a pool that has never had a connection on
# which it could write, by the session's default or because the server follows another
# one; a transaction that is read-only. PostgreSQL (14 and later) reports what it takes,
# and the drivers keep the last report: to read it takes no round trip. MySQL is asked
# as a connection is opened.

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


def _note_mode(
    core: PoolCore, dialect: Any, dbapi_connection: Any, record: Any
) -> None:
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
    if physical.mode is None:
        return _ONE
    if not has_written or now not in (FOLLOWS, READS):
        # It never took any, or it is the transaction that takes none, by intent.
        return None
    # One that took none from the start was opened before the address led elsewhere.
    return _ALL if physical.mode is WRITES else _ONE


# -- fork ------------------------------------------------------------------------------

# Held during the first connects of pools, by their number in this process.
_first_connects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def guard_first_connect(pool: Pool) -> None:
    """Have a fork wait until the first connect of a pool of threads is over.

    SQLAlchemy sets a dialect up in it, once and under a lock, which would be held for
    ever in a child that is forked meanwhile. A thread may fork in its own one.
    """
    lock = make_lock()
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
