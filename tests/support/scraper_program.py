"""A scraper in a process of its own, for the ledger's tests.

Usage: scraper_program.py URL LEDGER NAME THREADS HOLD [fork]

Works until its standard input ends; prints ``working`` after its first statement.
"""

from __future__ import annotations

import os
import sys
import threading

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

    with engine.connect() as connection:
        connection.execute(text("select 1"))
    if "fork" in how:  # a worker that goes on with what it was given
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
    print("working", flush=True)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(int(number))]
    for thread in threads:
        thread.start()
    for line in sys.stdin:
        if line.strip() == "pause":
            over.set()
            for thread in threads:
                thread.join()
            print("paused", flush=True)
    over.set()
    for thread in threads:
        thread.join()
    if errors:
        print(errors[0], file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
