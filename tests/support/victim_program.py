"""A process that is to be killed, for the ledger's tests.

Usage: victim_program.py URL LEDGER SLOTS BUSY IDLE SECONDS [HOW...]

Takes BUSY + IDLE connections under one ledger; BUSY of them execute a statement that
takes SECONDS, the others do nothing. Prints ``working`` when that is so.

HOW is ``wipe``, to discard all that a session has at each use; ``fork``, to leave a
child that lives on when its parent is killed; ``database=NAME``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time

from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool


def options(ledger: str, slots: int) -> dict[str, object]:
    return {
        "pool_size": slots,
        "soft_limit": slots,
        "max_limit": slots,
        "ledger": ledger,
        "execution_options": {"scraper": "victim"},
    }


def main() -> None:
    url, ledger, *numbers = sys.argv[1:6]
    slots, busy, idle = map(int, numbers)
    seconds, how = float(sys.argv[6]), sys.argv[7:]
    target = make_url(url)
    for word in how:
        if word.startswith("database="):
            target = target.set(database=word.removeprefix("database="))
    work = text(f"select pg_sleep({seconds})")
    if "asyncio" in how:
        asyncio.run(tasks(target, options(ledger, slots), busy, idle, work))
    else:
        threads(target, options(ledger, slots), busy, idle, work, how)


def wipe(engine) -> None:
    @event.listens_for(engine, "begin")
    def begin(connection):
        raw = connection.connection.driver_connection
        raw.rollback()
        raw.autocommit = True
        raw.cursor().execute("DISCARD ALL")
        raw.autocommit = False


def threads(url, options, busy, idle, work, how) -> None:
    engine = create_engine(url, poolclass=FairQueuePool, **options)
    if "wipe" in how:
        wipe(engine)
    out = [engine.connect() for _ in range(busy + idle)]
    for connection in out:
        connection.execute(text("select 1"))
        connection.rollback()
    if "fork" in how and not os.fork():
        os.closerange(1, 3)
        time.sleep(30)
        os._exit(0)
    for connection in out[:busy]:
        threading.Thread(target=connection.execute, args=[work], daemon=True).start()
    time.sleep(0.3)  # the statements have begun
    print("working", flush=True)
    time.sleep(60)


async def tasks(url, options, busy, idle, work) -> None:
    engine = create_async_engine(url, poolclass=AsyncAdaptedFairQueuePool, **options)
    out = [await engine.connect() for _ in range(busy + idle)]
    running = [asyncio.ensure_future(one.execute(work)) for one in out[:busy]]
    await asyncio.sleep(0.3)
    print("working", flush=True)
    await asyncio.gather(*running)
    await asyncio.sleep(60)


if __name__ == "__main__":
    main()
