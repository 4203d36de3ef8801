"""Scripts under the launcher, and the monitor beside them: one truth, the server's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool
from support.stores import stop
from support.threads import PATIENCE

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

SCRIPTS = Path(__file__).parents[2] / "examples" / "unchanged"
PACKAGE = [sys.executable, "-m", "sqla_fairpool"]

#: The database.
NAME = f"running_{os.getpid()}"


class Running:
    """Scripts and monitors of one database, of which the server is asked, too.

    The database is one of its own, without sessions of others.
    """

    def __init__(self, operator, url, ledger):
        self._operator = operator
        self._processes = []
        self.environment = {
            **os.environ,
            "DATABASE_URL": url.render_as_string(hide_password=False),
            "FAIRPOOL_LEDGER": str(ledger),
            "IDLE_TIMEOUT": "1",
            "REALLOCATION_INTERVAL": "0.5",
        }
        self.environment.pop("FAIRPOOL_RUN", None)

    def launch(self, script, *arguments):
        """Start a script under the launcher."""
        command = [*PACKAGE, "run", str(SCRIPTS / script), *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        how = {"env": self.environment, "text": True, **pipes}
        self._processes.append(subprocess.Popen(command, **how))
        return self._processes[-1]

    def look(self, **changes):
        """Look once with the monitor, as from another terminal."""
        command = [*PACKAGE, "monitor", "--once", "--json"]
        env = {**self.environment, **changes}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if "no process has used it yet" in done.stderr:
            return {"scrapers": []}  # the scripts are only starting
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def until(self, is_so, **changes):
        """Return the first picture of which something is so."""
        deadline = time.monotonic() + PATIENCE
        while not is_so(picture := self.look(**changes)):
            assert time.monotonic() < deadline, picture
        return picture

    def sessions(self):
        """Return how many sessions of the scripts the server has."""
        query = "select count(*) from pg_stat_activity where datname = :name "
        query += "and backend_type = 'client backend'"
        return self._operator.scalar(text(query), {"name": NAME})

    def close(self):
        for process in self._processes:
            process.kill()
            print(process.args[4], *process.communicate())  # shown if the test fails


@pytest.fixture
def running(postgres_url, tmp_path):
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as operator:
        operator.execute(text(f"create database {NAME}"))
        url = make_url(postgres_url).set(database=NAME)
        running = Running(operator, url, tmp_path / "app.ledger")
        yield running
        running.close()
        operator.execute(text(f"drop database {NAME} with (force)"))


def have(*counts, **by_name):
    """What to wait for: the scrapers have so many connections, all together."""

    def is_so(picture):
        seen = {row["scraper"]: row["connections"] for row in picture["scrapers"]}
        return seen == by_name if by_name else sorted(seen.values()) == sorted(counts)

    return is_so


def rows(picture):
    return {row["scraper"]: row for row in picture["scrapers"]}


def test_three_unchanged_scripts_and_what_the_monitor_says(running):
    names = {
        "layer1_5": running.launch("layer1_5.py"),
        # The pipe holds it open when it has nothing to do any more.
        "layer2": running.launch("layer2.py", "10"),
        "layer3": running.launch("layer3.py"),
    }
    first, second, third = names.values()

    def all_wait(row):
        return row["waiting"] == 25 - row["connections"]  # none is between two

    def all_there(picture):  # a connection counts before its session has begun
        return picture["server"]["sessions"] == 20

    full = have(6, 7, 7)
    picture = running.until(
        lambda p: full(p) and all_there(p) and all(map(all_wait, p["scrapers"]))
    )
    assert picture["pool"]["checked_out"] == picture["pool"]["open"] == 20
    assert running.sessions() == 20
    assert picture["strategy"] == "3 active: equal shares, at most 10 each"
    for name, process in names.items():
        row = rows(picture)[name]
        assert row["processes"] == [str(process.pid)]
        assert row["connections"] == row["fair_share"]
    assert picture["warnings"] == []

    # One has nothing to do: first it holds none, then it does not count.
    two = have(layer1_5=10, layer2=0, layer3=10)
    running.until(lambda p: two(p) and all_there(p))
    assert running.sessions() == 20
    picture = running.until(lambda p: not rows(p)["layer2"]["active"])
    assert rows(picture)["layer2"]["status"] == "idle"
    assert picture["strategy"] == "2 active: equal shares, at most 10 each"

    # One is killed: its slots are the other's as soon as the server knows.
    third.kill()
    alone = have(layer1_5=15, layer2=0)
    running.until(lambda p: alone(p) and p["server"]["sessions"] == 15)

    # One is stopped: it keeps what it has, and the monitor says so.
    stop(first, running.environment["FAIRPOOL_LEDGER"])
    picture = running.look()
    row = rows(picture)["layer1_5"]
    assert (row["status"], row["connections"]) == ("silent", 15)
    assert "does not answer: it keeps 15 slots" in "\n".join(picture["warnings"])
    assert running.sessions() == 15
    first.send_signal(signal.SIGCONT)

    # One ends by itself.
    second.stdin.write("\n")
    second.stdin.flush()
    assert second.wait(PATIENCE) == 0
    first.send_signal(signal.SIGINT)
    first.wait(PATIENCE)


def test_role_that_may_have_no_more_than_the_budget(running, postgres_role):
    """The server itself would refuse a 21st connection, and a thread would fail."""
    url = make_url(postgres_role("connection limit 20")).set(database=NAME)
    text = url.render_as_string(hide_password=False)
    running.environment["DATABASE_URL"] = text
    scripts = [running.launch("layer1_5.py")]
    running.until(have(layer1_5=15), DATABASE_URL="")
    scripts.append(running.launch("layer3.py"))
    picture = running.until(have(layer1_5=10, layer3=10), DATABASE_URL="")
    assert [row["waiting"] for row in picture["scrapers"]] == [15, 15]
    for script in scripts:
        script.kill()
        script.wait(PATIENCE)


FAILS = """
import os, sqlalchemy
connection = sqlalchemy.create_engine(os.environ['DATABASE_URL']).connect()
connection.execute(sqlalchemy.text('select 1'))
raise RuntimeError('on purpose')
"""


def test_script_that_fails_leaves_nothing(running, tmp_path):
    (tmp_path / "failing.py").write_text(FAILS)
    process = running.launch(tmp_path / "failing.py")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert err.splitlines()[0] == "Traceback (most recent call last):"
    assert err.splitlines()[-1] == "RuntimeError: on purpose"
    assert "sqla_fairpool" not in err
    # It ended with its connection open: no process may have that slot until the server
    # has ended the session, in a moment.
    picture = running.until(lambda p: p["pool"]["quarantined"] == 0)
    who = f"failing.py ({socket.gethostname()}:{process.pid})"
    free = "1 slot free for whoever comes next"
    assert picture["scrapers"] == []
    assert picture["warnings"] == [f"{who} left connections open: {free}"]
    running.launch("layer1_5.py")
    running.until(have(layer1_5=15))
    running.launch("layer3.py")
    shared = have(layer1_5=10, layer3=10)
    running.until(lambda p: shared(p) and p["pool"]["quarantined"] == 0)
