"""The monitor on an inspector that shows one overview: a program for a terminal.

python monitor_program.py LEDGER_FILE [ARGUMENTS OF sqla-fairpool]

With the variable HANGS each look hangs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from sqla_fairpool.cli import main, poller
from support.overviews import FakeInspector, overview


def make_inspector(store):
    inspector = FakeInspector(overview())
    if "HANGS" in os.environ:
        inspector.look = threading.Event().wait
    return inspector


if __name__ == "__main__":
    # The first terminal that the leader of a session opens is the session's, and the
    # one that sends it signals for keys.
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    # As a shell has it: nohup, under which the tests may run, ignores this one.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["FAIRPOOL_LEDGER"] = sys.argv[1]
    os.environ.pop("DATABASE_URL", None)
    poller.Inspector = make_inspector
    sys.exit(main(sys.argv[2:]))
