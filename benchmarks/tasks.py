"""The crowd of :mod:`.crowd` as asyncio tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .crowd import Outcome

__all__ = ["AsyncClosing", "TaskCrowd", "TaskMember"]


class AsyncClosing(Protocol):
    """What has to be given back."""

    def close(self) -> Awaitable[None]: ...


@dataclass(frozen=True)
class TaskMember:
    """One task: pauses, checks out, holds, returns, and begins again."""

    connect: Callable[[], Awaitable[AsyncClosing]]
    hold: float
    #: Seconds between a checkin and the next checkout.
    pause: float = 0.0
    #: Seconds after which every second checkout of this task is cancelled.
    patience: float | None = None


async def _cancelled_after(
    connect: Callable[[], Awaitable[AsyncClosing]], seconds: float
) -> AsyncClosing | None:
    """Return the connection, or None if the checkout had to be cancelled.

    Not by ``asyncio.wait_for``, which in older Pythons has lost results itself.
    """
    task = asyncio.ensure_future(connect())
    try:
        await asyncio.wait({task}, timeout=seconds)
        task.cancel()  # of no effect if it is done
        return await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise  # it was this task that was cancelled
        return None


class TaskCrowd:
    """Members that want connections, each in a task of its own.

    :param latecomers: members who join when the others have settled.
    """

    def __init__(
        self, members: Sequence[TaskMember], latecomers: Sequence[TaskMember] = ()
    ) -> None:
        self._members = [*members, *latecomers]
        self._early = len(members)
        self._goes_on = True
        self._waits: list[list[float]] = [[] for _ in self._members]
        # When each one's current wait began, 0.0 if it does not wait.
        self._since = [0.0] * len(self._members)
        self._given_up = [0] * len(self._members)

    async def run(self, seconds: float, settle: float = 0.2) -> Outcome:
        """Let all of them work; measure for `seconds` once they have settled."""
        cycles = [self._cycle(n, member) for n, member in enumerate(self._members)]
        tasks = [asyncio.ensure_future(cycle) for cycle in cycles[: self._early]]
        await asyncio.sleep(settle)
        tasks += [asyncio.ensure_future(cycle) for cycle in cycles[self._early :]]
        began, before = time.perf_counter(), [len(w) for w in self._waits]
        given_up = list(self._given_up)
        await asyncio.sleep(seconds)
        ended, after = time.perf_counter(), [len(w) for w in self._waits]
        pending = [ended - since if since else 0.0 for since in self._since]
        gave_up = [b - a for a, b in zip(given_up, self._given_up, strict=True)]
        self._goes_on = False
        await asyncio.gather(*tasks)
        waits = [
            waits[first:last]
            for waits, first, last in zip(self._waits, before, after, strict=True)
        ]
        return Outcome(ended - began, waits, pending, gave_up)

    async def _cycle(self, me: int, member: TaskMember) -> None:
        connect, hold, pause = member.connect, member.hold, member.pause
        waits, since = self._waits[me], self._since
        clock, sleep = time.perf_counter, asyncio.sleep
        checkouts = 0
        while self._goes_on:
            if pause:
                await sleep(pause)
            checkouts += 1
            since[me] = began = clock()
            if member.patience is not None and checkouts % 2:
                connection = await _cancelled_after(connect, member.patience)
            else:
                connection = await connect()
            since[me] = 0.0
            if connection is None:
                self._given_up[me] += 1
                continue
            waits.append(clock() - began)
            if self._goes_on:
                # Also with no hold at all: a task that never waits for anything
                # would keep the loop, and every pool would look unfair.
                await sleep(hold)
            await connection.close()
