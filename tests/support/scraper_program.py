"""A scraper in a process of its own, for the ledger's tests.

Usage: scraper_program.py URL LEDGER NAME THREADS HOLD [HOW]

HOW is fork, preload or multiprocessing. Works until its standard input ends; prints
``working`` after its first statement, each worker of several.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from programs import in_child, make_engine, say, wait_for
from sqlalchemy import text


def main(url, ledger, name, number, hold, how=""):
    engine, number = make_engine(url, ledger, name), int(number)
    over = threading.Event()
    # Not sys.stdin, which multiprocessing closes in its children.
    orders = os.fdopen(os.dup(0))

    def use(seconds=0.0):
        with engine.connect() as connection:
            connection.execute(text(f"select pg_sleep({float(seconds)})"))

    def work():
        while not over.is_set():
            use(hold)

    def serve():
        use()
        say("working")
        with ThreadPoolExecutor(number) as threads:
            running = [threads.submit(work) for _ in range(number)]
            for line in orders:
                if line.strip() == "pause":
                    over.set()
                    threads.shutdown()
                    say("paused")
            over.set()
        for each in running:
            each.result()

    if how == "fork":  # a worker that goes on with an engine that was used
        use()
        wait_for([in_child(serve)])
    elif how == "preload":  # two workers, whose engine was only made before
        wait_for([in_child(serve), in_child(serve)])
    elif how == "multiprocessing":
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=serve) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
            if child.exitcode:
                sys.exit(1)
    else:
        serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
