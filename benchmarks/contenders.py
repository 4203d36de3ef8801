"""The pools that people use, each as its documentation recommends.

All have the same number of connections to the same PostgreSQL, all of which are
open when the measurement begins. A contender is opened for one measurement and
closed after it. What a checkout is, is what the documentation shows: SQLAlchemy's
includes a ``Connection``, psycopg_pool's and asyncpg's the DBAPI's connection.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, exc
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, QueuePool

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool

from .crowd import Closing
from .database import APPLICATION_NAME, Database
from .report import Role
from .tasks import AsyncClosing

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["TASKS", "THREADS", "Setup", "TaskPeer", "ThreadPeer"]


@dataclass(frozen=True)
class Setup:
    """What all contenders are given."""

    place: Database
    #: Connections.
    size: int
    #: How many tags there will be; only the semaphores are made by it.
    tags: int
    #: Seconds that a checkout waits.
    timeout: float = 120.0


#: Gives for a tag what checks out under it.
Connects = Callable[[str], Callable[[], Closing]]
AsyncConnects = Callable[[str], Callable[[], Awaitable[AsyncClosing]]]


@dataclass(frozen=True)
class ThreadPeer:
    """A pool for threads."""

    name: str
    open: Callable[[Setup], AbstractContextManager[Connects]]
    #: How it is configured, and who recommends that.
    how: str
    role: Role = "other"
    #: What its time-out raises; looked up when it is needed.
    timeout_error: Callable[[], type[BaseException]] = lambda: exc.TimeoutError


@dataclass(frozen=True)
class TaskPeer:
    """A pool for asyncio tasks."""

    name: str
    open: Callable[[Setup], AbstractAsyncContextManager[AsyncConnects]]
    how: str
    role: Role = "other"


# -- SQLAlchemy, threads --------------------------------------------------------------


def _fill(engine: Engine, size: int) -> None:
    connections = [engine.connect() for _ in range(size)]
    for connection in connections:
        connection.close()


@contextmanager
def _fair(setup: Setup) -> Iterator[Connects]:
    engine = setup.place.engine(
        FairQueuePool,
        pool_size=setup.size,
        min_idle=setup.size,
        pool_timeout=setup.timeout,
    )
    pool = engine.pool
    assert isinstance(pool, FairQueuePool)
    try:
        pool.warm_up()
        yield lambda tag: engine.execution_options(scraper=tag).connect
    finally:
        engine.dispose()


@contextmanager
def _queue(setup: Setup, use_lifo: bool = False) -> Iterator[Connects]:
    engine = setup.place.engine(
        QueuePool,
        pool_size=setup.size,
        max_overflow=0,
        pool_timeout=setup.timeout,
        pool_use_lifo=use_lifo,
    )
    try:
        _fill(engine, setup.size)
        yield lambda tag: engine.connect
    finally:
        engine.dispose()


class _Admitted:
    """A connection that was checked out past a semaphore."""

    __slots__ = ("_connection", "_semaphore")

    def __init__(self, connection: Closing, semaphore: threading.Semaphore) -> None:
        self._connection, self._semaphore = connection, semaphore

    def close(self) -> None:
        try:
            self._connection.close()
        finally:
            self._semaphore.release()


@contextmanager
def _semaphores(setup: Setup) -> Iterator[Connects]:
    # Each tag its even part: with more, the sum is more than there is, and who
    # comes first waits in the pool again.
    part = max(setup.size // setup.tags, 1)
    semaphores: dict[str, threading.Semaphore] = {}

    with _queue(setup) as connects:

        def admitted(tag: str) -> Callable[[], Closing]:
            semaphore = semaphores.setdefault(tag, threading.BoundedSemaphore(part))
            connect = connects(tag)

            def enter() -> Closing:
                if not semaphore.acquire(timeout=setup.timeout):
                    raise exc.TimeoutError(f"no place for {tag}")
                try:
                    return _Admitted(connect(), semaphore)
                except BaseException:
                    semaphore.release()
                    raise

            return enter

        yield admitted


# -- psycopg_pool ---------------------------------------------------------------------


class _Returning:
    """A connection of psycopg_pool, which is given back by the pool's method."""

    __slots__ = ("_connection", "_pool")

    def __init__(self, pool: Any, connection: Any) -> None:
        self._pool, self._connection = pool, connection

    def close(self) -> Any:
        return self._pool.putconn(self._connection)


def _psycopg_options(setup: Setup) -> dict[str, Any]:
    return {
        "min_size": setup.size,
        "max_size": setup.size,
        "timeout": setup.timeout,
        "open": False,
        "kwargs": {"application_name": APPLICATION_NAME},
    }


@contextmanager
def _psycopg(setup: Setup) -> Iterator[Connects]:
    pool_class = import_module("psycopg_pool").ConnectionPool
    pool = pool_class(setup.place.dsn, **_psycopg_options(setup))
    try:
        pool.open(wait=True)

        def connect() -> Closing:
            return _Returning(pool, pool.getconn())

        yield lambda tag: connect
    finally:
        pool.close()


def _psycopg_timeout() -> type[BaseException]:
    error: type[BaseException] = import_module("psycopg_pool").PoolTimeout
    return error


# -- asyncio --------------------------------------------------------------------------


def _async_engine(setup: Setup, pool: type[Pool], **options: Any) -> AsyncEngine:
    # Imported when it is used: it needs greenlet.
    from sqlalchemy.ext.asyncio import create_async_engine

    async def connect() -> Any:
        # asyncpg reads a URL as libpq does; SQLAlchemy's dialect does not.
        return await import_module("asyncpg").connect(
            setup.place.dsn, server_settings={"application_name": APPLICATION_NAME}
        )

    return create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        poolclass=pool,
        pool_size=setup.size,
        max_overflow=0,
        pool_timeout=setup.timeout,
        **options,
    )


@asynccontextmanager
async def _fair_async(setup: Setup) -> AsyncIterator[AsyncConnects]:
    engine = _async_engine(setup, AsyncAdaptedFairQueuePool, min_idle=setup.size)
    pool = engine.pool
    assert isinstance(pool, AsyncAdaptedFairQueuePool)

    def connects(tag: str) -> Callable[[], Awaitable[AsyncClosing]]:
        tagged = engine.execution_options(scraper=tag)

        async def connect() -> AsyncClosing:
            return await tagged.connect()

        return connect

    try:
        await pool.warm_up()
        yield connects
    finally:
        await engine.dispose()


@asynccontextmanager
async def _queue_async(setup: Setup) -> AsyncIterator[AsyncConnects]:
    engine = _async_engine(setup, AsyncAdaptedQueuePool)

    async def connect() -> AsyncClosing:
        return await engine.connect()

    try:
        connections = [await connect() for _ in range(setup.size)]
        for connection in connections:
            await connection.close()
        yield lambda tag: connect
    finally:
        await engine.dispose()


@asynccontextmanager
async def _psycopg_async(setup: Setup) -> AsyncIterator[AsyncConnects]:
    pool_class = import_module("psycopg_pool").AsyncConnectionPool
    pool = pool_class(setup.place.dsn, **_psycopg_options(setup))
    try:
        await pool.open(wait=True)

        async def connect() -> AsyncClosing:
            return _Returning(pool, await pool.getconn())

        yield lambda tag: connect
    finally:
        await pool.close()


class _Releasing:
    """A connection of asyncpg's pool."""

    __slots__ = ("_connection", "_pool")

    def __init__(self, pool: Any, connection: Any) -> None:
        self._pool, self._connection = pool, connection

    async def close(self) -> None:
        await self._pool.release(self._connection)


@asynccontextmanager
async def _asyncpg(setup: Setup) -> AsyncIterator[AsyncConnects]:
    pool = await import_module("asyncpg").create_pool(
        setup.place.dsn,
        min_size=setup.size,
        max_size=setup.size,
        server_settings={"application_name": APPLICATION_NAME},
    )
    try:

        async def connect() -> AsyncClosing:
            return _Releasing(pool, await pool.acquire(timeout=setup.timeout))

        yield lambda tag: connect
    finally:
        await pool.close()


_POOLING = "docs.sqlalchemy.org, Connection Pooling"

#: The first is ours, the second is what ratios are taken to.
THREADS: tuple[ThreadPeer, ...] = (
    ThreadPeer("FairQueuePool", _fair, "default options, psycopg2", "ours"),
    ThreadPeer(
        "QueuePool",
        _queue,
        f"pool_size, max_overflow=0 for a fixed size, psycopg2 ({_POOLING})",
        "base",
    ),
    ThreadPeer(
        "QueuePool LIFO",
        partial(_queue, use_lifo=True),
        f"the same with pool_use_lifo ({_POOLING}, Using FIFO vs. LIFO)",
    ),
    ThreadPeer(
        "semaphore per tag",
        _semaphores,
        "a BoundedSemaphore for each tag, of its even part, before a QueuePool: what "
        "people write by hand",
    ),
    ThreadPeer(
        "psycopg_pool",
        _psycopg,
        "ConnectionPool, min_size = max_size for a fixed size, open(wait=True) at the "
        "start (psycopg.org, Connection pools)",
        timeout_error=_psycopg_timeout,
    ),
)

TASKS: tuple[TaskPeer, ...] = (
    TaskPeer(
        "AsyncAdaptedFairQueuePool", _fair_async, "default options, asyncpg", "ours"
    ),
    TaskPeer(
        "AsyncAdaptedQueuePool",
        _queue_async,
        f"pool_size, max_overflow=0, asyncpg ({_POOLING})",
        "base",
    ),
    TaskPeer(
        "psycopg_pool",
        _psycopg_async,
        "AsyncConnectionPool, configured as ConnectionPool",
    ),
    TaskPeer(
        "asyncpg pool",
        _asyncpg,
        "create_pool, min_size = max_size; it resets a connection on the server when "
        "it comes back, as by default (magicstack.github.io/asyncpg, Connection Pools)",
    ),
)
