"""One thread, no waiting: what a checkout and a checkin cost.

Each road by which a tag reaches the pool is measured. The engines carry the same
options whatever their pool is, so that a ratio is the pools' alone. It is the
thread's own processor time that counts, which a busy machine disturbs less.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Engine

from .figures import Figure, pairwise
from .peers import fair_engine, floor_engine, queue_engine
from .report import Bar, Bars, Findings, Role
from .stage import Stage
from .targets import TARGETS

__all__ = ["CYCLES", "PEERS", "by_engine", "other_roads", "tag_by_engine_option"]

#: In a round of some 2 ms: most of them fall between two disturbances.
CYCLES = 250

PEERS: dict[str, Callable[[], Engine]] = {
    "FairQueuePool": fair_engine,
    "QueuePool": queue_engine,
    "floor": floor_engine,
}

_ROLES: dict[str, Role] = {"FairQueuePool": "ours", "QueuePool": "base"}


def by_engine(engine: Engine) -> Callable[[], object]:
    """One cycle, the tag being the engine's option."""
    connect = engine.execution_options(scraper="a").connect
    return lambda: connect().close()


def by_connection(engine: Engine) -> Callable[[], object]:
    """One cycle, the tag being set on the connection."""
    connect = engine.connect
    return lambda: connect().execution_options(scraper="a").close()


def untagged(engine: Engine) -> Callable[[], object]:
    """One cycle without a tag."""
    connect = engine.connect
    return lambda: connect().close()


def alternating(engine: Engine) -> Callable[[], object]:
    """Two cycles, under one tag and under another."""
    first = engine.execution_options(scraper="a").connect
    second = engine.execution_options(scraper="b").connect

    def cycle() -> None:
        first().close()
        second().close()

    return cycle


def timed(cycle: Callable[[], object], cycles: int = CYCLES) -> Callable[[], float]:
    """Return what runs `cycle` many times and tells the seconds that took."""

    def run() -> float:
        began = time.thread_time()
        for _ in range(cycles):
            cycle()
        return time.thread_time() - began

    return run


def tag_by_engine_option(stage: Stage) -> Findings:
    """The usual road."""
    contenders = {name: timed(by_engine(make())) for name, make in PEERS.items()}
    times = stage.interleave("uncontended", contenders, stage.pick(400, 200))
    each = {n: [t / CYCLES * 1e6 for t in values] for n, values in times.items()}
    best = ", ".join(f"{name} {min(values):.2f}" for name, values in each.items())
    fair, queue, floor = times.values()
    target, over_floor = TARGETS["uncontended"], TARGETS["floor"]
    figures = (
        Figure(
            target.what,
            target.beside,
            tuple(pairwise(fair, queue)),
            target,
            f"best round, µs: {best}",
        ),
        Figure(
            over_floor.what,
            over_floor.beside,
            tuple(pairwise(fair, floor)),
            over_floor,
        ),
        Figure("QueuePool: the same, time", "floor", tuple(pairwise(queue, floor))),
    )
    bars = []
    for name, values in each.items():
        found = Figure("", "", tuple(values))
        role = _ROLES.get(name, "other")
        bars.append(Bar(name, found.median, *found.spread, role))
    plot = Bars("Uncontended checkout and checkin", "µs, less is better", tuple(bars))
    return Findings(figures, (plot,))


ROADS: dict[str, Callable[[Engine], Callable[[], object]]] = {
    "the same, tag set on the connection": by_connection,
    "the same, no tag": untagged,
    "the same, two tags in turn": alternating,
}


def other_roads(stage: Stage) -> Findings:
    """The other roads of a tag; in the full form only."""
    if stage.short:
        return Findings()
    figures: list[Figure] = []
    for what, road in ROADS.items():
        contenders = {name: timed(road(make())) for name, make in PEERS.items()}
        fair, queue, floor = stage.interleave(what, contenders, 200).values()
        figures += [
            Figure(what, "QueuePool", tuple(pairwise(fair, queue))),
            Figure(what, "floor", tuple(pairwise(fair, floor))),
        ]
    return Findings(tuple(figures))
