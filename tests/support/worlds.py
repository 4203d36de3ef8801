"""One test for threads and for tasks.

SQLAlchemy's API below its asyncio classes is synchronous, so a test that runs in a
greenlet reads like one that runs in a thread. What differs is how a second caller is
started, and how one waits for it. A test is marked with :func:`contract` and has a
`world` among its arguments.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time

import pytest
from sqlalchemy import create_engine, event, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool

from . import state
from .stub import StubServer, sized
from .tasks import until
from .threads import PATIENCE, Caller, Gate, connect, eventually, give


class Threads:
    """Callers are threads. What they have when the test is over is returned then.

    :param url: the database of :meth:`engine`.
    """

    pool_class = FairQueuePool
    #: What ends a caller in the middle of its work.
    interruption = KeyboardInterrupt

    def __init__(self, url=None):
        self.url = url
        #: The stub of :meth:`pool`.
        self.server = StubServer()
        self._engines, self._pools = [], []
        self._out, self._callers = [], []

    def run(self, test):
        try:
            test()
        finally:
            self.close()

    def engine(self, size=None, **options):
        """Return a (synchronous) engine, which is closed after the test.

        It is one on the stub in a world of threads without a database.
        """
        options = sized(size, options)
        engine = self.make(self.url, poolclass=self.pool_class, **options)
        self._engines.append(engine)
        return engine

    def make(self, url, **options):
        return create_engine(url, **options) if url else self.server.engine(**options)

    def pool(self, size=None, **options):
        """Return a pool on the stub, which must be quiet after the test.

        :param size: how many connections it has, all of which one tag may have.
        """
        self._pools.append(self.server.pool(self.pool_class, **sized(size, options)))
        return self._pools[-1]

    def close(self):
        while self._out or self._waiting():
            give(self._out)
            self.eventually(lambda: self._out or not self._waiting())
        for caller in self._callers:
            if not caller.asked:
                caller.result()
        for engine in self._engines:
            engine.dispose()
        for pool in [engine.pool for engine in self._engines] + self._pools:
            state.assert_quiet(pool)

    def _waiting(self):
        return any(caller.is_alive() for caller in self._callers)

    def connect(self, pool, tag="a"):
        """Check a connection out; it is returned after the test if not before."""
        connection = connect(pool, tag)
        self._out.append(connection)
        return connection

    def take(self, pool, number, tag="a"):
        """Check so many connections out; they are returned in the same way."""
        return [self.connect(pool, tag) for _ in range(number)]

    def come(self, pool, tag="a"):
        """Start another caller, which must be served before the test is over."""
        self._callers.append(self.start(self.connect, pool, tag))
        return self._callers[-1]

    def wait_in_line(self, pool, tag="a", count=1):
        """Start callers under a tag, one after the other; return them in that order."""
        callers = []
        for _ in range(count):
            before = state.waiting(pool)
            callers.append(self.come(pool, tag))
            self.ensure_waiting(pool, before + 1)
        return callers

    def ensure_waiting(self, pool, number):
        """Return once so many callers wait in a pool, or in that of an engine."""
        self.eventually(lambda: state.waiting(pool) == number, f"{number} waiting")

    # -- what differs in a world of tasks --

    #: Starts another caller; its `result()` waits for it.
    start = Caller
    gate = Gate
    eventually = staticmethod(eventually)
    sleep = staticmethod(time.sleep)


class Task:
    """As `Caller`, for a task."""

    asked = False

    def __init__(self, function, *args):
        self._task = asyncio.create_task(greenlet_spawn(function, *args))

    def is_alive(self):
        return not self._task.done()

    def cancel(self):
        self._task.cancel()

    def result(self):
        self.asked = True
        return await_only(self._task)

    def strand(self):
        """Have nothing logged when the loop is closed before the task has ended."""
        self._task._log_destroy_pending = False


class TaskGate:
    """As `Gate`, for tasks."""

    def __init__(self):
        self._reached, self._open = asyncio.Event(), asyncio.Event()

    def __call__(self, *args):
        self._reached.set()
        if not self._open.is_set():
            await_only(self._open.wait())

    def reached(self):
        await_only(self._reached.wait())

    def open(self):
        self._open.set()


class Tasks(Threads):
    """Callers are tasks; each runs in SQLAlchemy's greenlet."""

    pool_class = AsyncAdaptedFairQueuePool
    interruption = asyncio.CancelledError

    def __init__(self, url=None, new_loop=asyncio.new_event_loop):
        super().__init__(url)
        self.new_loop = new_loop

    def run(self, test):
        self.in_a_loop(functools.partial(super().run, test))

    def in_a_loop(self, function, *args, all_end=True):
        """Run a function in a new loop, which is closed then.

        :param all_end: every task must have ended with it.
        """
        loop = self.new_loop()
        main = greenlet_spawn(function, *args)
        try:
            result = loop.run_until_complete(asyncio.wait_for(main, 2 * PATIENCE))
            assert not (all_end and asyncio.all_tasks(loop))
            return result
        finally:
            loop.close()

    @staticmethod
    def make(url, **options):
        return create_async_engine(url, **options).sync_engine

    start = Task
    gate = TaskGate

    @staticmethod
    def eventually(condition, what="the condition"):
        await_only(until(condition, what))

    @staticmethod
    def sleep(seconds):
        await_only(asyncio.sleep(seconds))


def make_world(kind, url=None):
    """Return a world of "threads", or of tasks with "asyncio" or "uvloop"."""
    if kind == "threads":
        return Threads(url)
    if kind == "asyncio":
        return Tasks(url)
    uvloop = pytest.importorskip("uvloop", reason="it has no wheels for Windows")
    return Tasks(url, uvloop.new_event_loop)


def contract(test):
    """Run a test in the world that it is given."""
    signature = inspect.signature(test)

    @functools.wraps(test)
    def run(*args, **kw):
        arguments = signature.bind(*args, **kw).arguments
        names = ("world", "tasks", "threads")
        world = next(arguments[name] for name in names if name in arguments)
        world.run(lambda: test(**arguments))

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
