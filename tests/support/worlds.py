"""One test for threads and for tasks: the contract of `test_databases.py`.

SQLAlchemy's API below its asyncio classes is synchronous, so a test that is run in
a greenlet reads like one that is run in a thread. What differs is how a second
caller is started, and how one waits for it.
"""

from __future__ import annotations

import asyncio
import functools

from sqlalchemy import create_engine, event, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool

from .state import assert_quiet
from .tasks import waiting
from .threads import PATIENCE, Caller, ensure_waiting


class Threads:
    """Callers are threads."""

    pool_class = FairQueuePool

    def __init__(self, url):
        self.url = url
        self._engines = []

    def run(self, test):
        try:
            test()
        finally:
            self.close()

    def engine(self, **options):
        """Return a (synchronous) engine, which is closed after the test."""
        engine = self.make(self.url, poolclass=self.pool_class, **options)
        self._engines.append(engine)
        return engine

    make = staticmethod(create_engine)

    def close(self):
        for engine in self._engines:
            engine.dispose()
            assert_quiet(engine.pool)

    def start(self, function):
        """Start another caller; its `result()` waits for it."""
        return Caller(function)

    def ensure_waiting(self, engine, number):
        ensure_waiting(engine.pool, number)


class Task:
    """As `Caller`, for a task."""

    def __init__(self, function):
        self._task = asyncio.create_task(greenlet_spawn(function))

    def result(self):
        return await_only(self._task)


class Tasks(Threads):
    """Callers are tasks; each runs in SQLAlchemy's greenlet."""

    pool_class = AsyncAdaptedFairQueuePool

    def __init__(self, url, new_loop=asyncio.new_event_loop):
        super().__init__(url)
        self._new_loop = new_loop

    def run(self, test):
        loop = self._new_loop()
        main = greenlet_spawn(functools.partial(super().run, test))
        try:
            loop.run_until_complete(asyncio.wait_for(main, 2 * PATIENCE))
        finally:
            loop.close()

    @staticmethod
    def make(url, **options):
        return create_async_engine(url, **options).sync_engine

    def start(self, function):
        return Task(function)

    def ensure_waiting(self, engine, number):
        await_only(waiting(engine.pool, number))


def contract(test):
    """Run a test in the world that it is given."""

    @functools.wraps(test)
    def run(world, **arguments):
        world.run(lambda: test(world, **arguments))

    return run


def world_of(url, driver):
    """Return threads or tasks with the URL of a database.

    :param driver: SQLAlchemy's name, with `` tasks`` behind one that has a twin.
    """
    name, _, variant = driver.partition(" ")
    is_asyncio = variant == "tasks" or name.endswith(("asyncpg", "aiosqlite"))
    return (Tasks if is_asyncio else Threads)(make_url(url).set(drivername=name))


def holders(engine):
    """Return who holds how much, tags that hold nothing left out."""
    rows = engine.pool.stats().tags
    return {row.name: row.connections for row in rows if row.connections}


def count_opened(engine):
    """Return a list that grows with each connection which the engine opens."""
    seen = []
    event.listen(engine, "connect", lambda connection, record: seen.append(1))
    return seen
