"""Scrapers that do real work: fetch a batch, process it, write it back, commit.

A *workflow* is one such pass. It is due at some moment, and its latency is counted
from then, not from when a thread had time for it. So a pool that keeps workflows
waiting cannot hide that by being asked less often.
"""

from __future__ import annotations

import math
import random
import secrets
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from sqlalchemy import Connection, Engine, text
from sqlalchemy.pool import NullPool

from .crowd import Threads
from .database import Database
from .figures import percentile

__all__ = [
    "Job",
    "Outcome",
    "Scraper",
    "Shift",
    "Work",
    "backlog",
    "bursts",
    "run",
    "work_on",
]

#: Rows that a scraper takes at a time, and rows it has.
_BATCH, _ROWS = 3, 400

_CREATE = """
    CREATE TABLE {table} (
        id integer PRIMARY KEY,
        scraper text NOT NULL,
        payload text NOT NULL,
        runs integer NOT NULL DEFAULT 0,
        updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
    ) WITH (fillfactor = 50)
"""

# On what an update leaves alone, and pages are filled by half: so updates stay on
# their page, and the table does not get slower from round to round.
_INDEX = "CREATE INDEX ON {table} (scraper)"

_FILL = """
    INSERT INTO {table} (id, scraper, payload)
    SELECT n, (CAST(:scrapers AS text[]))[1 + n % :count], md5(n::text)
    FROM generate_series(1, :rows) AS n
"""

_FETCH = """
    SELECT id, payload FROM {table} WHERE scraper = :scraper
    LIMIT :batch FOR UPDATE SKIP LOCKED"""

_SERVICE = "SELECT pg_sleep(:seconds)"

_WRITE_BACK = """
    UPDATE {table} SET runs = runs + 1, payload = md5(payload),
        updated_at = clock_timestamp()
    WHERE id = ANY(:ids)"""


@dataclass(frozen=True)
class Job:
    """A workflow that is to be done."""

    #: Seconds after the start.
    due: float
    #: Seconds that the server spends on it.
    service: float


#: Does a workflow on a connection: the scraper's name, seconds of service.
Work = Callable[[Connection, str, float], None]


@contextmanager
def work_on(database: Database, scrapers: Sequence[str]) -> Iterator[Work]:
    """Create the scrapers' table, yield their work, drop the table."""
    table = f"sqla_fairpool_bench_{secrets.token_hex(4)}"
    engine = database.engine(NullPool)
    values = {
        "scrapers": list(scrapers),
        "count": len(scrapers),
        "rows": _ROWS * len(scrapers),
    }
    fetch, write = (text(s.format(table=table)) for s in (_FETCH, _WRITE_BACK))
    service = text(_SERVICE)

    def work(connection: Connection, scraper: str, seconds: float) -> None:
        rows = connection.execute(fetch, {"scraper": scraper, "batch": _BATCH}).all()
        if seconds:
            connection.execute(service, {"seconds": seconds})
        connection.execute(write, {"ids": [row.id for row in rows]})
        connection.commit()

    try:
        with engine.begin() as connection:
            connection.execute(text(_CREATE.format(table=table)))
            connection.execute(text(_INDEX.format(table=table)))
            connection.execute(text(_FILL.format(table=table)), values)
        yield work
    finally:
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '10s'"))
            connection.execute(text(f"DROP TABLE IF EXISTS {table}"))


def backlog(count: int, service: float, seed: int) -> list[Job]:
    """Return workflows that are all due at once.

    Their service times lie evenly between half and one and a half of `service`.
    """
    chance = random.Random(seed)
    return [Job(0.0, service * chance.uniform(0.5, 1.5)) for _ in range(count)]


def bursts(
    seconds: float, demand: float, most: int, service: float, seed: int
) -> list[Job]:
    """Return workflows that come in bursts, at random moments, each all at once.

    :param demand: connections that they keep busy on average.
    :param most: workflows of the largest burst; the smallest has a third of that.
    """
    chance = random.Random(seed)
    least = max(most // 3, 1)
    rate = demand / service / ((least + most) / 2)
    jobs = []
    due = chance.expovariate(rate)
    while due < seconds:
        for _ in range(chance.randint(least, most)):
            jobs.append(Job(due, service * chance.uniform(0.5, 1.5)))
        due += chance.expovariate(rate)
    return jobs


class Shift:
    """As many workflows as can be done between two moments.

    :param begin: seconds after the start of the run.
    :param end: likewise; what has begun by then is finished.
    """

    def __init__(self, begin: float, end: float, service: float) -> None:
        self._end = end
        self._service = service
        self._begin = begin
        self._start = math.nan

    def __iter__(self) -> Iterator[Job]:
        self._start = time.perf_counter()
        return self

    def __next__(self) -> Job:
        if time.perf_counter() - self._start >= self._end:
            raise StopIteration
        return Job(self._begin, self._service * random.uniform(0.5, 1.5))


@dataclass(frozen=True)
class Scraper:
    """Who has workflows to do, and with which connections.

    :param engine: carries the scraper's tag, if its pool knows tags.
    :param held: tells how many connections the scraper holds now.
    """

    name: str
    engine: Engine
    held: Callable[[], int]
    threads: int = 25


#: What each scraper has to do.
Tasks = Mapping[Scraper, Iterable[Job]]


@dataclass
class Outcome:
    """What happened in one run."""

    #: Until the last workflow was done.
    seconds: float = 0.0
    #: Of each scraper's workflows, from due to done.
    latencies: dict[str, list[float]] = field(default_factory=dict)
    #: Of each scraper, pairs of a moment and the connections it held then.
    held: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    #: Processor time of this process, as a part of `seconds`.
    client: float = 0.0

    @property
    def changes(self) -> dict[str, list[tuple[float, int]]]:
        """`held` without the moments at which it was what it was before."""
        looks = list(zip(*self.held.values(), strict=False))
        kept = [
            now
            for before, now in pairwise(looks)
            if [n for _, n in before] != [n for _, n in now]
        ]
        ends = looks[:1], kept, looks[-1:]
        return {
            name: [look[place] for part in ends for look in part]
            for place, name in enumerate(self.held)
        }

    @property
    def all_latencies(self) -> list[float]:
        """All scrapers' latencies."""
        return [value for values in self.latencies.values() for value in values]

    @property
    def throughput(self) -> float:
        """Workflows per second."""
        return len(self.all_latencies) / self.seconds

    @property
    def mean(self) -> float:
        """Mean latency."""
        return statistics.fmean(self.all_latencies)

    @property
    def p95(self) -> float:
        """95th percentile of the latencies."""
        return percentile(self.all_latencies, 95)


class _Run:
    """One run: what the threads have to do, and what came of it."""

    def __init__(self, work: Work, threads: Threads) -> None:
        self._work = work
        self._threads = threads
        self._start = time.perf_counter()
        self._cpu = time.process_time()
        self._last = 0.0
        self.outcome = Outcome()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def look(self, scrapers: Iterable[Scraper]) -> None:
        """Note what the scrapers hold."""
        for scraper in scrapers:
            held = self.outcome.held.setdefault(scraper.name, [])
            held.append((self.elapsed, scraper.held()))

    def do(self, scraper: Scraper, jobs: Iterator[Job]) -> None:
        """Do workflows, in a thread, as long as there are some."""
        latencies = self.outcome.latencies.setdefault(scraper.name, [])
        ended = self._threads.ended
        for job in jobs:
            early = job.due - self.elapsed
            if early > 0:
                ended.wait(early)
            if ended.is_set():
                return
            with scraper.engine.connect() as connection:
                self._work(connection, scraper.name, job.service)
            done = self.elapsed
            latencies.append(done - job.due)
            self._last = max(self._last, done)

    def end(self) -> Outcome:
        self.outcome.seconds = self._last or self.elapsed
        cpu = time.process_time() - self._cpu
        self.outcome.client = cpu / self.outcome.seconds
        return self.outcome


def run(work: Work, tasks: Tasks, limit: float = 60.0, every: float = 0.01) -> Outcome:
    """Let the scrapers do their workflows; return when all are done.

    :param tasks: each one's workflows, the first due first. A list or another
      collection whose iterator several threads may call.
    :param limit: seconds after which no workflow is begun any more.
    :param every: seconds between two looks at what the scrapers hold.
    """
    with Threads() as threads:
        this = _Run(work, threads)
        lines = [(scraper, iter(jobs)) for scraper, jobs in tasks.items()]
        threads.start(
            partial(this.do, scraper, line)
            for scraper, line in lines
            for _ in range(scraper.threads)
        )
        while threads.alive and this.elapsed < limit:
            this.look(tasks)
            if threads.ended.wait(every):
                break
    return this.end()
