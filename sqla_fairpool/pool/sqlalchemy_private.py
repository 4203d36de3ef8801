"""Every use of SQLAlchemy's private names, with the reason for each.

What stands here was read in SQLAlchemy 2.0 and 2.1; ``tests/test_private.py``
holds each function to its promise on whichever is installed. The names that a
``Pool`` subclass overrides (``_do_get``, ``_do_return_conn``,
``_create_connection``) are not meant: they are how a pool is written.
"""

from __future__ import annotations

import ctypes
import math
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.pool import (
    AsyncAdaptedQueuePool,
    ConnectionPoolEntry,
    Pool,
    PoolProxiedConnection,
)
from sqlalchemy.pool.base import _ConnectionRecord

__all__ = [
    "async_connection_dialect",
    "bare_record",
    "check_out_again",
    "check_out_by",
    "disown",
    "expired",
    "handed_out",
    "in_greenlet",
    "is_dropped",
    "note_statements",
    "record_of",
    "set_options",
]


def async_connection_dialect() -> Any:
    """Return what stands for a dialect in an asyncio pool that has no engine.

    It tells ``Pool`` that the collector must not close connections by itself.
    """
    return AsyncAdaptedQueuePool._dialect


def in_greenlet() -> bool:
    """Tell if the caller runs in SQLAlchemy's greenlet, so that it can await.

    ``sqlalchemy.util.concurrency`` tells it too, from some release of 2.0 on. A
    caller who is in no greenlet of its own has no parent to switch to.
    """
    from greenlet import getcurrent  # there whenever something can be awaited

    return getcurrent().parent is not None


def record_of(connection: Connection) -> ConnectionPoolEntry | None:
    """Return the pool's record behind a connection, None if it has none now.

    ``PoolProxiedConnection`` offers the record's ``record_info`` publicly, but not
    the record. A connection that is closed, invalidated or detached has none.
    """
    proxied = connection._dbapi_connection
    return getattr(proxied, "_connection_record", None)


def note_statements(dialect: Dialect) -> None:
    """Count each statement that is executed through `dialect` as activity.

    The dialect's own ``do_execute`` and its siblings are public; what they are
    given leads to the record only by `record_of`'s private names. Not as event
    listeners: SQLAlchemy calls these through more frames than this takes, and it
    runs once per statement.
    """

    execute, execute_many = dialect.do_execute, dialect.do_executemany
    execute_no_params = dialect.do_execute_no_params

    def do_execute(
        cursor: Any, statement: Any, parameters: Any, context: Any = None
    ) -> None:
        _note(context)
        execute(cursor, statement, parameters, context)

    def do_executemany(
        cursor: Any, statement: Any, parameters: Any, context: Any = None
    ) -> None:
        _note(context)
        execute_many(cursor, statement, parameters, context)

    def do_execute_no_params(cursor: Any, statement: Any, context: Any = None) -> None:
        _note(context)
        execute_no_params(cursor, statement, context)

    # Set by name: to the type checker they are methods, here they are hooks.
    for hook in (do_execute, do_executemany, do_execute_no_params):
        setattr(dialect, hook.__name__, hook)


def _note(context: Any) -> None:
    try:
        record = context.root_connection._dbapi_connection._connection_record
        checkout = record.fair.checkout
        tag_state, core = checkout.tag_state, checkout.core
    except AttributeError:
        return  # no connection of ours, or its first
    tag_state.last_activity = checkout.used = core.clock()
    # The caller that works with it has it, whichever caller checked it out.
    checkout.holder = core.here.caller
    if not tag_state.active:
        core.activity(checkout)


def check_out_again(connection: Connection) -> None:
    """Return the connection's DBAPI connection to the pool and get it another.

    What SQLAlchemy itself does for a connection that was invalidated, less the
    closing: without ``_dbapi_connection`` it asks its engine for one on the next
    use. If that fails, it asks again at the use after that, holding nothing.
    """
    proxied = connection._dbapi_connection
    connection._dbapi_connection = None
    if proxied is not None:
        proxied.close()
    connection.connection  # noqa: B018  (the property checks out)


def check_out_by(
    connection: Connection,
    check_out: Callable[
        [Connection, Callable[[], PoolProxiedConnection]], PoolProxiedConnection
    ],
) -> None:
    """Have a connection's later checkouts, after an invalidation, made by a function.

    It is called with the connection and what SQLAlchemy would do.
    ``_revalidate_connection`` is where these happen, and nothing public tells
    which connection a checkout is for. Replaced on this one object; through a weak
    reference, because a cycle would keep a leaked connection until the
    collector's next run.
    """
    ref = weakref.ref(connection)

    def revalidate() -> PoolProxiedConnection:
        this = ref()
        assert this is not None
        return check_out(this, partial(type(this)._revalidate_connection, this))

    vars(connection)["_revalidate_connection"] = revalidate


def set_options(target: Engine | Connection, options: Any) -> None:
    """Replace execution options, of which the dialect does not hear.

    ``execution_options`` of engines and connections stores what it is given before
    the dialect can refuse it, and nothing public takes an option back.
    """
    target._execution_options = options


def bare_record(pool: Pool) -> Any:
    """Return a record of the pool that has no connection, for the creator to see.

    Creators and ``do_connect`` listeners may keep something on it.
    """
    return _ConnectionRecord(pool, connect=False)


def expired(pool: Pool, record: ConnectionPoolEntry) -> bool:
    """Tell if a record's connection is as old as the pool's ``recycle``."""
    recycle = pool._recycle
    starttime: float = getattr(record, "starttime", math.inf)
    return recycle > -1 and time.time() - starttime > recycle


def handed_out(record: ConnectionPoolEntry) -> Any:
    """Return what the pool has handed out with a record, None if nothing.

    A ``PoolProxiedConnection``. ``fairy_ref`` is the only road to it from a record.
    """
    fairy_ref = getattr(record, "fairy_ref", None)
    return None if fairy_ref is None else fairy_ref()


def is_dropped(record: ConnectionPoolEntry) -> bool:
    """Tell if a connection that was handed out with a record has no user.

    So it is before SQLAlchemy has made its ``PoolProxiedConnection``, and from when
    that was dropped. No reference to it is taken, which would be the last one if it is
    dropped meanwhile: a weak reference loses its callback, and SQLAlchemy's has one,
    together with what it refers to.
    """
    fairy_ref: Any = getattr(record, "fairy_ref", None)
    return fairy_ref is None or fairy_ref.__callback__ is None


def disown(record: ConnectionPoolEntry) -> None:
    """Make a forked child forget a connection that is its parent's.

    The record and the user that has it checked out lose the DBAPI connection, so that
    neither a rollback nor a close can reach the socket shared with the parent.
    The driver's object is made immortal: some drivers say goodbye to the server
    when theirs is deallocated, even at the end of the process.
    """
    dbapi_connection = record.dbapi_connection
    if dbapi_connection is None:
        return
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dbapi_connection))
    setattr(record, "dbapi_connection", None)  # noqa: B010  (no slot in the interface)
    fairy = handed_out(record)
    if fairy is not None:
        fairy.dbapi_connection = None
