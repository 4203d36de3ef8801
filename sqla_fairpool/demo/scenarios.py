"""The scenarios of the demo: who runs, what each must get, and whether that is right.

`judge` is pure; `_Demo` plays the scenarios, with threads that stand for scrapers.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from secrets import token_hex
from statistics import median_low
from typing import Any, NamedTuple, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from sqlalchemy import Connection, Engine, QueuePool, create_engine, text

from .. import FairQueuePool
from ..cli import CommandError
from ..cli.server import connected, given_url
from ..stats import PoolStats

#: What each scraper must get of 20 connections, 0 where it has gone idle. Where the
#: division has a remainder, it moves: who has the larger numbers is not said.
SCENARIOS: Mapping[str, Mapping[str, int]] = {
    "only layer1_5 is running": {"layer1_5": 15},
    "layer1_5 and layer3": {"layer1_5": 10, "layer3": 10},
    "layer1_5, layer2 and layer3": {"layer1_5": 7, "layer2": 7, "layer3": 6},
    "then layer2 goes idle": {"layer1_5": 10, "layer2": 0, "layer3": 10},
}


class Verdict(NamedTuple):
    """How a scenario came out: the pool's medians, the server's fullest sample."""

    scenario: str
    expected: tuple[int, ...]
    pool: tuple[int, ...]
    server: tuple[int, ...]
    problems: list[str]


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

    Of the server the fullest sample counts: between two transactions it sees none, on
    a busy machine in more than half of the samples. Limits must hold in every one.

    :param before: the samples of the time in which the pool was still settling.
    """
    problems = [] if samples else ["it did not settle in time"]
    expected, running = _counts(scenario, SCENARIOS[scenario]), _running(scenario)
    ceiling = 15 if len(running) == 1 else 10  # max_limit, soft_limit
    pool = zip(*(_counts(scenario, sample.pool) for sample in samples), strict=True)
    server = (_counts(scenario, sample.server) for sample in samples)
    judged = {
        "pool": tuple(map(median_low, pool)),
        "server": max(server, key=sum, default=()),
    }
    for side, got in judged.items():
        if samples and got != expected:
            texts = map(counts_text, (got, expected))
            problems.append(f"{side}: {', expected '.join(texts)}")
        found = [getattr(sample, side) for sample in samples]
        for tag in sorted(set().union(*found)):
            limit = ceiling if tag in running else 0
            if (most := max(one.get(tag, 0) for one in found)) > limit:
                problems.append(f"{side}: {tag} had {most}, its limit is {limit}")
    for active in {sample.active for sample in samples} - {running}:
        problems.append(f"pool: active was {', '.join(sorted(active))}")
    sums = [max(sum(s.pool.values()), s.sessions) for s in (*before, *samples)]
    if (in_all := max(sums, default=0)) > 20:
        problems.append(f"{in_all} in all, the capacity is 20")
    return Verdict(scenario, expected, **judged, problems=problems)


def _running(scenario: str) -> frozenset[str]:
    return frozenset(tag for tag, count in SCENARIOS[scenario].items() if count)


def _counts(scenario: str, found: Mapping[str, int]) -> tuple[int, ...]:
    """Return the scrapers' counts, those of the running ones by size."""
    running, tags = _running(scenario), SCENARIOS[scenario]
    by_size = sorted(found.get(tag, 0) for tag in running)
    return tuple(by_size.pop() if t in running else found.get(t, 0) for t in tags)


def counts_text(counts: Iterable[int]) -> str:
    return " / ".join(map(str, counts)) or "nothing"


# -- on a database ---------------------------------------------------------------------

#: A scraper's statement. Its comment says, in the server's view, which scraper has it.
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

_STEPS = len(SCENARIOS) + len(_POOLS)


class _Worker(threading.Thread):
    """One thread of a scraper: checks out, works and commits, in a loop."""

    def __init__(self, engine: Engine, tag: str, seconds: float) -> None:
        # A daemon: if a server never answers, the program can end all the same.
        super().__init__(daemon=True)
        self.tag, self._engine = tag, engine.execution_options(scraper=tag)
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


def play(url: str, view: View, seconds: float, check: Callable[[], None]) -> None:
    """Play all scenarios and compare the pools; `check` is called now and then."""
    with connected(given_url(url)) as connection:
        _Demo(connection, view, seconds, check).run()


@dataclass(eq=False)
class _Demo:
    """One run on a database; the connection is outside of the pools, in autocommit."""

    connection: Connection
    view: View
    seconds: float
    check: Callable[[], None]

    def __post_init__(self) -> None:
        #: What the pools' sessions are named.
        self.name = f"fairpool demo {token_hex(4)}"
        self.workers: list[_Worker] = []

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
            self._stop()
            engine.dispose()

    def _play(self, engine: Engine, scenario: str) -> Verdict:
        expected, running = SCENARIOS[scenario], _running(scenario)
        self.view.step(f"{scenario}: expected {counts_text(expected.values())}")
        self._stop(staying=running)
        for tag in sorted(running - {worker.tag for worker in self.workers}):
            # More threads than any ceiling, so that demand has no end. The work is long
            # beside the moment between two transactions, in which the server sees no
            # scraper: with 0.1 s a busy machine failed by one connection.
            self._start(engine, tag, 25, 0.25)
        before, right = list[Sample](), 0
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
            for worker in self.workers:
                worker.checkouts, worker.longest = 0, 0.0
            list(self._moments(seconds))
        now = time.monotonic()
        for tag in ("light", "heavy"):
            workers = [worker for worker in self.workers if worker.tag == tag]
            checkouts = [worker.checkouts for worker in workers]
            row = {
                "pool": pool,
                "scraper": tag,
                "checkouts_per_second": sum(checkouts) / self.seconds,
                # Also of those waits that have not ended.
                "longest_wait": max(max(w.longest, now - w.since) for w in workers),
                "threads": len(workers),
                "never_served": checkouts.count(0),
            }
            self.view.comparison.append(row)

    def _start(self, engine: Engine, tag: str, threads: int, seconds: float) -> None:
        self.workers += [_Worker(engine, tag, seconds) for _ in range(threads)]

    def _stop(self, staying: Collection[str] = ()) -> None:
        """End scrapers: what their threads do is finished, nothing begun."""
        ending = [worker for worker in self.workers if worker.tag not in staying]
        for worker in ending:
            self.workers.remove(worker)
            worker.stopping = True
        deadline = time.monotonic() + 10.0
        for worker in ending:
            worker.join(max(deadline - time.monotonic(), 0.0))

    def _moments(self, seconds: float) -> Iterator[None]:
        """Yield now and then, for `seconds`, until a thread fails or a signal comes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for worker in self.workers:
                if worker.failure is not None:
                    why = getattr(worker.failure, "orig", worker.failure)
                    raise CommandError(f"scraper {worker.tag} failed: {why}")
            yield
            self.view.look()
            time.sleep(0.03)
            self.check()

    def _sample(self, engine: Engine) -> Sample:
        stats = cast(FairQueuePool, engine.pool).stats()
        rows = self.connection.execute(_ACTIVITY, {"name": self.name})
        server = {str(tag): int(count) for tag, count in rows}
        sessions = server.pop("")
        self.view.seen = stats, server
        pool = {row.name: row.connections for row in stats.tags}
        active = frozenset(row.name for row in stats.tags if row.active)
        return Sample(pool, server, active, sessions)


# -- what is seen: a live table on a terminal, elsewhere plain lines -------------------


class View:
    """Shows a run on standard output, and in the end what came out."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        # Whatever FORCE_COLOR says: no colours in a file. Where it cannot redraw, it
        # shows nothing, and there are lines instead.
        self._console = Console(quiet=as_json, force_terminal=sys.stdout.isatty())
        self.live = Live(console=self._console, auto_refresh=False, transient=True)
        self._began, self._next_look = time.monotonic(), 0.0
        self._step, self._title = 0, ""
        #: Figures of the pool, and the server's counts.
        self.seen: tuple[PoolStats, Mapping[str, int]] | None = None
        self.verdicts: list[Verdict] = []
        self.comparison: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, title: str) -> None:
        self._step += 1
        self._title, self.seen = title, None
        if self._console.is_dumb_terminal or not self._console.is_terminal:
            self.note(f"[{self._step}/{_STEPS}] {title}")

    def look(self) -> None:
        """Draw, if the last time is long enough ago."""
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + 0.125
        bar = ProgressBar(total=_STEPS, completed=self._step - 0.5, width=24)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(f"{self._step}/{_STEPS}", bar, f"[bold]{self._title}")
        parts = [grid, _verdicts_table(self.verdicts)]
        if self.seen is not None:
            parts.insert(1, _tags_table(*self.seen))
        self.live.update(Group(*parts), refresh=True)

    def report(self) -> bool:
        """Show what came out; return whether all of it is as expected."""
        ok = not any(verdict.problems for verdict in self.verdicts)
        if self._as_json:
            scenarios = [verdict._asdict() for verdict in self.verdicts]
            report = {"ok": ok, "scenarios": scenarios, "comparison": self.comparison}
            print(json.dumps(report, indent=2))
        show = self._console.print
        show(_verdicts_table(self.verdicts))
        for verdict in self.verdicts:
            for problem in verdict.problems:
                show(f"[red]{verdict.scenario}: {problem}")
        text = "A light scraper beside a heavy one, which may have half of a Fair"
        text += "QueuePool, or, with soft_limit and max_limit at the pool's size (*), "
        show(f"{text}all that no other wants.", highlight=False)
        show(_comparison_table(self.comparison))
        outcome = "[green]All" if ok else "[bold red]Not all"
        seconds = time.monotonic() - self._began
        show(f"{outcome} scenarios came out as expected[/], {seconds:.1f} s in all.")
        return ok


def _table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    # Narrow gaps and headings on two lines: eighty columns are enough.
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _tags_table(stats: PoolStats, server: Mapping[str, int]) -> Table:
    numbers = ("limit", "fair\nshare", "waiting", "on\nserver", "checkouts")
    table = _table("scraper", "status", "connections", numbers=numbers)
    table.caption = f"{stats.checked_out} of {stats.capacity} in use; {stats.strategy}"
    for row in stats.tags:
        status = "[green]active" if row.active else "[yellow]idle"
        bar = f"{row.connections:2d} [magenta]{'━' * row.connections:15}"
        counts = row.limit, row.fair_share, row.waiting, server.get(row.name, 0)
        table.add_row(row.name, status, bar, *map(str, counts), f"{row.checkouts:,}")
    return table


def _verdicts_table(verdicts: Iterable[Verdict]) -> Table:
    seen = "observed\n(pool)", "observed\n(server)"
    table = _table("scenario", "expected", *seen, "verdict")
    for verdict in verdicts:
        sides = (verdict.expected, verdict.pool, verdict.server)
        outcome = "[bold red]FAILED" if verdict.problems else "[green]ok"
        table.add_row(verdict.scenario, *map(counts_text, sides), outcome)
    return table


def _comparison_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    numbers = ("checkouts\nper s", "longest\nwait ms", "threads\nnever served")
    table = _table("pool", "scraper", numbers=numbers)
    for row in rows:
        table.add_row(
            row["pool"] if row["scraper"] == "light" else "",
            row["scraper"],
            f"{row['checkouts_per_second']:,.0f}",
            f"{row['longest_wait'] * 1000:,.1f}",
            f"{row['never_served']} of {row['threads']}",
            style="bold red" if row["never_served"] else "",
        )
    return table
