"""What the tests of the pool share: their worlds."""

from __future__ import annotations

import inspect

import pytest
from support.worlds import contract, make_world


def pytest_itemcollected(item):
    """Run a test in the world of threads or tasks that is among its arguments."""
    if {"world", "tasks", "threads"} & inspect.signature(item.obj).parameters.keys():
        item.obj = contract(item.obj)


@pytest.fixture
def threads():
    """A world of threads: see `support.worlds`."""
    return make_world("threads")
