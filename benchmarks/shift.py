"""How connections move when scrapers come and go, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .figures import Figure
from .report import Findings, Lines, Role, Series
from .stage import Scenario, Stage
from .targets import TARGETS
from .workload import Outcome, Shift, run, work_on
from .worlds import FAIR, NAMES, SCALED, World, fair_world, static_world

__all__ = ["SHIFT"]

#: Seconds of service of a workflow, on average.
_SERVICE = 0.05

#: Seconds from one change to the next; longer than it takes to be found idle.
_SCENE = 1.1

#: From which scene to which each scraper works: alone, two, three, two, alone.
_SCENES = {"layer1_5": (0, 5), "layer2": (2, 3), "layer3": (1, 4)}

_MARKS = (
    (1.0, "layer3 comes"),
    (2.0, "layer2 comes"),
    (3.0, "layer2 goes"),
    (4.0, "layer3 goes"),
)

_ROLES: dict[str, Role] = {"layer1_5": "a", "layer2": "b", "layer3": "c"}


def _play(world: World, stage: Stage) -> Outcome:
    with work_on(stage.place, NAMES) as work:
        tasks = {
            world.scrapers[name]: Shift(begin * _SCENE, end * _SCENE, _SERVICE)
            for name, (begin, end) in _SCENES.items()
        }
        return run(work, tasks, every=0.002)


def _story(title: str, outcome: Outcome) -> Lines:
    held = outcome.changes
    series = tuple(
        Series(name, tuple((t, float(n)) for t, n in held[name]), _ROLES[name])
        for name in NAMES
    )
    return Lines(
        title,
        "seconds",
        "connections held",
        series,
        steps=True,
        y_top=17.0,
        marks=tuple((scene * _SCENE, text) for scene, text in _MARKS),
    )


def _first(
    outcome: Outcome, after: float, enough: Callable[[dict[str, int]], bool]
) -> float:
    """Return the moment from `after` on at which it was first seen to be `enough`."""
    for number, (at, _) in enumerate(outcome.held[NAMES[-1]]):
        held = {name: outcome.held[name][number][1] for name in NAMES}
        if at >= after and enough(held):
            return at
    return outcome.seconds


def _times(outcome: Outcome) -> dict[str, float]:
    """Return how long each change took, in seconds."""
    came = 1 * _SCENE
    gone = _first(outcome, 3 * _SCENE, lambda held: not held["layer2"])
    alone = _first(outcome, 4 * _SCENE, lambda held: not held["layer3"])
    return {
        "first": _first(outcome, came, lambda held: held["layer3"] > 0) - came,
        "full": _first(outcome, came, lambda held: held["layer3"] >= 10) - came,
        "freed": _first(
            outcome, gone, lambda held: held["layer1_5"] + held["layer3"] >= 20
        )
        - gone,
        "idle": _first(outcome, alone, lambda held: held["layer1_5"] >= 15) - alone,
    }


def _figures(outcomes: Sequence[Outcome]) -> tuple[Figure, ...]:
    times = [_times(outcome) for outcome in outcomes]
    notice = SCALED["idle_timeout"] + SCALED["reallocation_interval"]

    def ratios(key: str, unit: float) -> tuple[float, ...]:
        return tuple(max(time[key], 0.0) / unit for time in times)

    wake, idle = TARGETS["shift: wake"], TARGETS["shift: idle"]
    return (
        Figure(wake.what, wake.beside, ratios("first", _SERVICE), wake),
        Figure(
            "a scraper wakes up: until it has its full share, ten",
            "a workflow",
            ratios("full", _SERVICE),
            remark="what others hold is not taken away, it drains",
        ),
        Figure(
            "a scraper stops: from its last checkin until the others have all twenty",
            "a workflow",
            ratios("freed", _SERVICE),
        ),
        Figure(
            idle.what,
            idle.beside,
            ratios("idle", notice),
            idle,
            f"idle_timeout {SCALED['idle_timeout']} s, reallocation_interval "
            f"{SCALED['reallocation_interval']} s",
        ),
    )


def coming_and_going(stage: Stage) -> Findings:
    """Play the story in both worlds; measure in the shared one."""
    with static_world(stage.place) as static:
        contenders = {static.name: lambda: _play(static, stage)}
        before = stage.interleave("story", contenders, 1)[static.name][0]

    def shared() -> Outcome:
        # A new pool for each: one that remembers has no scraper that is alone.
        with fair_world(stage.place, **SCALED) as world:
            return _play(world, stage)

    outcomes = stage.interleave("story", {FAIR: shared}, stage.pick(5, 1))[FAIR]
    plots = (
        _story(f"{FAIR}: 15, then 10 and 10, then 7, 7 and 6", outcomes[0]),
        _story(f"{static.name}: ten, whoever else is there", before),
    )
    return Findings(_figures(outcomes), plots)


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
