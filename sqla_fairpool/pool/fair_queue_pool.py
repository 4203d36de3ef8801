"""``FairQueuePool``: the surface that SQLAlchemy sees.

Rules of this file: it translates. Connections change hands in :mod:`.core`, the rules
are :mod:`..scheduling.policy` and :mod:`..scheduling.scheduler`, and which tag asks is
found in :mod:`..tagging` and :mod:`.execution_options`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.engine import Dialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.util import greenlet_spawn

from ..checks import naming
from ..diagnosis import locations
from ..diagnosis.event_log import LeakWatch
from ..options import PoolOptions, describe_changes
from ..scheduling.ticket import TagLimits
from ..tagging import blocks, context_tag
from . import sqlalchemy_private
from .checkout import Generation, Opener, Record
from .core import PoolCore
from .events import (
    await_url,
    guard_first_connect,
    observe,
    tell_on_checkout,
    warn_of_private_memory,
    watch_errors,
)
from .execution_options import check_server, current, watch_dialect
from .figures import Figures
from .pausing import AsyncPausable, Pausable
from .waiters import TaskWaiter, ThreadWaiter, Waiter


class FairQueuePool(Figures, Pausable, Pool):
    """A connection pool that divides its connections fairly among tags.

    Used in the place of :class:`sqlalchemy.pool.QueuePool`::

        engine = create_engine(url, poolclass=FairQueuePool)
        layer3 = engine.execution_options(scraper="layer3")

    A tag that is alone may have `max_limit` connections; of two or more active
    tags each may have `soft_limit`; when they want more than there are, each gets
    its max-min fair share. Callers under one tag are served in the order in which
    they came. See :mod:`sqla_fairpool.scheduling.policy` for the rules.

    :param creator: a callable that returns a DB-API connection, as for
      :class:`sqlalchemy.pool.Pool`.
    :param pool_size: connections kept open. Default 20.
    :param max_overflow: further connections while they are needed, closed when
      they come back. ``pool_size + max_overflow`` is the capacity. Default 0.
    :param timeout: seconds a checkout waits, None for no limit; ``pool_timeout``
      in :func:`sqlalchemy.create_engine`. Default 30.0.
    :param soft_limit: most connections of each tag while two or more tags are
      active. Default: half the capacity, rounded up.
    :param max_limit: most connections of a tag that is alone. Default: three
      quarters of the capacity, rounded up.
    :param idle_timeout: seconds without activity (a checkout, a statement, a
      checkin) after which a tag is idle and does not count any more. Default 60.0.
    :param reallocation_interval: how often, in seconds, idle tags are looked for;
      callers that use the pool or wait in it do so. Default 30.0.
    :param tags: :class:`.TagLimits` of tags that have their own, or dicts of its
      fields, by the tag; a key that ends in ``*`` is for all tags that begin so, and
      the longest one counts. Default None: all tags are alike.
    :param usage_half_life: seconds after which what a tag has used counts half. Of
      tags that hold equally much, the one that has used least per weight is next.
      Default 10.0.
    :param enforce: False for a dry run: callers are served in order of arrival, as if
      there were no tags, and what the rules would have done is counted. Default True.
    :param max_waiting: most callers that may wait; one more gets
      :class:`.TooManyWaiting` at once. Default None, no limit.
    :param tag_option: the execution option that carries the tag. Default
      ``"scraper"``.
    :param default_tag: the tag of a checkout that has none. Default ``"unknown"``.
    :param min_idle: connections that are opened with the first one, or by
      :meth:`warm_up`, and that `idle_connection_ttl` leaves open. Default 0.
    :param idle_connection_ttl: seconds after which a connection in the pool that
      was not used is closed, by the next caller that uses the pool. Default None:
      never.
    :param leak_threshold: seconds after which a connection that is out is reported
      in the log, with the stack of its checkout, which is noted for that. Default
      None: never.
    :param deadlock_timeout: seconds a checkout waits before it is refused with
      :class:`.SelfDeadlock`, if only its own caller, or callers that wait in the same
      way, could serve it. Default 1.0; None: it waits for its `timeout`.
    :param failover_guard: replace all connections when their server takes no writes
      any more, though it did as they were opened, or shuts down. Default True.
    :param reconnect_backoff: after a disconnect, one caller at a time tries to connect;
      the longest pause between failures, in seconds. Default 2.0, at most 5.
    :param recycle_jitter: connections are replaced after `recycle` seconds less up to
      this part of them, so that not all end at the same moment. Default 0.1.
    :param server_tag: tell PostgreSQL the tag as ``application_name``, when a
      connection goes from one tag to another. Default False.
    :param ledger: share the connections with all processes that name the same
      ledger: ``"host"``, a file at a place that follows from the database, or a path.
      Default None: this pool alone.
    :param on_other_terms: where the ledger has other limits, ``"adopt"`` these (the
      default), or ``"lead"``: have this pool's in force for all its processes.
    :param use_lifo: hand out the connection that came back last, so that the
      others fall idle. Default False, but True with `idle_connection_ttl`.
    :param \\**kw: ``recycle``, ``pre_ping``, ``reset_on_return``, ``echo``,
      ``logging_name``, ``events`` and ``dialect``, as for
      :class:`sqlalchemy.pool.Pool`.
    :raises sqlalchemy.exc.ArgumentError: for a bad value, naming it.
    """

    __module__ = "sqla_fairpool"  # where users import it from; loggers have it

    _is_asyncio = False

    # Below "sqlalchemy.pool", so that echo_pool and logging settings reach it.
    _sqla_logger_namespace = "sqlalchemy.pool.FairQueuePool"

    _waiter_class: type[Waiter] = ThreadWaiter
    _core: PoolCore

    #: Opens a connection that is none of the pool's, see `open_another`.
    _open_another: Callable[[Any], Any]

    #: The clock; a test's seam.
    _clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(
        self,
        creator: Any,
        pool_size: int = 20,
        max_overflow: int = 0,
        timeout: float | None = 30.0,
        soft_limit: int | None = None,
        max_limit: int | None = None,
        idle_timeout: float = 60.0,
        reallocation_interval: float = 30.0,
        max_waiting: int | None = None,
        tag_option: str = "scraper",
        default_tag: str = "unknown",
        min_idle: int = 0,
        idle_connection_ttl: float | None = None,
        leak_threshold: float | None = None,
        deadlock_timeout: float | None = 1.0,
        failover_guard: bool = True,
        reconnect_backoff: float = 2.0,
        recycle_jitter: float = 0.1,
        server_tag: bool = False,
        ledger: str | None = None,
        use_lifo: bool = False,
        tags: Mapping[str, TagLimits] | None = None,
        usage_half_life: float = 10.0,
        enforce: bool = True,
        on_other_terms: str = "adopt",  # by position, for create_engine() to know it
        *,
        _core: PoolCore | None = None,
        **kw: Any,
    ) -> None:
        owns, member = _core is None, None
        if _core is None:
            with naming({"timeout": "pool_timeout"}):  # as `create_engine` calls it
                options = PoolOptions.among(locals())
            if options.ledger is not None:
                from .ledger_member import LedgerMember  # most pools need none of it

                member = LedgerMember(self._waiter_class, options.default_tag)
            traced = options.leak_threshold is not None
            _core = (_TracedCore if traced else PoolCore)(
                options, self._waiter_class, use_lifo, self._clock, member
            )
        self._core = _core
        self._default_tag = _core.options.default_tag
        self.generation = Generation()
        # What Pool calls, which would call the method below: two frames less.
        self._return_conn = _core.checkin  # type: ignore[method-assign,assignment]  # with `fair`
        if owns:
            _core.housekeeping.owner = self.generation
        super().__init__(creator, **kw)
        _core.log_to(self.logger)
        if not self._is_asyncio:
            guard_first_connect(self)
        if owns:  # its successors inherit what listens
            observe(self, _core)
            self._tell_server()
            warn_of_private_memory(self, self._dialect)
            if getattr(self._dialect, "name", None) == "postgresql":
                # Others interrupt: a killed greenlet leaves a session that has begun.
                _core.slots.existing.failures = (Exception,)
            if member is not None:
                from .ledger_sessions import join_ledger

                member.serve(_core)
                join_ledger(self, _core, member)
                await_url(self._dialect, partial(join_ledger, self, _core, member))

    # -- what Pool asks of a pool ------------------------------------------------

    def _do_get(self) -> ConnectionPoolEntry:
        begun = current.begun
        request = begun.request
        if request is not None and request.dialect is self._dialect:
            begun.request = None  # before it waits or connects, see there
            tag = request.tag or context_tag() or self._default_tag
            return self._core.checkout(tag, self, request.timeout)
        tag, entries = self._default_tag, blocks()
        if entries:
            name, block = entries[-1]  # as a rule the one: a frame less
            tag = (context_tag() if block.has_ended else name) or tag
        return self._core.checkout(tag, self)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self._core.checkin(record)  # type: ignore[arg-type]  # with `fair`

    def _close_connection(
        self, connection: DBAPIConnection, *, terminate: bool = False
    ) -> None:
        # Also for detached connections, and those whose `connect` events failed.
        close = partial(super()._close_connection, connection, terminate=terminate)
        self._core.slots.existing.close(connection, close)

    def recreate(self) -> FairQueuePool:
        """Return a pool that takes over from this one when it is first used.

        What lies in this pool is closed then. It has the same options and the same
        accounting: what is checked out of this pool still counts. It is closed when
        it comes back after that, or in any case if this pool has been disposed of, as
        by ``engine.dispose()``.
        """
        self.logger.info("Pool recreating")
        if self.generation.disposed:
            self._core.lock.run(self._core.housekeeping.doom)
        return type(self)(
            self._creator,
            recycle=self._recycle,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=cast(Any, self._reset_on_return),
            pre_ping=self._pre_ping,
            dialect=self._dialect,
            _dispatch=self.dispatch,
            _core=self._core,
        )

    def dispose(self) -> None:
        """Close the connections that are in the pool.

        Those that are checked out stay open until they come back.
        """
        self.generation.disposed = True
        if self._core.housekeeping.owner is self.generation:
            self._core.lock.run(self._core.housekeeping.close_idle)
        self.logger.info("Pool disposed. %s", self.status())

    def open_another(self) -> DBAPIConnection:
        """Open a connection as the pool's are, which is none of the pool's.

        For questions to the server; the caller closes it.
        """
        record = sqlalchemy_private.bare_record(self)
        return cast(DBAPIConnection, self._open_another(record))

    # -- while it is running ---------------------------------------------------------

    def reconfigure(self, **changes: Any) -> None:
        """Change options of the living pool, all of those given or none.

        ::

            engine.pool.reconfigure(soft_limit=8, max_limit=12)

        Takes effect at once for callers that come or wait: one that may go on
        now is woken. Nothing that is checked out is taken away; what exceeds a
        lowered limit drains. Connections in the pool that are too many are closed.
        Limits that were never given follow the capacity. Callers that wait keep
        the time-out with which they came.

        With a ledger, limits are the ledger's: those given are soon in force in all
        its processes.

        :param changes: any of the options of this class but `tag_option`,
          `default_tag`, `leak_threshold`, `server_tag` and `use_lifo`; None as a
          limit stands for its default.
        :raises sqlalchemy.exc.ArgumentError: for a bad value, naming it. Nothing
          has changed then.
        """
        check_server(self._dialect, self.options.changed(changes))
        change = self._core.housekeeping.reconfigure
        before, now = self._core.lock.run(change, changes)
        self._tell_server()
        if before != now:
            self.logger.info("Pool reconfigured: %s", describe_changes(before, now))

    def _tell_server(self) -> None:
        if self.options.tells_server and not self._core.tells_server:
            self._core.tells_server = True
            tell_on_checkout(self)

    def warm_up(self) -> int:
        """Open connections until `min_idle` are open; return how many were opened.

        Connections that are checked out count as open. What goes wrong in opening
        one is raised; those opened before stay in the pool.
        """
        return self._core.opening.warm_up(self._core, self)

    def upkeep(self) -> None:
        """Do what is left to the next visitor, without waiting for one.

        That is: look for idle tags if it is time to, and close connections that
        were not used for `idle_connection_ttl`. For a timer of yours, in a
        process that may not touch its pool for hours.
        """
        self._core.lock.run(self._core.housekeeping.look_around)

    # -- the engine's dialect: where tags and statements come from ------------------

    if not TYPE_CHECKING:

        def __setattr__(self, name, value):
            # Pool.__init__ and create_engine(pool=...) assign the dialect. Not a
            # property: SQLAlchemy reads the attribute at every checkin.
            if name == "_invoke_creator":  # set together with the creator
                self._open_another = value
                value = partial(_open_for_record, self._core, value)
            super().__setattr__(name, value)
            if name == "_dialect" and isinstance(value, Dialect):
                watch_dialect(value, self.options)
                watch_errors(value, self._core)


class AsyncAdaptedFairQueuePool(AsyncPausable, FairQueuePool):
    """:class:`FairQueuePool` for :func:`sqlalchemy.ext.asyncio.create_async_engine`.

    The same class with the same options and the same accounting; only that a
    caller who has to wait suspends its task instead of its thread. A cancelled
    one leaves the line, or passes on what it was granted in the same moment.
    """

    __module__ = "sqla_fairpool"  # where users import it from; loggers have it

    _is_asyncio = True
    _waiter_class = TaskWaiter
    # For a pool that is made without an engine; an engine's dialect replaces it.
    _dialect = sqlalchemy_private.async_connection_dialect()

    async def warm_up(self) -> int:  # type: ignore[override]  # as all I/O of asyncio
        """Open connections until `min_idle` are open; return how many were opened.

        See :meth:`FairQueuePool.warm_up`.
        """
        return await greenlet_spawn(super().warm_up)

    async def upkeep(self) -> None:  # type: ignore[override]  # a task's
        """Do what is left to the next visitor. See :meth:`FairQueuePool.upkeep`."""
        await greenlet_spawn(super().upkeep)


class _TracedCore(PoolCore):
    """With ``leak_threshold``: notes where callers check out, and reports leaks."""

    def _begin(self, options: PoolOptions) -> None:
        super()._begin(options)
        assert options.leak_threshold is not None
        self.state.leaks = LeakWatch(self.state, options.leak_threshold)

    def checkout(
        self, tag: str, opener: Opener, timeout: float | None = None
    ) -> Record:
        assert self.state.leaks is not None
        self.state.leaks.start()
        stack = locations(self.here.frames())
        record = super().checkout(tag, opener, timeout)
        record.fair.checkout.stack = stack
        return record


def _open_for_record(core: PoolCore, invoke: Callable[[Any], Any], record: Any) -> Any:
    # Through the core, which has other parts after a fork.
    return core.opening.open_for_record(core, invoke, record)
