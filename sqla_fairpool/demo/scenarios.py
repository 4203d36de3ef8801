"""The scenarios of the demo: who runs, what each must get, and whether that is right.

`judge` is pure; `_Demo` plays the scenarios, with threads that stand for scrapers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import inf
from secrets import token_hex
from statistics import median_low
from typing import Any, NamedTuple, cast

from sqlalchemy import Connection, Engine, QueuePool, create_engine, text

from .. import FairQueuePool
from ..cli import CommandError
from ..cli.server import connected, given_url
from .server import EmbeddedServer, Signals
from .view import Verdict, View, counts_text

__all__ = ["SCENARIOS", "Sample", "judge", "play"]

#: What each scraper must get of 20 connections, 0 where it has gone idle. Where the
#: division has a remainder, it moves: who has the larger numbers is not said.
SCENARIOS: Mapping[str, Mapping[str, int]] = {
    "only layer1_5 is running": {"layer1_5": 15},
    "layer1_5 and layer3": {"layer1_5": 10, "layer3": 10},
    "layer1_5, layer2 and layer3": {"layer1_5": 7, "layer2": 7, "layer3": 6},
    "then layer2 goes idle": {"layer1_5": 10, "layer2": 0, "layer3": 10},
}


class Sample(NamedTuple):
    """Connections of each scraper at one moment, as pool and server see it."""

    pool: Mapping[str, int]
    server: Mapping[str, int]
    #: Tags that the pool counts in its division.
    active: frozenset[str]
    #: Sessions of the pool on the server, idle ones included.
    sessions: int


def judge(
    scenario: str, samples: Sequence[Sample], before: Sequence[Sample] = ()
) -> Verdict:
    """Compare what was observed with what the scenario expects.

    Medians, because between two transactions of a scraper the server sees one
    connection less for a moment; limits must hold in every single sample.

    :param before: the samples of the time in which the pool was still settling.
    """
    problems = [] if samples else ["it did not settle in time"]
    expected, running = _counts(scenario, SCENARIOS[scenario]), _running(scenario)
    ceiling = 15 if len(running) == 1 else 10  # max_limit, soft_limit
    medians: dict[str, tuple[int, ...]] = {}
    for side in ("pool", "server"):
        found = [getattr(sample, side) for sample in samples]
        columns = zip(*(_counts(scenario, one) for one in found), strict=True)
        medians[side] = tuple(map(median_low, columns))
        if samples and medians[side] != expected:
            seen, wanted = counts_text(medians[side]), counts_text(expected)
            problems.append(f"{side}: {seen}, expected {wanted}")
        for tag in sorted(set().union(*found)):
            most = max(one.get(tag, 0) for one in found)
            limit = ceiling if tag in running else 0
            if most > limit:
                problems.append(f"{side}: {tag} had {most}, its limit is {limit}")
    for active in {sample.active for sample in samples} - {running}:
        problems.append(f"pool: active was {', '.join(sorted(active))}")
    sums = [max(sum(s.pool.values()), s.sessions) for s in (*before, *samples)]
    in_all = max(sums, default=0)
    if in_all > 20:
        problems.append(f"{in_all} in all, the capacity is 20")
    return Verdict(scenario, expected, **medians, problems=problems)


def _running(scenario: str) -> frozenset[str]:
    return frozenset(tag for tag, count in SCENARIOS[scenario].items() if count)


def _counts(scenario: str, found: Mapping[str, int]) -> tuple[int, ...]:
    """Return the scrapers' counts, those of the running ones by size."""
    running, tags = _running(scenario), SCENARIOS[scenario]
    by_size = sorted(found.get(tag, 0) for tag in running)
    return tuple(by_size.pop() if t in running else found.get(t, 0) for t in tags)


# -- on a database ---------------------------------------------------------------------

#: A scraper's statement. The comment tells, in the server's view of its sessions, which
#: scraper has one.
_STATEMENT = "/* {tag} */ SELECT pg_sleep({seconds})"

# Each scraper's sessions in a transaction, and one row for all. The driver's BEGIN has
# no comment; it lasts a few microseconds.
_ACTIVITY = text("""
    SELECT split_part(query, ' ', 2), count(*) FROM pg_stat_activity
    WHERE application_name = :name AND starts_with(query, '/* ')
        AND state IN ('active', 'idle in transaction')
    GROUP BY 1
    UNION ALL
    SELECT '', count(*) FROM pg_stat_activity WHERE application_name = :name
""")

#: The pools of the scenarios, where layer2 is idle soon, and of the comparison. In it
#: the second one shows what the reserve of the first costs: by default a scraper may
#: have half while another is active.
_SIZE = {"pool_size": 20, "max_overflow": 0, "pool_timeout": None}
_FAIR = {"poolclass": FairQueuePool, **_SIZE}
_SCENARIOS_POOL = {**_FAIR, "idle_timeout": 1.0, "reallocation_interval": 0.25}
_POOLS: Mapping[str, Mapping[str, Any]] = {
    "FairQueuePool": _FAIR,
    "FairQueuePool*": {**_FAIR, "soft_limit": 20, "max_limit": 20},
    "QueuePool": {"poolclass": QueuePool, **_SIZE},
}


class _Worker(threading.Thread):
    """One thread of a scraper: checks out, works and commits, in a loop."""

    def __init__(self, engine: Engine, tag: str, seconds: float) -> None:
        # A daemon: if a server never answers, the program can end all the same.
        super().__init__(daemon=True)
        self._engine = engine.execution_options(scraper=tag)
        self._statement = text(_STATEMENT.format(tag=tag, seconds=seconds))
        self.stopping = False
        self.failure: Exception | None = None
        #: When its last wait began, unless that has ended.
        self.since = inf
        self.checkouts, self.longest = 0, 0.0
        self.start()

    def run(self) -> None:
        try:
            while not self.stopping:
                self.since = time.monotonic()
                with self._engine.begin() as connection:
                    self.longest = max(self.longest, time.monotonic() - self.since)
                    self.since = inf
                    self.checkouts += 1
                    connection.execute(self._statement)
        except Exception as error:
            self.failure = error


def play(url: str | None, as_json: bool, seconds: float, signals: Signals) -> bool:
    """Play all scenarios and compare the pools; return whether all is as expected."""
    with ExitStack() as stack:
        view = View(len(SCENARIOS) + len(_POOLS), as_json)
        stack.enter_context(view.live)
        if url is None:
            view.note("starting an embedded PostgreSQL ...")
            server = EmbeddedServer()
            stack.callback(server.stop)
            stack.callback(signals.ignore)  # also for the processes that stop it
            try:
                server.start()
            finally:
                # Also in place of an error: Ctrl-C reaches the server's processes as
                # well, and the start fails because they have gone.
                signals.check()
            url = server.url
        connection = stack.enter_context(connected(given_url(url)))
        _Demo(connection, view, seconds, signals).run()
    return view.report()


class _Demo:
    """One run on a database; the connection is outside of the pools, in autocommit."""

    def __init__(
        self, connection: Connection, view: View, seconds: float, signals: Signals
    ) -> None:
        self.connection, self.view = connection, view
        self.seconds, self.signals = seconds, signals
        #: What the pools' sessions are named.
        self.name = f"fairpool demo {token_hex(4)}"
        self.workers: dict[str, list[_Worker]] = {}

    def run(self) -> None:
        url = self.connection.engine.url
        version = self.connection.scalar(text("SHOW server_version"))
        self.view.note(f"PostgreSQL {version}, {url}, sessions {self.name!r}")
        with self._engine(_SCENARIOS_POOL) as engine:
            for scenario in SCENARIOS:
                self.view.verdicts.append(self._play(engine, scenario))
        for pool, options in _POOLS.items():
            self.view.step(f"a light scraper beside a heavy one: {pool}")
            with self._engine(options) as engine:
                self._compare(engine, pool)

    @contextmanager
    def _engine(self, options: Mapping[str, Any]) -> Iterator[Engine]:
        """Yield an engine; end its scrapers and sessions after the block."""
        url, name = self.connection.engine.url, {"application_name": self.name}
        engine = create_engine(url, connect_args=name, **options)
        try:
            yield engine
        finally:
            self._stop(*self.workers)
            engine.dispose()

    def _play(self, engine: Engine, scenario: str) -> Verdict:
        expected, running = SCENARIOS[scenario], _running(scenario)
        self.view.step(f"{scenario}: expected {counts_text([*expected.values()])}")
        self._stop(*self.workers.keys() - running)
        for tag in sorted(running - self.workers.keys()):
            # More threads than any ceiling, so that demand has no end. The work is long
            # beside the moment between two transactions, in which the server sees no
            # scraper: with 0.1 s a busy machine failed by one connection.
            self._start(engine, tag, 25, 0.25)
        before: list[Sample] = []
        right = 0
        # One service time is enough, but for the last one, with its idle_timeout.
        for _ in self._moments(10.0):
            before.append(sample := self._sample(engine))
            fits = _counts(scenario, sample.pool) == _counts(scenario, expected)
            right = right + 1 if fits and sample.active == running else 0
            if right == 5:
                samples = [self._sample(engine) for _ in self._moments(self.seconds)]
                return judge(scenario, samples, before)
        return judge(scenario, [], before)

    def _compare(self, engine: Engine, pool: str) -> None:
        self._start(engine, "heavy", 60, 0.05)
        self._start(engine, "light", 1, 0.01)
        for seconds in (0.5, self.seconds):  # first until all connections are open
            for workers in self.workers.values():
                for worker in workers:
                    worker.checkouts, worker.longest = 0, 0.0
            for _ in self._moments(seconds):
                pass
        now = time.monotonic()
        for tag in ("light", "heavy"):
            checkouts = [worker.checkouts for worker in self.workers[tag]]
            # Also those that have not ended.
            waits = [max(w.longest, now - w.since) for w in self.workers[tag]]
            row = {
                "pool": pool,
                "scraper": tag,
                "checkouts_per_second": sum(checkouts) / self.seconds,
                "longest_wait": max(waits),
                "threads": len(waits),
                "never_served": checkouts.count(0),
            }
            self.view.comparison.append(row)

    def _start(self, engine: Engine, tag: str, threads: int, seconds: float) -> None:
        self.workers[tag] = [_Worker(engine, tag, seconds) for _ in range(threads)]

    def _stop(self, *tags: str) -> None:
        """End scrapers: what their threads do is finished, nothing begun."""
        workers = [worker for tag in tags for worker in self.workers.pop(tag)]
        for worker in workers:
            worker.stopping = True
        deadline = time.monotonic() + 10.0
        for worker in workers:
            worker.join(max(deadline - time.monotonic(), 0.0))

    def _moments(self, seconds: float) -> Iterator[None]:
        """Yield now and then, for `seconds`, until a thread fails or a signal comes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for tag, workers in self.workers.items():
                for error in filter(None, (worker.failure for worker in workers)):
                    why = getattr(error, "orig", error)
                    raise CommandError(f"scraper {tag} failed: {why}")
            yield
            self.view.look()
            time.sleep(0.03)
            self.signals.check()

    def _sample(self, engine: Engine) -> Sample:
        stats = cast(FairQueuePool, engine.pool).stats()
        rows = self.connection.execute(_ACTIVITY, {"name": self.name})
        server = {str(tag): int(count) for tag, count in rows}
        sessions = server.pop("")
        self.view.seen = stats, server
        pool = {row.name: row.connections for row in stats.tags}
        active = frozenset(row.name for row in stats.tags if row.active)
        return Sample(pool, server, active, sessions)
