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

from programs import in_child, make_engine, say, wait_for
from sqlalchemy import text


def main() -> None:
    url, ledger, name, number, hold, *how = sys.argv[1:]
    engine = make_engine(url, ledger, name)
    over = threading.Event()
    errors: list[Exception] = []
    query = text(f"select pg_sleep({float(hold)})")

    def work() -> None:
        try:
            while not over.is_set():
                with engine.connect() as connection:
                    connection.execute(query)
        except Exception as error:
            errors.append(error)

    # Not sys.stdin, which multiprocessing closes in its children.
    orders = os.fdopen(os.dup(0))

    def use_once() -> None:
        with engine.connect() as connection:
            connection.execute(text("select 1"))

    def serve() -> None:
        use_once()
        say("working")
        threads = [
            threading.Thread(target=work, daemon=True) for _ in range(int(number))
        ]
        for thread in threads:
            thread.start()
        for line in orders:
            if line.strip() == "pause":
                over.set()
                for thread in threads:
                    thread.join()
                say("paused")
        over.set()
        for thread in threads:
            thread.join()
        if errors:
            print(errors[0], file=sys.stderr)
            sys.exit(1)

    if "fork" in how:  # a worker that goes on with an engine that was used
        use_once()
        wait_for([in_child(serve)])
    elif "preload" in how:  # two workers, whose engine was only made before
        wait_for([in_child(serve), in_child(serve)])
    elif "multiprocessing" in how:
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
    main()
