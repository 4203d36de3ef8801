"""Load: callers that all want a connection, as threads or as tasks.

A caller pauses, checks out, holds, returns, and begins again, until the time is over.
`working` runs what else is done in threads as well.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqla_fairpool.scheduling.policy import jain

from .findings import percentile


@dataclass(frozen=True)
class Caller:
    """One thread or task; `connect` is a coroutine function for a task."""

    connect: Callable[[], Any]
    hold: float
    #: Seconds between a checkin and the next checkout.
    pause: float = 0.0
    #: In threads: raised by `connect` when it gives up waiting; the caller goes on.
    gives_up: tuple[type[BaseException], ...] = ()
    #: In tasks: seconds after which every second checkout is cancelled.
    patience: float | None = None


Callers = Sequence[Caller]


@dataclass(frozen=True)
class Outcome:
    """What happened between the start and the end of the measurement."""

    seconds: float
    #: For each caller, how long each checkout waited that was served meanwhile.
    waits: Sequence[Sequence[float]]
    #: For each caller, how long it had been waiting when the time was over.
    pending: Sequence[float]
    #: For each caller, checkouts that were given up meanwhile.
    given_up: Sequence[int] = ()

    @property
    def served(self) -> list[int]:
        return [len(waits) for waits in self.waits]

    @property
    def throughput(self) -> float:
        return sum(self.served) / self.seconds

    @property
    def fairness(self) -> float:
        return jain(self.served)

    @property
    def never_served(self) -> int:
        return self.served.count(0)

    @property
    def all_waits(self) -> list[float]:
        """All waits, with those that were not over, as far as they came.

        Without these the worst would be left out: a caller that waits until the end
        was never served, and has no wait that ended.
        """
        ended = [wait for waits in self.waits for wait in waits]
        return ended + [wait for wait in self.pending if wait]

    @property
    def longest_wait(self) -> float:
        return max(self.all_waits)

    @property
    def spread(self) -> float:
        return self.wait(99) / max(self.wait(50), 1e-6)

    def wait(self, percent: float) -> float:
        return percentile(self.all_waits, percent)

    @property
    def last_waits(self) -> list[float]:
        """The waits of the last caller, with that which was not over."""
        pending = self.pending[-1]
        return [*self.waits[-1], *([pending] if pending else [])] or [0.0]


class _Record:
    """What the callers note, and what came of it in a stretch of time."""

    def __init__(self, callers: int) -> None:
        self.goes_on = True
        self.waits: list[list[float]] = [[] for _ in range(callers)]
        #: When each one's current wait began, 0.0 if it does not wait.
        self.since = [0.0] * callers
        self.given_up = [0] * callers

    def mark(self) -> tuple[float, list[int], list[int]]:
        """Return the time, and how far the callers have come."""
        return time.perf_counter(), list(map(len, self.waits)), list(self.given_up)

    def outcome(self, mark: tuple[float, list[int], list[int]]) -> Outcome:
        (began, first, gave_up), (ended, last, given_up) = mark, self.mark()
        return Outcome(
            ended - began,
            [w[a:b] for w, a, b in zip(self.waits, first, last, strict=True)],
            [ended - since if since else 0.0 for since in self.since],
            [b - a for a, b in zip(gave_up, given_up, strict=True)],
        )


# -- processes and threads ------------------------------------------------------------


SPAWN = multiprocessing.get_context("spawn")


@contextmanager
def processes(target: Callable[..., object], arguments: Iterable[Any]) -> Iterator[int]:
    """Run a process for each of the arguments; wait for their ends after the block."""
    workers = [SPAWN.Process(target=target, args=each) for each in arguments]
    for worker in workers:
        worker.start()
    yield len(workers)
    for worker in workers:
        worker.join()


class Threads:
    """Threads that are told when to end: by the first error of one, at the latest."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.error: BaseException | None = None
        #: When those that were started last began their work.
        self.began = 0.0
        self.threads: list[threading.Thread] = []

    def start(self, works: Iterable[Callable[[], object]]) -> None:
        go = threading.Event()
        try:
            for work in works:
                args = go, work
                thread = threading.Thread(target=self._run, args=args, daemon=True)
                thread.start()
                self.threads.append(thread)
        finally:
            self.began = time.perf_counter()
            go.set()

    def _run(self, go: threading.Event, work: Callable[[], object]) -> None:
        go.wait()
        try:
            work()
        except BaseException as error:
            self.error = self.error or error
            self.ended.set()


@contextmanager
def working() -> Iterator[Threads]:
    """Yield threads that are told to end when the block ends; raise their error."""
    group = Threads()
    try:
        yield group
    finally:
        group.ended.set()
        for thread in group.threads:
            thread.join()
    if group.error is not None:
        raise group.error


def in_threads(
    callers: Callers, seconds: float, settle: float = 0.2, late: Callers = ()
) -> Outcome:
    """Let callers work, each in a thread; measure once they have settled."""
    record = _Record(len(callers) + len(late))
    works = [partial(_call, record, n, c) for n, c in enumerate([*callers, *late])]
    with working() as threads:
        try:
            threads.start(works[: len(callers)])
            time.sleep(settle)
            threads.start(works[len(callers) :])
            mark = record.mark()
            threads.ended.wait(seconds)
        finally:
            record.goes_on = False  # first of all: many threads may starve this one
        return record.outcome(mark)


def _call(record: _Record, me: int, caller: Caller) -> None:
    connect, hold, pause = caller.connect, caller.hold, caller.pause
    waits, since, gives_up = record.waits[me], record.since, caller.gives_up
    clock, sleep = time.perf_counter, time.sleep
    while record.goes_on:
        if pause:
            sleep(pause)
        since[me] = began = clock()
        try:
            connection = connect()
        except gives_up:
            record.given_up[me] += 1
            continue
        waits.append(clock() - began)
        since[me] = 0.0
        if hold and record.goes_on:
            sleep(hold)
        connection.close()


# -- tasks ----------------------------------------------------------------------------


async def in_tasks(
    callers: Callers, seconds: float, settle: float = 0.2, late: Callers = ()
) -> Outcome:
    """Let callers work, each in a task, as :func:`in_threads` does."""
    record = _Record(len(callers) + len(late))
    cycles = [_call_async(record, n, c) for n, c in enumerate([*callers, *late])]
    tasks = [*map(asyncio.ensure_future, cycles[: len(callers)])]
    await asyncio.sleep(settle)
    tasks += map(asyncio.ensure_future, cycles[len(callers) :])
    mark = record.mark()
    await asyncio.sleep(seconds)
    outcome = record.outcome(mark)
    record.goes_on = False
    await asyncio.gather(*tasks)
    return outcome


async def _call_async(record: _Record, me: int, caller: Caller) -> None:
    connect, hold, pause = caller.connect, caller.hold, caller.pause
    waits, since = record.waits[me], record.since
    clock, sleep, checkouts = time.perf_counter, asyncio.sleep, 0
    while record.goes_on:
        if pause:
            await sleep(pause)
        checkouts += 1
        since[me] = began = clock()
        if caller.patience is not None and checkouts % 2:
            connection = await _cancelled_after(connect, caller.patience)
        else:
            connection = await connect()
        since[me] = 0.0
        if connection is None:
            record.given_up[me] += 1
            continue
        waits.append(clock() - began)
        if record.goes_on:
            # Also with no hold at all: a task that never waits for anything would
            # keep the loop, and every pool would look unfair.
            await sleep(hold)
        await connection.close()


async def _cancelled_after(connect: Callable[[], Awaitable[Any]], after: float) -> Any:
    """Return the connection, or None if the checkout had to be cancelled.

    Not by ``asyncio.wait_for``, which in older Pythons has lost results itself.
    """
    task = asyncio.ensure_future(connect())
    try:
        await asyncio.wait({task}, timeout=after)
        task.cancel()  # of no effect if it is done
        return await task
    except asyncio.CancelledError:
        if not task.cancelled():
            raise  # it was this task that was cancelled
        return None
