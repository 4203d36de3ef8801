"""One thread, no waiting: what a checkout and a checkin cost.

Each road by which a tag reaches the pool is measured. The engines carry the same
options whatever their pool is, so that a ratio is the pools' alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine

from sqla_fairpool.bench.figures import interleave, pairwise
from sqla_fairpool.bench.peers import fair_engine, floor_engine, queue_engine

from .conftest import Sheet

#: Rounds of some 2 ms: most of them fall between two disturbances.
ROUNDS, CYCLES = 400, 250

PEERS: dict[str, Callable[[], Engine]] = {
    "fair": fair_engine,
    "queue": queue_engine,
    "floor": floor_engine,
}


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


@pytest.mark.parametrize("peer", PEERS)
def test_cycle(benchmark: Any, peer: str) -> None:
    """pytest-benchmark's own view: absolute times, one pool after the other."""
    benchmark.group = "checkout + checkin, tag by engine option"
    cycle = by_engine(PEERS[peer]())
    benchmark.pedantic(cycle, rounds=ROUNDS, iterations=CYCLES, warmup_rounds=5)


def test_tag_by_engine_option(sheet: Sheet) -> None:
    contenders = {name: timed(by_engine(make())) for name, make in PEERS.items()}
    times = sheet.measure(lambda: interleave(contenders, ROUNDS))
    best = {name: min(values) / CYCLES * 1e6 for name, values in times.items()}
    remark = "best round, µs: " + ", ".join(f"{n} {t:.2f}" for n, t in best.items())
    sheet.target("uncontended", pairwise(times["fair"], times["queue"]), remark)
    sheet.target("floor", pairwise(times["fair"], times["floor"]))
    sheet.note(
        "QueuePool: the same, time", "floor", pairwise(times["queue"], times["floor"])
    )


@pytest.mark.parametrize(
    ("road", "what"),
    [
        (by_connection, "the same, tag set on the connection"),
        (untagged, "the same, no tag"),
        (alternating, "the same, two tags in turn"),
    ],
)
def test_other_roads(
    sheet: Sheet, road: Callable[[Engine], Callable[[], object]], what: str
) -> None:
    contenders = {name: timed(road(make())) for name, make in PEERS.items()}
    times = sheet.measure(lambda: interleave(contenders, ROUNDS // 2))
    sheet.note(what, "QueuePool", pairwise(times["fair"], times["queue"]))
    sheet.note(what, "floor", pairwise(times["fair"], times["floor"]))
