"""Every measurement, under pytest-benchmark, in its full form."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from .harness.bench import Part
from .scenarios import SCENARIOS
from .scenarios.uncontended import CYCLES, THREE, by_engine

#: Those of scenarios with a database that need it, if not all do.
NEED_DATABASE = {"asyncpg_1247", "settings_server_tag", "statement_on_postgresql"}
#: They take minutes.
SLOW_SCENARIOS = {"shift", "alone", "bursts", "saturated", "peers"}


def measurements() -> Iterator[Any]:
    for scenario in SCENARIOS:
        is_slow = scenario.name in SLOW_SCENARIOS
        for part in (*scenario.parts, *scenario.more):
            inner = part.func if isinstance(part, partial) else part
            case = f"-{part.keywords['key']}" if isinstance(part, partial) else ""
            needs_database = is_slow or inner.__name__ in NEED_DATABASE
            marks = [
                *([pytest.mark.postgres] if needs_database else []),
                *([pytest.mark.slow] if is_slow or "million" in inner.__name__ else []),
            ]
            name = f"{scenario.name}-{inner.__name__}{case}"
            yield pytest.param(part, needs_database, id=name, marks=marks)


@pytest.mark.parametrize(("part", "needs_database"), list(measurements()))
def test_measurement(measure: Any, part: Part, needs_database: bool) -> None:
    measure(part, needs_database)


@pytest.mark.parametrize("peer", THREE)
def test_uncontended_cycle(benchmark: Any, peer: str) -> None:
    """pytest-benchmark's own view: absolute times, one pool after the other."""
    benchmark.group = "checkout + checkin, tag by engine option"
    cycle = by_engine(THREE[peer]())
    benchmark.pedantic(cycle, rounds=400, iterations=CYCLES, warmup_rounds=5)
