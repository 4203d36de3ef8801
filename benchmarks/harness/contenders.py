"""The pools that people use, each as its documentation recommends.

All have the same number of connections to the same PostgreSQL, all of which are
open when the measurement begins. A contender is opened for one measurement and
closed after it. What a checkout is, is what the documentation shows: SQLAlchemy's
includes a ``Connection``, psycopg_pool's and asyncpg's the DBAPI's connection.
"""

from __future__ import annotations

import csv
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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


Contenders = tuple[Contender, ...]

#: What their time-outs raise.
TIMED_OUT = (exc.TimeoutError, psycopg_pool.PoolTimeout)


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
        with ExitStack() as stack:
            stack.callback(semaphore.release)
            stack.callback(connects(tag)().close)
            return _Held(stack.pop_all().close)

    with _engine(setup, QueuePool) as connects:
        yield lambda tag: partial(
            enter, tag, semaphores.setdefault(tag, threading.BoundedSemaphore(part))
        )


def _psycopg_pool(setup: Setup, kind: type[Any]) -> Any:
    times = {"timeout": setup.timeout, "open": False, "kwargs": _SETTINGS}
    return kind(setup.database.dsn, **_sizes(setup), **times)


def _sizes(setup: Setup) -> dict[str, Any]:
    return {"min_size": setup.size, "max_size": setup.size}


@contextmanager
def _psycopg(setup: Setup) -> Iterator[Connects]:
    pool = _psycopg_pool(setup, psycopg_pool.ConnectionPool)

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

    options = {"pool_timeout": setup.timeout, **fixed(pool, setup.size)}
    options |= {"poolclass": pool, "async_creator": dbapi_connect}
    engine = create_async_engine("postgresql+asyncpg://", **options)

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
    pool = _psycopg_pool(setup, psycopg_pool.AsyncConnectionPool)

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
        setup.database.dsn, server_settings=_SETTINGS, **_sizes(setup)
    )

    async def connect() -> _Held:
        connection = await pool.acquire(timeout=setup.timeout)
        return _Held(partial(pool.release, connection))

    try:
        yield lambda tag: connect
    finally:
        await pool.close()


# -- the tables of them: the first is ours, the second is what ratios are taken to -----


def _described(side: str, opened: Mapping[str, Callable[[Setup], Any]]) -> Contenders:
    file = Path(__file__).with_name("contenders.csv").read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(file.splitlines()) if row["side"] == side]
    how = {row["name"]: row["how"] for row in rows}
    return tuple(Contender(name, opens, how[name]) for name, opens in opened.items())


THREADS = _described(
    "threads",
    {
        "FairQueuePool": partial(_engine, pool=FairQueuePool),
        "QueuePool": partial(_engine, pool=QueuePool),
        "QueuePool LIFO": partial(_engine, pool=QueuePool, pool_use_lifo=True),
        "semaphore per tag": _semaphores,
        "psycopg_pool": _psycopg,
    },
)

TASKS = _described(
    "tasks",
    {
        "AsyncAdaptedFairQueuePool": partial(
            _async_engine, pool=AsyncAdaptedFairQueuePool
        ),
        "AsyncAdaptedQueuePool": partial(_async_engine, pool=AsyncAdaptedQueuePool),
        "psycopg_pool": _psycopg_async,
        "asyncpg pool": _asyncpg,
    },
)
