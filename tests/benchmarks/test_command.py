"""The command: its options, its errors, what it leaves behind."""

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
from benchmarks.harness.bench import Scenario
from benchmarks.harness.database import BenchError
from benchmarks.harness.findings import Figure, Target

ROOT = Path(__file__).parents[2]

TARGET = Target("speed", "QueuePool", 1.0, at_most=False)


@pytest.fixture(autouse=True)
def signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def play(monkeypatch, tmp_path, capsys):
    """Run the command with scenarios of the test's own, which need no database."""

    def play(*args, output=tmp_path / "report", **parts):
        scenarios = [
            Scenario(name, f"About {name}", "Text.", (part,), ("speed",))
            for name, part in parts.items()
        ]
        monkeypatch.setattr(command, "SCENARIOS", scenarios)
        monkeypatch.setattr(command, "TARGETS", {"speed": TARGET})
        prefix = ["--output", str(output)] if output else []
        status = command.main([*prefix, *args])
        return status, *capsys.readouterr()

    return play


def measured(value):
    return lambda bench: [Figure("speed", "QueuePool", (value,), TARGET)]


def failing(error):
    def part(bench):
        raise error

    return part


def read(folder):
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_report_of_the_chosen_scenarios_and_unmet_targets(play, tmp_path):
    args = ("--short", "--only", "two", "--check")
    status, out, err = play(*args, one=measured(0.5), two=measured(1.2))
    assert (status, err) == (0, "")
    assert "1 of 1 targets met" in out
    assert "report.html" in out.replace("\n", "")  # lines are wrapped
    assert "About one" not in out
    report = read(tmp_path)
    assert report["about"]["form"] == "short"
    assert report["about"]["server"] is None
    assert [section["name"] for section in report["sections"]] == ["two"]
    assert report["targets"][0]["verdict"] == "met"
    assert report["cut_short"] == ""
    for args, status in (([], 0), (["--check"], 1)):
        found, out, _ = play(*args, one=measured(0.5))
        assert found == status
        assert "NOT MET" in out and "0 of 1 targets met" in out


def test_scenarios_are_listed_and_others_refused(capsys):
    assert command.main(["--list"]) == 0
    out = capsys.readouterr().out
    for scenario in command.SCENARIOS:
        assert f"{scenario.name} " in out
        assert scenario.title in out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--only", "nonsense"])
    assert "'nonsense'" in capsys.readouterr().err


def test_only_writes_a_file_of_its_own_and_a_busy_machine_is_told(
    play, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (64.0, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    parts = {name: measured(1.2) for name in ("one", "two", "three")}
    for only in ([], ["--only", "two"], ["--only", "two", "--only", "one"]):
        _, out, _ = play(*only, output=None, **parts)
        said = "targets met, measured on a busy machine, load 64 on 2 cores: look again"
        assert said in " ".join(out.split())
    assert sorted(file.name for file in tmp_path.glob("*.json")) == [
        "fairpool-bench-one-two.json",
        "fairpool-bench-two.json",
        "fairpool-bench.json",
    ]


def test_unwritable_output_is_told_before_anything_is_measured(play, tmp_path):
    prefix = str(tmp_path / "missing" / "report")
    status, out, err = play("--output", prefix, one=measured(1.0))
    assert (status, out) == (2, "")
    assert "--output" in err
    assert "No such file" in err


def test_interrupt_keeps_what_is_measured_and_an_error_is_one_line(play, tmp_path):
    interrupted = failing(KeyboardInterrupt())
    assert play(one=interrupted)[0] == 130
    assert list(tmp_path.iterdir()) == []  # there is nothing yet
    status, _, err = play(one=measured(1.0), two=interrupted)
    assert (status, err) == (130, "benchmarks: interrupted\n")
    report = read(tmp_path)
    assert "interrupted" in report["cut_short"]
    assert [section["name"] for section in report["sections"]] == ["one"]
    status, _, err = play(one=failing(BenchError("no\nroom")))
    assert (status, err) == (2, "benchmarks: no room\n")


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("nonsense", "not a database URL"),
        ("mysql://u:hidden@h/d", "the benchmarks need PostgreSQL, not 'mysql'"),
        ("postgresql://u:hidden@127.0.0.1:1/d", "Connection refused"),
    ],
)
def test_bad_url_is_one_line_without_the_password(capsys, tmp_path, url, complaint):
    args = ["--only", "alone", "--output", str(tmp_path / "r"), "--url", url]
    assert command.main(args) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1
    assert "hidden" not in err


# -- real runs ------------------------------------------------------------------------


@pytest.fixture
def folder():
    """A temporary directory with a short name, for sockets, that all may enter."""
    name = tempfile.mkdtemp(prefix="bench-", dir="/tmp")
    yield name
    shutil.rmtree(name, ignore_errors=True)


def start(folder, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--short", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        # A group of its own, which a signal reaches as Ctrl-C in a terminal does.
        start_new_session=True,
        env={**os.environ, "TMPDIR": folder, "PYTHONPATH": str(ROOT)},
    )


def interrupt(process, line, number):
    """Send the signal when a line has been shown that begins like this."""
    while not process.stdout.readline().startswith(line):
        assert process.poll() is None, f"{line} was not shown"
    os.killpg(process.pid, number)


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


@pytest.mark.slow
@pytest.mark.postgres
def test_scenario_runs_on_an_embedded_server(folder):
    status, out, err = finish(start(folder, "--only", "alone"))
    assert (status, err) == (0, ""), out
    assert "\x1b" not in out
    report = json.loads(
        Path(folder, "fairpool-bench-alone.json").read_text(encoding="utf-8")
    )
    assert report["about"]["server"]["embedded"] is True
    assert len(report["targets"]) == 3
    unused = report["targets"][2]
    assert unused["remark"] == "20 of 30 before, 5 of 20 now"
    assert unused["verdict"] == "met"
    assert left_in(folder) == ([], [])


@pytest.mark.slow
@pytest.mark.postgres
@pytest.mark.parametrize(
    ("only", "line", "number", "is_given"),
    [
        ("alone", "starting", signal.SIGINT, False),
        ("alone", "[1/1]", signal.SIGTERM, False),
        ("saturated", "       ", signal.SIGINT, False),
        ("peers", "       ", signal.SIGINT, False),
        ("saturated", "      ", signal.SIGINT, True),
        ("saturated", "      ", None, True),
    ],
)
def test_nothing_is_left_behind_after_a_signal_and_in_a_given_database(
    folder, postgres_url, only, line, number, is_given
):
    url = make_url(postgres_url).set(password="s3cret")
    url = url.render_as_string(hide_password=False)
    process = start(folder, "--only", only, *(["--url", url] if is_given else []))
    if number:
        interrupt(process, line, number)
    status, out, err = finish(process)
    said = "benchmarks: interrupted\n" if number else ""
    assert (status, err) == (130 if number else 0, said)
    files = list(Path(folder).glob(f"fairpool-bench-{only}.*"))
    if is_given:  # else it may be at its end
        assert len(files) == (0 if number else 2)
    texts = [out, err, *(file.read_text(encoding="utf-8") for file in files)]
    assert "s3cret" not in "".join(texts)
    assert left_in(folder) == ([], [])
    with create_engine(postgres_url, poolclass=NullPool).connect() as connection:
        tables = text("SELECT tablename FROM pg_tables WHERE tablename LIKE 'sqla%'")
        assert connection.execute(tables).scalars().all() == []
