"""How much memory a tag takes, and a caller that waits."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Callable

from sqlalchemy.pool import AsyncAdaptedQueuePool, Pool

from sqla_fairpool import AsyncAdaptedFairQueuePool
from sqla_fairpool.scheduling.account import Ticket

from .figures import Figure
from .peers import fair_engine
from .report import Bar, Bars, Findings
from .scale import make_scheduler
from .stage import Stage

__all__ = ["million_tags", "of_a_tag", "of_a_waiter"]


def _grown(function: Callable[[], object]) -> int:
    """Return the bytes that are allocated after the call and were not before."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = function()
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        del kept
        return size
    finally:
        tracemalloc.stop()


def of_a_tag(stage: Stage) -> Findings:
    """The pool's own memory for a tag that is active and has one warm connection."""
    number = 5000
    engine = fair_engine()
    tags = [f"tag{n}" for n in range(number)]
    connects = [engine.execution_options(scraper=tag).connect for tag in tags]
    engine.connect().close()

    def use_all() -> None:
        for connect in connects:
            connect().close()

    each = _grown(use_all) / number
    return Findings((Figure("memory of an active tag, bytes", "-", (each,)),))


async def _line(pool: type[Pool], waiters: int, options: dict[str, int]) -> float:
    """Return the bytes for each of so many tasks that wait for a connection."""
    # Imported when it is used: it needs greenlet.
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(
        "null+async://",
        poolclass=pool,
        pool_size=4,
        max_overflow=0,
        pool_timeout=600,
        **options,
    )
    held = [await engine.connect() for _ in range(4)]

    async def wait() -> None:
        connection = await engine.connect()
        await connection.close()

    gc.collect()
    tracemalloc.start()
    try:
        tasks = [asyncio.ensure_future(wait()) for _ in range(waiters)]
        for _ in range(3):
            await asyncio.sleep(0)  # each goes as far as it can
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    for connection in held:
        await connection.close()
    await asyncio.gather(*tasks)
    await engine.dispose()
    return size / waiters


def of_a_waiter(stage: Stage) -> Findings:
    """A task that waits: all its memory, greenlet included, with either pool."""
    all_four = {"soft_limit": 4, "max_limit": 4}
    fair = asyncio.run(_line(AsyncAdaptedFairQueuePool, 2000, all_four))
    queue = asyncio.run(_line(AsyncAdaptedQueuePool, 2000, {}))
    figures = (
        Figure(
            "memory of a task that waits for a connection",
            "AsyncAdaptedQueuePool",
            (fair / queue,),
            remark=f"bytes: {fair:,.0f} beside {queue:,.0f}, most of them SQLAlchemy's",
        ),
    )
    plot = Bars(
        "Memory of a task that waits for a connection, all included",
        "bytes",
        (
            Bar("AsyncAdaptedFairQueuePool", fair, fair, fair, "ours"),
            Bar("AsyncAdaptedQueuePool", queue, queue, queue, "base"),
        ),
    )
    return Findings(figures, (plot,))


def million_tags(stage: Stage) -> Findings:
    """Each tag is used once: memory rises to a bound and stays there."""
    if stage.short:
        return Findings()
    scheduler = make_scheduler()
    ticket, most, early = Ticket(), 0, 0
    tracemalloc.start()
    try:
        for n in range(1_000_000):
            now = n * 0.001
            scheduler.request(ticket, f"tag{n}", now)
            scheduler.release(ticket, now)
            if now >= scheduler.next_tick:
                scheduler.tick(now)
            most = max(most, len(scheduler.roster.accounts))
            if n == 100_000:
                early = tracemalloc.get_traced_memory()[1]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    remark = f"{peak / 2**20:.1f} MiB at most, of {most:,} tags remembered at a time"
    what = "peak memory after 1,000,000 tags"
    return Findings((Figure(what, "after 100,000", (peak / early,), remark=remark),))
