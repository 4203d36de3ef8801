"""The command ``bench``: its options, its errors, what it leaves behind."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

import benchmarks.__main__ as command
from benchmarks.__main__ import main
from benchmarks.database import BenchError
from benchmarks.figures import Figure, Target
from benchmarks.report import Findings
from benchmarks.stage import Scenario

ROOT = Path(__file__).parents[2]

TARGET = Target("speed", "QueuePool", 1.0, at_most=False)


@pytest.fixture
def play(monkeypatch, tmp_path, capsys):
    """Run the command with scenarios of the test's own, which need no database."""

    def play(*args, **parts):
        scenarios = [
            Scenario(name, f"About {name}", "Text.", (part,), ("speed",))
            for name, part in parts.items()
        ]
        monkeypatch.setattr(command, "SCENARIOS", scenarios)
        monkeypatch.setattr(command, "TARGETS", {"speed": TARGET})
        prefix = tmp_path / "report"
        status = main(["--output", str(prefix), *args])
        out, err = capsys.readouterr()
        return status, out, err, prefix

    return play


def measured(value):
    return lambda stage: Findings((Figure("speed", "QueuePool", (value,), TARGET),))


def read(prefix):
    text = prefix.with_name("report.json").read_text(encoding="utf-8")
    assert prefix.with_name("report.html").read_text().startswith("<!DOCTYPE html>")
    return json.loads(text)


def test_report_is_written_as_html_and_as_json(play):
    status, out, err, prefix = play("--short", one=measured(1.2))
    assert (status, err) == (0, "")
    assert "1 of 1 targets met." in out
    assert "report.html" in out
    report = read(prefix)
    assert report["about"]["form"] == "short"
    assert report["about"]["server"] is None
    assert [section["name"] for section in report["sections"]] == ["one"]
    assert report["targets"][0]["verdict"] == "met"
    assert report["cut_short"] == ""


@pytest.mark.parametrize(("args", "status"), [([], 0), (["--check"], 1)])
def test_unmet_target_is_told_and_fails_only_with_check(play, args, status):
    found, out, _, _ = play(*args, one=measured(0.5))
    assert found == status
    assert "NOT MET" in out
    assert "0 of 1 targets met." in out


def test_check_is_content_when_all_is_met(play):
    assert play("--check", one=measured(1.0))[0] == 0


def test_only_the_chosen_scenarios_run(play):
    _, out, _, prefix = play("--only", "two", one=measured(1.0), two=measured(1.0))
    assert "About one" not in out
    assert [section["name"] for section in read(prefix)["sections"]] == ["two"]


def test_scenarios_are_listed(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    for scenario in command.SCENARIOS:
        assert f"{scenario.name} " in out
        assert scenario.title in out


def test_unknown_scenario_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--only", "nonsense"])
    assert caught.value.code == 2
    assert "'nonsense'" in capsys.readouterr().err


def test_unwritable_output_is_told_before_anything_is_measured(play, tmp_path):
    status, out, err, _ = play(
        "--output", str(tmp_path / "missing" / "report"), one=measured(1.0)
    )
    assert status == 2
    assert out == ""
    assert "--output" in err
    assert "No such file" in err


def test_interrupt_keeps_what_has_been_measured(play):
    def interrupt(stage):
        raise KeyboardInterrupt

    status, _, err, prefix = play(one=measured(1.0), two=interrupt)
    assert status == 130
    assert err == "benchmarks: interrupted\n"
    report = read(prefix)
    assert "interrupted" in report["cut_short"]
    assert [section["name"] for section in report["sections"]] == ["one"]


def test_interrupt_before_the_first_figure_leaves_no_files(play, tmp_path):
    def interrupt(stage):
        raise KeyboardInterrupt

    assert play(one=interrupt)[0] == 130
    assert list(tmp_path.iterdir()) == []


def test_failing_measurement_is_one_line(play):
    def fail(stage):
        raise BenchError("no, at nothing to measure")

    status, _, err, _ = play(one=fail)
    assert status == 2
    assert err == "benchmarks: no, at nothing to measure\n"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("nonsense", "not a database URL"),
        ("mysql://u:hidden@h/d", "the benchmarks need PostgreSQL, not 'mysql'"),
        ("postgresql://u:hidden@127.0.0.1:1/d", "Connection refused"),
    ],
)
def test_bad_url_is_one_line_without_the_password(capsys, tmp_path, url, complaint):
    prefix = str(tmp_path / "r")
    assert main(["--only", "alone", "--output", prefix, "--url", url]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1
    assert "hidden" not in err


# -- real runs ------------------------------------------------------------------------


def start(folder, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--short", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        # A group of its own, which a signal reaches as Ctrl-C in a terminal does.
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT)},
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def left_in(folder):
    """Return what a run left of its server: folders, and processes that work there."""
    psutil = pytest.importorskip("psutil")
    processes = [
        process.info
        for process in psutil.process_iter(["pid", "cmdline", "cwd"])
        if any(folder in word for word in process.info["cmdline"] or ())
        or folder in (process.info["cwd"] or "")
    ]
    return [n for n in os.listdir(folder) if n.startswith("sqla")], processes


@pytest.fixture
def folder():
    """A temporary directory with a short name, for sockets, that all may enter."""
    name = tempfile.mkdtemp(prefix="bench-", dir="/tmp")
    yield name
    shutil.rmtree(name, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.postgres
def test_scenario_runs_on_an_embedded_server(folder):
    status, out, err = finish(start(folder, "--only", "alone"))
    assert (status, err) == (0, ""), out
    assert "\x1b" not in out
    with open(f"{folder}/fairpool-bench.json", encoding="utf-8") as file:
        report = json.load(file)
    assert report["about"]["server"]["embedded"] is True
    assert len(report["targets"]) == 3
    unused = report["targets"][2]
    assert unused["remark"] == "20 of 30 before, 5 of 20 now"
    assert unused["verdict"] == "met"
    assert left_in(folder) == ([], [])


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize(
    ("only", "line"),
    [
        ("alone", "starting"),
        ("alone", "[1/1]"),
        ("saturated", "       "),
        ("peers", "       "),
    ],
)
def test_signal_leaves_nothing_behind(folder, only, line):
    process = start(folder, "--only", only)
    for shown in process.stdout:
        if shown.startswith(line):
            break
    else:
        pytest.fail(f"{line} was not shown")
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130
    assert err == "benchmarks: interrupted\n"
    assert left_in(folder) == ([], [])


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize("interrupted", [False, True])
def test_given_database_is_left_as_it_was(folder, postgres_url, interrupted):
    url = make_url(postgres_url).set(password="s3cret")
    shown = url.render_as_string(hide_password=False)
    process = start(folder, "--only", "saturated", "--url", shown)
    if interrupted:
        while not process.stdout.readline().startswith("      "):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
    status, out, err = finish(process)
    assert status == (130 if interrupted else 0), err
    texts = [out, err]
    for file in glob.glob(f"{folder}/fairpool-bench.*"):
        with open(file, encoding="utf-8") as opened:
            texts.append(opened.read())
    assert len(texts) == (2 if interrupted else 4)
    assert "s3cret" not in "".join(texts)
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.connect() as connection:
        tables = text("SELECT tablename FROM pg_tables WHERE tablename LIKE 'sqla%'")
        assert connection.execute(tables).scalars().all() == []
