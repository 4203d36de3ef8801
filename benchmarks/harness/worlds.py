"""Two worlds: a ``QueuePool`` for each scraper, and one ``FairQueuePool`` for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.pool import QueuePool

from sqla_fairpool import FairQueuePool

from .database import Database
from .pools import fixed, open_all
from .workload import Scraper

#: The scrapers.
NAMES = ("layer1_5", "layer2", "layer3")

#: A minute of a day is 10 ms here: the default times, divided by a hundred.
SCALED: dict[str, Any] = {"idle_timeout": 0.6, "reallocation_interval": 0.3}

#: Options with which a scraper may have all that nobody else wants.
LIFTED: dict[str, Any] = {"soft_limit": 20, "max_limit": 20}

FAIR = "FairQueuePool 20"

#: Seconds a checkout may wait. No workflow may be lost by it.
_PATIENCE = 120.0


@dataclass(frozen=True)
class World:
    """Scrapers and their connections, all of which are open."""

    name: str
    connections: int
    scrapers: dict[str, Scraper]


@contextmanager
def static_world(
    database: Database, sizes: Sequence[int] = (10, 10, 10), threads: int = 25
) -> Iterator[World]:
    """A ``QueuePool`` for each scraper, of so many connections."""
    with ExitStack() as stack:
        scrapers = {}
        for name, size in zip(NAMES, sizes, strict=True):
            engine = database.engine(
                QueuePool, **fixed(QueuePool, size), pool_timeout=_PATIENCE
            )
            stack.callback(engine.dispose)
            open_all(engine)
            scrapers[name] = Scraper(name, engine, engine.pool.checkedout, threads)
        shown = f"QueuePool {'+'.join(map(str, sizes))}"
        yield World(shown, sum(sizes), scrapers)


@contextmanager
def fair_world(
    database: Database, title: str = FAIR, threads: int = 25, **options: Any
) -> Iterator[World]:
    """One ``FairQueuePool`` of twenty connections for all scrapers."""
    options |= fixed(FairQueuePool, 20)
    engine = database.engine(FairQueuePool, pool_timeout=_PATIENCE, **options)

    def held(name: str) -> int:
        row = engine.pool.stats().tag(name)
        return row.connections if row is not None else 0

    def scraper(name: str) -> Scraper:
        tagged = engine.execution_options(scraper=name)
        return Scraper(name, tagged, partial(held, name), threads)

    try:
        open_all(engine)
        yield World(title, 20, {name: scraper(name) for name in NAMES})
    finally:
        engine.dispose()
