"""A process that is stopped while it connects.

Usage: stopped_program.py URL LEDGER SLOTS NAME

As many threads as there are slots open a connection; the process stops itself when all
are about to. After that each prints ``refused`` or ``connected``. When the input has
ended they try again, and it prints how many have a connection.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import create_engine, event

from sqla_fairpool import CheckoutTimeout, FairQueuePool


def main(url, ledger, slots, name):
    slots = int(slots)
    engine = create_engine(
        url,
        poolclass=FairQueuePool,
        pool_size=slots,
        soft_limit=slots,
        max_limit=slots,
        ledger=ledger,
        connect_args={"application_name": name},
    )
    connecting, goes_on = threading.Barrier(slots), threading.Event()

    @event.listens_for(engine, "do_connect")
    def on_connect(*_):
        if goes_on.is_set():
            return
        if connecting.wait() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            goes_on.set()
        goes_on.wait()

    def connect(_):
        try:
            engine.connect().close()
            os.write(1, b"connected\n")
        except CheckoutTimeout:
            os.write(1, b"refused\n")

    with ThreadPoolExecutor(slots) as threads:
        list(threads.map(connect, range(slots)))
        sys.stdin.read()
        connections = list(threads.map(lambda _: engine.connect(), range(slots)))
        print("has", len(connections), flush=True)
        for connection in connections:
            connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
