"""Many tags, many waiters: what a step costs when there are 10,000, and memory."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from itertools import cycle

import pytest
from sqlalchemy import Engine

from sqla_fairpool.account import Ticket
from sqla_fairpool.bench.crowd import Closing
from sqla_fairpool.bench.figures import interleave, pairwise
from sqla_fairpool.bench.peers import fair_engine, queue_engine
from sqla_fairpool.scheduler import Scheduler

from .conftest import Sheet

FEW, MANY = 10, 10_000
#: Rounds of some 5 ms: most of them fall between two disturbances.
ROUNDS, STEPS = 160, 500


def make_scheduler() -> Scheduler:
    """Return a scheduler with the pool's defaults, for 20 connections."""
    return Scheduler(
        capacity=20,
        soft_limit=10,
        max_limit=15,
        idle_timeout=60.0,
        reallocation_interval=30.0,
        now=0.0,
    )


# -- tags -----------------------------------------------------------------------------


def tagged_engines(engine: Engine, number: int) -> list[Callable[[], Closing]]:
    """Return the ``connect`` of engines under many tags, each used once already."""
    tagged = (engine.execution_options(scraper=f"tag{n}") for n in range(number))
    connects: list[Callable[[], Closing]] = [engine.connect for engine in tagged]
    for connect in connects:
        connect().close()
    return connects


def random_walk(connects: list[Callable[[], Closing]]) -> Callable[[], float]:
    """Time checkouts and checkins, each under a tag chosen at random."""
    chosen = cycle(random.Random(7).choices(connects, k=2 * MANY))

    def run() -> float:
        began = time.thread_time()
        for _ in range(STEPS):
            next(chosen)().close()
        return time.thread_time() - began

    return run


def test_checkout_under_random_tags(sheet: Sheet) -> None:
    """The worst for the pool: hardly ever the same tag twice running.

    Looking at 10,000 engines in turn costs time with any pool, because the
    processor's caches do not hold them; QueuePool, which knows no tags, shows
    how much of the ratio that is.
    """
    contenders = {
        (name, number): random_walk(tagged_engines(make(), number))
        for name, make in (("fair", fair_engine), ("queue", queue_engine))
        for number in (FEW, MANY)
    }
    times = sheet.measure(lambda: interleave(contenders, ROUNDS))
    fair = pairwise(times["fair", MANY], times["fair", FEW])
    queue = pairwise(times["queue", MANY], times["queue", FEW])
    sheet.target("tags", fair)
    sheet.note("QueuePool: the same, which has no tags", "10 tags", queue)


def test_checkout_under_one_tag_of_many(sheet: Sheet) -> None:
    """The usual case: the same tag again, with all the others known and active."""
    contenders = {
        number: random_walk(tagged_engines(fair_engine(), number)[:1])
        for number in (FEW, MANY)
    }
    times = sheet.measure(lambda: interleave(contenders, ROUNDS))
    sheet.note(
        "one tag's checkout + checkin among 10,000 active tags, time",
        "10 tags",
        pairwise(times[MANY], times[FEW]),
    )


# -- waiters --------------------------------------------------------------------------


def turnover(waiters: int, tags: int) -> Callable[[], float]:
    """Time a release, which serves a waiter, and a request, which becomes one.

    The scheduler alone, driven as the pool drives it: the line keeps its length,
    and no 10,000 threads are needed to stand in it.
    """
    scheduler = make_scheduler()
    names = cycle(f"tag{n}" for n in range(tags))
    clock = cycle([0.0])  # the time stands still: no tag becomes idle
    out: deque[Ticket] = deque()
    while scheduler.waiting < waiters:
        ticket = Ticket()
        if scheduler.request(ticket, next(names), next(clock)):
            out.append(ticket)

    def run() -> float:
        began = time.thread_time()
        for _ in range(STEPS):
            ticket = out.popleft()
            out.extend(scheduler.release(ticket, 0.0))
            scheduler.request(ticket, next(names), 0.0)
        took = time.thread_time() - began
        assert scheduler.waiting == waiters
        assert len(out) == 20
        return took

    return run


def test_turnover_with_many_waiters(sheet: Sheet) -> None:
    """The waiters are under ten tags, however many they are."""
    contenders = {number: turnover(number, tags=10) for number in (FEW, MANY)}
    times = sheet.measure(lambda: interleave(contenders, ROUNDS))
    sheet.target("waiters", pairwise(times[MANY], times[FEW]))


def test_turnover_with_many_waiting_tags(sheet: Sheet) -> None:
    """Every waiter under a tag of its own: the line to choose from is long too."""
    contenders = {number: turnover(number, tags=2 * number) for number in (FEW, MANY)}
    times = sheet.measure(lambda: interleave(contenders, ROUNDS))
    sheet.note(
        "the same, each waiter under a tag of its own",
        "10 waiters",
        pairwise(times[MANY], times[FEW]),
    )


# -- memory ---------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_under_a_million_tags(sheet: Sheet) -> None:
    """Each tag is used once: memory rises to a bound and stays there."""

    def pass_by() -> tuple[int, int, float]:
        scheduler = make_scheduler()
        ticket, most = Ticket(), 0
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
            return most, early, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    most, early, peak = sheet.measure(pass_by)
    remark = f"{peak / 2**20:.1f} MiB at most, of {most:,} tags remembered at a time"
    sheet.note(
        "peak memory after 1,000,000 tags", "after 100,000", [peak / early], remark
    )
