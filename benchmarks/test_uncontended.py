"""One thread, no waiting; see :mod:`benchmarks.uncontended`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import uncontended
from benchmarks.uncontended import CYCLES, PEERS, by_engine

from .conftest import Sheet


@pytest.mark.parametrize("peer", PEERS)
def test_cycle(benchmark: Any, peer: str) -> None:
    """pytest-benchmark's own view: absolute times, one pool after the other."""
    benchmark.group = "checkout + checkin, tag by engine option"
    cycle = by_engine(PEERS[peer]())
    benchmark.pedantic(cycle, rounds=400, iterations=CYCLES, warmup_rounds=5)


def test_tag_by_engine_option(sheet: Sheet) -> None:
    sheet.run(uncontended.tag_by_engine_option)


def test_other_roads(sheet: Sheet) -> None:
    sheet.run(uncontended.other_roads)
