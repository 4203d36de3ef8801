"""A light scraper beside a heavy one, on each pool in turn, in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import QueuePool
from sqlalchemy.pool import Pool

from .. import FairQueuePool
from .demo_load import Group, batch_work, stop_groups, warm_up
from .demo_report import SCRAPERS, Comparison
from .demo_server import Database
from .demo_stage import CAPACITY, Stage

__all__ = ["POOLS", "compare"]

#: Name, class and options. The second one shows what the first one's reserve
#: costs: by default the heavy scraper may have half of the connections while
#: another is active.
POOLS: tuple[tuple[str, type[Pool], dict[str, Any]], ...] = (
    ("FairQueuePool", FairQueuePool, {}),
    (
        "FairQueuePool*",
        FairQueuePool,
        {"soft_limit": CAPACITY, "max_limit": CAPACITY},
    ),
    ("QueuePool", QueuePool, {}),
)

#: Three times as many as there are connections.
_HEAVY_THREADS = 3 * CAPACITY
_HEAVY_SERVICE = 0.05

#: Seconds between two checkouts of the light scraper's one thread.
_LIGHT_PAUSE = 0.01


def compare(stage: Stage, database: Database) -> Iterator[Comparison]:
    """Measure one pool after the other, on the same server and table."""
    for name, pool, options in POOLS:
        stage.view.comparison(name)
        yield _measure(stage, database, name, pool, options)


def _measure(
    stage: Stage,
    database: Database,
    name: str,
    pool: type[Pool],
    options: dict[str, Any],
) -> Comparison:
    engine = stage.open_engine(database, pool, options)
    # QueuePool ignores the tags.
    heavy, light = (engine.execution_options(scraper=s) for s in ("heavy", "light"))
    table = database.table
    groups = [
        Group(
            heavy,
            "heavy",
            _HEAVY_THREADS,
            batch_work(table, SCRAPERS[0], _HEAVY_SERVICE),
        ),
        Group(light, "light", 1, batch_work(table, SCRAPERS[1], 0.0), _LIGHT_PAUSE),
    ]
    look = stage.view.tick
    # No wait should be that for a new connection.
    warm_up([heavy, light], CAPACITY)
    stage.start(groups[0])
    # The flood stands when the light one comes.
    stage.watch(groups, 4 * _HEAVY_SERVICE, look)
    stage.start(groups[1])
    for group in groups:
        group.measure_from_here()
    seconds = stage.watch(groups, stage.seconds, look)
    figures = tuple(group.figures() for group in reversed(groups))
    stop_groups(groups)
    stage.close_engine(database, engine)
    return Comparison(name, options, round(seconds, 3), figures)
