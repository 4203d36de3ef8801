"""What the programs of the ledger's tests have in common. They are run as scripts."""

from __future__ import annotations

import os
import sys
import traceback

from sqlalchemy import create_engine

from sqla_fairpool import FairQueuePool


def make_engine(url, ledger, name):
    """An engine of a scraper that others know by its name."""
    return create_engine(
        url,
        poolclass=FairQueuePool,
        ledger=ledger,
        idle_timeout=1.0,
        reallocation_interval=0.3,
        connect_args={"application_name": f"scraper {name}"},
    ).execution_options(scraper=name)


def say(word):
    os.write(1, f"{word}\n".encode())  # at once: there may be several of us


def in_child(function, *args):
    """Run a function in a forked child, which ends as a script does; return its pid."""
    child = os.fork()
    if not child:
        try:
            function(*args)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.exit()
    return child


def wait_for(children):
    """Exit with an error unless all children have ended without one."""
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit(f"children have failed: {codes}")
