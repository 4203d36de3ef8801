"""The monitor on an observer that shows overviews of its own: a program for a terminal.

python monitor_program.py LEDGER_FILE [ARGUMENTS OF sqla-fairpool]
"""

from __future__ import annotations

import os
import signal
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from sqla_fairpool.cli import main, watching
from support.overviews import FakeInspector, overview

if __name__ == "__main__":
    # The first terminal that the leader of a session opens is the session's, and the
    # one that sends it signals for keys.
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    # As a shell has it: nohup, under which the tests may run, ignores this one.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["FAIRPOOL_LEDGER"] = sys.argv[1]
    os.environ.pop("DATABASE_URL", None)
    watching.make_observer = lambda store: FakeInspector(overview())
    sys.exit(main(sys.argv[2:]))
