"""Statements that count as activity; see :mod:`benchmarks.statements`."""

from __future__ import annotations

import pytest

from benchmarks import statements
from benchmarks.database import Database

from .conftest import Sheet


@pytest.mark.postgres
def test_statement_on_postgresql(sheet: Sheet, place: Database) -> None:
    sheet.run(statements.statement_on_postgresql, place=place)


def test_statement_on_sqlite(sheet: Sheet) -> None:
    sheet.run(statements.statement_on_sqlite)
