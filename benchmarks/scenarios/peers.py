"""Against the peers: the same work for all of them, in threads and in tasks.

Ten connections, and ten callers that wait for each of them.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqla_fairpool.scheduling.policy import jain

from ..harness.bench import Bench, Metric, Runs, Scenario
from ..harness.contenders import TASKS, THREADS, Contender, Setup
from ..harness.crowd import Caller, Outcome, in_tasks, in_threads
from ..harness.figures import percentile
from ..harness.findings import Findings, Table
from .contention import starved

__all__ = ["PEERS", "UNEVEN", "light_p99", "over_tags"]

#: Connections, and callers: ten hold one, ten wait for each.
SIZE, CALLERS = 10, 110

HOLD = 0.005

#: Seconds after which, in a line that all callers leave then, every second one leaves
#: unserved: a hundred wait, and two thousand are served in a second.
#: (A time-out is the pool's, so not every second caller can be given one.)
_PATIENCE = (CALLERS - SIZE) / (2 * SIZE / HOLD)

#: Callers under each of five tags: all want more than their part, two of ten.
UNEVEN = (50, 30, 16, 8, 6)

#: Seconds: some two turns of the line.
_SETTLE = 0.12


@dataclass(frozen=True)
class Work:
    """What a contender is given to do."""

    name: str
    #: Callers under each tag.
    callers: tuple[int, ...]
    seconds: float
    hold: float = HOLD
    #: One caller more under a tag of its own comes when the others have settled.
    with_light: bool = False
    #: Every second caller gives up.
    impatient: bool = False

    def crowd(self, connects: Any, **more: Any) -> tuple[list[Caller], list[Caller]]:
        """Return the callers, and those that come later."""
        callers = [
            Caller(connects(f"tag{n}"), self.hold, **more)
            for n, number in enumerate(self.callers)
            for _ in range(number)
        ]
        light = Caller(connects("light"), HOLD, pause=HOLD) if self.with_light else None
        return callers, [light] if light else []


def _in_threads(bench: Bench, peer: Contender, work: Work) -> Outcome:
    patience = _PATIENCE if work.impatient else Setup.timeout
    gives_up = (peer.timeout_error,) if work.impatient else ()
    with peer.open(Setup(bench.database, SIZE, 5, patience)) as connects:
        callers, late = work.crowd(connects, gives_up=gives_up)
        return in_threads(callers, work.seconds, _SETTLE, late)


def _in_tasks(bench: Bench, peer: Contender, work: Work) -> Outcome:
    async def run() -> Outcome:
        patience = 2 * HOLD if work.impatient else None
        async with peer.open(Setup(bench.database, SIZE, 5)) as connects:
            callers, late = work.crowd(connects, patience=patience)
            return await in_tasks(callers, work.seconds, _SETTLE, late)

    return asyncio.run(run())


_CYCLES = 500


def _cycle_in_thread(bench: Bench, peer: Contender) -> float:
    """Return the microseconds of a cycle: wall clock, so with the server's."""
    with peer.open(Setup(bench.database, SIZE, 5)) as connects:
        connect = connects("tag0")
        for number in range(20 + _CYCLES):
            if number == 20:
                began = time.perf_counter()
            connect().close()
        return (time.perf_counter() - began) / _CYCLES * 1e6


def _cycle_in_task(bench: Bench, peer: Contender) -> float:
    async def run() -> float:
        async with peer.open(Setup(bench.database, SIZE, 5)) as connects:
            connect = connects("tag0")
            for number in range(20 + _CYCLES):
                if number == 20:
                    began = time.perf_counter()
                await (await connect()).close()
            return (time.perf_counter() - began) / _CYCLES * 1e6

    return asyncio.run(run())


# -- what is computed -----------------------------------------------------------------


def over_tags(outcome: Outcome) -> float:
    """Return Jain's index over what each of the uneven tags got."""
    amounts, first = [], 0
    for callers in UNEVEN:
        amounts.append(float(sum(outcome.served[first : first + callers])))
        first += callers
    return jain(amounts)


def light_p99(outcome: Outcome) -> float:
    """Return the p99 of the light tag's waits, in milliseconds."""
    return percentile(outcome.last_waits, 99) * 1e3


def _lost(outcome: Outcome) -> float:
    return sum(outcome.given_up) / max(sum(outcome.served), 1)


def _never_served(outcomes: Sequence[Outcome]) -> str:
    never = statistics.median(outcome.never_served for outcome in outcomes)
    return f"{never:g} of {CALLERS} never served" if never else ""


_FAIRNESS: dict[str, Metric] = {
    "Jain, callers": "fairness",
    "p50 wait, ms": lambda outcome: outcome.wait(50) * 1e3,
    "p99 wait, ms": lambda outcome: outcome.wait(99) * 1e3,
    "longest wait, ms": lambda outcome: outcome.longest_wait * 1e3,
    "p99 / p50": "spread",
}

# -- the measurements -----------------------------------------------------------------


class _Side:
    """The measurements of threads or of tasks, each a column of their table."""

    def __init__(
        self,
        name: str,
        peers: Sequence[Contender],
        work: Callable[[Bench, Any, Work], Outcome],
        cycle: Callable[[Bench, Any], float],
        bench: Bench,
    ) -> None:
        self._name, self._peers, self._bench = name, peers, bench
        self._work, self._cycle = work, cycle
        self._columns: dict[str, dict[str, float]] = {}

    def measure(self) -> Findings:
        """Make all measurements of the bench's form."""
        seconds = self._bench.pick(1.5, 0.25)
        found = self._uncontended()
        for hold in self._bench.pick((0.0, 0.001, HOLD, 0.05), (HOLD,)):
            found += self._hold(hold, 3.0 if hold > HOLD else max(seconds, 0.55))
        found += self._tags(seconds) + self._light(seconds)
        if not self._bench.short:
            found += self._giving_up(seconds) + self._alone(seconds)
        return found + self._tables()

    def _run(self, work: Work) -> Runs:
        contenders = {
            p.name: partial(self._work, self._bench, p, work) for p in self._peers
        }
        what = f"{self._name}, {work.name}"
        return self._bench.interleave(what, contenders, self._bench.pick(5, 2))

    def _column(self, heading: str, runs: Runs, metric: Metric = float) -> None:
        each = runs.each(metric)
        self._columns[heading] = {n: statistics.median(v) for n, v in each.items()}

    def _uncontended(self) -> Findings:
        contenders = {p.name: partial(self._cycle, self._bench, p) for p in self._peers}
        what = f"{self._name}, uncontended"
        runs = self._bench.interleave(what, contenders, self._bench.pick(9, 3))
        self._column("uncontended, µs", runs)
        title = f"Uncontended checkout and checkin, {self._name}"
        figures = (runs.ratio(f"{self._name}: uncontended, time"),)
        return Findings(figures, (runs.bars(title, "µs, less is better"),))

    def _hold(self, hold: float, seconds: float) -> Findings:
        """Five tags, each with as many callers."""
        name = f"{hold * 1000:g} ms hold"
        runs = self._run(Work(name, (CALLERS // 5,) * 5, seconds, hold))
        self._column(f"{name}, per s", runs, "throughput")
        title = f"Throughput with {name}, {self._name}"
        found = Findings(
            (runs.ratio(f"{self._name}: throughput, {name}", "throughput"),),
            (runs.bars(title, "checkouts per second", "throughput"),),
        )
        return found + self._fairness(runs) if hold == HOLD else found

    def _fairness(self, runs: Runs) -> Findings:
        for heading, metric in _FAIRNESS.items():
            self._column(heading, runs, metric)
        figures = (
            self._target(runs, "jain", "fairness", ".3f"),
            self._target(runs, "spread", "spread", ".3g"),
        )
        title = f"Waits of {CALLERS} {self._name} on {SIZE} connections, 5 ms hold"
        return Findings(figures, (runs.waits(title, remark=_never_served),))

    def _target(self, runs: Runs, key: str, metric: Metric, form: str) -> Any:
        others = runs.medians(metric, form, others=True)
        return runs.value(f"{self._name}: {key}", metric, remark=others)

    def _tags(self, seconds: float) -> Findings:
        """Five tags, of which some are louder than others."""
        runs = self._run(Work("loud and quiet tags", UNEVEN, seconds))
        self._column("Jain, tags", runs, over_tags)
        title = f"Fairness over five tags with 50, 30, 16, 8 and 6 {self._name}"
        return Findings(
            (self._target(runs, "tags", over_tags, ".3f"),),
            (runs.bars(title, "Jain's index, 1 is even", over_tags),),
        )

    def _light(self, seconds: float) -> Findings:
        """A flood of callers under one tag, and one caller that comes to it."""
        runs = self._run(Work("light tag", (CALLERS - 1,), seconds, with_light=True))
        self._column("light tag p99, ms", runs, light_p99)
        figure = runs.value(
            f"{self._name}: light",
            lambda outcome: light_p99(outcome) / 1e3 / HOLD,
            remark=f"ms: {runs.medians(light_p99, '.3g', others=True)}",
        )
        title = f"Waits of a light tag beside a flood of 109 {self._name}"
        return Findings((figure,), (runs.waits(title, "last_waits", starved),))

    def _alone(self, seconds: float) -> Findings:
        """One of five tags, the others having no callers."""
        runs = self._run(Work("one tag alone", (40,), seconds))
        title = f"One tag alone, 40 {self._name}: throughput"
        note = (
            "A tag that is alone may have three quarters of a FairQueuePool by "
            "default, the rest is for newcomers; a semaphore holds it to its part for "
            "ever."
        )
        return Findings(
            (runs.ratio(f"{self._name}: one tag alone", "throughput"),),
            (runs.bars(title, "checkouts per second", "throughput"),),
            notes=(note,),
        )

    def _giving_up(self, seconds: float) -> Findings:
        """Every second caller gives up."""
        callers = (CALLERS // 5,) * 5
        runs = self._run(Work("giving up", callers, seconds, impatient=True))
        self._column("giving up, per s", runs, "throughput")
        self._column("given up per served", runs, _lost)
        how = "times out" if self._name == "threads" else "is cancelled"
        lost = self._columns["given up per served"]
        plot = runs.bars(
            f"Throughput while every second waiter {how}",
            "checkouts per second, 5 ms hold",
            "throughput",
            {name: f"{value:.2f} given up per served" for name, value in lost.items()},
        )
        what = f"{self._name}: every second {how}"
        return Findings((runs.ratio(what, "throughput"),), (plot,))

    def _tables(self) -> Findings:
        columns = self._columns
        rows = ((p.name, *(c[p.name] for c in columns.values())) for p in self._peers)
        how = tuple((peer.name, peer.how) for peer in self._peers)
        name = self._name
        return Findings(
            tables=(
                Table(f"All medians, {name}", ("pool", *columns), tuple(rows)),
                Table(f"How they are configured, {name}", ("pool", "how"), how),
            )
        )


def threads(bench: Bench) -> Findings:
    """The pools for threads."""
    return _Side("threads", THREADS, _in_threads, _cycle_in_thread, bench).measure()


def tasks(bench: Bench) -> Findings:
    """The pools for asyncio tasks."""
    return _Side("tasks", TASKS, _in_tasks, _cycle_in_task, bench).measure()


PEERS = Scenario(
    "peers",
    "Against the peers",
    f"The pools that people would use instead, each as its documentation recommends "
    f"(see the tables), with {SIZE} connections to the same PostgreSQL and {CALLERS} "
    "callers, so that ten wait for each connection. A caller checks out, sleeps for as "
    "long as it holds the connection, returns it, and comes again at once; on the "
    "server nothing is done, because the pools are what is measured. Waits that had "
    "not ended count with what they had lasted. Threads and asyncio tasks are compared "
    "apart.",
    (threads, tasks),
    tuple(
        f"{side}: {key}"
        for side in ("threads", "tasks")
        for key in ("jain", "spread", "tags", "light")
    ),
    sessions=32,
)
