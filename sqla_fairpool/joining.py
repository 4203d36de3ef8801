"""How a pool becomes the member of a ledger."""

from __future__ import annotations

import atexit
import os
import socket
import weakref
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.pool import Pool

from .exchange import Exchange
from .ledger.host import HostStore
from .ledger.keeper import Keeper
from .ledger.places import make_store, needs_database
from .ledger.postgres import PostgresStore
from .ledger.rows import Terms
from .ledger.sessions import mark, members_with_sessions, refuse_pooler
from .options import PoolOptions
from .overview import figures_of
from .share import Share
from .snapshot import snapshot

__all__ = ["await_url", "join_ledger"]

#: Seconds that a server may take to end a session that is closed. It takes one or two
#: milliseconds; a server that is gone is not waited for any longer.
_GOODBYE = 2.0


def terms_of(options: PoolOptions) -> Terms:
    """Return what all members have to agree on."""
    return Terms(
        capacity=options.capacity,
        soft_limit=options.soft_limit,
        max_limit=options.max_limit,
        idle_timeout=options.idle_timeout,
        reallocation_interval=options.reallocation_interval,
    )


def join_ledger(pool: Pool, exchange: Exchange) -> None:
    """Let a pool share the slots of its ledger. Needs :func:`await_url` for some."""
    share = Share(exchange)
    exchange.join(share)
    share.watch(pool)
    ledger = exchange.options.ledger
    assert ledger is not None
    if not needs_database(ledger):
        _begin(pool, exchange, share, None)


def await_url(pool: Pool, exchange: Exchange, dialect: Any) -> None:
    """Prepare the engine's dialect; begin when it is told which database it is.

    ``on_connect_url()`` is called by ``create_engine`` with the URL, which a pool
    is never told.
    """
    share = exchange.share
    if share is None or not isinstance(dialect, Dialect):
        return
    _close_for_good(dialect)
    if share.keeper is not None:
        return
    on_connect_url = dialect.on_connect_url

    def told(url: URL) -> Any:
        if share.keeper is None:
            _begin(pool, exchange, share, url)
        return on_connect_url(url)

    setattr(dialect, on_connect_url.__name__, told)


def _close_for_good(dialect: Any) -> None:
    """Have a connection's close return when the server has ended the session.

    libpq says goodbye and does not wait; for a moment the server has the session and
    the one that takes its slot. A copy of the socket sees when the server closes it.
    """
    do_close = dialect.do_close

    def close(dbapi_connection: Any) -> None:
        copy = None
        try:
            copy = socket.socket(fileno=os.dup(dbapi_connection.fileno()))
        except Exception:
            pass  # broken already, or a driver without sockets
        try:
            do_close(dbapi_connection)
            if copy is not None:
                _await_the_end(copy)
        finally:
            if copy is not None:
                copy.close()

    if dialect.name == "postgresql" and not dialect.is_async:
        setattr(dialect, do_close.__name__, close)


def _await_the_end(copy: socket.socket) -> None:
    copy.settimeout(_GOODBYE)
    try:
        while copy.recv(4096):
            pass  # what nobody has read
    except OSError:
        pass


def _begin(pool: Pool, exchange: Exchange, share: Share, url: URL | None) -> None:
    assert exchange.options.ledger is not None
    store = make_store(exchange.options.ledger, url)
    sessions = _Sessions(pool, store)
    keeper = Keeper(
        store,
        terms_of(exchange.options),
        share,
        sessions.of_the_gone,
        figures=partial(_figures, weakref.ref(exchange)),
    )
    share.keeper = keeper
    sessions.mark_for(keeper)
    _keepers.add(keeper)


def _figures(ref: weakref.ref[Exchange]) -> dict[str, Any]:
    """Return what a process says of itself to whoever looks on."""
    exchange = ref()
    if exchange is None:
        return {}
    with exchange.section():
        open_ = exchange.connections_there()
    return {
        "size": exchange.options.pool_size,
        "open": open_,
        "tags": [asdict(figures) for figures in figures_of(snapshot(exchange))],
    }


class _Sessions:
    """Marks a pool's connections on PostgreSQL, and finds those of others."""

    def __init__(self, pool: Pool, store: HostStore | PostgresStore) -> None:
        self._pool = weakref.ref(pool)
        self._store = store

    def mark_for(self, keeper: Keeper) -> None:
        """Have each new connection counted as `keeper`'s."""
        pool = self._pool()
        assert pool is not None

        @event.listens_for(pool, "connect")
        def connected(dbapi_connection: Any, record: Any) -> None:
            if not self._on_postgresql():
                return
            number = keeper.status().member
            assert number is not None, "a connection without a slot"
            cursor = dbapi_connection.cursor()
            try:
                refuse_pooler(cursor, _backend_pid(dbapi_connection))
                mark(cursor, self._store.key, number)
            finally:
                cursor.close()
            dbapi_connection.rollback()

    def _on_postgresql(self) -> bool:
        pool: Any = self._pool()
        return getattr(pool and pool._dialect, "name", None) == "postgresql"

    def of_the_gone(self, numbers: set[int]) -> Collection[int] | None:
        """Return which of these members still have sessions; None if unknown.

        Takes a connection of its own for that, beside the budget: at most one for
        each process that looks, for a moment, while there are slots in quarantine.
        """
        pool: Any = self._pool()
        if pool is None or not self._on_postgresql() or pool._dialect.is_async:
            return None
        connection = pool._creator()
        try:
            cursor = connection.cursor()
            found = members_with_sessions(cursor, self._store.key)
            cursor.close()
        finally:
            connection.close()
        return found & numbers


def _backend_pid(dbapi_connection: Any) -> int | None:
    """Return the server process as the driver knows it, None if it tells nothing."""
    driver = getattr(dbapi_connection, "driver_connection", dbapi_connection)
    if hasattr(driver, "get_server_pid"):  # asyncpg
        return int(driver.get_server_pid())
    info = getattr(driver, "info", None)
    pid = getattr(info, "backend_pid", None)
    return None if pid is None else int(pid)


# Those that are to leave before the interpreter goes.
_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    for keeper in list(_keepers):
        keeper.close()
