"""Many tags, many waiters, large pools: what a step costs then, and memory."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

from sqlalchemy import Engine

from sqla_fairpool.scheduling.account import Ticket
from sqla_fairpool.scheduling.scheduler import Scheduler

from .crowd import Closing
from .figures import Figure, pairwise, percentile
from .peers import fair_engine, queue_engine
from .report import Findings, Lines, Role, Series
from .stage import Stage
from .targets import TARGETS

__all__ = [
    "FEW",
    "MANY",
    "make_scheduler",
    "many_waiters",
    "one_tag_of_many",
    "pools_of_many_sizes",
    "random_tags",
]

FEW, MANY = 10, 10_000

#: Steps of a round of some 5 ms: most rounds fall between two disturbances.
_STEPS = 500

_MAKE: dict[str, Callable[..., Engine]] = {
    "FairQueuePool": fair_engine,
    "QueuePool": queue_engine,
}
_ROLES: dict[str, Role] = {"FairQueuePool": "ours", "QueuePool": "base"}


def make_scheduler(capacity: int = 20) -> Scheduler:
    """Return a scheduler with the pool's default limits."""
    return Scheduler(
        capacity=capacity,
        soft_limit=-(-capacity // 2),
        max_limit=-(-capacity * 3 // 4),
        idle_timeout=60.0,
        reallocation_interval=30.0,
        now=0.0,
    )


def curve(
    name: str, times: Mapping[int, Sequence[float]], role: Role = "other"
) -> Series:
    """Return the medians of the rounds, in microseconds for each step."""
    points = (
        (float(n), percentile(values, 50) / _STEPS * 1e6) for n, values in times.items()
    )
    return Series(name, tuple(points), role)


def _powers(stage: Stage) -> tuple[int, ...]:
    return stage.pick(
        (1, 3, 10, 30, 100, 300, 1000, 3000, MANY), (1, FEW, 100, 1000, MANY)
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
        for _ in range(_STEPS):
            next(chosen)().close()
        return time.thread_time() - began

    return run


def random_tags(stage: Stage) -> Findings:
    """The worst for the pool: hardly ever the same tag twice running.

    Looking at 10,000 engines in turn costs time with any pool, because the
    processor's caches do not hold them; QueuePool, which knows no tags, shows
    how much of the ratio that is.
    """
    contenders = {
        (name, number): random_walk(tagged_engines(make(), number))
        for number in _powers(stage)
        for name, make in _MAKE.items()
    }
    times = stage.interleave("random tags", contenders, stage.pick(160, 60))
    target = TARGETS["tags"]
    ratios = {
        name: tuple(pairwise(times[name, MANY], times[name, FEW])) for name in _MAKE
    }
    figures = (
        Figure(target.what, target.beside, ratios["FairQueuePool"], target),
        Figure(
            "QueuePool: the same, which has no tags", "10 tags", ratios["QueuePool"]
        ),
    )
    series = tuple(
        curve(name, {n: times[name, n] for n in _powers(stage)}, _ROLES[name])
        for name in _MAKE
    )
    plot = Lines(
        "Checkout and checkin, under a tag chosen at random",
        "tags that the pool knows",
        "µs",
        series,
        log_x=True,
    )
    return Findings(figures, (plot,))


def one_tag_of_many(stage: Stage) -> Findings:
    """The usual case: the same tag again, with all the others known and active."""
    if stage.short:
        return Findings()
    contenders = {
        number: random_walk(tagged_engines(fair_engine(), number)[:1])
        for number in (FEW, MANY)
    }
    times = stage.interleave("one tag of many", contenders, 160)
    what = "one tag's checkout + checkin among 10,000 active tags, time"
    return Findings(
        (Figure(what, "10 tags", tuple(pairwise(times[MANY], times[FEW]))),)
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
        for _ in range(_STEPS):
            ticket = out.popleft()
            out.extend(scheduler.release(ticket, 0.0))
            scheduler.request(ticket, next(names), 0.0)
        took = time.thread_time() - began
        assert scheduler.waiting == waiters
        assert len(out) == 20
        return took

    return run


def _turnovers(
    stage: Stage, what: str, tags: Callable[[int], int]
) -> dict[int, list[float]]:
    contenders = {n: turnover(n, tags(n)) for n in _powers(stage)}
    return stage.interleave(what, contenders, stage.pick(160, 60))


def many_waiters(stage: Stage) -> Findings:
    """The waiters are under ten tags, however many they are."""
    times = _turnovers(stage, "waiters", lambda number: 10)
    each = _turnovers(stage, "waiters, a tag each", lambda number: 2 * number + 20)
    target = TARGETS["waiters"]
    figures = (
        Figure(
            target.what, target.beside, tuple(pairwise(times[MANY], times[FEW])), target
        ),
        Figure(
            "the same, each waiter under a tag of its own",
            "10 waiters",
            tuple(pairwise(each[MANY], each[FEW])),
        ),
    )
    plot = Lines(
        "A release that serves a waiter, and a request: the scheduler alone",
        "callers that wait",
        "µs",
        (curve("under ten tags", times, "ours"), curve("under a tag each", each, "b")),
        log_x=True,
    )
    return Findings(figures, (plot,))


# -- large pools ----------------------------------------------------------------------


def crowded(make: Callable[..., Engine], size: int) -> Callable[[], float]:
    """Time checkouts and checkins on a pool of which all but a few are out."""
    engine = make(size).execution_options(scraper="a")
    held = [engine.connect() for _ in range(size // 2)]

    def run() -> float:
        began = time.thread_time()
        for _ in range(_STEPS):
            engine.connect().close()
        took = time.thread_time() - began
        assert len(held) == size // 2
        return took

    return run


def pools_of_many_sizes(stage: Stage) -> Findings:
    """From 5 to 1,000 connections, half of which are out."""
    sizes = stage.pick((5, 10, 20, 50, 100, 200, 500, 1000), (5, 20, 100, 1000))
    contenders = {
        (name, size): crowded(make, size)
        for size in sizes
        for name, make in _MAKE.items()
    }
    times = stage.interleave("large pools", contenders, stage.pick(160, 60))
    fair = {size: times["FairQueuePool", size] for size in sizes}
    figure = Figure(
        "checkout + checkin with a pool of 1,000, time",
        "a pool of 5",
        tuple(pairwise(fair[1000], fair[5])),
    )
    series = tuple(
        curve(name, {size: times[name, size] for size in sizes}, _ROLES[name])
        for name in _MAKE
    )
    plot = Lines(
        "Checkout and checkin, half of the pool being out",
        "connections of the pool",
        "µs",
        series,
        log_x=True,
    )
    return Findings((figure,), (plot,))
