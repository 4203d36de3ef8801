"""Shares by time, and reserved connections, with threads, processes and PostgreSQL.

    python -m benchmarks.tenants --processes 2
    python -m benchmarks.tenants --reserved --processes 2

The first: 100 tags with four callers each on 20 connections, of which some hold for a
second and the others for ten milliseconds. Prints Jain's index over connection-seconds
and how long the short ones waited. With several processes, each tag is in one of them,
every fourth with ``--spread`` in two.

The second: checkouts under a tag with `reserved=1` beside 200 threads that want more
connections than there are. Several processes share a ledger.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections import Counter
from typing import Any

from sqlalchemy import Engine, create_engine, text

from sqla_fairpool import FairQueuePool
from sqla_fairpool.scheduling.policy import jain

from .harness.crowd import working
from .harness.database import open_database
from .harness.figures import percentile

SPAWN = multiprocessing.get_context("spawn")
SLOTS, TAGS, CALLERS, LONG, SHORT = 20, 100, 4, 1.0, 0.01
FLOOD, FLOOD_HOLD = 200, 0.01


def make(url: str, ledger: str | None, **options: Any) -> Engine:
    sizes = {"pool_size": SLOTS, "soft_limit": SLOTS, "max_limit": SLOTS}
    return create_engine(
        url,
        poolclass=FairQueuePool,
        pool_timeout=None,
        ledger=ledger,
        **sizes,
        **options,
    )


def hold(engine: Engine, tag: str, seconds: float, until: threading.Event, note: Any):
    """Ask, hold in the server, return, and again: from one caller."""
    tagged = engine.execution_options(scraper=tag)
    sleep = text(f"select pg_sleep({seconds})")
    while not until.is_set():
        began = time.perf_counter()
        with tagged.connect() as connection:
            note(tag, time.perf_counter() - began)
            connection.execute(sleep)


def tenants(number: int, options: Any, url: str, ledger: str | None, found: Any):
    """The callers of one process; puts connection-seconds and waits into a queue."""
    engine = make(url, ledger)
    waits: list[float] = []

    def note(tag: str, waited: float) -> None:
        if int(tag[3:]) >= options.long:
            waits.append(waited)

    def held() -> Counter[str]:
        return Counter({t.name: t.hold_time.total for t in engine.pool.stats().tags})

    places = {tag: {tag % options.processes} for tag in range(TAGS)}
    if options.spread:
        for tag in range(0, TAGS, 4):
            places[tag].add((tag + 1) % options.processes)
    with working() as group:
        group.start(
            lambda tag=tag: hold(
                engine,
                f"tag{tag}",
                LONG if tag < options.long else SHORT,
                group.ended,
                note,
            )
            for tag, where in places.items()
            for _ in range(CALLERS if number in where else 0)
        )
        group.ended.wait(20.0)
        first, before = len(waits), held()
        group.ended.wait(options.seconds)
        got = dict(held() - before), waits[first:]
    found.put(got)
    engine.dispose()


def flood(url: str, ledger: str | None, ready: Any, ended: Any) -> None:
    """Another process that wants all connections."""
    engine = make(url, ledger, tags={"health": {"reserved": 1}})
    with working() as group:
        group.start(
            lambda n=n: hold(engine, f"web{n % 3}", FLOOD_HOLD, group.ended, _ignore)
            for n in range(FLOOD // 4)
        )
        ready.set()
        ended.wait()
    engine.dispose()


def _ignore(tag: str, waited: float) -> None:
    pass


def reserved(options: Any, url: str, ledger: str | None) -> None:
    engine = make(url, ledger, tags={"health": {"reserved": 1}})
    ready, ended = SPAWN.Event(), SPAWN.Event()
    others = [
        SPAWN.Process(target=flood, args=(url, ledger, ready, ended))
        for _ in range(options.processes - 1)
    ]
    for other in others:
        other.start()
        ready.wait()
    health, waits = engine.execution_options(scraper="health"), []
    with working() as group:
        group.start(
            lambda n=n: hold(engine, f"web{n % 3}", FLOOD_HOLD, group.ended, _ignore)
            for n in range(FLOOD)
        )
        group.ended.wait(2.0)
        for _ in range(options.checkouts):
            began = time.perf_counter()
            connection = health.connect()
            waits.append(time.perf_counter() - began)
            connection.close()
            time.sleep(options.pause)
    ended.set()
    for other in others:
        other.join()
    engine.dispose()
    shown = ", ".join(
        f"p{p:g} {percentile(waits[1:], p) * 1000:.3f} ms" for p in (50, 99, 99.9, 100)
    )
    print(f"{len(waits)} checkouts: first {waits[0] * 1000:.1f} ms, then {shown}")


def by_time(options: Any, url: str, ledger: str | None) -> None:
    found = SPAWN.Queue()
    workers = [
        SPAWN.Process(target=tenants, args=(n, options, url, ledger, found))
        for n in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    seconds, waits = Counter(), []
    for _ in workers:
        some, more = found.get()
        seconds.update(some)
        waits += more
    for worker in workers:
        worker.join()
    times = [seconds[f"tag{n}"] for n in range(TAGS)]
    used = sum(times) / SLOTS / options.seconds
    print(
        f"Jain {jain(times):.4f} over connection-seconds of {TAGS} tags, {used:.1%} of "
        f"the time used, short ones waited {statistics.median(waits) * 1000:.0f} ms "
        f"(median of {len(waits)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="measure tenants on one budget")
    parser.add_argument("--url", help="a PostgreSQL; default: one of its own")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--long", type=int, default=30, help="tags that hold for 1 s")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--reserved", action="store_true")
    parser.add_argument("--checkouts", type=int, default=10_000)
    parser.add_argument("--pause", type=float, default=0.001)
    options = parser.parse_args()
    with open_database(options.url) as database:
        place = tempfile.mkdtemp()  # processes leave the ledger when they end
        url = database.url.render_as_string(hide_password=False)
        ledger = f"{place}/tenants.ledger" if options.processes > 1 else None
        (reserved if options.reserved else by_time)(options, url, ledger)


if __name__ == "__main__":
    main()
