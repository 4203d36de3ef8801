"""Scrapers that do real work: fetch a batch, process it, write it back, commit.

A *workflow* is one such pass. It is due at some moment, and its latency is counted
from then, not from when a thread had time for it. So a pool that keeps workflows
waiting cannot hide that by being asked less often.
"""

from __future__ import annotations

import math
import random
import re
import secrets
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text
from sqlalchemy.pool import NullPool, QueuePool

from sqla_fairpool import FairQueuePool

from .crowd import working
from .database import Database
from .findings import percentile
from .pools import fixed, open_all

#: Rows that a scraper takes at a time, and rows it has.
_BATCH, _ROWS = 3, 400

#: The statements on the scrapers' table, by name.
_SQL: dict[str, str] = dict(
    re.findall(
        r"-- (\w+)\n((?:.+\n)+)", Path(__file__).with_name("scrapers.sql").read_text()
    )
)


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
    engine, count = database.engine(NullPool), len(scrapers)
    values = {"scrapers": list(scrapers), "count": count, "rows": _ROWS * count}
    sql = {name: text(one.format(table=table)) for name, one in _SQL.items()}

    def work(connection: Connection, scraper: str, seconds: float) -> None:
        batch = {"scraper": scraper, "batch": _BATCH}
        rows = connection.execute(sql["fetch"], batch).all()
        if seconds:
            connection.execute(sql["serve"], {"seconds": seconds})
        connection.execute(sql["write"], {"ids": [row.id for row in rows]})
        connection.commit()

    try:
        with engine.begin() as connection:
            connection.execute(sql["create"])
            connection.execute(sql["index"])
            connection.execute(sql["fill"], values)
        yield work
    finally:
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '10s'"))
            connection.execute(sql["drop"])


def backlog(count: int, service: float, seed: int) -> list[Job]:
    """Return workflows that are all due at once.

    Their service times lie evenly between half and one and a half of `service`.
    """
    chance = random.Random(seed)
    return [Job(0.0, service * chance.uniform(0.5, 1.5)) for _ in range(count)]


def bursts(
    seconds: float, demand: float, most: int, service: float, seed: int
) -> list[Job]:
    """Return workflows that come in bursts, at random moments, each all at once."""
    chance, jobs = random.Random(seed), list[Job]()
    least = max(most // 3, 1)
    rate = demand / service / ((least + most) / 2)
    due = chance.expovariate(rate)
    while due < seconds:
        for _ in range(chance.randint(least, most)):
            jobs.append(Job(due, service * chance.uniform(0.5, 1.5)))
        due += chance.expovariate(rate)
    return jobs


def shift(begin: float, end: float, service: float) -> Iterator[Job]:
    """Return as many workflows as can be done between two moments of the run.

    What has begun by the end is finished. Several threads may take from it.
    """
    start = math.nan

    def job() -> Job | None:
        nonlocal start
        now = time.perf_counter()
        start = now if math.isnan(start) else start
        if now - start >= end:
            return None
        return Job(begin, service * random.uniform(0.5, 1.5))

    return iter(job, None)


@dataclass(frozen=True)
class Scraper:
    """A scraper, and the threads in which it does its workflows."""

    name: str
    #: Carries the scraper's tag, if its pool knows tags.
    engine: Engine
    #: Tells how many connections the scraper holds now.
    held: Callable[[], int]
    threads: int = 25


#: What each scraper has to do.
Tasks = Mapping[Scraper, Iterable[Job]]


@dataclass
class Outcome:
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
        held = [[n for _, n in look] for look in looks]
        kept = [now for n, now in enumerate(looks[1:]) if held[n] != held[n + 1]]
        kept = [*looks[:1], *kept, *looks[-1:]]
        return {name: [look[n] for look in kept] for n, name in enumerate(self.held)}

    @property
    def all_latencies(self) -> list[float]:
        return [value for values in self.latencies.values() for value in values]

    @property
    def throughput(self) -> float:
        return len(self.all_latencies) / self.seconds

    @property
    def mean(self) -> float:
        return statistics.fmean(self.all_latencies)

    @property
    def p95(self) -> float:
        return percentile(self.all_latencies, 95)


def run(work: Work, tasks: Tasks, limit: float = 60.0, every: float = 0.01) -> Outcome:
    """Let the scrapers do their workflows; return when all are done."""
    outcome, ends = Outcome(), list[float]()
    cpu = time.process_time()

    def elapsed() -> float:
        return time.perf_counter() - threads.began

    def do(scraper: Scraper, jobs: Iterator[Job], latencies: list[float]) -> None:
        for job in jobs:
            early = job.due - elapsed()
            if early > 0:
                threads.ended.wait(early)
            if threads.ended.is_set():
                return
            with scraper.engine.connect() as connection:
                work(connection, scraper.name, job.service)
            done = elapsed()
            latencies.append(done - job.due)
            ends.append(done)

    with working() as threads:
        workers = []
        for scraper, jobs in tasks.items():
            latencies = outcome.latencies.setdefault(scraper.name, [])
            worker = partial(do, scraper, iter(jobs), latencies)
            workers += [worker] * scraper.threads
        threads.start(workers)
        while elapsed() < limit and any(t.is_alive() for t in threads.threads):
            for scraper in tasks:
                held = outcome.held.setdefault(scraper.name, [])
                held.append((elapsed(), scraper.held()))
            if threads.ended.wait(every):
                break
    outcome.seconds = max(ends, default=limit)
    outcome.client = (time.process_time() - cpu) / outcome.seconds
    return outcome


# -- the two worlds: a pool for each scraper, and one for all --------------------------

#: The scrapers.
NAMES = ("layer1_5", "layer2", "layer3")

#: A minute of a day is 10 ms here: the default times, divided by a hundred.
SCALED: dict[str, Any] = {"idle_timeout": 0.6, "reallocation_interval": 0.3}

#: Options with which a scraper may have all that nobody else wants.
LIFTED: dict[str, Any] = {"soft_limit": 20, "max_limit": 20}

FAIR = "FairQueuePool 20"

#: Seconds a checkout may wait. No workflow may be lost by it.
_PATIENCE = 120.0


@dataclass(frozen=True)
class World:
    name: str
    connections: int
    scrapers: dict[str, Scraper]


@contextmanager
def static_world(
    database: Database, sizes: Sequence[int] = (10, 10, 10), threads: int = 25
) -> Iterator[World]:
    """A ``QueuePool`` for each scraper, of so many connections."""
    with ExitStack() as stack:
        scrapers = {}
        for name, size in zip(NAMES, sizes, strict=True):
            options = {"pool_timeout": _PATIENCE, **fixed(QueuePool, size)}
            engine = database.engine(QueuePool, **options)
            stack.callback(engine.dispose)
            open_all(engine)
            scrapers[name] = Scraper(name, engine, engine.pool.checkedout, threads)
        shown = f"QueuePool {'+'.join(map(str, sizes))}"
        yield World(shown, sum(sizes), scrapers)


@contextmanager
def fair_world(
    database: Database, title: str = FAIR, threads: int = 25, **options: Any
) -> Iterator[World]:
    """One ``FairQueuePool`` of twenty connections for all scrapers."""
    options |= fixed(FairQueuePool, 20)
    engine = database.engine(FairQueuePool, pool_timeout=_PATIENCE, **options)

    def held(name: str) -> int:
        row = engine.pool.stats().tag(name)
        return row.connections if row is not None else 0

    def scraper(name: str) -> Scraper:
        tagged = engine.execution_options(scraper=name)
        return Scraper(name, tagged, partial(held, name), threads)

    try:
        open_all(engine)
        yield World(title, 20, {name: scraper(name) for name in NAMES})
    finally:
        engine.dispose()
