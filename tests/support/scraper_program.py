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
from collections.abc import Callable

from sqlalchemy import create_engine, text

from sqla_fairpool import FairQueuePool


def main() -> None:
    url, ledger, name, number, hold, *how = sys.argv[1:]
    engine = create_engine(
        url,
        poolclass=FairQueuePool,
        ledger=ledger,
        idle_timeout=1.0,
        reallocation_interval=0.3,
        connect_args={"application_name": f"scraper {name}"},
    ).execution_options(scraper=name)
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

    def say(word: str) -> None:
        os.write(1, f"{word}\n".encode())  # at once: there may be two of us

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
        in_child(serve)()
    elif "preload" in how:  # two workers, whose engine was only made before
        for wait in [in_child(serve), in_child(serve)]:
            wait()
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


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """Run a function in a forked child; return what waits for its end."""
    child = os.fork()
    if not child:
        function()
        sys.exit()

    def wait() -> None:
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(1)

    return wait


if __name__ == "__main__":
    main()
