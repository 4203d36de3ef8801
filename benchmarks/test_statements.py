"""What it costs that each statement counts as activity of its tag."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

from sqla_fairpool.bench.figures import interleave, pairwise
from sqla_fairpool.bench.peers import fair_engine, queue_engine

from .conftest import Sheet

#: Rounds of one or two milliseconds; each block on a backend of its own, because one
#: may be lucky in its memory or its core for as long as it lives.
BLOCKS, ROUNDS, STATEMENTS = 12, 150, 20

SELECT = text("SELECT 1")

PEERS = (fair_engine, queue_engine)


def statements(connection: Connection) -> Callable[[], float]:
    """Time statements on a connection that is checked out."""
    execute = connection.execute

    def run() -> float:
        began = time.perf_counter()
        for _ in range(STATEMENTS):
            execute(SELECT).all()
        return time.perf_counter() - began

    return run


def on_one_backend(bare: Engine, flip: bool) -> tuple[list[float], list[float]]:
    """Return the times with our pool and with QueuePool, in turns.

    Both pools have the same DBAPI connection, so it is the same socket to the
    same backend; with two, the backends would differ by more than the pools do.
    """
    raw = bare.raw_connection()
    shared = raw.dbapi_connection
    engines = [make(1, url=bare.url, creator=lambda: shared) for make in PEERS]
    tagged = [engine.execution_options(scraper="a") for engine in engines]
    with tagged[0].connect() as ours, tagged[1].connect() as theirs:
        contenders = {"fair": statements(ours), "queue": statements(theirs)}
        if flip:  # neither is always the one after the other
            contenders = dict(reversed(contenders.items()))
        interleave(contenders, 2)  # compiles the statement, warms the backend
        times = interleave(contenders, ROUNDS)
    for engine in engines:
        engine.dispose()
    raw.invalidate()  # closed with the engines; let its pool know
    return times["fair"], times["queue"]


@pytest.mark.postgres
def test_statement_on_postgresql(sheet: Sheet, postgres_url: str) -> None:
    """The noise of a round is larger than the effect: hence so many of them."""
    bare = create_engine(postgres_url, poolclass=NullPool)

    def all_blocks() -> tuple[list[float], list[float]]:
        fair: list[float] = []
        queue: list[float] = []
        for number in range(BLOCKS):
            ours, theirs = on_one_backend(bare, flip=number % 2 == 1)
            fair += ours
            queue += theirs
        return fair, queue

    fair, queue = sheet.measure(all_blocks)
    best = [min(times) / STATEMENTS * 1e6 for times in (fair, queue)]
    added = [(a - b) / STATEMENTS * 1e6 for a, b in zip(fair, queue, strict=True)]
    remark = (
        f"best round, µs: fair {best[0]:.1f}, queue {best[1]:.1f}; "
        f"added per statement, median: {statistics.median(added):.2f} µs"
    )
    sheet.target("statement", pairwise(fair, queue), remark)


def test_statement_on_sqlite(sheet: Sheet) -> None:
    """The same without a round trip: little noise, but no database is so fast."""
    engines = {
        "fair": fair_engine(1, url="sqlite://"),
        "queue": queue_engine(1, url="sqlite://"),
    }
    tagged = [engine.execution_options(scraper="a") for engine in engines.values()]
    connections = [engine.connect() for engine in tagged]
    runs = map(statements, connections)
    contenders = dict(zip(engines, runs, strict=True))
    interleave(contenders, 2)
    times = sheet.measure(lambda: interleave(contenders, 1000))
    for connection, engine in zip(connections, engines.values(), strict=True):
        connection.close()
        engine.dispose()
    pairs = zip(times["fair"], times["queue"], strict=True)
    added = statistics.median((a - b) / STATEMENTS * 1e6 for a, b in pairs)
    sheet.note(
        "the same on SQLite in memory",
        "QueuePool",
        pairwise(times["fair"], times["queue"]),
        f"added per statement, median: {added:.2f} µs",
    )
