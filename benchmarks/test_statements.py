"""Statements that count as activity; see :mod:`sqla_fairpool.bench.statements`."""

from __future__ import annotations

import pytest

from sqla_fairpool.bench import statements
from sqla_fairpool.bench.stage import Place

from .conftest import Sheet


@pytest.mark.postgres
def test_statement_on_postgresql(sheet: Sheet, place: Place) -> None:
    sheet.run(statements.statement_on_postgresql, place=place)


def test_statement_on_sqlite(sheet: Sheet) -> None:
    sheet.run(statements.statement_on_sqlite)
