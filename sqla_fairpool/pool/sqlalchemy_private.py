"""Every use of SQLAlchemy's private names, with the reason for each.

Read in SQLAlchemy 2.0 and 2.1, and tested with whichever is installed. Not meant are
the names that a ``Pool`` subclass overrides (``_do_get``, ``_do_return_conn``,
``_create_connection``): they are how a pool is written.
"""

from __future__ import annotations

import ctypes
import math
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.pool import (
    AsyncAdaptedQueuePool,
    ConnectionPoolEntry,
    Pool,
    PoolProxiedConnection,
)
from sqlalchemy.pool.base import _ConnectionRecord


def async_connection_dialect() -> Any:
    """Return what tells a ``Pool`` without an engine that it is one for asyncio."""
    return AsyncAdaptedQueuePool._dialect


def in_greenlet() -> bool:
    """Tell if the caller runs in SQLAlchemy's greenlet, so that it can await."""
    from greenlet import getcurrent  # there whenever something can be awaited

    try:
        return getcurrent().parent is not None
    except RuntimeError:  # the interpreter ends
        return False


def record_of(connection: Connection) -> ConnectionPoolEntry | None:
    """Return the pool's record behind a connection, None if it has none now.

    ``PoolProxiedConnection`` offers the record's ``record_info`` publicly, no more.
    """
    proxied: Any = connection._dbapi_connection
    return None if proxied is None else proxied._connection_record


def note_statements(dialect: Dialect) -> None:
    """Count each statement that is executed through `dialect` as activity.

    Its ``do_execute`` and siblings are public; what they are given leads to the record
    by private names. Event listeners would take more frames for each statement.
    """

    def noting(execute: Callable[..., None]) -> Callable[..., None]:
        def do_execute(*args: Any, **kw: Any) -> None:
            _note(kw.get("context") if kw else args[-1])
            execute(*args, **kw)

        return do_execute

    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, noting(getattr(dialect, name)))


def _note(context: Any) -> None:
    try:
        record = context.root_connection._dbapi_connection._connection_record
        checkout = record.fair.checkout
        tag_state, core = checkout.tag_state, checkout.core
    except AttributeError:
        return  # no connection of ours, or its first
    checkout.used = now = core.clock()
    # The caller that works with it has it, whichever caller checked it out.
    checkout.holder = core.here.caller
    if tag_state.active and not checkout.borrowed:
        tag_state.last_activity = now
    else:
        core.activity(checkout)


def check_out_again(connection: Connection) -> None:
    """Return the connection's DBAPI connection to the pool and get it another.

    As for one that was invalidated: without ``_dbapi_connection``, SQLAlchemy asks the
    engine for one on the next use, and again if that fails.
    """
    proxied = connection._dbapi_connection
    connection._dbapi_connection = None
    if proxied is not None:
        proxied.close()
    connection.connection  # noqa: B018  (the property checks out)


def check_out_by(
    connection: Connection,
    check_out: Callable[[weakref.ref[Connection]], PoolProxiedConnection],
) -> ConnectionPoolEntry | None:
    """Have a connection's later checkouts, after an invalidation, made by a function.

    Returns the record that it has now, as :func:`record_of`. Nothing public tells which
    connection a checkout is for. A weak reference, because a cycle would keep a leaked
    connection until the collector's next run.
    """
    method = MethodType(check_out, weakref.ref(connection))
    connection._revalidate_connection = method  # type: ignore[method-assign]
    proxied: Any = connection._dbapi_connection
    return None if proxied is None else proxied._connection_record


def check_out(connection: Connection) -> PoolProxiedConnection:
    """Check out for a connection that has none, as SQLAlchemy does."""
    return type(connection)._revalidate_connection(connection)


def set_options(target: Engine | Connection, options: Any) -> None:
    """Replace execution options: they are stored before the dialect can refuse them."""
    target._execution_options = options


def root_of(engine: Engine) -> Engine:
    """Return the engine from which another one is derived: the one that has the pool.

    The public ``pool`` of a derived engine leads there too, by a property for each
    engine in between, at every checkout.
    """
    while (parent := getattr(engine, "_proxied", None)) is not None:
        engine = parent
    return engine


def bare_record(pool: Pool) -> Any:
    """Return a record without a connection, for creators and ``do_connect``."""
    return _ConnectionRecord(pool, connect=False)


def pool_of(record: ConnectionPoolEntry) -> Any:
    """Return the pool that has made a record, which says so nowhere in public."""
    return record._ConnectionRecord__pool  # type: ignore[attr-defined]  # mangled


def guard_first_connects(pool: Pool, lock: AbstractContextManager[object]) -> None:
    """Have the listeners of a pool's first connect, which run once, run under `lock`.

    SQLAlchemy makes a mutex of its own for each kind of event where there is none.
    """
    dispatch: Any = pool.dispatch
    for listeners in (dispatch.first_connect, dispatch.connect):
        listeners.for_modify(dispatch)._exec_once_mutex = lock


def recycle(pool: Pool) -> float:
    """Return ``pool_recycle``, -1 for never."""
    return pool._recycle


def expired(pool: Pool, record: ConnectionPoolEntry) -> bool:
    """Tell if a record's connection is as old as the pool's ``recycle``."""
    recycle = pool._recycle
    starttime: float = getattr(record, "starttime", math.inf)
    return recycle > -1 and time.time() - starttime > recycle


def handed_out(record: ConnectionPoolEntry) -> Any:
    """Return the ``PoolProxiedConnection`` of a record, None if it has none."""
    fairy_ref = getattr(record, "fairy_ref", None)
    return None if fairy_ref is None else fairy_ref()


def is_dropped(record: ConnectionPoolEntry) -> bool:
    """Tell if a connection that was handed out with a record has no user.

    No reference to the ``PoolProxiedConnection`` is taken, which might become the last
    one: a weak reference loses its callback together with what it refers to.
    """
    fairy_ref: Any = getattr(record, "fairy_ref", None)
    return fairy_ref is None or fairy_ref.__callback__ is None


def disown(record: ConnectionPoolEntry) -> None:
    """Make a forked child forget a connection that is its parent's.

    Neither a rollback nor a close may reach the socket shared with the parent. The
    driver's object is made immortal: some drivers say goodbye when it is deallocated.
    """
    dbapi_connection = record.dbapi_connection
    if dbapi_connection is None:
        return
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dbapi_connection))
    setattr(record, "dbapi_connection", None)  # noqa: B010  (no slot in the interface)
    fairy = handed_out(record)
    if fairy is not None:
        fairy.dbapi_connection = None
