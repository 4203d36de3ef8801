"""Static against dynamic: a pool for each scraper, beside one that all share.

The static world is what there was before: a ``QueuePool`` of ten connections for
each of three scrapers, thirty in all. The dynamic one is a ``FairQueuePool`` of
twenty with its default limits. How connections move in it when scrapers come and go,
and how long that takes, is measured as well.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import count

from ..harness.bench import Bench, Runs, scenario
from ..harness.findings import Finding, Lines, Series, figure
from ..harness.workload import (
    FAIR,
    LIFTED,
    NAMES,
    SCALED,
    Job,
    Outcome,
    World,
    backlog,
    bursts,
    fair_world,
    run,
    shift,
    static_world,
    work_on,
)

#: Seconds of service of a workflow, on average.
SERVICE = 0.05

#: The jobs of each scraper in round number so-and-so.
Demand = Callable[[int], Mapping[str, Sequence[Job]]]


def _demand(names: Sequence[str], jobs: Callable[[int], list[Job]]) -> Demand:
    """Return what gives each scraper jobs by a seed of its own."""
    return lambda number: {name: jobs(100 * number + n) for n, name in enumerate(names)}


def _compare(
    bench: Bench,
    what: str,
    worlds: Sequence[AbstractContextManager[World]],
    demand: Demand,
    rounds: int,
) -> tuple[Runs, list[World]]:
    """Run the rounds; in all worlds with the same jobs in the same one."""

    def one_round(world: World, rounds: Iterator[int]) -> Outcome:
        jobs = demand(next(rounds))
        return run(work, {world.scrapers[name]: jobs[name] for name in jobs})

    with work_on(bench.database, NAMES) as work, ExitStack() as stack:
        opened = [stack.enter_context(world) for world in worlds]
        for world in opened:  # plans and caches, and a connection's first statements
            scrapers = [world.scrapers[name] for name in demand(0)]
            run(work, {s: backlog(60, 0.005, 0) for s in scrapers})
        contenders = {w.name: partial(one_round, w, count()) for w in opened}
        return bench.interleave(what, contenders, rounds), opened


def _over_time(
    title: str, outcome: Outcome, total: int, top: float = 33, end: float = 0.0
) -> Lines:
    series = [
        Series(name, points, role)
        for (name, points), role in zip(outcome.changes.items(), "abc", strict=False)
    ]
    axes = {"x": "seconds", "y": "connections held", "x_end": end, "y_top": top}
    levels = [(total, f"{total} open")]
    return Lines(title, series=series, levels=levels, steps=True, stacked=True, **axes)


def _client(runs: Runs) -> str:
    """Say how busy this process was: it must not be what is measured."""
    used = f"used of one core: {runs.medians('client', '.0%')}"
    whose = "The benchmark's own process, Python and SQLAlchemy included"
    return f"{whose}, {used}. The rest of the time it waited for the server."


# -- one active scraper ---------------------------------------------------------------


def unused(outcome: Outcome, connections: int) -> float:
    """Return the connections that nobody held, as a rule, in the middle of the run."""
    begin, end = 0.2 * outcome.seconds, 0.8 * outcome.seconds
    middle = [held for at, held in outcome.held[NAMES[0]] if begin < at < end]
    return connections - statistics.median(middle)


def one_active(bench: Bench) -> Iterator[Finding]:
    workflows = bench.pick(300, 180)
    demand = _demand(NAMES[:1], lambda seed: backlog(workflows, SERVICE, seed))
    database = bench.database
    worlds = [fair_world(database, threads=40), static_world(database, threads=40)]
    rounds = bench.pick(12, 5)
    runs, opened = _compare(bench, "one active scraper", worlds, demand, rounds)
    fair, static = opened
    free = Runs(
        {w.name: [unused(o, w.connections) for o in runs[w.name]] for w in opened}
    )
    now, before = (statistics.median(values) for values in free.values())
    remark = f"{before:g} of {static.connections} before, "
    remark += f"{now:g} of {fair.connections} now"
    yield runs.ratio("alone: throughput", "throughput")
    yield runs.ratio("alone: latency", "mean")
    yield free.ratio("alone: unused", remark=remark)
    new, old = runs[fair.name][0], runs[static.name][0]
    end = max(old.seconds, new.seconds)
    yield _over_time(f"{static.name}: ten are all it may have", old, 30, end=end)
    yield _over_time(f"{fair.name}: fifteen while it is alone", new, 20, end=end)
    title = "Workflows per second, one active scraper"
    yield runs.bars(title, "per second", "throughput")
    yield free.bars("Connections that no caller uses meanwhile", "connections")
    yield _client(runs)


ALONE = scenario("alone", one_active, sessions=52)


# -- all of them, in bursts -----------------------------------------------------------

#: Connections that the three keep busy on average: half of twenty.
_DEMAND = 10.0

#: Workflows of the largest burst of one scraper, as many as twenty connections do
#: not take at once.
_BURST = 15

_LIFTED_NAME = f"{FAIR}, lifted"


def _bursty(seconds: float, demand: float) -> Demand:
    each = demand / 3
    return _demand(NAMES, lambda seed: bursts(seconds, each, _BURST, SERVICE, seed))


def _compare_bursts(
    bench: Bench, what: str, demand: Demand, rounds: int
) -> tuple[Runs, list[World]]:
    """Compare the shared world, the static one, and a shared one with lifted limits."""
    worlds = [
        fair_world(bench.database, **SCALED),
        static_world(bench.database),
        fair_world(bench.database, _LIFTED_NAME, **LIFTED, **SCALED),
    ]
    return _compare(bench, what, worlds, demand, rounds)


def bursty(bench: Bench) -> Iterator[Finding]:
    demand = _bursty(bench.pick(5.0, 1.6), _DEMAND)
    rounds = bench.pick(9, 3)
    runs, worlds = _compare_bursts(bench, "three bursty scrapers", demand, rounds)
    for key, name in (("bursts", FAIR), ("bursts, lifted", _LIFTED_NAME)):
        yield runs.ratio(f"{key}: throughput", "throughput", of=name)
        yield runs.ratio(f"{key}: latency", "p95", of=name)
    end = max(outcomes[0].seconds for outcomes in runs.values())
    for world in worlds:
        title, first = f"{world.name}: connections held", runs[world.name][0]
        yield _over_time(title, first, world.connections, end=end)
    yield runs.waits("Latency of a workflow, from due to done", "all_latencies")
    yield _client(runs)


def by_demand(bench: Bench) -> Iterator[Finding]:
    """The same with less and with more to do: where twenty stop being enough."""
    points: dict[str, list[tuple[float, float]]] = {FAIR: [], _LIFTED_NAME: []}
    for mean in (5.0, 10.0, 15.0, 18.0):
        what = f"bursts, {mean:g} busy on average"
        runs, _ = _compare_bursts(bench, what, _bursty(4.0, mean), 3)
        for name, line in points.items():
            line.append((mean, runs.ratio(what, "p95", of=name).median))
    yield Lines(
        "p95 latency over that of three QueuePools of 10, by demand",
        "connections busy on average",
        "ratio",
        [Series(FAIR, points[FAIR]), Series(_LIFTED_NAME, points[_LIFTED_NAME], "b")],
        levels=((1.05, "target 1.05"),),
    )


BURSTS = scenario("bursts", bursty, more=[by_demand], sessions=72)


# -- all of them, always --------------------------------------------------------------


def saturated(bench: Bench) -> Iterator[Finding]:
    workflows = bench.pick(160, 80)
    demand = _demand(NAMES, lambda seed: backlog(workflows, SERVICE, seed))
    database, rounds = bench.database, bench.pick(9, 3)
    static, same = static_world(database), static_world(database, (7, 7, 6))
    worlds = [fair_world(database), static, same]
    what = "three saturated scrapers"
    runs, opened = _compare(bench, what, worlds, demand, rounds)
    what += " on 20 connections"
    rate, three = f"{what}: workflows per second", "three QueuePools of 10"
    less = "a third fewer connections do up to a third less"
    yield runs.ratio(rate, "throughput", beside=three, remark=less)
    yield runs.ratio(f"{what}: p95 latency", "p95", beside=three)
    same = "three QueuePools of 7, 7 and 6"
    less = "the same number of connections; the scraper with 6 is ready last"
    yield runs.ratio(rate, "throughput", opened[2].name, beside=same, remark=less)
    yield _over_time(f"{FAIR}: 7, 7 and 6", runs[FAIR][0], 20, top=22)
    yield runs.bars("Workflows per second, all saturated", "per second", "throughput")
    yield _client(runs)


SATURATED = scenario("saturated", saturated, sessions=72)


# -- scrapers come and go -----------------------------------------------------------

#: Seconds from one change to the next; longer than it takes to be found idle.
SCENE = 1.1

#: From which scene to which each scraper works: alone, two, three, two, alone.
_SCENES = {"layer1_5": (0, 5), "layer2": (2, 3), "layer3": (1, 4)}

_CHANGES = ("layer3 comes", "layer2 comes", "layer2 goes", "layer3 goes")


def _play(world: World, bench: Bench) -> Outcome:
    with work_on(bench.database, NAMES) as work:
        tasks = {
            world.scrapers[name]: shift(begin * SCENE, end * SCENE, SERVICE)
            for name, (begin, end) in _SCENES.items()
        }
        return run(work, tasks, every=0.002)


def _story(title: str, outcome: Outcome) -> Lines:
    held = outcome.changes
    series = [Series(n, held[n], role) for n, role in zip(NAMES, "abc", strict=True)]
    marks = [(n * SCENE, text) for n, text in enumerate(_CHANGES, 1)]
    axes = {"x": "seconds", "y": "connections held", "y_top": 17.0}
    return Lines(title, series=series, marks=marks, steps=True, **axes)


def _first(
    outcome: Outcome, after: float, enough: Callable[[dict[str, int]], bool]
) -> float:
    """Return the moment from `after` on at which it was first seen to be `enough`."""
    for number, (at, _) in enumerate(outcome.held[NAMES[-1]]):
        held = {name: outcome.held[name][number][1] for name in NAMES}
        if at >= after and enough(held):
            return at
    return outcome.seconds


def times(outcome: Outcome) -> dict[str, float]:
    came = 1 * SCENE
    gone = _first(outcome, 3 * SCENE, lambda held: not held["layer2"])
    alone = _first(outcome, 4 * SCENE, lambda held: not held["layer3"])
    twenty = _first(outcome, gone, lambda held: held["layer1_5"] + held["layer3"] >= 20)
    return {
        "first": _first(outcome, came, lambda held: held["layer3"] > 0) - came,
        "full": _first(outcome, came, lambda held: held["layer3"] >= 10) - came,
        "freed": twenty - gone,
        "idle": _first(outcome, alone, lambda held: held["layer1_5"] >= 15) - alone,
    }


def coming_and_going(bench: Bench) -> Iterator[Finding]:
    with static_world(bench.database) as static:
        contenders = {static.name: lambda: _play(static, bench)}
        before = bench.interleave("story", contenders, 1)[static.name][0]

    def shared() -> Outcome:
        # A new pool for each: one that remembers has no scraper that is alone.
        with fair_world(bench.database, **SCALED) as world:
            return _play(world, bench)

    outcomes = bench.interleave("story", {FAIR: shared}, bench.pick(5, 1))[FAIR]
    took = [times(outcome) for outcome in outcomes]
    idle, interval = SCALED["idle_timeout"], SCALED["reallocation_interval"]

    def ratios(key: str, unit: float = SERVICE) -> list[float]:
        return [max(each[key], 0.0) / unit for each in took]

    workflow, remark = "a workflow", "what others hold is not taken away, it drains"
    full = "a scraper wakes up: until it has its full share, ten"
    freed = "a scraper stops: from its last checkin until the others have all twenty"
    yield figure("shift: wake", ratios("first"))
    yield figure(full, ratios("full"), workflow, remark)
    yield figure(freed, ratios("freed"), workflow)
    remark = f"idle_timeout {idle} s, reallocation_interval {interval} s"
    yield figure("shift: idle", ratios("idle", idle + interval), remark=remark)
    yield _story(f"{FAIR}: 15, then 10 and 10, then 7, 7 and 6", outcomes[0])
    yield _story(f"{static.name}: ten, whichever others are there", before)


SHIFT = scenario("shift", coming_and_going, sessions=52)
