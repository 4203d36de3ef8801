"""A running pool of a manager: its engine, the sessions on it, its figures."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sqlalchemy import create_engine, exc
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import Session

from ..ledger.addresses import make_store
from ..ledger.drivers import for_asyncio, for_threads, translate_for_asyncpg
from ..ledger.errors import LedgerError
from ..ledger.inspector import Inspector
from ..ledger.keeper import describe_process
from ..ledger.overview import (
    Limits,
    Overview,
    Part,
    ProcessRow,
    compile_overview,
    condensed,
)
from ..ledger.store import StoreAway
from ..options import OPTIONS
from ..pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool
from ..scheduling.limits import LimitsByTag

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

__all__ = ["TASKS", "THREADS", "Kind", "Started", "async_session", "session"]

_E = TypeVar("_E", bound="Engine | AsyncEngine")

#: Engines with a tag that are kept; names may come from user data.
_ENGINES = 256


@dataclass(frozen=True, slots=True)
class Kind(Generic[_E]):
    """What differs between the pool for threads and that for tasks."""

    startup: str
    driver: Callable[[URL], URL]
    engine: Callable[[URL, dict[str, Any]], _E]


class Started(Generic[_E]):
    """A running pool, and what it was started with.

    :param options: the arguments of ``create_engine``, those of the pool included.
    """

    def __init__(self, engine: _E, url: URL, options: Mapping[str, Any]) -> None:
        self.engine = engine
        self._url = url
        self._options = options
        pool = engine.pool
        assert isinstance(pool, FairQueuePool)
        self.pool: FairQueuePool = pool
        #: Returns the engine that checks out under a tag.
        self.tagged = lru_cache(maxsize=_ENGINES)(self._tagged)

    def _tagged(self, name: str) -> _E:
        option = {self.pool.options.tag_option: name}
        return self.engine.execution_options(**option)  # type: ignore[return-value]

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
            raise exc.InvalidRequestError(
                "the dynamic pool runs already and cannot be started with "
                f"{', '.join(differing)}: shut it down before"
            )

    def overview(self, registered: Mapping[str, None]) -> Overview:
        """Return the figures of all that share the budget, or of this process alone.

        :param registered: scrapers that have a row in any case.
        """
        ledger = self.pool.options.ledger
        if ledger is None:
            return self._own_overview(registered)
        inspector = Inspector(make_store(ledger, self._url, observes=True))
        try:
            return inspector.look(registered=registered)
        except StoreAway as error:
            return self._own_overview(registered, f"the ledger is away: {error}")
        except LedgerError as error:
            # A pool that was never used has joined none.
            is_used = self.pool.checkedout() or self.pool.checkedin()
            return self._own_overview(registered, *([str(error)] if is_used else []))
        finally:
            inspector.close()

    def _own_overview(self, registered: Mapping[str, None], *warnings: str) -> Overview:
        stats, options = self.pool.stats(), self.pool.options
        rows, who = condensed(stats.tags), describe_process()
        process = ProcessRow(
            host=who["host"],
            pid=who["pid"],
            program=who["program"],
            state="answers",
            tags=tuple(row.name for row in rows),
            open=stats.checked_out + stats.idle,
        )
        limits = Limits(
            options.pool_size,
            options.capacity,
            options.soft_limit,
            options.max_limit,
            tags=LimitsByTag(options.tags or {}),
        )
        return compile_overview(
            [Part(process, rows)],
            limits,
            registered=registered,
            warnings=warnings,
            taken_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )


def _threads_engine(url: URL, options: dict[str, Any]) -> Engine:
    return create_engine(url, poolclass=FairQueuePool, **options)


def _tasks_engine(url: URL, options: dict[str, Any]) -> AsyncEngine:
    from sqlalchemy.ext.asyncio import create_async_engine  # needs greenlet

    engine = create_async_engine(url, poolclass=AsyncAdaptedFairQueuePool, **options)
    if url.get_driver_name() == "asyncpg":
        translate_for_asyncpg(engine.sync_engine, url)
    return engine


THREADS = Kind("startup", for_threads, _threads_engine)
TASKS = Kind("startup_async", for_asyncio, _tasks_engine)


@contextmanager
def session(engine: Engine, options: Mapping[str, Any]) -> Iterator[Session]:
    """A session that commits at the end of the block."""
    # Closing rolls back what is not committed, and returns the connection.
    with Session(engine, **options) as session:
        yield session
        session.commit()


@asynccontextmanager
async def async_session(
    engine: AsyncEngine, options: Mapping[str, Any]
) -> AsyncIterator[AsyncSession]:
    """A session of asyncio that commits at the end of the block."""
    from sqlalchemy.ext.asyncio import AsyncSession

    async with AsyncSession(engine, **options) as session:
        yield session
        await session.commit()
