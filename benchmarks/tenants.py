"""Shares by time, and reserved connections, with threads, processes and PostgreSQL.

    python -m benchmarks.tenants --processes 2
    python -m benchmarks.tenants --reserved --processes 2

The first: 100 tags with four callers each on 20 connections, of which some hold for a
second and the others for ten milliseconds. Prints Jain's index over connection-seconds
and how long the short ones waited. Of several processes each tag is in one, every
fourth in two (--spread), or those that hold long in one, with this --weight.

The second: checkouts under a tag with `reserved=1` beside 200 threads that want more
connections than there are. Several processes share a ledger.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sqlalchemy import Engine, create_engine, text

from sqla_fairpool import FairQueuePool
from sqla_fairpool.scheduling.policy import jain

from .harness.crowd import SPAWN, Threads, processes, working
from .harness.database import open_database
from .harness.findings import percentile

SLOTS, TAGS, CALLERS, LONG, SHORT = 20, 100, 4, 1.0, 0.01
FLOOD, FLOOD_HOLD = 200, 0.01
RESERVED = {"health": {"reserved": 1}}


def make(url: str, ledger: str | None, **options: Any) -> Engine:
    options |= dict.fromkeys(("pool_size", "soft_limit", "max_limit"), SLOTS)
    options |= {"poolclass": FairQueuePool, "pool_timeout": None, "ledger": ledger}
    return create_engine(url, **options)


def start(
    group: Threads,
    engine: Engine,
    callers: Iterable[tuple[str, float]],
    note: Callable[[str, float], object] = lambda tag, waited: None,
) -> None:
    """Start callers, by tag and hold: each asks, holds in the server, and again."""

    def call(tag: str, seconds: float) -> None:
        tagged = engine.execution_options(scraper=tag)
        sleep = text(f"select pg_sleep({seconds})")
        while not group.ended.is_set():
            began = time.perf_counter()
            with tagged.connect() as connection:
                note(tag, time.perf_counter() - began)
                connection.execute(sleep)

    group.start(partial(call, *caller) for caller in callers)


def web(threads: int) -> list[tuple[str, float]]:
    return [(f"web{n % 3}", FLOOD_HOLD) for n in range(threads)]


def tenants(number: int, options: Any, url: str, ledger: str | None, found: Any):
    """The callers of one process; puts connection-seconds and waits into a queue."""
    weights = {f"tag{n}": {"weight": options.weight} for n in range(options.long)}
    engine, waits = make(url, ledger, tags=weights), list[float]()

    def note(tag: str, waited: float) -> None:
        if int(tag[3:]) >= options.long:
            waits.append(waited)

    def held() -> Counter[str]:
        return Counter({t.name: t.hold_time.total for t in engine.pool.stats().tags})

    block = 1 if options.weight == 1 else TAGS // options.processes
    places = {tag: {tag // block % options.processes} for tag in range(TAGS)}
    for tag in range(0, TAGS, 4) if options.spread else ():
        places[tag].add((tag + 1) % options.processes)
    here = [tag for tag, where in places.items() if number in where]
    holds = [(f"tag{n}", LONG if n < options.long else SHORT) for n in here]
    with working() as group:
        start(group, engine, holds * CALLERS, note)
        group.ended.wait(20.0)
        first, before = len(waits), held()
        group.ended.wait(options.seconds)
        got = dict(held() - before), waits[first:]
    found.put(got)
    engine.dispose()


def flood(url: str, ledger: str | None, ready: Any, ended: Any) -> None:
    """Another process that wants all connections."""
    engine = make(url, ledger, tags=RESERVED)
    with working() as group:
        start(group, engine, web(FLOOD // 4))
        ready.wait()
        ended.wait()
    engine.dispose()


def reserved(options: Any, url: str, ledger: str | None) -> None:
    engine = make(url, ledger, tags=RESERVED)
    ready, ended = SPAWN.Barrier(options.processes), SPAWN.Event()
    health, waits = engine.execution_options(scraper="health"), []
    with processes(flood, [(url, ledger, ready, ended)] * (options.processes - 1)):
        ready.wait()
        with working() as group:
            start(group, engine, web(FLOOD))
            group.ended.wait(2.0)
            for _ in range(options.checkouts):
                began = time.perf_counter()
                connection = health.connect()
                waits.append(time.perf_counter() - began)
                connection.close()
                time.sleep(options.pause)
        ended.set()
    engine.dispose()
    shown = ", ".join(
        f"p{p:g} {percentile(waits[1:], p) * 1000:.3f} ms" for p in (50, 99, 99.9, 100)
    )
    print(f"{len(waits)} checkouts: first {waits[0] * 1000:.1f} ms, then {shown}")


def by_time(options: Any, url: str, ledger: str | None) -> None:
    found, seconds, waits = SPAWN.Queue(), Counter(), []
    each = [(n, options, url, ledger, found) for n in range(options.processes)]
    with processes(tenants, each):
        for _ in each:
            some, more = found.get()
            seconds.update(some)
            waits += more
    weights = [options.weight] * options.long + [1.0] * (TAGS - options.long)
    times = [seconds[f"tag{n}"] / weight for n, weight in enumerate(weights)]
    used = seconds.total() / SLOTS / options.seconds
    what = f"Jain {jain(times):.4f} over connection-seconds of {TAGS} tags, {used:.1%}"
    waited = f"waited {statistics.median(waits) * 1000:.0f} ms (median of {len(waits)})"
    print(f"{what} of the time used, short ones {waited}")


def main() -> None:
    parser = argparse.ArgumentParser(description="measure tenants on one budget")
    parser.add_argument("--url", help="a PostgreSQL; default: one of its own")
    file = f"{tempfile.mkdtemp()}/tenants.ledger"  # processes leave it as they end
    parser.add_argument("--ledger", default=file, help="of processes; default: a file")
    numbers = {"processes": 1, "long": 30, "weight": 1.0, "checkouts": 10_000}
    for name, default in (numbers | {"seconds": 40.0, "pause": 0.001}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    for name in ("spread", "reserved"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    with open_database(options.url) as database:
        url = database.url.render_as_string(hide_password=False)
        ledger = options.ledger if options.processes > 1 else None
        (reserved if options.reserved else by_time)(options, url, ledger)


if __name__ == "__main__":
    main()
