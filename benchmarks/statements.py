"""What it costs that each statement counts as activity of its tag."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection, text
from sqlalchemy.engine import Engine
from sqlalchemy.pool import NullPool

from .figures import Figure, pairwise
from .peers import fair_engine, queue_engine
from .report import Findings
from .stage import Stage
from .targets import TARGETS

__all__ = ["statement_on_postgresql", "statement_on_sqlite"]

#: Rounds of one or two milliseconds; each block on a backend of its own, because one
#: may be lucky in its memory or its core for as long as it lives.
_ROUNDS, _STATEMENTS = 150, 20

_SELECT = text("SELECT 1")

_NAMES = ("FairQueuePool", "QueuePool")
_PEERS = (fair_engine, queue_engine)


def statements(connection: Connection) -> Callable[[], float]:
    """Time statements on a connection that is checked out."""
    execute = connection.execute

    def run() -> float:
        began = time.perf_counter()
        for _ in range(_STATEMENTS):
            execute(_SELECT).all()
        return time.perf_counter() - began

    return run


def _on_one_backend(
    stage: Stage, bare: Engine, flip: bool
) -> tuple[list[float], list[float]]:
    """Return the times with our pool and with QueuePool, in turns.

    Both pools have the same DBAPI connection, so it is the same socket to the
    same backend; with two, the backends would differ by more than the pools do.
    """
    raw = bare.raw_connection()
    shared = raw.dbapi_connection
    engines = [make(1, url=bare.url, creator=lambda: shared) for make in _PEERS]
    tagged = [engine.execution_options(scraper="a") for engine in engines]
    with tagged[0].connect() as ours, tagged[1].connect() as theirs:
        contenders = {
            "FairQueuePool": statements(ours),
            "QueuePool": statements(theirs),
        }
        if flip:  # neither is always the one after the other
            contenders = dict(reversed(contenders.items()))
        stage.interleave("SELECT 1", contenders, 2)  # compiles it, warms the backend
        times = stage.interleave("SELECT 1", contenders, _ROUNDS)
    for engine in engines:
        engine.dispose()
    raw.invalidate()  # closed with the engines; let its pool know
    return times["FairQueuePool"], times["QueuePool"]


def _added(fair: Sequence[float], queue: Sequence[float]) -> str:
    added = [(a - b) / _STATEMENTS * 1e6 for a, b in zip(fair, queue, strict=True)]
    return f"added per statement, median: {statistics.median(added):.2f} µs"


def statement_on_postgresql(stage: Stage) -> Findings:
    """The noise of a round is larger than the effect: hence so many of them."""
    bare = stage.place.engine(NullPool)
    fair: list[float] = []
    queue: list[float] = []
    for number in range(stage.pick(12, 4)):
        ours, theirs = _on_one_backend(stage, bare, flip=number % 2 == 1)
        fair += ours
        queue += theirs
    best = [min(times) / _STATEMENTS * 1e6 for times in (fair, queue)]
    target = TARGETS["statement"]
    remark = (
        f"best round, µs: FairQueuePool {best[0]:.1f}, QueuePool {best[1]:.1f}; "
        f"{_added(fair, queue)}"
    )
    values = tuple(pairwise(fair, queue))
    return Findings(
        (Figure(target.what, target.beside, values, target, remark),),
    )


def statement_on_sqlite(stage: Stage) -> Findings:
    """The same without a round trip: little noise, but no database is so fast."""
    if stage.short:
        return Findings()
    engines = [make(1, url="sqlite://") for make in _PEERS]
    connections = [
        engine.execution_options(scraper="a").connect() for engine in engines
    ]
    runs = map(statements, connections)
    contenders = dict(zip(("FairQueuePool", "QueuePool"), runs, strict=True))
    stage.interleave("SELECT 1 on SQLite", contenders, 2)
    times = stage.interleave("SELECT 1 on SQLite", contenders, 1000)
    for connection, engine in zip(connections, engines, strict=True):
        connection.close()
        engine.dispose()
    fair, queue = times.values()
    ratios = tuple(pairwise(fair, queue))
    what = "the same on SQLite in memory"
    return Findings((Figure(what, "QueuePool", ratios, remark=_added(fair, queue)),))
