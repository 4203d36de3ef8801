"""A running pool of a manager: its engine, the sessions on it, its figures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, exc
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import Session

from ..ledger import overview
from ..ledger.addresses import make_store
from ..ledger.drivers import for_asyncio, for_threads, translate_for_asyncpg
from ..ledger.errors import LedgerError
from ..ledger.inspector import Inspector
from ..ledger.keeper import describe_process
from ..ledger.overview import Overview
from ..ledger.store import StoreAway
from ..options import OPTIONS
from ..pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

#: Engines with a tag that are kept; names may come from user data.
_ENGINES = 256


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between the pool for threads and that for tasks."""

    startup: str
    driver: Callable[[URL], URL]
    engine: Callable[[URL, dict[str, Any]], Any]


class Started:
    """A running pool, and what it was started with.

    :param options: the arguments of ``create_engine``, those of the pool included.
    """

    def __init__(self, engine: Any, url: URL, options: Mapping[str, Any]) -> None:
        self.engine = engine
        self._url, self._options = url, options
        self.pool: FairQueuePool = engine.pool
        tag_option = self.pool.options.tag_option

        @lru_cache(maxsize=_ENGINES)
        def tagged(name: str) -> Any:  # the engine that checks out under a tag
            return engine.execution_options(**{tag_option: name})

        self.tagged = tagged

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

    def overview(self, registered: Iterable[str]) -> Overview:
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

    def _own_overview(self, registered: Iterable[str], *warnings: str) -> Overview:
        stats, own = self.pool.stats(), self.pool.options
        rows, who = overview.condensed(stats.tags), {**describe_process()}
        now = who.pop("since")
        tags, there = tuple(row.name for row in rows), stats.checked_out + stats.idle
        process = overview.ProcessRow(**who, state="answers", tags=tags, open=there)
        return overview.compile_overview(
            [overview.Part(process, rows)],
            overview.Limits(own.pool_size, own.capacity, own.soft_limit, own.max_limit),
            registered=registered,
            warnings=warnings,
            taken_at=now,
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
    # Closing rolls back what is not committed, and returns the connection.
    with Session(engine, **options) as session:
        yield session
        session.commit()


@asynccontextmanager
async def async_session(
    engine: AsyncEngine, options: Mapping[str, Any]
) -> AsyncIterator[AsyncSession]:
    from sqlalchemy.ext.asyncio import AsyncSession

    async with AsyncSession(engine, **options) as session:
        yield session
        await session.commit()
