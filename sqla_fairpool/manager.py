"""The pool for scripts that want three lines and no engine of their own.

::

    from sqla_fairpool.manager import get_session, register_scraper

    register_scraper("layer3")
    with get_session("layer3") as session:
        session.execute(...)

The database and the limits come from the environment, see :mod:`.environment`, unless
:func:`startup_dynamic_pool` is given others. Scripts that name the same database share
one budget: the ledger is ``host`` by default.

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
a session without a name              has the tag of the ``with sqla_fairpool.tag(...)``
                                      around it, the launcher's ``--scraper``, or else
                                      ``unknown``, with one warning
====================================  ==================================================
"""

from __future__ import annotations

import sys
import threading
import warnings
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from sqlalchemy import exc
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import Session

from .diagnosis.callers import users_level
from .launch.environment import DATABASE, VARIABLES, Settings
from .launch.started import TASKS, THREADS, Kind, Started, async_session, session
from .ledger import overview_text
from .ledger.overview import Overview
from .options import PoolOptions, naming, refuse_timeout, validate_tag
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

#: The options if nothing is said.
_DEFAULTS = PoolOptions.parse()


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
    GLOBAL_POOL_SIZE: int = _DEFAULTS.pool_size
    #: Most connections of each of several active scrapers.
    SCRAPER_SOFT_LIMIT: int = _DEFAULTS.soft_limit
    #: Most connections of one that is alone.
    SCRAPER_MAX_LIMIT: int = _DEFAULTS.max_limit
    #: Seconds without activity after which a scraper is idle.
    IDLE_TIMEOUT: float = _DEFAULTS.idle_timeout
    #: How often, in seconds, idle scrapers are looked for.
    REALLOCATION_INTERVAL: float = _DEFAULTS.reallocation_interval

    def __init__(self, url: str | URL | None = None, **options: Any) -> None:
        self._url = url
        self._options = options
        self._lock = threading.RLock()
        self._running: dict[Kind[Any], Started[Any]] = {}
        self._ended: set[Kind[Any]] = set()
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
        self._start(THREADS, url, options)

    def startup_async(self, url: str | URL | None = None, **options: Any) -> None:
        """Start the pool of :meth:`get_async_session`. See :meth:`startup`.

        It is another pool than that of the threads, and shares their budget as every
        process does, by the ledger.
        """
        self._start(TASKS, url, options)

    def shutdown(self) -> None:
        """Close the connections in the pool; those that are out, when they come back.

        Does nothing if it does not run.
        """
        running = self._end(THREADS)
        if running is not None:
            running.engine.dispose()

    async def shutdown_async(self) -> None:
        """Close the connections in the pool of :meth:`get_async_session`."""
        running = self._end(TASKS)
        if running is not None:
            await running.engine.dispose()

    def _start(
        self, kind: Kind[_E], url: str | URL | None, options: dict[str, Any]
    ) -> Started[_E]:
        with self._lock:
            running = self._running.get(kind)
            if running is not None:
                given = None if url is None else self._database(kind, url)
                running.refuse_others(given, options)
            else:
                running = self._running[kind] = self._make(kind, url, options)
                self._ended.discard(kind)
            return running

    def _make(
        self, kind: Kind[_E], url: str | URL | None, arguments: dict[str, Any]
    ) -> Started[_E]:
        settings = Settings.read()
        arguments = {**self._options, **arguments}
        refuse_timeout(arguments)
        # What the class says otherwise than the pool itself would.
        defaults, names = {}, {}
        for attribute, option in _ATTRIBUTES.items():
            if getattr(self, attribute) != getattr(_DEFAULTS, option):
                defaults[option] = getattr(self, attribute)
            if option not in settings.options and option not in arguments:
                names[option] = attribute
        if settings.run is not None:
            defaults["default_tag"] = settings.run.scraper
        database = self._database(kind, url, settings)
        with naming(names), settings.naming(arguments):
            options = settings.with_arguments(arguments, defaults)
            engine = kind.engine(database, options)
        return Started(engine, database, options)

    def _database(
        self, kind: Kind[_E], url: str | URL | None, settings: Settings | None = None
    ) -> URL:
        settings = settings or Settings.read()
        found = settings.database(self._url if url is None else url, "url")
        if found is None:
            raise exc.ArgumentError(
                f"no database is named: set {DATABASE}, or start the pool with a URL"
            )
        return kind.driver(found)

    def _end(self, kind: Kind[_E]) -> Started[_E] | None:
        with self._lock:
            running = self._running.pop(kind, None)
            if running is not None:
                self._ended.add(kind)
            return running

    def _use(self, kind: Kind[_E]) -> Started[_E]:
        """Return the running pool; start it if it was never started."""
        # Without the lock, as a rule, so that it is free when the process forks.
        running = self._running.get(kind)
        if running is None:
            with self._lock:
                if kind in self._ended:
                    raise exc.InvalidRequestError(
                        "the dynamic pool has been shut down: "
                        f"{kind.startup}() starts it again"
                    )
                running = self._start(kind, None, {})
        return running

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
        return session(self._engine_for(self._use(THREADS), name), options)

    def get_async_session(
        self, name: str | None = None, **options: Any
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Return a session for an ``async with`` block. See :meth:`get_session`."""
        return async_session(self._engine_for(self._use(TASKS), name), options)

    def _engine_for(self, running: Started[_E], name: str | None) -> _E:
        if name is not None:
            return running.tagged(validate_tag(name, "scraper"))
        default = running.pool.options.default_tag
        is_unknown = context_tag() is None and default == _DEFAULTS.default_tag
        if is_unknown and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"a session without a scraper's name goes under {default!r}: give "
                "the name, or put `with sqla_fairpool.tag(name):` around it",
                stacklevel=users_level(),
            )
        return running.engine

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
        running = self._running.get(THREADS) or self._running.get(TASKS)
        return (running or self._use(THREADS)).overview(self._scrapers)


#: The pool's option that each class attribute stands for.
_ATTRIBUTES = {"GLOBAL_POOL_SIZE": "pool_size"} | {
    name: option
    for name, option in VARIABLES.items()
    if hasattr(DynamicConnectionManager, name)
}


# -- the functions: methods of one manager ---------------------------------------------

_manager = DynamicConnectionManager()

startup_dynamic_pool = _manager.startup
shutdown_dynamic_pool = _manager.shutdown
startup_dynamic_async_pool = _manager.startup_async
shutdown_dynamic_async_pool = _manager.shutdown_async
register_scraper = _manager.register_scraper
get_session = _manager.get_session
get_async_session = _manager.get_async_session
get_connection_stats = _manager.get_connection_stats
print_connection_stats = _manager.print_connection_stats
