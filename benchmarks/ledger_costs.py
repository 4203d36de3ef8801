"""What a ledger costs, and how fast it is.

    python -m benchmarks.ledger_costs

Prints, for the host store and for PostgreSQL: transactions per second by one, four and
eight processes; how long it takes until a slot that one process returns is used in
another that waits for it; the throughput of a pool that is alone in its ledger beside
one without; what an idle member costs. The machine should be otherwise idle.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import uuid
from functools import partial
from typing import Any

from sqlalchemy import create_engine

from sqla_fairpool import FairQueuePool
from sqla_fairpool.ledger.addresses import make_store

from .harness.bench import Bench
from .harness.crowd import SPAWN, Caller, in_threads, processes
from .harness.database import open_database
from .harness.findings import percentile
from .harness.pools import fair_engine


def transact(ledger: str, seconds: float, ready: Any, counts: Any) -> None:
    store = make_store(ledger, None)
    store.open()
    ready.wait()
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        with store.transaction() as rows:
            rows[store.member] = str(count) * 50
        count += 1
    counts.put(count)
    store.close()


def transactions_per_second(ledger: str, number: int, seconds: float = 2.0) -> float:
    ready, counts = SPAWN.Barrier(number), SPAWN.Queue()
    with processes(transact, [(ledger, seconds, ready, counts)] * number):
        return sum(counts.get() for _ in range(number)) / seconds


def one_slot(url: str, ledger: str) -> Any:
    limits = {"pool_size": 1, "soft_limit": 1, "max_limit": 1}
    engine = create_engine(url, poolclass=FairQueuePool, ledger=ledger, **limits)
    return engine.execution_options(scraper=uuid.uuid4().hex)


def wait_for_slots(url: str, ledger: str, pipe: Any) -> None:
    engine = one_slot(url, ledger)
    while pipe.recv():
        pipe.send("waiting")
        with engine.connect():
            pipe.send(time.monotonic())
    engine.dispose()


def hand_over_latency(url: str, ledger: str, times: int = 40) -> list[float]:
    """Seconds from a checkin here to a checkout there, of the only slot there is."""
    ours, theirs = SPAWN.Pipe()
    with processes(wait_for_slots, [(url, ledger, theirs)]):
        engine, found = one_slot(url, ledger), []
        for _ in range(times):
            held = engine.connect()
            ours.send(True)
            ours.recv()
            time.sleep(0.05)  # until it waits
            began = time.monotonic()
            held.close()
            found.append(ours.recv() - began)
        ours.send(False)
    engine.dispose()
    return found


def throughput_ratio(ledger: str, threads: int, hold: float, rounds: int = 7) -> float:
    """A pool that is alone in a ledger, over one without, in turns."""
    contenders = {}
    for name, options in (("member", {"ledger": ledger}), ("plain", {})):
        engine = fair_engine(20, **options).execution_options(scraper="a")
        callers = [Caller(engine.connect, hold)] * threads
        contenders[name] = partial(in_threads, callers, 0.4)
    return Bench().interleave("", contenders, rounds).ratio("", "throughput").median


def idle_cost(ledger: str, seconds: float = 20.0) -> float:
    """The part of a core that a member needs that does nothing."""
    engine = fair_engine(20, ledger=ledger)
    engine.execution_options(scraper="a").connect().close()
    time.sleep(2)
    began = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - began) / seconds


def tell(kind: str, url: str, new: Any) -> None:
    rates = [f"{transactions_per_second(new(), n):,.0f}" for n in (1, 4, 8)]
    print(f"{kind}: transactions/s by 1, 4, 8 processes: {', '.join(rates)}")
    found = [seconds * 1e3 for seconds in hand_over_latency(url, new())]
    median, p95 = statistics.median(found), percentile(found, 95)
    print(f"{kind}: a slot is used here after {median:.1f} ms, p95 {p95:.1f} ms")
    # Without a hold it depends on where the interpreter stops forty threads.
    for threads, hold in ((1, 0.0), (40, 0.001)):
        ratio = throughput_ratio(new(), threads, hold)
        print(f"{kind}: alone, {threads} threads, beside none: {ratio:.3f}")
    with SPAWN.Pool(1) as process:  # the pools above have their own cost here
        part = process.apply(idle_cost, (new(),))
    print(f"{kind}: an idle member: {part:.3%} of a core")


def main() -> None:
    with open_database() as database, tempfile.TemporaryDirectory() as folder:

        def in_database() -> str:
            ledger = database.url.update_query_dict({"ledger": uuid.uuid4().hex})
            return ledger.render_as_string(hide_password=False)

        url = database.url.render_as_string(hide_password=False)
        tell("host", url, lambda: f"{folder}/{uuid.uuid4().hex}.ledger")
        tell("postgresql", url, in_database)


if __name__ == "__main__":
    main()
