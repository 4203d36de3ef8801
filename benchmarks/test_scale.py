"""Many tags, waiters and connections; see :mod:`benchmarks.scale`."""

from __future__ import annotations

import pytest

from benchmarks import memory, scale

from .conftest import Sheet


def test_checkout_under_random_tags(sheet: Sheet) -> None:
    sheet.run(scale.random_tags)


def test_checkout_under_one_tag_of_many(sheet: Sheet) -> None:
    sheet.run(scale.one_tag_of_many)


def test_turnover_with_many_waiters(sheet: Sheet) -> None:
    sheet.run(scale.many_waiters)


def test_pools_of_many_sizes(sheet: Sheet) -> None:
    sheet.run(scale.pools_of_many_sizes)


def test_memory_of_a_tag(sheet: Sheet) -> None:
    sheet.run(memory.of_a_tag)


def test_memory_of_a_waiter(sheet: Sheet) -> None:
    sheet.run(memory.of_a_waiter)


@pytest.mark.slow
def test_memory_under_a_million_tags(sheet: Sheet) -> None:
    sheet.run(memory.million_tags)
