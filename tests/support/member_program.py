"""A process that comes to a ledger, does something peculiar, and goes.

Usage: member_program.py URL LEDGER HOW

HOW is engines, observer, fresh, used or threads. Prints ``done``, each process of it
that has done its work.
"""

from __future__ import annotations

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

from programs import in_child, make_engine, say, wait_for
from sqlalchemy import text

from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.inspector import Inspector
from sqla_fairpool.pool import ledger_member

LONG = 100.0

QUERY = text("select pg_sleep(0.01)")


def work(engine, times=3):
    for _ in range(times):
        with engine.connect() as connection:
            connection.execute(QUERY)


def in_threads(number, function, *args):
    with ThreadPoolExecutor(number) as pool:
        for done in [pool.submit(function, *args) for _ in range(number)]:
            done.result()


def in_child_saying_so(function, *args):
    def work_and_say():
        function(*args)
        say("done")

    return in_child(work_and_say)


def two_engines(one, other):
    in_threads(5, work, one)
    in_threads(5, work, other)
    other.dispose()
    in_threads(5, work, one)


def observe(engine, ledger):
    """Look at the ledger as a member of it, and close what looks."""

    def look():
        for _ in range(5):
            inspector = Inspector(HostStore(ledger))
            inspector.look()
            inspector.close()
            work(engine, 1)

    in_threads(3, look)


def fork_in_checkouts(engine):
    """Ten threads are in checkouts, the first of them too, while children are forked.

    Each child is to get a connection; how soon depends on what else the machine does.
    """
    engine.pool.reconfigure(timeout=LONG)
    ledger_member._CONFIRMED_WITHIN = LONG
    over = threading.Event()

    def go_on():
        while not over.is_set():
            work(engine, 1)

    with ThreadPoolExecutor(10) as pool:
        threads = [pool.submit(go_on) for _ in range(10)]
        children = [in_child_saying_so(work, engine, 1) for _ in range(25)]
        try:
            wait_for(children)
        finally:
            over.set()
    for thread in threads:
        thread.result()


def main(url, ledger, how):
    warnings.simplefilter("ignore")  # newer Pythons warn of threads and fork together
    engine = make_engine(url, ledger, how)
    if how == "engines":
        two_engines(engine, make_engine(url, ledger, how))
    elif how == "observer":
        observe(engine, ledger)
    elif how == "threads":
        fork_in_checkouts(engine)
    else:
        if how == "used":
            work(engine)
        for _ in range(3):  # they outlive their parent
            in_child_saying_so(in_threads, 5, work, engine)
    say("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
