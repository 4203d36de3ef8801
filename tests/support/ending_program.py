"""A program, or its child, that uses a connection and ends in one of several ways.

Arguments: the database, the ledger, the way.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace

from programs import in_child, make_engine
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_fairpool import AsyncAdaptedFairQueuePool

URL, LEDGER, WAY = sys.argv[1:]


def use():
    with make_engine(URL, LEDGER, "a").connect() as connection:
        connection.execute(text("select 1"))


async def use_in_task():
    url = URL.replace("psycopg2", "psycopg")
    engine = create_async_engine(
        url, poolclass=AsyncAdaptedFairQueuePool, ledger=LEDGER
    )
    async with engine.connect() as connection:
        await connection.execute(text("select 1"))


class Signal:
    """As Celery's, which tells its workers' end."""

    def __init__(self):
        self.receivers = set()

    def connect(self, receiver, *, weak):
        self.receivers.add(receiver)

    def send(self, **values):
        for receiver in self.receivers:
            receiver(**values)


SHUTDOWN = Signal()


def use_and_end():
    use()
    SHUTDOWN.send(sender=None, pid=os.getpid(), exitcode=0)
    os._exit(0)


def main():
    if WAY in ("fork", "spawn"):
        child = multiprocessing.get_context(WAY).Process(target=use)
        child.start()
        child.join()
        assert child.exitcode == 0
    elif WAY == "tasks":
        asyncio.run(use_in_task())
    elif WAY in ("celery", "os._exit"):
        if WAY == "celery":
            signals = SimpleNamespace(worker_process_shutdown=SHUTDOWN)
            sys.modules["celery.signals"] = signals
        os.waitpid(in_child(use_and_end), 0)
    else:
        use()
    if WAY == "SystemExit":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    if WAY in ("SIGTERM", "SystemExit"):
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
