"""The same work for all pools, and who does it.

The same measurements for threads and for tasks, so that only who runs a crowd
differs. Ten connections, and ten callers that wait for each of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .contenders import Setup, TaskPeer, ThreadPeer
from .crowd import Crowd, Member, Outcome
from .stage import Stage
from .tasks import TaskCrowd, TaskMember

__all__ = [
    "CALLERS",
    "HOLD",
    "SIZE",
    "UNEVEN",
    "Crew",
    "Work",
    "alone",
    "by_tasks",
    "by_threads",
    "even",
    "flood",
    "impatient",
    "uncontended_by_task",
    "uncontended_by_thread",
    "uneven",
]

#: Connections, and callers: ten hold one, ten wait for each.
SIZE, CALLERS = 10, 110

HOLD = 0.005

#: Seconds after which, in a line that everybody leaves then, every second caller
#: leaves unserved: a hundred wait, and two thousand are served in a second.
#: (A time-out is the pool's, so not every second caller can be given one.)
_PATIENCE = (CALLERS - SIZE) / (2 * SIZE / HOLD)


@dataclass(frozen=True)
class Crew:
    """Callers under one tag."""

    tag: str
    callers: int
    hold: float
    pause: float = 0.0


@dataclass(frozen=True)
class Work:
    """What a contender is given to do."""

    name: str
    crews: tuple[Crew, ...]
    seconds: float
    #: They join when the others have settled.
    late: tuple[Crew, ...] = ()
    #: Every second caller gives up.
    impatient: bool = False
    #: Seconds: some two turns of the line.
    settle: float = 0.12


def even(hold: float, seconds: float, name: str = "") -> Work:
    """Return work under five tags, each with as many callers."""
    crews = tuple(Crew(f"tag{n}", CALLERS // 5, hold) for n in range(5))
    return Work(name or f"{hold * 1000:g} ms hold", crews, seconds)


#: Callers under each of five tags: all want more than their part, two of ten.
UNEVEN = (50, 30, 16, 8, 6)


def uneven(seconds: float) -> Work:
    """Return work under five tags, of which some are louder than others."""
    crews = tuple(Crew(f"tag{n}", c, HOLD) for n, c in enumerate(UNEVEN))
    return Work("loud and quiet tags", crews, seconds)


def flood(seconds: float) -> Work:
    """Return work of a hundred callers, and of one that comes to it."""
    late = (Crew("light", 1, HOLD, pause=HOLD),)
    return Work("light tag", (Crew("flood", CALLERS - 1, HOLD),), seconds, late)


def alone(seconds: float) -> Work:
    """Return work under one of five tags, the others having none."""
    return Work("one tag alone", (Crew("tag0", 40, HOLD),), seconds)


def impatient(seconds: float) -> Work:
    """Return work in which every second caller gives up."""
    crews = even(HOLD, seconds).crews
    return Work("giving up", crews, seconds, impatient=True)


# -- who does it ----------------------------------------------------------------------


def by_threads(stage: Stage, peer: ThreadPeer, work: Work) -> Outcome:
    """Run the work in threads."""
    patience = _PATIENCE if work.impatient else Setup.timeout
    setup = Setup(stage.place, SIZE, 5, patience)
    gives_up = (peer.timeout_error(),) if work.impatient else ()
    with peer.open(setup) as connects:

        def members(crews: Sequence[Crew]) -> list[Member]:
            return [
                Member(connects(crew.tag), crew.hold, crew.pause, gives_up)
                for crew in crews
                for _ in range(crew.callers)
            ]

        crowd = Crowd(members(work.crews), members(work.late))
        return crowd.run(work.seconds, work.settle)


async def _by_tasks(stage: Stage, peer: TaskPeer, work: Work) -> Outcome:
    patience = 2 * HOLD if work.impatient else None
    async with peer.open(Setup(stage.place, SIZE, 5)) as connects:

        def members(crews: Sequence[Crew]) -> list[TaskMember]:
            return [
                TaskMember(connects(crew.tag), crew.hold, crew.pause, patience)
                for crew in crews
                for _ in range(crew.callers)
            ]

        crowd = TaskCrowd(members(work.crews), members(work.late))
        return await crowd.run(work.seconds, work.settle)


def by_tasks(stage: Stage, peer: TaskPeer, work: Work) -> Outcome:
    """Run the work in tasks, in an event loop of its own."""
    return asyncio.run(_by_tasks(stage, peer, work))


_CYCLES = 500


def uncontended_by_thread(stage: Stage, peer: ThreadPeer) -> float:
    """Return the seconds of a cycle in one thread: wall clock, so with the server's."""
    with peer.open(Setup(stage.place, SIZE, 5)) as connects:
        connect = connects("tag0")
        for _ in range(20):
            connect().close()
        began = time.perf_counter()
        for _ in range(_CYCLES):
            connect().close()
        return (time.perf_counter() - began) / _CYCLES


async def _uncontended(stage: Stage, peer: TaskPeer) -> float:
    async with peer.open(Setup(stage.place, SIZE, 5)) as connects:
        connect = connects("tag0")
        for _ in range(20):
            await (await connect()).close()
        began = time.perf_counter()
        for _ in range(_CYCLES):
            await (await connect()).close()
        return (time.perf_counter() - began) / _CYCLES


def uncontended_by_task(stage: Stage, peer: TaskPeer) -> float:
    """Return the seconds of a cycle in one task."""
    return asyncio.run(_uncontended(stage, peer))
