"""The host store: its lock, its file and what lies beside it, over real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"

#: Seconds after which a program is taken to hang.
LONG = 120


@pytest.fixture
def path(tmp_path):
    return tmp_path / "app.ledger"


def run(program, *arguments):
    """Run a program of ``tests/support``; return what it prints."""
    done = subprocess.run(
        [sys.executable, SUPPORT / program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- transactions exclude each other ---------------------------------------------------


@pytest.mark.parametrize("how", ["stores", "used", "fresh", "threads"])
def test_no_slot_is_taken_twice(path, how):
    """Several stores in a process; workers forked before and after their parent's use
    of the store, and while threads are in transactions."""
    said = json.loads(run("slot_program.py", path, how))
    assert said["most"] == 4
    assert said["turns"] > 800
    assert said["left"] == 0
