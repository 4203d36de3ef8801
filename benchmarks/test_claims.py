"""The scenarios that need a PostgreSQL, and the peers' own benchmarks."""

from __future__ import annotations

import pytest

from benchmarks import styles
from benchmarks.catalogue import PEERS, SHIFT
from benchmarks.database import Database
from benchmarks.generator import headroom, sleepers
from benchmarks.stage import Part
from benchmarks.static import ALONE, BURSTS, SATURATED

from .conftest import Sheet

PARTS = {
    f"{scenario.name}{number}": part
    for scenario in (SHIFT, ALONE, BURSTS, SATURATED, PEERS)
    for number, part in enumerate(scenario.parts)
}


@pytest.mark.postgres
@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_claim(sheet: Sheet, place: Database, part: Part) -> None:
    sheet.run(part, place=place)


@pytest.mark.parametrize("part", [styles.pg_doorman, styles.hikaricp])
def test_style(sheet: Sheet, part: Part) -> None:
    sheet.run(part)


@pytest.mark.postgres
def test_style_of_asyncpg(sheet: Sheet, place: Database) -> None:
    sheet.run(styles.asyncpg_1247, place=place)


@pytest.mark.parametrize("part", [headroom, sleepers])
def test_generator(sheet: Sheet, part: Part) -> None:
    sheet.run(part)
