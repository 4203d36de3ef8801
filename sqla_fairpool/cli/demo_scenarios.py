"""The four scenarios: who runs, what each gets, and whether that is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from .. import FairQueuePool
from .demo_load import Group, batch_work, stop_groups
from .demo_report import SCENARIOS, Sample, Scenario, Verdict, judge
from .demo_server import Database
from .demo_stage import CAPACITY, Stage

__all__ = ["Scenarios", "figures"]

#: Threads of each scraper: more than any ceiling, so that demand has no end.
_THREADS = 25

#: Seconds that a scraper keeps a connection. Long beside the moment between two
#: transactions, in which the server sees it without a scraper: with 0.1 a machine
#: with twice as many busy processes as cores failed by one connection.
_SERVICE = 0.25

#: Short, so that layer2 is idle soon. Everything else is the default.
_INTERVALS = {"idle_timeout": 1.0, "reallocation_interval": 0.25}

#: Seconds a scenario has to settle. One service time is enough, but for the last
#: one, which takes layer2's idle_timeout.
_SETTLE_WITHIN = 10.0

#: Samples in a row that must be as expected before a scenario counts as settled.
_SAMPLES_SETTLED = 5


def figures() -> dict[str, Any]:
    """Return what the scenarios are played with."""
    return {
        "pool": "FairQueuePool",
        "capacity": CAPACITY,
        **_INTERVALS,
        "threads_per_scraper": _THREADS,
        "service_seconds": _SERVICE,
    }


class Scenarios:
    """Plays the scenarios on one pool."""

    def __init__(self, stage: Stage, database: Database) -> None:
        self._stage = stage
        self._database = database
        self._engine = stage.open_engine(database, FairQueuePool, _INTERVALS)
        self._pool = cast(FairQueuePool, self._engine.pool)
        self._groups: dict[str, Group] = {}

    def run(self) -> Iterator[Verdict]:
        """Play one after the other, yield the verdicts."""
        for scenario in SCENARIOS:
            self._stage.view.scenario(scenario)
            self._switch_to(scenario)
            verdict = self._observe(scenario)
            self._stage.view.verdict(verdict)
            yield verdict
        stop_groups(list(self._groups.values()))
        self._stage.close_engine(self._database, self._engine)

    def _switch_to(self, scenario: Scenario) -> None:
        leaving = self._groups.keys() - scenario.running
        stop_groups([self._groups.pop(scraper) for scraper in leaving])
        for scraper in sorted(scenario.running - self._groups.keys()):
            work = batch_work(self._database.table, scraper, _SERVICE)
            tagged = self._engine.execution_options(scraper=scraper)
            self._groups[scraper] = Group(tagged, scraper, _THREADS, work)
            self._stage.start(self._groups[scraper])

    def _observe(self, scenario: Scenario) -> Verdict:
        stage, groups = self._stage, list(self._groups.values())
        options = self._pool.options
        before: list[Sample] = []

        def settled() -> bool:
            return len(before) >= _SAMPLES_SETTLED and all(
                scenario.counts(sample.pool) == scenario.expected
                and sample.active == scenario.running
                for sample in before[-_SAMPLES_SETTLED:]
            )

        waited = stage.watch(
            groups, _SETTLE_WITHIN, lambda: before.append(self._sample()), settled
        )
        samples: list[Sample] = []
        stage.watch(groups, stage.seconds, lambda: samples.append(self._sample()))
        return judge(
            scenario,
            samples,
            capacity=options.capacity,
            ceiling=options.max_limit
            if len(scenario.running) == 1
            else options.soft_limit,
            settled_after=round(waited, 3) if settled() else None,
            before=before,
        )

    def _sample(self) -> Sample:
        stats = self._pool.stats()
        counts, sessions = self._database.activity()
        self._stage.view.figures(stats, counts)
        return Sample(
            pool={row.name: row.connections for row in stats.tags},
            server=counts,
            active=frozenset(row.name for row in stats.tags if row.active),
            sessions=sessions,
        )
