"""Static against dynamic: a pool for each scraper, beside one that all share.

The static world is what there was before: a ``QueuePool`` of ten connections for
each of three scrapers, thirty in all. The dynamic one is a ``FairQueuePool`` of
twenty with its default limits.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count

from .figures import Figure, pairwise
from .report import (
    Bar,
    Bars,
    Distribution,
    Distributions,
    Findings,
    Lines,
    Plot,
    Role,
    Series,
)
from .stage import Scenario, Stage
from .targets import TARGETS
from .workload import Job, Outcome, Work, backlog, bursts, run, work_on
from .worlds import FAIR, LIFTED, NAMES, SCALED, World, fair_world, static_world

__all__ = ["ALONE", "BURSTS", "SATURATED"]

#: Seconds of service of a workflow, on average.
SERVICE = 0.05

_ROLES: tuple[Role, ...] = ("a", "b", "c")

#: The jobs of each scraper in round number so-and-so.
_Demand = Callable[[int], Mapping[str, Sequence[Job]]]


def _contender(world: World, work: Work, demand: _Demand) -> Callable[[], Outcome]:
    """Return what runs the next round; in all worlds the same jobs in the same one."""
    rounds = count()

    def one_round() -> Outcome:
        jobs = demand(next(rounds))
        return run(work, {world.scrapers[name]: jobs[name] for name in jobs})

    return one_round


def _compare(
    stage: Stage, what: str, worlds: Sequence[World], demand: _Demand, rounds: int
) -> dict[str, list[Outcome]]:
    with work_on(stage.place, NAMES) as work:
        contenders = {w.name: _contender(w, work, demand) for w in worlds}
        for world in worlds:  # plans and caches, and a connection's first statements
            scrapers = [world.scrapers[name] for name in demand(0)]
            run(work, {s: backlog(60, 0.005, 0) for s in scrapers})
        return stage.interleave(what, contenders, rounds)


def figure(key: str, values: Sequence[float], remark: str = "") -> Figure:
    """Return a figure for the target of this name."""
    target = TARGETS[key]
    return Figure(target.what, target.beside, tuple(values), target, remark)


def _rates(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.throughput for outcome in outcomes]


def _means(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.mean for outcome in outcomes]


def bar(name: str, values: Sequence[float], role: Role, remark: str = "") -> Bar:
    """Return a bar for the median, with the middle half of the rounds."""
    found = Figure("", "", tuple(values))
    return Bar(name, found.median, *found.spread, role, remark)


def _over_time(
    title: str, outcome: Outcome, total: int, top: float, end: float
) -> Lines:
    """Return a plot of what the scrapers held, one on top of the other."""
    series = tuple(
        Series(name, tuple((t, float(n)) for t, n in points), role)
        for (name, points), role in zip(outcome.changes.items(), _ROLES, strict=False)
    )
    return Lines(
        title,
        "seconds",
        "connections held",
        series,
        steps=True,
        stacked=True,
        x_end=end,
        y_top=top,
        levels=((float(total), f"{total} open"),),
    )


def _client(runs: Mapping[str, Sequence[Outcome]]) -> str:
    """Say how busy this process was: it must not be what is measured."""
    parts = [
        f"{name} {statistics.median(o.client for o in outcomes):.0%}"
        for name, outcomes in runs.items()
    ]
    return (
        "The benchmark's own process, Python and SQLAlchemy included, used of one "
        f"core: {', '.join(parts)}. The rest of the time it waited for the server."
    )


# -- one active scraper ---------------------------------------------------------------


def _unused(outcome: Outcome, connections: int) -> float:
    """Return the connections that nobody held, as a rule, in the middle of the run."""
    middle = [
        held
        for at, held in outcome.held[NAMES[0]]
        if 0.2 * outcome.seconds < at < 0.8 * outcome.seconds
    ]
    return connections - statistics.median(middle)


def one_active(stage: Stage) -> Findings:
    """One scraper has a backlog, the others rest."""
    workflows = stage.pick(300, 180)

    def demand(number: int) -> Mapping[str, Sequence[Job]]:
        return {NAMES[0]: backlog(workflows, SERVICE, number)}

    with ExitStack() as stack:
        static = stack.enter_context(static_world(stage.place, threads=40))
        fair = stack.enter_context(fair_world(stage.place, threads=40))
        rounds = stage.pick(12, 5)
        runs = _compare(stage, "one active scraper", [static, fair], demand, rounds)
    old, new = runs[static.name], runs[fair.name]
    unused = [
        [_unused(outcome, world.connections) for outcome in runs[world.name]]
        for world in (static, fair)
    ]
    medians = [statistics.median(values) for values in unused]
    figures = (
        figure("alone: throughput", pairwise(_rates(new), _rates(old))),
        figure(
            "alone: latency", pairwise([o.mean for o in new], [o.mean for o in old])
        ),
        figure(
            "alone: unused",
            pairwise(unused[1], unused[0]),
            f"{medians[0]:g} of {static.connections} before, {medians[1]:g} of "
            f"{fair.connections} now",
        ),
    )
    end = max(old[0].seconds, new[0].seconds)
    plots = (
        _over_time(f"{static.name}: ten are all it may have", old[0], 30, 33, end),
        _over_time(f"{fair.name}: fifteen while it is alone", new[0], 20, 33, end),
        Bars(
            "Workflows per second, one active scraper",
            "per second",
            tuple(bar(w.name, _rates(runs[w.name]), w.role) for w in (static, fair)),
        ),
        Bars(
            "Connections that nobody uses meanwhile",
            "connections",
            tuple(
                bar(w.name, values, w.role)
                for w, values in zip((static, fair), unused, strict=True)
            ),
        ),
    )
    return Findings(figures, plots, notes=(_client(runs),))


ALONE = Scenario(
    "alone",
    "One active scraper",
    "One of three scrapers has a backlog of workflows, all due at once, and the "
    "others rest. A workflow fetches a batch with FOR UPDATE SKIP LOCKED, has the "
    "server work for 50 ms on average, writes the batch back and commits; its latency "
    "is counted from when it was due. Beside each other: three QueuePools of 10 (30 "
    "connections, of which this scraper may use 10), and one FairQueuePool of 20, with "
    "its default options.",
    (one_active,),
    ("alone: throughput", "alone: latency", "alone: unused"),
    sessions=52,
)


# -- all of them, in bursts -----------------------------------------------------------

#: Connections that the three keep busy on average: half of twenty.
_DEMAND = 10.0

#: Workflows of the largest burst of one scraper, as many as twenty connections do
#: not take at once.
_BURST = 15


def _bursty(seconds: float, demand: float) -> _Demand:
    def jobs(number: int) -> Mapping[str, Sequence[Job]]:
        return {
            name: bursts(seconds, demand / 3, _BURST, SERVICE, 100 * number + n)
            for n, name in enumerate(NAMES)
        }

    return jobs


def _p95(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.latency(95) for outcome in outcomes]


@contextmanager
def _three_worlds(stage: Stage) -> Iterator[list[World]]:
    """The static world, the shared one as it is, and with its limits lifted."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(static_world(stage.place)),
            stack.enter_context(fair_world(stage.place, **SCALED)),
            stack.enter_context(
                fair_world(stage.place, f"{FAIR}, lifted", **LIFTED, **SCALED)
            ),
        ]


def bursty(stage: Stage) -> Findings:
    """All three have bursts, at times of their own."""
    demand = _bursty(stage.pick(5.0, 1.6), _DEMAND)
    with _three_worlds(stage) as worlds:
        rounds = stage.pick(9, 3)
        runs = _compare(stage, "three bursty scrapers", worlds, demand, rounds)
    old, new, lifted = runs.values()
    figures = (
        figure("bursts: throughput", pairwise(_rates(new), _rates(old))),
        figure("bursts: latency", pairwise(_p95(new), _p95(old))),
        figure("bursts, lifted: throughput", pairwise(_rates(lifted), _rates(old))),
        figure("bursts, lifted: latency", pairwise(_p95(lifted), _p95(old))),
    )
    rows = tuple(
        Distribution.of(
            w.name, [x for o in runs[w.name] for x in o.all_latencies], w.role
        )
        for w in worlds
    )
    end = max(outcomes[0].seconds for outcomes in runs.values())
    plots: tuple[Plot, ...] = (
        *(
            _over_time(
                f"{w.name}: connections held", runs[w.name][0], w.connections, 33, end
            )
            for w in worlds
        ),
        Distributions("Latency of a workflow, from due to done", rows),
    )
    return Findings(figures, plots, notes=(_client(runs),))


def by_demand(stage: Stage) -> Findings:
    """The same with less and with more to do: where twenty stop being enough."""
    if stage.short:
        return Findings()
    points: dict[str, list[tuple[float, float]]] = {}
    with _three_worlds(stage) as worlds:
        for mean in (5.0, 10.0, 15.0, 18.0):
            demand = _bursty(4.0, mean)
            what = f"bursts, {mean:g} busy on average"
            runs = _compare(stage, what, worlds, demand, 3)
            old = _p95(runs[worlds[0].name])
            for world in worlds[1:]:
                ratios = pairwise(_p95(runs[world.name]), old)
                points.setdefault(world.name, []).append(
                    (mean, statistics.median(ratios))
                )
    roles: tuple[Role, ...] = ("ours", "b")
    plot = Lines(
        "p95 latency over that of three QueuePools of 10, by demand",
        "connections busy on average",
        "ratio",
        tuple(
            Series(name, tuple(line), role)
            for (name, line), role in zip(points.items(), roles, strict=True)
        ),
        levels=((1.05, "target 1.05"),),
    )
    return Findings(plots=(plot,))


BURSTS = Scenario(
    "bursts",
    "Three bursty scrapers, a third fewer connections",
    "All three scrapers get workflows in bursts of 5 to 15 at random moments, so many "
    "that ten connections are busy on average. Beside each other, with the same "
    "workflows due at the same moments: three QueuePools of 10 (30 connections), one "
    "FairQueuePool of 20 with its default limits, under which a scraper never gets "
    "more than ten beside others, and the same with soft_limit and max_limit at 20, "
    "under which it may have what nobody else wants. The pool's times are a hundredth "
    "of the default ones, as the bursts are.",
    (bursty, by_demand),
    (
        "bursts: throughput",
        "bursts: latency",
        "bursts, lifted: throughput",
        "bursts, lifted: latency",
    ),
    sessions=72,
)


# -- all of them, always --------------------------------------------------------------


def saturated(stage: Stage) -> Findings:
    """All three want everything: fewer connections do less."""
    workflows = stage.pick(160, 80)

    def demand(number: int) -> Mapping[str, Sequence[Job]]:
        return {
            name: backlog(workflows, SERVICE, 100 * number + n)
            for n, name in enumerate(NAMES)
        }

    with ExitStack() as stack:
        worlds = [
            stack.enter_context(static_world(stage.place)),
            stack.enter_context(static_world(stage.place, (7, 7, 6))),
            stack.enter_context(fair_world(stage.place)),
        ]
        rounds = stage.pick(9, 3)
        runs = _compare(stage, "three saturated scrapers", worlds, demand, rounds)
    old, small, new = runs.values()
    rate, p95 = _rates(new), _p95(new)
    what = "three saturated scrapers on 20 connections"
    figures = (
        Figure(
            f"{what}: workflows per second",
            "three QueuePools of 10",
            tuple(pairwise(rate, _rates(old))),
            remark="a third fewer connections do up to a third less",
        ),
        Figure(
            f"{what}: p95 latency",
            "three QueuePools of 10",
            tuple(pairwise(p95, _p95(old))),
        ),
        Figure(
            f"{what}: workflows per second",
            "three QueuePools of 7, 7 and 6",
            tuple(pairwise(rate, _rates(small))),
            remark="the same number of connections; the scraper with 6 is ready last",
        ),
    )
    plots = (
        _over_time(f"{FAIR}: 7, 7 and 6", new[0], 20, 22, new[0].seconds),
        Bars(
            "Workflows per second, all saturated",
            "per second",
            tuple(bar(w.name, _rates(runs[w.name]), w.role) for w in worlds),
        ),
    )
    return Findings(figures, plots, notes=(_client(runs),))


SATURATED = Scenario(
    "saturated",
    "When all of them are saturated",
    "The honest other half: if all three have a backlog all the time, nothing is left "
    "to share. Twenty connections do what twenty can, and thirty do half as much "
    "again. What the pool still does is to divide evenly.",
    (saturated,),
    sessions=72,
)
