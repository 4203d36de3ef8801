"""Pools on a DBAPI that does nothing: ours, QueuePool, and the least a pool can be.

The DBAPI belongs to a dialect of our own, registered as any third-party dialect is.
What is left in a checkout is SQLAlchemy and the pool.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.dialects import registry
from sqlalchemy.engine import Connection
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, Pool, QueuePool

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool


class NullConnection:
    """A DBAPI connection to nothing. A checkin calls its ``rollback``."""

    def close(self) -> None:
        pass

    commit = rollback = close


class NullError(Exception):
    """The base of the DBAPI's errors, none of which ever happens."""


class NullDialect(DefaultDialect):
    name = "null"
    driver = "null"
    supports_statement_cache = True

    @classmethod
    def import_dbapi(cls) -> Any:
        names = {"paramstyle": "qmark", "Error": NullError}
        return SimpleNamespace(connect=lambda *args, **kw: NullConnection(), **names)

    def initialize(self, connection: Connection) -> None:
        pass  # there is no version or isolation level to be found out


class NullAsyncDialect(NullDialect):
    """The same for asyncio. There is nothing that it would have to wait for."""

    driver = "async"
    is_async = True


registry.register("null", __name__, "NullDialect")
registry.register("null.async", __name__, "NullAsyncDialect")


class FloorPool(Pool):
    """The floor: a deque. No limit, no lock, no line, so nothing can cost less."""

    def __init__(self, creator: Any, **kw: Any) -> None:
        super().__init__(creator, **kw)
        self._idle: deque[ConnectionPoolEntry] = deque()

    def _do_get(self) -> ConnectionPoolEntry:
        try:
            return self._idle.popleft()
        except IndexError:
            return self._create_connection()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._idle.append(record)

    def dispose(self) -> None:
        while self._idle:
            self._idle.popleft().close()

    def recreate(self) -> FloorPool:
        return type(self)(self._creator, dialect=self._dialect)


class HandoffPool(FloorPool):
    """The least that serves in order: a limit, a lock, one line, a hand-off.

    No tags, no time-out, and nothing is safe. What this costs beyond ``QueuePool`` is
    the price of standing in line at all; what we cost beyond this, that of our rules.
    """

    def __init__(self, creator: Any, pool_size: int, **kw: Any) -> None:
        super().__init__(creator, **kw)
        self._size = pool_size
        self._lock = threading.Lock()
        self._line: deque[tuple[threading.Lock, list[ConnectionPoolEntry]]] = deque()
        self._opened = 0

    def _do_get(self) -> ConnectionPoolEntry:
        with self._lock:
            if self._idle:
                return self._idle.popleft()
            full = self._opened == self._size
            if full:
                bell, handed = threading.Lock(), list[ConnectionPoolEntry]()
                bell.acquire()
                self._line.append((bell, handed))
            else:
                self._opened += 1
        if not full:
            return self._create_connection()
        bell.acquire()
        return handed[0]

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        with self._lock:
            if not self._line:
                self._idle.append(record)
                return
            bell, handed = self._line.popleft()
            handed.append(record)
        bell.release()

    def recreate(self) -> HandoffPool:
        return type(self)(self._creator, self._size, dialect=self._dialect)


#: Seconds. No wait in any benchmark may end by it, however starved the waiter is.
_PATIENCE = 300.0


def fair_engine(size: int = 20, **options: Any) -> Engine:
    options = {"pool_size": size, "pool_timeout": _PATIENCE, **options}
    return _engine(FairQueuePool, **options)


def queue_engine(size: int = 20, **options: Any) -> Engine:
    """Return an engine with a ``QueuePool`` of `size` connections, no overflow."""
    options = {"pool_size": size, "pool_timeout": _PATIENCE, **options}
    return _engine(QueuePool, max_overflow=0, **options)


#: Ours, and the one that it stands beside, each of a size.
PEERS: dict[str, Callable[..., Engine]] = {
    "FairQueuePool": fair_engine,
    "QueuePool": queue_engine,
}


def handoff_engine(size: int = 20) -> Engine:
    return _engine(HandoffPool, pool_size=size)


def floor_engine() -> Engine:
    return _engine(FloorPool)


#: These, and the floor.
THREE = PEERS | {"floor": floor_engine}


def async_engine(pool: type[Pool], size: int = 20) -> AsyncEngine:
    options = {} if pool is FloorPool else fixed(pool, size)
    return AsyncEngine(_engine(pool, "null+async://", **options))


def _engine(pool_class: type[Pool], url: Any = "null://", **options: Any) -> Engine:
    return create_engine(url, poolclass=pool_class, **options)


def fixed(pool: type[Pool], size: int) -> dict[str, Any]:
    """Return the options with which a pool has so many connections and keeps them."""
    if pool in (FairQueuePool, AsyncAdaptedFairQueuePool):
        return {"pool_size": size, "min_idle": size}
    return {"pool_size": size, "max_overflow": 0}


def open_all(engine: Engine) -> None:
    if isinstance(engine.pool, FairQueuePool):
        engine.pool.warm_up()  # a tag may not have all
        return
    for connection in [engine.connect() for _ in range(engine.pool.size())]:
        connection.close()
