"""Asyncio tasks in a known order: by the state of the pool, never by a sleep."""

from __future__ import annotations

import asyncio
import time

from . import state
from .threads import PATIENCE


async def until(condition, what="the condition"):
    """Return once `condition()` is true; lets the other tasks run meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        await asyncio.sleep(0)


async def waiting(pool, number):
    """Return once `number` callers wait in the pool."""
    await until(lambda: state.waiting(pool) == number, f"{number} waiting")


async def steps(number):
    """Let the loop run through its ready callbacks `number` times."""
    for _ in range(number):
        await asyncio.sleep(0)
