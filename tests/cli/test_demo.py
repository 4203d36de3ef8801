"""The demo: its verdicts on made-up samples, and real runs of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from sqla_fairpool.cli import demo_load, main
from sqla_fairpool.cli.demo_report import SCENARIOS, Sample, judge

ALONE, TWO, THREE, GONE = SCENARIOS

#: Seconds for anything that a run does at once; only failures take that long.
PATIENCE = 60.0


def sample(scenario, *counts, server=None, sessions=20, active=None):
    names = scenario.scrapers
    pool = dict(zip(names, counts, strict=True))
    seen = pool if server is None else dict(zip(names, server, strict=True))
    return Sample(pool, seen, active or scenario.running, sessions)


def judged(scenario, *samples, settled_after=0.5, before=()):
    ceiling = 15 if len(scenario.running) == 1 else 10
    return judge(
        scenario,
        samples,
        capacity=20,
        ceiling=ceiling,
        settled_after=settled_after,
        before=before,
    )


class TestVerdict:
    @pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.title)
    def test_expected_counts_are_ok(self, scenario):
        verdict = judged(scenario, *[sample(scenario, *scenario.expected)] * 9)
        assert verdict.ok
        assert verdict.problems == ()
        assert verdict.pool.median == verdict.server.median == scenario.expected
        assert verdict.samples == 9

    def test_scenarios_are_those_of_the_contract(self):
        assert [s.expected for s in SCENARIOS] == [
            (15,),
            (10, 10),
            (7, 7, 6),
            (10, 0, 10),
        ]
        assert GONE.running == {"layer1_5", "layer3"}

    def test_gap_between_transactions_is_forgiven(self):
        good, gap = sample(TWO, 10, 10), sample(TWO, 10, 10, server=(9, 8))
        assert judged(TWO, good, gap, good, gap, good).ok

    def test_gaps_in_most_samples_are_not(self):
        good, gap = sample(TWO, 10, 10), sample(TWO, 10, 10, server=(9, 10))
        verdict = judged(TWO, good, gap, gap)
        assert verdict.problems == ("server: 9 / 10, expected 10 / 10",)

    def test_remainder_may_wander(self):
        samples = [sample(THREE, *c) for c in [(7, 7, 6), (6, 7, 7), (7, 6, 7)]]
        assert judged(THREE, *samples).ok

    def test_unequal_thirds_are_wrong(self):
        verdict = judged(THREE, sample(THREE, 8, 6, 6))
        assert len(verdict.problems) == 2  # the pool's and the server's
        assert verdict.problems[0] == "pool: 8 / 6 / 6, expected 7 / 7 / 6"

    def test_order_counts_where_there_is_no_remainder(self):
        assert not judged(GONE, sample(GONE, 10, 10, 0)).ok

    def test_too_few_are_wrong(self):
        assert not judged(ALONE, sample(ALONE, 14)).ok

    @pytest.mark.parametrize("server", [None, (10, 11)])
    def test_ceiling_holds_in_every_single_sample(self, server):
        bad = sample(TWO, 10, 11 if server is None else 10, server=server)
        verdict = judged(TWO, *[sample(TWO, 10, 10)] * 99, bad)
        assert "server: layer3 had 11, its ceiling is 10" in verdict.problems

    def test_scraper_that_has_gone_may_hold_nothing(self):
        verdict = judged(GONE, *[sample(GONE, 10, 0, 10)] * 9, sample(GONE, 9, 1, 10))
        assert "pool: layer2 had 1, its ceiling is 0" in verdict.problems

    def test_stranger_may_hold_nothing(self):
        good = sample(ALONE, 15)
        bad = replace(good, pool={"layer1_5": 15, "unknown": 1})
        verdict = judged(ALONE, good, good, bad)
        assert verdict.problems == ("pool: unknown had 1, its ceiling is 0",)

    def test_capacity_holds_also_before_it_settles(self):
        before = [sample(TWO, 15, 6, server=(15, 5))]
        verdict = judged(TWO, sample(TWO, 10, 10), before=before)
        assert verdict.problems == ("pool: 21 in all, the capacity is 20",)

    def test_idle_sessions_count_in_the_capacity(self):
        verdict = judged(TWO, sample(TWO, 10, 10, sessions=21))
        assert verdict.problems == (
            "server, idle sessions included: 21 in all, the capacity is 20",
        )

    def test_wrong_active_set_is_wrong(self):
        active = frozenset(GONE.scrapers)
        verdict = judged(GONE, sample(GONE, 10, 0, 10, active=active))
        assert verdict.problems == ("pool: active was layer1_5, layer2, layer3",)

    def test_never_settled_is_wrong(self):
        verdict = judged(ALONE, sample(ALONE, 15), settled_after=None)
        assert verdict.problems == ("did not settle in time",)

    def test_no_samples_are_wrong(self):
        verdict = judged(ALONE)
        assert verdict.problems == ("nothing was observed",)
        assert verdict.pool is None


def start_demo(folder, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "sqla_fairpool", "demo", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A group of its own, which a signal reaches as Ctrl-C in a terminal does.
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )


def finish(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


@pytest.fixture
def folder():
    """A temporary directory with a short name, for sockets, that all may enter."""
    name = tempfile.mkdtemp(prefix="demo-", dir="/tmp")
    yield name
    shutil.rmtree(name, ignore_errors=True)


def left_in(folder):
    """Return the demo's folders and the processes that work below `folder`."""
    psutil = pytest.importorskip("psutil")
    processes = [
        process.info
        for process in psutil.process_iter(["pid", "name", "cmdline", "cwd"])
        if any(folder in word for word in process.info["cmdline"] or ())
        or folder in (process.info["cwd"] or "")
    ]
    return [n for n in os.listdir(folder) if n.startswith("sqla")], processes


@pytest.mark.slow
@pytest.mark.postgres
def test_demo_runs_as_expected(folder):
    status, out, err = finish(
        start_demo(folder, "--json", "--seconds-per-scenario", "1")
    )
    report = json.loads(out)
    assert err == ""
    assert status == 0, report
    assert report["ok"] is True
    assert report["server"]["embedded"] is True
    assert [s["expected"] for s in report["scenarios"]] == [
        [15],
        [10, 10],
        [7, 7, 6],
        [10, 0, 10],
    ]
    for scenario in report["scenarios"]:
        assert scenario["problems"] == []
        assert scenario["observed_pool"]["median"] == scenario["expected"]
        assert scenario["observed_server"]["median"] == scenario["expected"]
        assert scenario["observed_server"]["most_in_all"] <= 20
    assert {c["pool"] for c in report["comparison"]} >= {"FairQueuePool", "QueuePool"}
    for comparison in report["comparison"]:
        light, heavy = comparison["scrapers"]
        assert (light["scraper"], heavy["scraper"]) == ("light", "heavy")
        assert heavy["checkouts"] > 0
        assert comparison["pool"] == "QueuePool" or light["checkouts"] > 0
    assert left_in(folder) == ([], [])


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize(
    ("line", "signum", "status"),
    [
        ("starting an embedded PostgreSQL", signal.SIGINT, 130),
        ("PostgreSQL 1", signal.SIGINT, 130),
        ("[1/7]", signal.SIGINT, 130),
        ("[2/7]", signal.SIGTERM, 143),
        ("[7/7]", signal.SIGINT, 130),
    ],
)
def test_signal_leaves_nothing_behind(folder, line, signum, status):
    process = start_demo(folder, "--seconds-per-scenario", "0.2")
    for shown in process.stdout:
        if shown.startswith(line):
            break
    else:
        pytest.fail(f"{line} was not shown")
    os.killpg(process.pid, signum)
    returncode, _, err = finish(process)
    assert returncode == status
    assert err == "sqla-fairpool demo: interrupted\n"
    assert left_in(folder) == ([], [])


@pytest.mark.slow
@pytest.mark.postgres
def test_impatient_user_leaves_nothing_behind(folder):
    process = start_demo(folder)
    assert process.stdout.readline().startswith("starting")
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    returncode, _, err = finish(process)
    assert returncode == 130
    assert "Traceback" not in err
    assert left_in(folder) == ([], [])


@pytest.fixture
def foreign(postgres_url):
    """A database of somebody else, as (URL with a password, function for SQL)."""
    engine = create_engine(postgres_url, poolclass=NullPool)

    def sql(statement):
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            return result.scalars().all() if result.returns_rows else []

    url = make_url(postgres_url).set(password="s3cret")
    return url.render_as_string(hide_password=False), sql


TABLES = "SELECT tablename FROM pg_tables WHERE tablename LIKE 'sqla_fairpool%'"


@pytest.mark.slow
@pytest.mark.postgres
def test_given_database_is_left_as_it_was(folder, foreign):
    url, sql = foreign
    process = start_demo(folder, "--url", url, "--seconds-per-scenario", "0.3")
    table = None
    out = []
    for line in process.stdout:
        out.append(line)
        if line.startswith("[1/7]"):
            (table,) = sql(TABLES)
    status, _, err = finish(process)
    text = "".join(out)
    assert status == 0, text
    assert table in text
    assert "postgres:***@" in text
    assert "s3cret" not in text + err
    assert "\x1b" not in text
    assert sql(TABLES) == []
    assert left_in(folder)[0] == []


@pytest.mark.slow
@pytest.mark.postgres
def test_given_database_is_left_as_it_was_after_a_signal(folder, foreign):
    url, sql = foreign
    process = start_demo(folder, "--url", url)
    while not process.stdout.readline().startswith("[2/7]"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    returncode, out, err = finish(process)
    assert returncode == 130
    assert "s3cret" not in out + err
    assert sql(TABLES) == []


@pytest.mark.postgres
def test_server_without_room_is_told_in_words(foreign, capsys):
    url, sql = foreign
    sql("CREATE ROLE cramped LOGIN CONNECTION LIMIT 5")
    try:
        cramped = make_url(url).set(username="cramped")
        status = main(["demo", "--url", cramped.render_as_string(hide_password=False)])
    finally:
        sql("DROP ROLE cramped")
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert "needs 20 more connections" in err
    assert "room for only 4" in err


@pytest.mark.postgres
def test_failing_scraper_ends_the_demo(foreign, capsys, monkeypatch):
    url, sql = foreign
    monkeypatch.setattr(demo_load, "_SERVICE", "/* {scraper} */ SELECT 1/0, :seconds")
    assert main(["demo", "--url", url]) == 2
    err = capsys.readouterr().err
    assert err == "sqla-fairpool demo: scraper layer1_5 failed: division by zero\n"
    assert sql(TABLES) == []
    deadline = time.monotonic() + PATIENCE
    while any("worker" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
