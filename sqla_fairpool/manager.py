"""The pool for scripts that want three lines and no engine of their own.

::

    from sqla_fairpool.manager import get_session, register_scraper

    register_scraper("layer3")
    with get_session("layer3") as session:
        session.execute(...)

The database and the limits come from the environment, see :mod:`.environment`, unless
:func:`startup_dynamic_pool` is given others. Scripts that name the same database share
one budget: the ledger is ``host`` if nobody says otherwise.

====================================  ==================================================
what happens                          what it does
====================================  ==================================================
a session before the start-up         starts from the environment
start-up while it runs                nothing; with a URL or options that differ from
                                      those in force, an error
a session after the shut-down         an error; start-up begins anew
shut-down twice, or before            nothing
registering twice                     nothing
a scraper that is not registered      is served like any other; it has a row in the
                                      figures from its first session on
no name                               the tag of ``with sqla_fairpool.tag(...)`` around
                                      it, the launcher's ``--scraper``, or else
                                      ``unknown``, with one warning
====================================  ==================================================
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from sqlalchemy import exc
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import Session

from .launch.environment import DATABASE, Settings
from .launch.started import (
    Started,
    async_session,
    session,
    tasks_engine,
    threads_engine,
)
from .ledger import overview_text
from .ledger.drivers import for_asyncio, for_threads
from .ledger.overview import Overview
from .options import PoolOptions, naming, validate_tag
from .tagging import context_tag

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

__all__ = [
    "DynamicConnectionManager",
    "get_async_session",
    "get_connection_stats",
    "get_session",
    "print_connection_stats",
    "register_scraper",
    "shutdown_dynamic_async_pool",
    "shutdown_dynamic_pool",
    "startup_dynamic_async_pool",
    "startup_dynamic_pool",
]

_E = TypeVar("_E", bound="Engine | AsyncEngine")


class DynamicConnectionManager:
    """One database, its pool and its sessions; the functions' object form.

    The class attributes are the limits if neither the environment nor an argument says
    otherwise; override them by subclassing::

        class Manager(DynamicConnectionManager):
            GLOBAL_POOL_SIZE = 40
            IDLE_TIMEOUT = 15

    A limit that is left as it is follows the size: half of it, and three quarters.

    :param url: the database. Default: the environment's ``DATABASE_URL``.
    :param options: of :class:`.FairQueuePool` and
      :func:`sqlalchemy.create_engine`, but ``poolclass``.

    Safe to be used by several threads.
    """

    #: Connections in all.
    GLOBAL_POOL_SIZE: int = 20
    #: Most connections of each of several active scrapers.
    SCRAPER_SOFT_LIMIT: int = 10
    #: Most connections of one that is alone.
    SCRAPER_MAX_LIMIT: int = 15
    #: Seconds without activity after which a scraper is idle.
    IDLE_TIMEOUT: float = 60
    #: How often, in seconds, idle scrapers are looked for.
    REALLOCATION_INTERVAL: float = 30

    def __init__(self, url: str | URL | None = None, **options: Any) -> None:
        self._url = url
        self._options = options
        self._lock = threading.RLock()
        self._started: Started[Engine] | None = None
        self._started_async: Started[AsyncEngine] | None = None
        #: Which were shut down: "" and "_async".
        self._ended: set[str] = set()
        self._scrapers: dict[str, None] = {}
        self._has_warned = False

    # -- start-up and shut-down -----------------------------------------------------

    def startup(self, url: str | URL | None = None, **options: Any) -> None:
        """Start the pool. No connection is opened yet.

        :param url: the database. Default: that of the constructor, or the environment's
          ``DATABASE_URL``. Without a driver, or with one of asyncio, one for threads is
          chosen that is installed.
        :param options: as for the class.
        :raises sqlalchemy.exc.ArgumentError: for a bad value, naming the argument or
          the variable; without any URL.
        :raises sqlalchemy.exc.InvalidRequestError: if it runs with others already.
        """
        with self._lock:
            if self._started is not None:
                given = None if url is None else self._database(url, for_threads)
                self._started.refuse_others(given, options)
                return
            self._started = self._start(url, options, for_threads, threads_engine)
            self._ended.discard("")

    def startup_async(self, url: str | URL | None = None, **options: Any) -> None:
        """Start the pool of :meth:`get_async_session`. See :meth:`startup`.

        It is another pool than that of the threads, and shares their budget as every
        process does, by the ledger.
        """
        with self._lock:
            if self._started_async is not None:
                given = None if url is None else self._database(url, for_asyncio)
                self._started_async.refuse_others(given, options)
                return
            self._started_async = self._start(url, options, for_asyncio, tasks_engine)
            self._ended.discard("_async")

    def shutdown(self) -> None:
        """Close the connections in the pool; those that are out, when they come back.

        Nothing if it does not run.
        """
        with self._lock:
            started, self._started = self._started, None
            if started is not None:
                self._ended.add("")
        if started is not None:
            started.engine.dispose()

    async def shutdown_async(self) -> None:
        """Close the connections in the pool of :meth:`get_async_session`."""
        with self._lock:
            started, self._started_async = self._started_async, None
            if started is not None:
                self._ended.add("_async")
        if started is not None:
            await started.engine.dispose()

    def _start(
        self,
        url: str | URL | None,
        arguments: Mapping[str, Any],
        driver: Callable[[URL], URL],
        make: Callable[[URL, dict[str, Any]], _E],
    ) -> Started[_E]:
        settings = Settings.read()
        arguments = {**self._options, **arguments}
        defaults = self._class_options()
        names = {
            _ATTRIBUTES[name]: name
            for name in _ATTRIBUTES
            if _ATTRIBUTES[name] not in {*settings.options, *arguments}
        }
        if settings.run is not None:
            defaults["default_tag"] = settings.run.scraper
        database = self._database(url, driver, settings)
        with naming(names), settings.naming(arguments):
            options = settings.with_arguments(arguments, defaults)
            engine = make(database, options)
        return Started(engine, database, options)

    def _database(
        self,
        url: str | URL | None,
        driver: Callable[[URL], URL],
        settings: Settings | None = None,
    ) -> URL:
        settings = settings or Settings.read()
        found = settings.database(self._url if url is None else url, "url")
        if found is None:
            raise exc.ArgumentError(
                f"no database is named: set {DATABASE}, or start the pool with a URL"
            )
        return driver(found)

    def _class_options(self) -> dict[str, Any]:
        """Return what the class says otherwise than the pool itself would."""
        return {
            option: getattr(self, name)
            for name, option in _ATTRIBUTES.items()
            if getattr(self, name) != _DEFAULTS[name]
        }

    # -- sessions -------------------------------------------------------------------

    def register_scraper(self, name: str) -> None:
        """Have a scraper in the figures before its first session. Idempotent.

        :raises sqlalchemy.exc.ArgumentError: if the name cannot be a tag.
        """
        self._scrapers[validate_tag(name, "scraper")] = None

    def get_session(
        self, name: str | None = None, **options: Any
    ) -> AbstractContextManager[Session]:
        """Return a session for a ``with`` block.

        It commits when the block ends, and rolls back when it ends by an error; its
        connection is returned in any case.

        :param name: the scraper. See the head of this file for when it is missing.
        :param options: of :class:`sqlalchemy.orm.Session`.
        :raises sqlalchemy.exc.ArgumentError: if the name cannot be a tag.
        :raises sqlalchemy.exc.InvalidRequestError: after :meth:`shutdown`.
        """
        started = self._running()
        return session(self._engine_for(started, name), options)

    def get_async_session(
        self, name: str | None = None, **options: Any
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Return a session for an ``async with`` block. See :meth:`get_session`."""
        started = self._started_async
        if started is None:
            with self._lock:
                self._refuse_after_shutdown("_async")
                self.startup_async()
                started = self._started_async
        assert started is not None
        return async_session(self._engine_for(started, name), options)

    def _running(self) -> Started[Engine]:
        # Without the lock, as a rule: nobody holds it when a process forks.
        started = self._started
        if started is None:
            with self._lock:
                self._refuse_after_shutdown("")
                self.startup()
                started = self._started
        assert started is not None
        return started

    def _refuse_after_shutdown(self, which: str) -> None:
        if which in self._ended:
            raise exc.InvalidRequestError(
                f"the dynamic pool has been shut down: startup{which}() starts it again"
            )

    def _engine_for(self, started: Started[_E], name: str | None) -> _E:
        if name is not None:
            return started.tagged(validate_tag(name, "scraper"))
        if context_tag() is None and not self._has_warned:
            default = started.pool.options.default_tag
            if default == _UNKNOWN:
                self._has_warned = True
                warnings.warn(
                    f"a session without a scraper's name goes under {default!r}: give "
                    "the name, or put `with sqla_fairpool.tag(name):` around it",
                    stacklevel=_stack_of_ours(),
                )
        return started.engine

    # -- figures --------------------------------------------------------------------

    def get_connection_stats(self) -> dict[str, Any]:
        """Return the figures of all processes that share the budget, as plain data.

        ``{"pool": {"size", "checked_out", "available", "overflow", "utilization", ...},
        "scrapers": [{"scraper", "active", "connections", "limit", "idle_seconds",
        "waiting", ...}], "strategy": ..., ...}``, see :class:`.Overview`. Times are in
        seconds. Starts the pool if need be; while the ledger cannot be reached, the
        figures are this process's, and a warning among them says so.

        Takes a few milliseconds, and a second if a process does not answer.

        :raises sqlalchemy.exc.InvalidRequestError: after :meth:`shutdown`.
        """
        return self._overview().as_dict()

    def print_connection_stats(self, file: TextIO | None = None) -> None:
        """Print them for people.

        :param file: default: standard output.
        """
        out = file or sys.stdout
        text = "\n".join(overview_text.lines(self._overview()))
        # A name may have characters that the output's encoding has not.
        encoding = getattr(out, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=out)

    def _overview(self) -> Overview:
        started: Started[Any] | None = self._started or self._started_async
        return (started or self._running()).overview(self._scrapers)


#: The pool's option that each class attribute stands for.
_ATTRIBUTES = {
    "GLOBAL_POOL_SIZE": "pool_size",
    "SCRAPER_SOFT_LIMIT": "soft_limit",
    "SCRAPER_MAX_LIMIT": "max_limit",
    "IDLE_TIMEOUT": "idle_timeout",
    "REALLOCATION_INTERVAL": "reallocation_interval",
}

_DEFAULTS = {name: getattr(DynamicConnectionManager, name) for name in _ATTRIBUTES}

#: The tag of those who say nothing, and are warned.
_UNKNOWN = PoolOptions.parse().default_tag


def _stack_of_ours() -> int:
    """Return the level of the first frame that is not of this file, for a warning."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    return level


# -- the functions --------------------------------------------------------------------

_manager = DynamicConnectionManager()


def startup_dynamic_pool(url: str | URL | None = None, **options: Any) -> None:
    """Start the pool. See :meth:`DynamicConnectionManager.startup`."""
    _manager.startup(url, **options)


def shutdown_dynamic_pool() -> None:
    """Close the pool. See :meth:`DynamicConnectionManager.shutdown`."""
    _manager.shutdown()


def startup_dynamic_async_pool(url: str | URL | None = None, **options: Any) -> None:
    """Start the asyncio pool. See :meth:`DynamicConnectionManager.startup_async`."""
    _manager.startup_async(url, **options)


async def shutdown_dynamic_async_pool() -> None:
    """Close the asyncio pool. See :meth:`DynamicConnectionManager.shutdown_async`."""
    await _manager.shutdown_async()


def register_scraper(name: str) -> None:
    """Name a scraper. See :meth:`DynamicConnectionManager.register_scraper`."""
    _manager.register_scraper(name)


def get_session(
    name: str | None = None, **options: Any
) -> AbstractContextManager[Session]:
    """Return a session. See :meth:`DynamicConnectionManager.get_session`."""
    return _manager.get_session(name, **options)


def get_async_session(
    name: str | None = None, **options: Any
) -> AbstractAsyncContextManager[AsyncSession]:
    """Return one of asyncio. See :meth:`DynamicConnectionManager.get_async_session`."""
    return _manager.get_async_session(name, **options)


def get_connection_stats() -> dict[str, Any]:
    """Return figures. See :meth:`DynamicConnectionManager.get_connection_stats`."""
    return _manager.get_connection_stats()


def print_connection_stats(file: TextIO | None = None) -> None:
    """Print them. See :meth:`DynamicConnectionManager.print_connection_stats`."""
    _manager.print_connection_stats(file)
