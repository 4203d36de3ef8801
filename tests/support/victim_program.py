"""A process that is to be killed, for the ledger's tests.

Usage: victim_program.py URL LEDGER SLOTS BUSY IDLE SECONDS [HOW...]

Takes BUSY + IDLE connections under one ledger; BUSY of them execute a statement that
takes SECONDS, the others do nothing. Prints ``working`` when that is so.

HOW is ``wipe``, to discard all that a session has at each use; ``fork``, to leave a
child that lives on when its parent is killed; ``asyncio``; ``database=NAME``.
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

#: Seconds until the statements have begun, and until it ends by itself.
BEGUN, END = 0.3, 60


def main(url, ledger, slots, busy, idle, seconds, *how):
    target = make_url(url)
    for word in how:
        if word.startswith("database="):
            target = target.set(database=word.removeprefix("database="))
    options = dict.fromkeys(("pool_size", "soft_limit", "max_limit"), int(slots))
    options |= {"ledger": ledger, "execution_options": {"scraper": "victim"}}
    arguments = int(busy), int(idle), text(f"select pg_sleep({float(seconds)})")
    if "asyncio" in how:
        pool = AsyncAdaptedFairQueuePool
        engine = create_async_engine(target, poolclass=pool, **options)
        asyncio.run(tasks(engine, *arguments))
    else:
        engine = create_engine(target, poolclass=FairQueuePool, **options)
        threads(engine, *arguments, how)


def wipe(connection):
    raw = connection.connection.driver_connection
    raw.rollback()
    raw.autocommit = True
    raw.cursor().execute("DISCARD ALL")
    raw.autocommit = False


def threads(engine, busy, idle, work, how):
    if "wipe" in how:
        event.listen(engine, "begin", wipe)
    out = [engine.connect() for _ in range(busy + idle)]
    for connection in out:
        connection.execute(text("select 1"))
        connection.rollback()
    if "fork" in how and not os.fork():
        os.closerange(1, 3)
        time.sleep(END / 2)
        os._exit(0)
    for connection in out[:busy]:
        threading.Thread(target=connection.execute, args=[work], daemon=True).start()
    time.sleep(BEGUN)
    print("working", flush=True)
    time.sleep(END)


async def tasks(engine, busy, idle, work):
    out = [await engine.connect() for _ in range(busy + idle)]
    running = [asyncio.ensure_future(one.execute(work)) for one in out[:busy]]
    await asyncio.sleep(BEGUN)
    print("working", flush=True)
    await asyncio.gather(*running)
    await asyncio.sleep(END)


if __name__ == "__main__":
    main(*sys.argv[1:])
