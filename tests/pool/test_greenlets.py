"""Greenlets of gevent and eventlet: patched threading, greenlets ended anywhere."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from sqlalchemy import make_url
from support.sessions import Sessions

PROGRAM = Path(__file__).parents[1] / "support" / "green_program.py"

# The libraries are not imported here: they warn when they patch what is in use.
if sys.platform == "win32":
    pytest.skip("patched signals differ there", allow_module_level=True)

pytestmark = pytest.mark.parametrize("library", ["gevent", "eventlet"])


def run(library, scenario, url=""):
    done = subprocess.run(
        [sys.executable, str(PROGRAM), library, scenario, url],
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
def test_greenlets(library, scenario):
    run(library, scenario)


@pytest.mark.postgres
@pytest.mark.parametrize("ended", ["killed", "timed_out"])
@pytest.mark.parametrize("where", ["on_postgresql", "with_a_ledger"])
def test_greenlets_that_end_anywhere(library, ended, where, postgres_url):
    name = f"greenlets {uuid.uuid4().hex[:12]}"
    url = make_url(postgres_url).update_query_dict({"application_name": name})
    with Sessions(postgres_url, name) as sessions:
        run(library, f"{ended}_anywhere_{where}", url.render_as_string(False))
    # A ledger's member asks for lost sessions by one that is beside the budget.
    assert 5 <= sessions.most <= 5 + (where == "with_a_ledger")
