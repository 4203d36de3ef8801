"""Against the peers: the same work for all of them, in threads and in tasks.

Ten connections, and ten callers that wait for each of them.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from sqla_fairpool.scheduling.policy import jain

from ..harness.bench import Bench, Metric, Runs, scenario
from ..harness.contenders import TASKS, THREADS, TIMED_OUT, Contender, Setup
from ..harness.crowd import Caller, Outcome, in_tasks, in_threads
from ..harness.findings import Figure, Finding, Table, percentile
from .contention import starved

#: Connections, and callers: ten hold one, ten wait for each.
SIZE, CALLERS = 10, 110

HOLD = 0.005

#: Seconds after which, in a line that all callers leave then, every second one leaves
#: unserved: a hundred wait, and two thousand are served in a second.
#: (A time-out is the pool's, so not every second caller can be given one.)
_PATIENCE = (CALLERS - SIZE) / (2 * SIZE / HOLD)

#: Callers under each of five tags. All want more than their part, two of ten.
EVEN = (CALLERS // 5,) * 5
UNEVEN = (50, 30, 16, 8, 6)

#: Seconds: some two turns of the line.
_SETTLE = 0.12


@dataclass(frozen=True)
class Work:
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
        callers = []
        for n, number in enumerate(self.callers):
            callers += [Caller(connects(f"tag{n}"), self.hold, **more)] * number
        light = Caller(connects("light"), HOLD, pause=HOLD)
        return callers, [light] * self.with_light


def _in_threads(bench: Bench, peer: Contender, work: Work) -> Outcome:
    patience = _PATIENCE if work.impatient else Setup.timeout
    gives_up = TIMED_OUT if work.impatient else ()
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


# -- what is computed -----------------------------------------------------------------


def over_tags(outcome: Outcome) -> float:
    served = iter(outcome.served)
    return jain([sum(islice(served, callers)) for callers in UNEVEN])


def light_p99(outcome: Outcome) -> float:
    return percentile(outcome.last_waits, 99) * 1e3


def cycle_time(outcome: Outcome) -> float:
    return 1e6 / outcome.throughput


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

_ALONE = (
    "A tag that is alone may have three quarters of a FairQueuePool by default, the "
    "rest is for newcomers; a semaphore holds it to its part for ever."
)

# -- the measurements -----------------------------------------------------------------


@dataclass
class _Side:
    """The measurements of threads or of tasks, of which each adds to their table."""

    _name: str
    _peers: Sequence[Contender]
    _work: Callable[[Bench, Any, Work], Outcome]
    _bench: Bench
    _columns: dict[str, dict[str, float]] = field(default_factory=dict)

    def measure(self) -> Iterator[Finding]:
        seconds = self._bench.pick(1.5, 0.25)
        yield from self._uncontended()
        for hold in self._bench.pick((0.0, 0.001, HOLD, 0.05), (HOLD,)):
            yield from self._hold(hold, 3.0 if hold > HOLD else max(seconds, 0.55))
        yield from self._tags(seconds)
        yield from self._light(seconds)
        if not self._bench.short:
            yield from self._giving_up(seconds)
            yield from self._alone(seconds)
        yield from self._tables()

    def _run(self, work: Work, rounds: tuple[int, int] = (5, 2)) -> Runs:
        run = partial(self._work, self._bench, work=work)
        what, peers = f"{self._name}, {work.name}", {p.name: p for p in self._peers}
        return self._bench.interleave(what, peers, self._bench.pick(*rounds), run)

    def _column(self, heading: str, runs: Runs, metric: Metric = float) -> None:
        each = runs.each(metric)
        self._columns[heading] = {n: statistics.median(v) for n, v in each.items()}

    def _target(self, runs: Runs, key: str, metric: Metric, form: str) -> Figure:
        others = runs.medians(metric, form, others=True)
        return runs.value(f"{self._name}: {key}", metric, remark=others)

    def _throughput(
        self, runs: Runs, what: str, title: str, **more: Any
    ) -> Iterator[Finding]:
        yield runs.ratio(f"{self._name}: {what}", "throughput")
        yield runs.bars(title, "checkouts per second", "throughput", **more)

    def _uncontended(self) -> Iterator[Finding]:
        """One caller, and the time of its cycle on the wall clock."""
        runs = self._run(Work("uncontended", (1,), 0.1, 0.0), (9, 3))
        self._column("uncontended, µs", runs, cycle_time)
        title = f"Uncontended checkout and checkin, {self._name}"
        yield runs.ratio(f"{self._name}: uncontended, time", cycle_time)
        yield runs.bars(title, "µs, less is better", cycle_time)

    def _hold(self, hold: float, seconds: float) -> Iterator[Finding]:
        """Five tags, each with as many callers."""
        name = f"{hold * 1000:g} ms hold"
        runs = self._run(Work(name, EVEN, seconds, hold))
        self._column(f"{name}, per s", runs, "throughput")
        title = f"Throughput with {name}, {self._name}"
        yield from self._throughput(runs, f"throughput, {name}", title)
        if hold != HOLD:
            return
        for heading, metric in _FAIRNESS.items():
            self._column(heading, runs, metric)
        yield self._target(runs, "jain", "fairness", ".3f")
        yield self._target(runs, "spread", "spread", ".3g")
        title = f"Waits of {CALLERS} {self._name} on {SIZE} connections, {name}"
        yield runs.waits(title, remark=_never_served)

    def _tags(self, seconds: float) -> Iterator[Finding]:
        runs = self._run(Work("loud and quiet tags", UNEVEN, seconds))
        self._column("Jain, tags", runs, over_tags)
        title = f"Fairness over five tags with 50, 30, 16, 8 and 6 {self._name}"
        yield self._target(runs, "tags", over_tags, ".3f")
        yield runs.bars(title, "Jain's index, 1 is even", over_tags)

    def _light(self, seconds: float) -> Iterator[Finding]:
        """A flood of callers under one tag, and one caller that comes to it."""
        runs = self._run(Work("light tag", (CALLERS - 1,), seconds, with_light=True))
        self._column("light tag p99, ms", runs, light_p99)
        in_holds = lambda outcome: light_p99(outcome) / 1e3 / HOLD  # noqa: E731  (short)
        remark = f"ms: {runs.medians(light_p99, '.3g', others=True)}"
        yield runs.value(f"{self._name}: light", in_holds, remark=remark)
        title = f"Waits of a light tag during a flood of 109 {self._name}"
        yield runs.waits(title, "last_waits", starved)

    def _alone(self, seconds: float) -> Iterator[Finding]:
        runs = self._run(Work("one tag alone", (40,), seconds))
        title = f"One tag alone, 40 {self._name}: throughput"
        yield from self._throughput(runs, "one tag alone", title)
        yield _ALONE

    def _giving_up(self, seconds: float) -> Iterator[Finding]:
        runs = self._run(Work("giving up", EVEN, seconds, impatient=True))
        self._column("giving up, per s", runs, "throughput")
        self._column("given up per served", runs, _lost)
        how = "times out" if self._name == "threads" else "is cancelled"
        lost = self._columns["given up per served"]
        remarks = {name: f"{n:.2f} given up per served" for name, n in lost.items()}
        title = f"Throughput while every second waiter {how}, 5 ms hold"
        yield from self._throughput(runs, f"every second {how}", title, remarks=remarks)

    def _tables(self) -> Iterator[Finding]:
        columns = self._columns
        rows = [(p.name, *(c[p.name] for c in columns.values())) for p in self._peers]
        how = [(peer.name, peer.how) for peer in self._peers]
        yield Table(f"All medians, {self._name}", ("pool", *columns), rows)
        yield Table(f"How they are configured, {self._name}", ("pool", "how"), how)


def threads(bench: Bench) -> Iterator[Finding]:
    return _Side("threads", THREADS, _in_threads, bench).measure()


def tasks(bench: Bench) -> Iterator[Finding]:
    return _Side("tasks", TASKS, _in_tasks, bench).measure()


PEERS = scenario("peers", threads, tasks, sessions=32)
