"""Many tags, many waiters, large pools: what a step costs then, and memory."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool

from sqla_fairpool import AsyncAdaptedFairQueuePool
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.ticket import Ticket

from ..harness.bench import Bench, Runs, scenario
from ..harness.findings import Bar, Bars, Finding, Lines, Series, figure
from ..harness.pools import PEERS, fair_engine
from .uncontended import timed

FEW, MANY = 10, 10_000

#: How many there are, in the full form and in the short one.
_POWERS = (1, 3, 10, 30, 100, 300, 1000, 3000, MANY), (1, FEW, 100, 1000, MANY)

#: Steps of a round of some 5 ms: most rounds fall between two disturbances.
_STEPS = 500

_ROLES = {"under ten tags": "ours", "under a tag each": "b"}

Connect = Callable[[], Any]


def make_scheduler(capacity: int = 20) -> Scheduler:
    limits = {"soft_limit": -(-capacity // 2), "max_limit": -(-capacity * 3 // 4)}
    times = {"idle_timeout": 60.0, "reallocation_interval": 30.0, "now": 0.0}
    return Scheduler(capacity=capacity, **limits, **times)


def _interleave(
    bench: Bench, what: str, contenders: dict[Any, Callable[[], float]]
) -> Runs:
    return bench.interleave(what, contenders, bench.pick(160, 60))


def _curves(title: str, x: str, runs: Runs) -> Lines:
    """Return a plot of the medians; the keys of `runs` are a curve's name and x."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for (name, at), times in runs.items():
        curves.setdefault(name, []).append((at, statistics.median(times)))
    series = [Series(n, points, _ROLES.get(n, "")) for n, points in curves.items()]
    return Lines(title, x, "µs", series, log_x=True)


# -- tags -----------------------------------------------------------------------------


def _tagged(engine: Engine, number: int) -> list[Connect]:
    """Return the ``connect`` of engines under many tags, each used once already."""
    tagged = (engine.execution_options(scraper=f"tag{n}") for n in range(number))
    connects: list[Connect] = [engine.connect for engine in tagged]
    for connect in connects:
        connect().close()
    return connects


def _random_walk(connects: list[Connect]) -> Callable[[], float]:
    chosen = cycle(random.Random(7).choices(connects, k=2 * MANY))
    return timed(lambda: next(chosen)().close(), _STEPS)


def random_tags(bench: Bench) -> Iterator[Finding]:
    """The worst for the pool: hardly ever the same tag twice running.

    Looking at 10,000 engines in turn costs time with any pool, because the
    processor's caches do not hold them; QueuePool, which knows no tags, shows
    how much of the ratio that is.
    """
    contenders = {
        (name, number): _random_walk(_tagged(make(), number))
        for number in bench.pick(*_POWERS)
        for name, make in PEERS.items()
    }
    runs = _interleave(bench, "random tags", contenders)
    ours, theirs = PEERS
    yield runs.ratio("tags", of=(ours, MANY), over=(ours, FEW))
    what = "QueuePool: the same, which has no tags"
    yield runs.ratio(what, of=(theirs, MANY), over=(theirs, FEW), beside="10 tags")
    title = "Checkout and checkin, under a tag chosen at random"
    yield _curves(title, "tags that the pool knows", runs)


def one_tag_of_many(bench: Bench) -> Iterator[Finding]:
    """The usual case: the same tag again, with all the others known and active."""
    walks = {n: _random_walk(_tagged(fair_engine(), n)[:1]) for n in (MANY, FEW)}
    runs = _interleave(bench, "one tag of many", walks)
    what = "one tag's checkout + checkin among 10,000 active tags, time"
    yield runs.ratio(what, beside="10 tags")


# -- waiters --------------------------------------------------------------------------


def _turnover(waiters: int, tags: int) -> Callable[[], float]:
    """Time a release, which serves a waiter, and a request, which becomes one.

    The scheduler alone, driven as the pool drives it: the line keeps its length,
    and no 10,000 threads are needed to stand in it. The time stands still, so that
    no tag becomes idle.
    """
    scheduler = make_scheduler()
    names = cycle(f"tag{n}" for n in range(tags))
    out: deque[Ticket] = deque()
    while scheduler.waiting < waiters:
        ticket = Ticket()
        if scheduler.request(ticket, next(names), 0.0):
            out.append(ticket)

    def step() -> None:
        ticket = out.popleft()
        out.extend(scheduler.release(ticket, 0.0))
        scheduler.request(ticket, next(names), 0.0)

    run = timed(step, _STEPS)

    def checked() -> float:
        took = run()
        assert (scheduler.waiting, len(out)) == (waiters, 20)
        return took

    return checked


def many_waiters(bench: Bench) -> Iterator[Finding]:
    """Under ten tags, however many they are; and each under a tag of its own."""
    ten, own = _ROLES
    contenders = {}
    for n in bench.pick(*_POWERS):
        contenders[ten, n] = _turnover(n, 10)
        contenders[own, n] = _turnover(n, 2 * n + 20)
    runs = _interleave(bench, "waiters", contenders)
    yield runs.ratio("waiters", of=(ten, MANY), over=(ten, FEW))
    what = "the same, each waiter under a tag of its own"
    yield runs.ratio(what, of=(own, MANY), over=(own, FEW), beside="10 waiters")
    title = "A release that serves a waiter, and a request: the scheduler alone"
    yield _curves(title, "callers that wait", runs)


# -- large pools ----------------------------------------------------------------------


def _crowded(make: Callable[..., Engine], size: int) -> Callable[[], float]:
    engine = make(size).execution_options(scraper="a")
    held = [engine.connect() for _ in range(size // 2)]
    return timed(lambda held=held: engine.connect().close(), _STEPS)


def pools_of_many_sizes(bench: Bench) -> Iterator[Finding]:
    sizes = bench.pick((5, 10, 20, 50, 100, 200, 500, 1000), (5, 20, 100, 1000))
    contenders = {
        (name, size): _crowded(make, size)
        for size in sizes
        for name, make in PEERS.items()
    }
    runs = _interleave(bench, "large pools", contenders)
    ours, what = "FairQueuePool", "checkout + checkin with a pool of 1,000, time"
    yield runs.ratio(what, of=(ours, 1000), over=(ours, 5), beside="a pool of 5")
    title = "Checkout and checkin, half of the pool being out"
    yield _curves(title, "connections of the pool", runs)


# -- memory ---------------------------------------------------------------------------


@contextmanager
def _traced() -> Iterator[None]:
    gc.collect()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def memory_of_a_tag(bench: Bench) -> Iterator[Finding]:
    engine, number = fair_engine(), 5000
    tagged = [engine.execution_options(scraper=f"tag{n}") for n in range(number)]
    engine.connect().close()
    with _traced():
        for one in tagged:
            one.connect().close()
        gc.collect()
        each = tracemalloc.get_traced_memory()[0] / number
    yield figure("memory of an active tag, bytes", (each,))


async def _line(pool: type[Pool], waiters: int, **options: int) -> float:
    engine = create_async_engine(
        "null+async://", poolclass=pool, pool_size=4, pool_timeout=600, **options
    )
    held = [await engine.connect() for _ in range(4)]

    async def wait() -> None:
        connection = await engine.connect()
        await connection.close()

    with _traced():
        tasks = [asyncio.ensure_future(wait()) for _ in range(waiters)]
        for _ in range(3):
            await asyncio.sleep(0)  # each goes as far as it can
        size = tracemalloc.get_traced_memory()[0]
    for connection in held:
        await connection.close()
    await asyncio.gather(*tasks)
    await engine.dispose()
    return size / waiters


def memory_of_a_waiter(bench: Bench) -> Iterator[Finding]:
    """A task that waits: all its memory, greenlet included, with either pool."""
    options: dict[type[Pool], dict[str, int]] = {
        AsyncAdaptedFairQueuePool: {"soft_limit": 4, "max_limit": 4},
        AsyncAdaptedQueuePool: {"max_overflow": 0},
    }
    sizes = {p.__name__: asyncio.run(_line(p, 2000, **options[p])) for p in options}
    fair, queue = sizes.values()
    remark = f"bytes: {fair:,.0f} instead of {queue:,.0f}, most of them SQLAlchemy's"
    what = "memory of a task that waits for a connection"
    yield figure(what, (fair / queue,), "AsyncAdaptedQueuePool", remark)
    bars = tuple(Bar(name, size, size, size) for name, size in sizes.items())
    yield Bars(f"M{what[1:]}, all included", "bytes", bars)


def memory_under_a_million_tags(bench: Bench) -> Iterator[Finding]:
    """Each tag is used once: memory rises to a bound and stays there."""
    scheduler = make_scheduler()
    ticket, most, early = Ticket(), 0, 0
    with _traced():
        for n in range(1_000_000):
            now = n * 0.001
            scheduler.request(ticket, f"tag{n}", now)
            scheduler.release(ticket, now)
            if now >= scheduler.next_tick:
                scheduler.tick(now)
            most = max(most, len(scheduler.tags.tag_states))
            if n == 100_000:
                early = tracemalloc.get_traced_memory()[1]
        peak = tracemalloc.get_traced_memory()[1]
    remark = f"{peak / 2**20:.1f} MiB at most, of {most:,} tags remembered at a time"
    what = "peak memory after 1,000,000 tags"
    yield figure(what, (peak / early,), "after 100,000", remark)


SCALE = scenario(
    "scale",
    *(random_tags, many_waiters, pools_of_many_sizes),
    *(memory_of_a_tag, memory_of_a_waiter),
    more=[one_tag_of_many, memory_under_a_million_tags],
)
