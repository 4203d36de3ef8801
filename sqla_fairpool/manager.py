"""The pool for scripts that want three lines and no engine of their own.

::

    from sqla_fairpool.manager import get_session, register_scraper

    register_scraper("layer3")
    with get_session("layer3") as session:
        session.execute(...)

The database and the limits come from the environment, see :mod:`.launch`, unless
:func:`startup_dynamic_pool` is given others. Scripts that name the same database share
one budget: the ledger is ``host`` by default.

The first session starts the pool. After a shut-down a session is an error, and a
start-up begins anew. A start-up while it runs does nothing; with a URL or options that
differ from those in force it is an error. A scraper that is not registered is served
like any other, and has a row in the figures from its first session on.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeAlias

from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from .checks import BadArgument, BadState, naming, refuse_timeout, validate_tag
from .diagnosis import users_level
from .launch import DATABASE, VARIABLES, Settings
from .ledger import overview_text
from .ledger.addresses import make_store
from .ledger.drivers import for_asyncio, for_threads, translate_for_asyncpg
from .ledger.inspector import Inspector
from .ledger.keeper import describe_process
from .ledger.overview import Limits, Overview, Part, ProcessRow, compile_overview
from .ledger.store import LedgerError, StoreAway
from .options import OPTIONS, PoolOptions
from .pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool
from .pool.ledger_sessions import announce
from .stats import condensed
from .tagging import context_tag
from .threads import make_lock

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

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

#: The options if nothing is said.
_DEFAULTS = PoolOptions.parse()

_Url: TypeAlias = "str | URL | None"

#: Engines with a tag that are kept; names may come from user data.
_ENGINES = 256


class Kind(NamedTuple):
    """What differs between the pool for threads and that for tasks."""

    startup: str
    driver: Callable[[URL], URL]
    engine: Callable[..., Any]


class Started:
    """A running pool, and what it was started with: ``create_engine``'s arguments."""

    def __init__(self, engine: Any, url: URL, options: Mapping[str, Any]) -> None:
        self.engine = engine
        self._url, self._options = url, options
        self.pool: FairQueuePool = engine.pool
        option = self.pool.options.tag_option
        #: Returns the engine that checks out under a tag.
        self.tagged = lru_cache(maxsize=_ENGINES)(
            lambda name: engine.execution_options(**{option: name})
        )

    def refuse_others(self, url: URL | None, options: Mapping[str, Any]) -> None:
        """Raise if it would be another pool with these."""
        differing = []
        if url is not None and url != self._url:
            differing.append("another URL")
        for name, value in options.items():
            if name in OPTIONS:
                current = getattr(self.pool.options, name)
                if str(value) != str(current):  # numbers may come as texts
                    differing.append(f"{name}={value!r}, which is {current!r}")
            elif value != self._options.get(name):
                differing.append(f"another {name}")  # it may be a secret
        if differing:
            raise BadState(
                "the dynamic pool runs already and cannot be started with "
                f"{', '.join(differing)}: shut it down before"
            )

    def overview(self, registered: Iterable[str]) -> Overview:
        """Return the figures of all that share the budget, or of this process alone."""
        stats, ledger, warnings = self.pool.stats(), self.pool.options.ledger, []
        own = Limits.of(self.pool.options)
        if ledger is not None:
            inspector = Inspector(make_store(ledger, self._url, observes=True))
            try:
                return inspector.look(registered=registered, own=own)
            except StoreAway as error:
                warnings = [f"the ledger is away: {error}"]
            except LedgerError as error:
                if stats.checked_out or stats.idle:  # else it has joined none
                    warnings = [str(error.args[0])]
            finally:
                inspector.close()
        rows, who = condensed(stats.tags), describe_process()
        tags, there = tuple(row.name for row in rows), stats.checked_out + stats.idle
        names = who["host"], who["pid"], who["program"]
        parts = [Part(ProcessRow(*names, "answers", tags, open=there), rows)]
        more = {"warnings": warnings, "taken_at": who["since"]}
        return compile_overview(parts, own, registered=registered, **more)


def _tasks_engine(url: URL, **options: Any) -> Any:
    from sqlalchemy.ext.asyncio import create_async_engine  # needs greenlet

    engine = create_async_engine(url, poolclass=AsyncAdaptedFairQueuePool, **options)
    if url.get_driver_name() == "asyncpg":
        translate_for_asyncpg(engine.sync_engine, url)
    return engine


THREADS = Kind("startup", for_threads, partial(create_engine, poolclass=FairQueuePool))
TASKS = Kind("startup_async", for_asyncio, _tasks_engine)


@contextlib.contextmanager
def _session(engine: Any, **options: Any) -> Iterator[Session]:
    # Closing rolls back what is not committed, and returns the connection.
    with Session(engine, **options) as session:
        yield session
        session.commit()


@contextlib.asynccontextmanager
async def _async_session(engine: Any, **options: Any) -> AsyncIterator[AsyncSession]:
    from sqlalchemy.ext.asyncio import AsyncSession

    async with AsyncSession(engine, **options) as session:
        yield session
        await session.commit()


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
        self._lock = make_lock()
        self._running: dict[Kind, Started] = {}
        self._ended: set[Kind] = set()
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
        if running := self._end(THREADS):
            running.engine.dispose()

    async def shutdown_async(self) -> None:
        """Close the connections in the pool of :meth:`get_async_session`."""
        if running := self._end(TASKS):
            await running.engine.dispose()

    def _start(self, kind: Kind, url: _Url, options: dict[str, Any]) -> Started:
        with self._lock:
            if running := self._running.get(kind):
                given = None if url is None else self._database(kind, url)
                running.refuse_others(given, options)
            else:
                running = self._running[kind] = self._make(kind, url, options)
                self._ended.discard(kind)
                announce(running.pool, self._scrapers)
            return running

    def _make(self, kind: Kind, url: _Url, arguments: dict[str, Any]) -> Started:
        settings = Settings.read()
        arguments = {**self._options, **arguments}
        refuse_timeout(arguments)
        # What the class says otherwise than the pool itself would.
        defaults = {
            option: getattr(self, attribute)
            for option, attribute in _ATTRIBUTES.items()
            if getattr(self, attribute) != getattr(_DEFAULTS, option)
        }
        said = {**settings.options, **arguments}
        names = {o: name for o, name in _ATTRIBUTES.items() if o not in said}
        if settings.run is not None:
            defaults["default_tag"] = settings.run.scraper
        database = self._database(kind, url)
        with naming(names), settings.naming(arguments):
            options = settings.with_arguments(arguments, defaults)
            engine = kind.engine(database, **options)
        return Started(engine, database, options)

    def _database(self, kind: Kind, url: _Url) -> URL:
        found = Settings.read().database(self._url if url is None else url, "url")
        if found is None:
            how = f"set {DATABASE}, or start the pool with a URL"
            raise BadArgument(f"no database is named: {how}")
        return kind.driver(found)

    def _end(self, kind: Kind) -> Started | None:
        with self._lock:
            if kind in self._running:
                self._ended.add(kind)
            return self._running.pop(kind, None)

    def _use(self, kind: Kind) -> Started:
        """Return the running pool; start it if it was never started."""
        # Without the lock, as a rule, so that it is free when the process forks.
        if running := self._running.get(kind):
            return running
        with self._lock:
            if kind in self._ended:
                how = f"{kind.startup}() starts it again"
                raise BadState(f"the dynamic pool has been shut down: {how}")
            return self._start(kind, None, {})

    # -- sessions -------------------------------------------------------------------

    def register_scraper(self, name: str) -> None:
        """Have a scraper in the figures of all processes, from the pool's start on.

        :raises sqlalchemy.exc.ArgumentError: if the name cannot be a tag.
        """
        with self._lock:
            self._scrapers[validate_tag(name, "scraper")] = None
            for running in self._running.values():
                announce(running.pool, [name])

    def get_session(
        self, name: str | None = None, **options: Any
    ) -> contextlib.AbstractContextManager[Session]:
        """Return a session for a ``with`` block.

        It commits when the block ends, and rolls back when it ends by an error; its
        connection is returned in any case.

        :param name: the scraper. Without one the session has the tag of the ``with
          sqla_fairpool.tag(...)`` around it, the launcher's ``--scraper``, or else
          ``unknown``, with one warning.
        :param options: of :class:`sqlalchemy.orm.Session`.
        :raises sqlalchemy.exc.ArgumentError: if the name cannot be a tag.
        :raises sqlalchemy.exc.InvalidRequestError: after :meth:`shutdown`.
        """
        return _session(self._engine_for(self._use(THREADS), name), **options)

    def get_async_session(
        self, name: str | None = None, **options: Any
    ) -> contextlib.AbstractAsyncContextManager[AsyncSession]:
        """Return a session for an ``async with`` block. See :meth:`get_session`."""
        return _async_session(self._engine_for(self._use(TASKS), name), **options)

    def _engine_for(self, running: Started, name: str | None) -> Any:
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
        """Print them for people, to a file or to standard output."""
        out = file or sys.stdout
        text = "\n".join(overview_text.lines(self._overview()))
        # A name may have characters that the output's encoding has not.
        encoding = getattr(out, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=out)

    def _overview(self) -> Overview:
        running = self._running.get(THREADS) or self._running.get(TASKS)
        return (running or self._use(THREADS)).overview(self._scrapers)


#: The class attribute that stands for an option of the pool.
_ATTRIBUTES = {"pool_size": "GLOBAL_POOL_SIZE"} | {
    option: name
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
