"""The demo: its verdicts on made-up samples, and real runs of it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack

import pytest
from sqlalchemy import make_url
from support.threads import PATIENCE

from sqla_fairpool.cli import main
from sqla_fairpool.demo import scenarios
from sqla_fairpool.demo.scenarios import SCENARIOS, Sample, judge

ALONE, TWO, THREE, GONE = SCENARIOS


def sample(scenario, *counts, server=None, sessions=20, active=None):
    tags = SCENARIOS[scenario]
    pool = dict(zip(tags, counts or tags.values(), strict=True))
    server = pool if server is None else dict(zip(tags, server, strict=True))
    running = frozenset(tag for tag in tags if tags[tag])
    return Sample(pool, server, active or running, sessions)


@pytest.mark.parametrize(
    ("scenario", "samples"),
    [
        *((scenario, [sample(scenario)] * 9) for scenario in SCENARIOS),
        # Between two transactions the server sees less for a moment.
        (TWO, [sample(TWO), *[sample(TWO, server=(9, 8))] * 2]),
        # The remainder may wander.
        (THREE, [sample(THREE, *c) for c in [(7, 7, 6), (6, 7, 7), (7, 6, 7)]]),
    ],
)
def test_what_is_right(scenario, samples):
    verdict = judge(scenario, samples)
    assert verdict.problems == []
    assert verdict.pool == verdict.server == verdict.expected
    expected = [tuple(tags.values()) for tags in SCENARIOS.values()]
    assert expected == [(15,), (10, 10), (7, 7, 6), (10, 0, 10)]  # the contract


@pytest.mark.parametrize(
    ("scenario", "samples", "problems"),
    [
        (ALONE, [], ["it did not settle in time"]),
        (TWO, [sample(TWO, server=(9, 8)), sample(TWO, server=(9, 10))], [
            "server: 10 / 9, expected 10 / 10",
        ]),
        (ALONE, [sample(ALONE)] + [sample(ALONE, 14, server=(15,))] * 2, [
            "pool: 14, expected 15",
        ]),
        (THREE, [sample(THREE, 8, 6, 6)], [
            "pool: 8 / 6 / 6, expected 7 / 7 / 6",
            "server: 8 / 6 / 6, expected 7 / 7 / 6",
        ]),
        (TWO, [sample(TWO)] * 99 + [sample(TWO, 10, 10, server=(10, 11))], [
            "server: 11 / 10, expected 10 / 10",
            "server: layer3 had 11, its limit is 10",
        ]),
        (TWO, [sample(TWO)] * 99 + [sample(TWO, 9, 11, server=(10, 10))], [
            "pool: layer3 had 11, its limit is 10",
        ]),
        (GONE, [sample(GONE)] * 9 + [sample(GONE, 9, 1, 10, server=(9, 0, 10))], [
            "pool: layer2 had 1, its limit is 0",
        ]),
        (GONE, [sample(GONE, 10, 10, 0, server=(10, 0, 10))], [
            "pool: 10 / 10 / 0, expected 10 / 0 / 10",
            "pool: layer2 had 10, its limit is 0",
        ]),
        (ALONE, [sample(ALONE)] * 2
            + [sample(ALONE)._replace(pool={"layer1_5": 15, "unknown": 1})], [
            "pool: unknown had 1, its limit is 0",
        ]),
        (TWO, [sample(TWO, sessions=21)], ["21 in all, the capacity is 20"]),
        (GONE, [sample(GONE, active=frozenset(SCENARIOS[GONE]))], [
            "pool: active was layer1_5, layer2, layer3",
        ]),
    ],
)  # fmt: skip
def test_what_is_wrong(scenario, samples, problems):
    assert judge(scenario, samples).problems == problems


def test_capacity_holds_also_before_it_settles():
    before = [sample(TWO, 15, 6, server=(15, 5))]
    problems = judge(TWO, [sample(TWO)], before).problems
    assert problems == ["21 in all, the capacity is 20"]


@pytest.fixture
def start_demo():
    """Start the demo; nothing of it may be left in its folder after the test."""
    # With a short name, for sockets, and for all to enter.
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp") as folder:
        environment = {**os.environ, "TMPDIR": folder, "FORCE_COLOR": "1"}
        with ExitStack() as ending:
            yield lambda *args: ending.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "sqla_fairpool", "demo", *args],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    # A group of its own: a signal reaches it as Ctrl-C in a terminal.
                    start_new_session=True,
                    env=environment,
                )
            )
        psutil = pytest.importorskip("psutil")
        left = [
            process.info
            for process in psutil.process_iter(["pid", "name", "cmdline", "cwd"])
            if folder in f"{process.info['cmdline']} {process.info['cwd']}"
        ]
        assert left == []
        assert [name for name in os.listdir(folder) if name.startswith("sqla")] == []


def finish(process):
    out, err = process.communicate(timeout=PATIENCE * 2)
    return process.returncode, out, err


def lines_until(process, start):
    """Return what is printed until a line that starts so."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start):
            return "".join(lines)
    shown = "".join(lines)
    return pytest.fail(f"{start} was not shown:\n{shown}{process.stderr.read()}")


@pytest.mark.slow
@pytest.mark.postgres
def test_demo_runs_as_expected(start_demo):
    status, out, err = finish(start_demo("--json", "--seconds-per-scenario", "1"))
    report = json.loads(out)
    assert (status, err) == (0, ""), report
    assert report["ok"] is True
    expected = [list(tags.values()) for tags in SCENARIOS.values()]
    for side in ("expected", "pool", "server"):
        assert [row[side] for row in report["scenarios"]] == expected
    assert [row["problems"] for row in report["scenarios"]] == [[]] * 4
    rates = {
        (row["pool"], row["scraper"]): row["checkouts_per_second"]
        for row in report["comparison"]
    }
    assert len(rates) == 6
    assert all(rates[key] > 0 for key in rates if key != ("QueuePool", "light"))


@pytest.fixture
def foreign(postgres_url):
    """The URL, with a password, of a database that is not the demo's own."""
    url = make_url(postgres_url).set(password="s3cret")
    return url.render_as_string(hide_password=False)


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize(
    ("line", "signum", "times", "status"),
    [
        ("starting an embedded PostgreSQL", signal.SIGINT, 1, 130),
        ("starting an embedded PostgreSQL", signal.SIGINT, 2, 130),
        ("PostgreSQL 1", signal.SIGINT, 1, 130),
        ("[2/7]", signal.SIGTERM, 1, 143),
        ("[7/7]", signal.SIGINT, 1, 130),
        ("[2/7] given", signal.SIGINT, 1, 130),
        ("All given", None, 0, 0),
    ],
)
def test_a_signal_leaves_nothing_behind_and_no_password_is_shown(
    start_demo, foreign, line, signum, times, status
):
    line, *given = line.split(" given")
    url = ["--url", foreign] if given else []
    process = start_demo(*url, "--seconds-per-scenario", "0.2")
    shown = lines_until(process, line)
    for _ in range(times):
        os.killpg(process.pid, signum)
    returncode, out, err = finish(process)
    says = "sqla-fairpool demo: interrupted\n" if signum else ""
    assert (returncode, err) == (status, says)
    assert "s3cret" not in shown + out + err and "\x1b" not in shown + out
    assert not given or "postgres:***@" in shown


@pytest.mark.postgres
def test_a_scraper_that_fails_ends_the_demo_in_words(
    postgres_role, foreign, capsys, monkeypatch
):
    assert main(["demo", "--url", postgres_role("connection limit 5")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "scraper layer1_5 failed: " in err
    assert 'too many connections for role "' in err
    monkeypatch.setattr(scenarios, "_STATEMENT", "/* {tag} */ SELECT 1/0")
    assert main(["demo", "--url", foreign]) == 2
    err = capsys.readouterr().err
    assert err == "sqla-fairpool demo: scraper layer1_5 failed: division by zero\n"
    assert not any(isinstance(t, scenarios._Worker) for t in threading.enumerate())
