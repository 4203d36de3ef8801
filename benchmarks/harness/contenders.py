"""The pools that people use, each as its documentation recommends.

All have the same number of connections to the same PostgreSQL, all of which are
open when the measurement begins. A contender is opened for one measurement and
closed after it. What a checkout is, is what the documentation shows: SQLAlchemy's
includes a ``Connection``, psycopg_pool's and asyncpg's the DBAPI's connection.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
import psycopg_pool
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool, QueuePool

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool

from .database import APPLICATION_NAME, Database
from .pools import fixed, open_all

_SETTINGS = {"application_name": APPLICATION_NAME}


@dataclass(frozen=True)
class Setup:
    database: Database
    #: Connections.
    size: int
    #: How many tags there will be; only the semaphores are made by it.
    tags: int
    #: Seconds that a checkout waits.
    timeout: float = 120.0


#: Gives for a tag what checks out under it; in tasks, a coroutine function.
Connects = Callable[[str], Callable[[], Any]]


@dataclass(frozen=True)
class Contender:
    name: str
    #: Given a setup, a context manager, or an asynchronous one, of `Connects`.
    open: Callable[[Setup], Any]
    #: How it is configured, and who recommends that.
    how: str
    #: What its time-out raises.
    timeout_error: type[BaseException] = exc.TimeoutError


class _Held:
    """What was checked out, with the pool's own way to give it back."""

    __slots__ = ("close",)

    def __init__(self, close: Callable[[], Any]) -> None:
        self.close = close


# -- threads --------------------------------------------------------------------------


@contextmanager
def _engine(setup: Setup, pool: type[Pool], **options: Any) -> Iterator[Connects]:
    options |= {**fixed(pool, setup.size), "pool_timeout": setup.timeout}
    engine = setup.database.engine(pool, **options)
    try:
        open_all(engine)
        yield lambda tag: engine.execution_options(scraper=tag).connect
    finally:
        engine.dispose()


@contextmanager
def _semaphores(setup: Setup) -> Iterator[Connects]:
    # Each tag its even part: with more, the sum is more than there is, and the
    # callers wait in the pool again, in no order of tags.
    part = max(setup.size // setup.tags, 1)
    semaphores: dict[str, threading.Semaphore] = {}

    def enter(tag: str, semaphore: threading.Semaphore) -> _Held:
        if not semaphore.acquire(timeout=setup.timeout):
            raise exc.TimeoutError(f"the semaphore of {tag}")
        try:
            connection = connects(tag)()
        except BaseException:
            semaphore.release()
            raise

        stack = ExitStack()
        stack.callback(semaphore.release)
        stack.callback(connection.close)
        return _Held(stack.close)

    with _engine(setup, QueuePool) as connects:
        yield lambda tag: partial(
            enter, tag, semaphores.setdefault(tag, threading.BoundedSemaphore(part))
        )


def _psycopg_options(setup: Setup) -> dict[str, Any]:
    return {
        "min_size": setup.size,
        "max_size": setup.size,
        "timeout": setup.timeout,
        "open": False,
        "kwargs": _SETTINGS,
    }


@contextmanager
def _psycopg(setup: Setup) -> Iterator[Connects]:
    pool = psycopg_pool.ConnectionPool(setup.database.dsn, **_psycopg_options(setup))

    def connect() -> _Held:
        return _Held(partial(pool.putconn, pool.getconn()))

    try:
        pool.open(wait=True)
        yield lambda tag: connect
    finally:
        pool.close()


# -- tasks ----------------------------------------------------------------------------


@asynccontextmanager
async def _async_engine(setup: Setup, pool: type[Pool]) -> AsyncIterator[Connects]:
    async def dbapi_connect() -> Any:
        # asyncpg reads a URL as libpq does; SQLAlchemy's dialect does not.
        return await asyncpg.connect(setup.database.dsn, server_settings=_SETTINGS)

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=dbapi_connect,
        poolclass=pool,
        pool_timeout=setup.timeout,
        **fixed(pool, setup.size),
    )

    def connects(tag: str) -> Callable[[], Any]:
        tagged = engine.execution_options(scraper=tag)

        async def connect() -> Any:
            return await tagged.connect()

        return connect

    try:
        if isinstance(engine.pool, AsyncAdaptedFairQueuePool):
            await engine.pool.warm_up()
        else:
            for connection in [await engine.connect() for _ in range(setup.size)]:
                await connection.close()
        yield connects
    finally:
        await engine.dispose()


@asynccontextmanager
async def _psycopg_async(setup: Setup) -> AsyncIterator[Connects]:
    pool = psycopg_pool.AsyncConnectionPool(
        setup.database.dsn, **_psycopg_options(setup)
    )

    async def connect() -> _Held:
        return _Held(partial(pool.putconn, await pool.getconn()))

    try:
        await pool.open(wait=True)
        yield lambda tag: connect
    finally:
        await pool.close()


@asynccontextmanager
async def _asyncpg(setup: Setup) -> AsyncIterator[Connects]:
    pool = await asyncpg.create_pool(
        setup.database.dsn,
        min_size=setup.size,
        max_size=setup.size,
        server_settings=_SETTINGS,
    )

    async def connect() -> _Held:
        connection = await pool.acquire(timeout=setup.timeout)
        return _Held(partial(pool.release, connection))

    try:
        yield lambda tag: connect
    finally:
        await pool.close()


_POOLING = "docs.sqlalchemy.org, Connection Pooling"

#: The first is ours, the second is what ratios are taken to.
THREADS: tuple[Contender, ...] = (
    Contender(
        "FairQueuePool",
        partial(_engine, pool=FairQueuePool),
        "default options, psycopg2",
    ),
    Contender(
        "QueuePool",
        partial(_engine, pool=QueuePool),
        f"pool_size, max_overflow=0 for a fixed size, psycopg2 ({_POOLING})",
    ),
    Contender(
        "QueuePool LIFO",
        partial(_engine, pool=QueuePool, pool_use_lifo=True),
        f"the same with pool_use_lifo ({_POOLING}, Using FIFO vs. LIFO)",
    ),
    Contender(
        "semaphore per tag",
        _semaphores,
        "a BoundedSemaphore for each tag, of its even part, before a QueuePool: what "
        "people write by hand",
    ),
    Contender(
        "psycopg_pool",
        _psycopg,
        "ConnectionPool, min_size = max_size for a fixed size, open(wait=True) at the "
        "start (psycopg.org, Connection pools)",
        psycopg_pool.PoolTimeout,
    ),
)

TASKS: tuple[Contender, ...] = (
    Contender(
        "AsyncAdaptedFairQueuePool",
        partial(_async_engine, pool=AsyncAdaptedFairQueuePool),
        "default options, asyncpg",
    ),
    Contender(
        "AsyncAdaptedQueuePool",
        partial(_async_engine, pool=AsyncAdaptedQueuePool),
        f"pool_size, max_overflow=0, asyncpg ({_POOLING})",
    ),
    Contender(
        "psycopg_pool",
        _psycopg_async,
        "AsyncConnectionPool, configured as ConnectionPool",
    ),
    Contender(
        "asyncpg pool",
        _asyncpg,
        "create_pool, min_size = max_size; it resets a connection on the server when "
        "it comes back, as by default (magicstack.github.io/asyncpg, Connection Pools)",
    ),
)
