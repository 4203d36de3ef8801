"""More threads than connections; see :mod:`benchmarks.contention`."""

from __future__ import annotations

from benchmarks import contention

from .conftest import Sheet


def test_with_hold(sheet: Sheet) -> None:
    sheet.run(contention.with_hold)


def test_without_hold(sheet: Sheet) -> None:
    sheet.run(contention.without_hold)


def test_without_hold_on_all_cores(sheet: Sheet) -> None:
    sheet.run(contention.without_hold_on_all_cores)


def test_starvation(sheet: Sheet) -> None:
    sheet.run(contention.starvation)
