"""SQLAlchemy's issue 7679: do 100 threads get the 10 connections in turn?

    python -m benchmarks.sqlalchemy_7679 [seconds]

100 threads share 10 connections and hold each for 10 ms; a fair pool serves each of
them some ten times a second, and nobody waits much longer than 90 ms. Written
without the harness, so that it can be read, and believed, on its own.
"""

from __future__ import annotations

import sys
import threading
import time

from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool

from sqla_fairpool import FairQueuePool

THREADS, CONNECTIONS, HOLD = 100, 10, 0.010

POOLS = {
    "QueuePool": (QueuePool, {"max_overflow": 0}),
    "FairQueuePool": (FairQueuePool, {"soft_limit": 10, "max_limit": 10}),
}


def run(name: str, seconds: float) -> None:
    pool, options = POOLS[name]
    engine = create_engine(
        "sqlite://",
        poolclass=pool,
        pool_size=CONNECTIONS,
        pool_timeout=300,
        connect_args={"check_same_thread": False},
        **options,
    )
    served = [0] * THREADS
    longest = [0.0] * THREADS
    end = time.monotonic() + seconds

    def work(me: int) -> None:
        while time.monotonic() < end:
            began = time.monotonic()
            with engine.connect():
                now = time.monotonic()
                longest[me] = max(longest[me], now - began)
                if now < end:  # later, everybody is served: it does not count
                    served[me] += 1
                    time.sleep(HOLD)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.dispose()
    print(
        f"{name:14} {sum(served):6,} checkouts, per thread {min(served)} to "
        f"{max(served)}, never served {served.count(0)}, longest wait "
        f"{max(longest) * 1000:,.0f} ms"
    )


if __name__ == "__main__":
    for name in POOLS:
        run(name, float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
