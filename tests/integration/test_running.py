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
from support.threads import PATIENCE

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

SCRIPTS = Path(__file__).parents[2] / "examples" / "unchanged"


@pytest.fixture
def server(postgres_url):
    """An operator's connection to the server, and the scripts' database on it.

    A database of its own, without sessions of others.
    """
    name = f"running_{os.getpid()}"
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as operator:
        operator.execute(text(f"create database {name}"))
        url = make_url(postgres_url).set(database=name)
        yield operator, url.render_as_string(hide_password=False)
        drop = f"drop database {name} with (force)"
        operator.execute(text(drop))


@pytest.fixture
def environment(server, tmp_path):
    _, url = server
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "FAIRPOOL_LEDGER": str(tmp_path / "app.ledger"),
        "IDLE_TIMEOUT": "1",
        "REALLOCATION_INTERVAL": "0.5",
    }
    environment.pop("FAIRPOOL_RUN", None)
    return environment


@pytest.fixture
def launch(environment):
    """Start scripts under the launcher; they are gone after the test."""
    processes = []

    def start(script, *arguments):
        command = [sys.executable, "-m", "sqla_fairpool", "run", script]
        process = subprocess.Popen(
            [*map(str, command), *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        print(process.args[4], *process.communicate())  # shown if the test fails


@pytest.fixture
def monitor(environment):
    """Look once, as from another terminal."""

    def look(**changes):
        command = [sys.executable, "-m", "sqla_fairpool", "monitor", "--once", "--json"]
        env = {**environment, **changes}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if "no process has used it yet" in done.stderr:
            return {"scrapers": []}  # the scripts are only starting
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return look


def until(look, is_so):
    """Return the first picture of which something is so."""
    deadline = time.monotonic() + PATIENCE
    while not is_so(picture := look()):
        assert time.monotonic() < deadline, picture
    return picture


def have(*counts, **by_name):
    """What to wait for: the scrapers have so many connections, all together."""

    def is_so(picture):
        seen = {row["scraper"]: row["connections"] for row in picture["scrapers"]}
        return seen == by_name if by_name else sorted(seen.values()) == sorted(counts)

    return is_so


def rows(picture):
    return {row["scraper"]: row for row in picture["scrapers"]}


def sessions(server):
    """Return how many sessions the server has of the scripts, at work or between."""
    operator, _ = server
    name = f"running_{os.getpid()}"
    query = text(
        "select count(*) from pg_stat_activity where datname = :name "
        "and backend_type = 'client backend'"
    )
    return operator.scalar(query, {"name": name})


def test_three_unchanged_scripts_and_what_the_monitor_says(server, launch, monitor):
    first = launch(SCRIPTS / "layer1_5.py")
    # The pipe holds it open when it has nothing to do any more.
    second = launch(SCRIPTS / "layer2.py", "10")
    third = launch(SCRIPTS / "layer3.py")
    picture = until(monitor, have(6, 7, 7))
    assert picture["pool"]["checked_out"] == picture["pool"]["open"] == 20
    assert sessions(server) == picture["server"]["sessions"] == 20
    assert picture["strategy"] == "3 active: equal shares, at most 10 each"
    for name, process in (("layer1_5", first), ("layer2", second), ("layer3", third)):
        row = rows(picture)[name]
        assert row["processes"] == [str(process.pid)]
        assert row["connections"] == row["fair_share"]
        assert row["waiting"] == 25 - row["connections"]
    assert picture["warnings"] == []

    # One has nothing to do: first it holds none, then it does not count.
    picture = until(monitor, have(layer1_5=10, layer2=0, layer3=10))
    assert sessions(server) == 20
    picture = until(monitor, lambda p: not rows(p)["layer2"]["active"])
    assert rows(picture)["layer2"]["status"] == "idle"
    assert picture["strategy"] == "2 active: equal shares, at most 10 each"

    # One is killed: its slots are the other's as soon as the server knows.
    third.kill()
    picture = until(monitor, have(layer1_5=15, layer2=0))
    assert picture["server"]["sessions"] == 15

    # One is stopped: it keeps what it has, and the monitor says so.
    first.send_signal(signal.SIGSTOP)
    picture = monitor()
    assert rows(picture)["layer1_5"]["status"] == "silent"
    assert rows(picture)["layer1_5"]["connections"] == 15
    assert "does not answer: it keeps its 15 slots" in picture["warnings"][0]
    assert sessions(server) == 15
    first.send_signal(signal.SIGCONT)

    # One ends by itself.
    second.stdin.write("\n")
    second.stdin.flush()
    assert second.wait(PATIENCE) == 0
    first.send_signal(signal.SIGINT)
    first.wait(PATIENCE)


def test_role_that_may_have_no_more_than_the_budget(
    server, environment, launch, monitor, postgres_role
):
    """The server itself would refuse a 21st connection, and a thread would fail."""
    url = make_url(postgres_role("connection limit 20"))
    url = url.set(database=make_url(server[1]).database)
    environment["DATABASE_URL"] = url.render_as_string(hide_password=False)

    def look():
        return monitor(DATABASE_URL="")

    scripts = [launch(SCRIPTS / "layer1_5.py")]
    until(look, have(layer1_5=15))
    scripts.append(launch(SCRIPTS / "layer3.py"))
    picture = until(look, have(layer1_5=10, layer3=10))
    assert [row["waiting"] for row in picture["scrapers"]] == [15, 15]
    for script in scripts:
        script.kill()
        script.wait(PATIENCE)


def test_script_that_fails_leaves_nothing(launch, monitor, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import os\n"
        "from sqlalchemy import create_engine, text\n"
        "connection = create_engine(os.environ['DATABASE_URL']).connect()\n"
        "connection.execute(text('select 1'))\n"
        "raise RuntimeError('on purpose')\n"
    )
    process = launch(script)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert err.splitlines()[0] == "Traceback (most recent call last):"
    assert err.splitlines()[-1] == "RuntimeError: on purpose"
    assert "sqla_fairpool" not in err
    picture = monitor()
    assert picture["scrapers"] == []
    # It ended with its connection open: no process may have that slot until one has
    # seen that the server has ended the session.
    assert picture["pool"]["quarantined"] == 1
    assert picture["warnings"] == [
        f"1 slots in quarantine: failing.py ({socket.gethostname()}:{process.pid}) "
        "left connections open"
    ]
    launch(SCRIPTS / "layer1_5.py")
    until(monitor, have(layer1_5=15))
    launch(SCRIPTS / "layer3.py")
    until(
        monitor,
        lambda picture: (
            have(layer1_5=10, layer3=10)(picture)
            and picture["pool"]["quarantined"] == 0
        ),
    )
