"""How connections move when scrapers come and go, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..harness.bench import Bench, Scenario
from ..harness.findings import Finding, Lines, Series
from ..harness.targets import figure
from ..harness.workload import (
    FAIR,
    NAMES,
    SCALED,
    Outcome,
    World,
    fair_world,
    run,
    shift,
    static_world,
    work_on,
)

#: Seconds of service of a workflow, on average.
_SERVICE = 0.05

#: Seconds from one change to the next; longer than it takes to be found idle.
SCENE = 1.1

#: From which scene to which each scraper works: alone, two, three, two, alone.
_SCENES = {"layer1_5": (0, 5), "layer2": (2, 3), "layer3": (1, 4)}

_CHANGES = ("layer3 comes", "layer2 comes", "layer2 goes", "layer3 goes")


def _play(world: World, bench: Bench) -> Outcome:
    with work_on(bench.database, NAMES) as work:
        tasks = {
            world.scrapers[name]: shift(begin * SCENE, end * SCENE, _SERVICE)
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
    """Return how long each change took, in seconds."""
    came = 1 * SCENE
    gone = _first(outcome, 3 * SCENE, lambda held: not held["layer2"])
    alone = _first(outcome, 4 * SCENE, lambda held: not held["layer3"])
    all_twenty = _first(
        outcome, gone, lambda held: held["layer1_5"] + held["layer3"] >= 20
    )
    return {
        "first": _first(outcome, came, lambda held: held["layer3"] > 0) - came,
        "full": _first(outcome, came, lambda held: held["layer3"] >= 10) - came,
        "freed": all_twenty - gone,
        "idle": _first(outcome, alone, lambda held: held["layer1_5"] >= 15) - alone,
    }


def coming_and_going(bench: Bench) -> Iterator[Finding]:
    """Play the story in both worlds; measure in the shared one."""
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

    def ratios(key: str, unit: float = _SERVICE) -> list[float]:
        return [max(each[key], 0.0) / unit for each in took]

    workflow = "a workflow"
    yield figure("shift: wake", ratios("first"))
    yield figure(
        "a scraper wakes up: until it has its full share, ten",
        ratios("full"),
        workflow,
        "what others hold is not taken away, it drains",
    )
    yield figure(
        "a scraper stops: from its last checkin until the others have all twenty",
        ratios("freed"),
        workflow,
    )
    remark = f"idle_timeout {idle} s, reallocation_interval {interval} s"
    yield figure("shift: idle", ratios("idle", idle + interval), remark=remark)
    yield _story(f"{FAIR}: 15, then 10 and 10, then 7, 7 and 6", outcomes[0])
    yield _story(f"{static.name}: ten, whichever others are there", before)


SHIFT = Scenario(
    "shift",
    "Scrapers come and go",
    "Each scraper that is there does all it can, on real tables. One is alone at "
    "first; two more come, and go again. With a pool for each nothing changes hands. "
    "The shared pool gives a newcomer connections at once, because one that is alone "
    "leaves five of twenty; what a scraper returns that stops is the others' at once, "
    "and when it has been found idle, its part of the limits is as well. The pool's "
    "times are a hundredth of the default ones.",
    (coming_and_going,),
    ("shift: wake", "shift: idle"),
    sessions=52,
)
