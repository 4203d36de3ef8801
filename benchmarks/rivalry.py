"""Against the peers: the same work for all of them, side by side, and the pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from sqla_fairpool.scheduling.policy import jain

from . import rivals
from .contenders import TASKS, THREADS
from .crowd import Outcome
from .figures import Figure, pairwise, percentile
from .report import (
    Bar,
    Bars,
    Distribution,
    Distributions,
    Findings,
    Role,
    Table,
)
from .rivals import CALLERS, HOLD, SIZE, UNEVEN, Work
from .stage import Scenario, Stage
from .targets import TARGETS

__all__ = ["PEERS", "over_tags", "spread"]

#: The outcomes of all rounds, by the contender's name.
Runs: TypeAlias = Mapping[str, Sequence[Outcome]]


@dataclass(frozen=True)
class _Side:
    """Threads, or tasks."""

    name: str
    peers: Sequence[Any]
    work: Callable[[Stage, Any, Work], Outcome]
    uncontended: Callable[[Stage, Any], float]

    @property
    def ours(self) -> str:
        return str(self.peers[0].name)

    @property
    def base(self) -> str:
        return str(self.peers[1].name)

    def role(self, name: str) -> Role:
        roles: dict[str, Role] = {peer.name: peer.role for peer in self.peers}
        return roles[name]


_THREADS = _Side("threads", THREADS, rivals.by_threads, rivals.uncontended_by_thread)
_TASKS = _Side("tasks", TASKS, rivals.by_tasks, rivals.uncontended_by_task)


# -- what is computed -----------------------------------------------------------------


def spread(outcome: Outcome) -> float:
    """Return p99 over p50 of the waits; who was never served counts as well."""
    waits = outcome.all_waits
    return percentile(waits, 99) / max(percentile(waits, 50), 1e-6)


def over_tags(outcome: Outcome) -> float:
    """Return Jain's index over what each of the uneven tags got."""
    amounts, first = [], 0
    for callers in UNEVEN:
        amounts.append(float(sum(outcome.served[first : first + callers])))
        first += callers
    return jain(amounts)


def _light_waits(outcome: Outcome) -> list[float]:
    """Return the latecomer's waits, with that which had not ended."""
    pending = outcome.pending[-1]
    return [*outcome.waits[-1], *([pending] if pending else [])] or [0.0]


def _light(outcome: Outcome) -> float:
    return percentile(_light_waits(outcome), 99)


def _each(runs: Runs, of: Callable[[Outcome], float]) -> dict[str, list[float]]:
    return {name: [of(outcome) for outcome in found] for name, found in runs.items()}


def _milliseconds(percent: float, outcome: Outcome) -> float:
    return percentile(outcome.all_waits, percent) * 1e3


def _rate(outcome: Outcome) -> float:
    return outcome.throughput


# -- how it is told -------------------------------------------------------------------


def _bars(
    side: _Side,
    title: str,
    unit: str,
    values: Mapping[str, Sequence[float]],
    remarks: Mapping[str, str] | None = None,
) -> Bars:
    bars = []
    for name, each in values.items():
        found = Figure("", "", tuple(each))
        remark = (remarks or {}).get(name, "")
        bars.append(Bar(name, found.median, *found.spread, side.role(name), remark))
    return Bars(title, unit, tuple(bars))


def _waits(side: _Side, title: str, runs: Runs, light: bool = False) -> Distributions:
    rows = []
    for name, outcomes in runs.items():
        if light:
            seconds = [wait for o in outcomes for wait in _light_waits(o)]
            starved = sum(not o.served[-1] for o in outcomes)
            remark = "never served" if starved == len(outcomes) else ""
        else:
            seconds = [wait for o in outcomes for wait in o.all_waits]
            never = statistics.median(o.never_served for o in outcomes)
            remark = f"{never:g} of {CALLERS} never served" if never else ""
        rows.append(Distribution.of(name, seconds, side.role(name), remark))
    return Distributions(title, tuple(rows))


def _ratio(side: _Side, what: str, values: Mapping[str, Sequence[float]]) -> Figure:
    ratios = pairwise(values[side.ours], values[side.base])
    return Figure(f"{side.name}: {what}", side.base, tuple(ratios))


def _target(key: str, values: Sequence[float], remark: str = "") -> Figure:
    target = TARGETS[key]
    return Figure(target.what, target.beside, tuple(values), target, remark)


def _others(side: _Side, values: Mapping[str, Sequence[float]], form: str) -> str:
    """Say what the medians of the others are."""
    parts = [
        f"{name} {statistics.median(each):{form}}"
        for name, each in values.items()
        if name != side.ours
    ]
    return "; ".join(parts)


# -- the measurements -----------------------------------------------------------------


class _Rivalry:
    """One side's measurements, of which each adds a column to its table."""

    def __init__(self, side: _Side, stage: Stage) -> None:
        self._side, self._stage = side, stage
        self._columns: dict[str, dict[str, float]] = {}

    def _run(self, work: Work) -> dict[str, list[Outcome]]:
        side = self._side
        contenders = {
            peer.name: partial(side.work, self._stage, peer, work)
            for peer in side.peers
        }
        what = f"{side.name}, {work.name}"
        return self._stage.interleave(what, contenders, self._stage.pick(5, 2))

    def _column(self, heading: str, values: Mapping[str, Sequence[float]]) -> None:
        self._columns[heading] = {n: statistics.median(v) for n, v in values.items()}

    def uncontended(self) -> Findings:
        side = self._side
        contenders = {
            peer.name: partial(side.uncontended, self._stage, peer)
            for peer in side.peers
        }
        what = f"{side.name}, uncontended"
        rounds = self._stage.pick(9, 3)
        seconds = self._stage.interleave(what, contenders, rounds)
        times = {name: [s * 1e6 for s in each] for name, each in seconds.items()}
        self._column("uncontended, µs", times)
        title = f"Uncontended checkout and checkin, {side.name}"
        plot = _bars(side, title, "µs, less is better", times)
        return Findings((_ratio(side, "uncontended, time", times),), (plot,))

    def hold(self, hold: float, seconds: float) -> Findings:
        side = self._side
        runs = self._run(rivals.even(hold, seconds))
        rates = _each(runs, _rate)
        name = f"{hold * 1000:g} ms hold"
        self._column(f"{name}, per s", rates)
        bars = _bars(
            side, f"Throughput with {name}, {side.name}", "checkouts per second", rates
        )
        found = Findings((_ratio(side, f"throughput, {name}", rates),), (bars,))
        return found + self._fairness(runs) if hold == HOLD else found

    def _fairness(self, runs: Runs) -> Findings:
        side = self._side
        fair = _each(runs, lambda o: o.fairness)
        spreads = _each(runs, spread)
        self._column("Jain, callers", fair)
        for percent in (50, 99):
            waits = _each(runs, partial(_milliseconds, percent))
            self._column(f"p{percent} wait, ms", waits)
        self._column("longest wait, ms", _each(runs, lambda o: o.longest_wait * 1e3))
        self._column("p99 / p50", spreads)
        spread_of_others = _others(side, spreads, ".3g")
        figures = (
            _target(f"{side.name}: jain", fair[side.ours], _others(side, fair, ".3f")),
            _target(f"{side.name}: spread", spreads[side.ours], spread_of_others),
        )
        title = f"Waits of {CALLERS} {side.name} on {SIZE} connections, 5 ms hold"
        return Findings(figures, (_waits(side, title, runs),))

    def tags(self, seconds: float) -> Findings:
        side = self._side
        fair = _each(self._run(rivals.uneven(seconds)), over_tags)
        self._column("Jain, tags", fair)
        plot = _bars(
            side,
            f"Fairness over five tags with 50, 30, 16, 8 and 6 {side.name}",
            "Jain's index, 1 is even",
            fair,
        )
        remark = _others(side, fair, ".3f")
        return Findings(
            (_target(f"{side.name}: tags", fair[side.ours], remark),), (plot,)
        )

    def light(self, seconds: float) -> Findings:
        side = self._side
        runs = self._run(rivals.flood(seconds))
        waits = _each(runs, _light)
        self._column("light tag p99, ms", _each(runs, lambda o: _light(o) * 1e3))
        plot = _waits(
            side, f"Waits of a light tag beside a flood of 109 {side.name}", runs, True
        )
        holds = [wait / HOLD for wait in waits[side.ours]]
        milliseconds = _each(runs, lambda o: _light(o) * 1e3)
        remark = f"ms: {_others(side, milliseconds, '.3g')}"
        return Findings((_target(f"{side.name}: light", holds, remark),), (plot,))

    def alone(self, seconds: float) -> Findings:
        side = self._side
        rates = _each(self._run(rivals.alone(seconds)), _rate)
        self._column("one tag alone, per s", rates)
        plot = _bars(
            side,
            f"One tag alone, 40 {side.name}: throughput",
            "checkouts per second",
            rates,
        )
        note = (
            "A tag that is alone may have three quarters of a FairQueuePool by "
            "default, the rest is for newcomers; a semaphore holds it to its part for "
            "ever."
        )
        return Findings((_ratio(side, "one tag alone", rates),), (plot,), notes=(note,))

    def giving_up(self, seconds: float) -> Findings:
        side = self._side
        runs = self._run(rivals.impatient(seconds))
        rates = _each(runs, _rate)
        lost = _each(runs, lambda o: sum(o.given_up) / max(sum(o.served), 1))
        self._column("giving up, per s", rates)
        self._column("given up per served", lost)
        how = "times out" if side is _THREADS else "is cancelled"
        remarks = {
            name: f"{statistics.median(each):.2f} given up per served"
            for name, each in lost.items()
        }
        plot = _bars(
            side,
            f"Throughput while every second waiter {how}",
            "checkouts per second, 5 ms hold",
            rates,
            remarks,
        )
        return Findings((_ratio(side, f"every second {how}", rates),), (plot,))

    def table(self) -> Findings:
        headings = ("pool", *self._columns)
        rows = tuple(
            (peer.name, *(column[peer.name] for column in self._columns.values()))
            for peer in self._side.peers
        )
        how = tuple((peer.name, peer.how) for peer in self._side.peers)
        name = self._side.name
        return Findings(
            tables=(
                Table(f"All medians, {name}", headings, rows),
                Table(f"How they are configured, {name}", ("pool", "how"), how),
            )
        )


def _measure(side: _Side, stage: Stage) -> Findings:
    rivalry = _Rivalry(side, stage)
    stage.expect(stage.pick(9, 4))
    seconds = stage.pick(1.5, 0.25)
    found = rivalry.uncontended()
    for hold in stage.pick((0.0, 0.001, HOLD, 0.05), (HOLD,)):
        found += rivalry.hold(hold, 3.0 if hold > HOLD else max(seconds, 0.55))
    found += rivalry.tags(seconds) + rivalry.light(seconds)
    if not stage.short:
        found += rivalry.giving_up(seconds) + rivalry.alone(seconds)
    return found + rivalry.table()


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
    (partial(_measure, _THREADS), partial(_measure, _TASKS)),
    tuple(
        f"{side}: {key}"
        for side in ("threads", "tasks")
        for key in ("jain", "spread", "tags", "light")
    ),
    sessions=32,
)
