"""Greenlets of gevent: monkey-patched threading, greenlets killed anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "gevent_program.py"

# Not imported here: gevent warns when it patches what is in use already.
if sys.platform == "win32":
    pytest.skip("patched signals differ there", allow_module_level=True)


def run(scenario, url):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), scenario, url],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr


@pytest.mark.parametrize(
    "scenario",
    [
        "waiters_are_served_in_order",
        "time_out_does_not_block_the_hub",
        "greenlet_that_waits_for_itself_is_refused",
        "killed_while_waiting",
        "killed_when_it_was_granted",
        "killed_while_connecting",
        "killed_while_returning",
    ],
)
def test_greenlets(scenario):
    run(scenario, "")


@pytest.mark.postgres
def test_greenlets_killed_anywhere_on_postgresql(postgres_url):
    run("killed_anywhere_on_postgresql", postgres_url)


@pytest.mark.postgres
def test_greenlets_killed_anywhere_with_a_ledger(postgres_url):
    run("killed_anywhere_with_a_ledger", postgres_url)
