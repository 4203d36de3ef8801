"""SQLAlchemy's issue 7679: do 100 threads get the 10 connections in turn?

    python -m benchmarks.sqlalchemy_7679

100 threads share 10 connections and hold each for 10 ms; a fair pool serves each of
them some ten times a second, and nobody waits much longer than 90 ms. Written
without the harness, so that it can be read, and believed, on its own.
"""

import threading
import time

from sqlalchemy import create_engine
from sqlalchemy.pool import QueuePool

from sqla_fairpool import FairQueuePool

THREADS, CONNECTIONS, HOLD, SECONDS = 100, 10, 0.010, 5.0


def run(pool, **options):
    engine = create_engine(
        "sqlite://",
        poolclass=pool,
        pool_size=CONNECTIONS,
        pool_timeout=300,
        connect_args={"check_same_thread": False},
        **options,
    )
    served, longest = [0] * THREADS, [0.0] * THREADS
    end = time.monotonic() + SECONDS

    def work(me):
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
    print(
        f"{pool.__name__:14} {sum(served):6,} checkouts, per thread {min(served)} to "
        f"{max(served)}, never served {served.count(0)}, longest wait "
        f"{max(longest) * 1000:,.0f} ms"
    )


if __name__ == "__main__":
    run(QueuePool, max_overflow=0)
    run(FairQueuePool, soft_limit=CONNECTIONS, max_limit=CONNECTIONS)
