"""``sqla-fairpool monitor`` and ``stats``, as they are called."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from sqlalchemy import create_engine, make_url, text
from support import state
from support.overviews import EVIL, FakeInspector, overview
from support.stub import StubServer
from support.threads import PATIENCE, VirtualClock

from sqla_fairpool import FairQueuePool
from sqla_fairpool.cli import main, monitor, poller
from sqla_fairpool.cli.poller import Poller, in_background
from sqla_fairpool.cli.server import ServerFigures, ServerView
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.store import LedgerError, StoreAway

PROGRAM = str(Path(__file__).parents[1] / "support" / "monitor_program.py")


@pytest.fixture(autouse=True)
def _environment(monkeypatch, temp):
    for name in ("DATABASE_URL", "FAIRPOOL_LEDGER", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def path(tmp_path):
    """The path of a file that is there, as a ledger's is."""
    path = tmp_path / "app.ledger"
    path.touch()
    return str(path)


@pytest.fixture
def show(monkeypatch, path):
    """Have the inspector of the default ledger show these scenes; return it."""

    def show(*scenes):
        inspector = FakeInspector(*scenes)
        monkeypatch.setattr(poller, "Inspector", lambda store: inspector)
        monkeypatch.setenv("FAIRPOOL_LEDGER", path)
        return inspector

    return show


def run(capsys, *args):
    """Run a command; return its status and what it printed."""
    status = main([*map(str, args)])
    return status, *capsys.readouterr()


def read(capsys, *args):
    """Run ``stats --json``, return the document."""
    return json.loads(run(capsys, "stats", "--json", *args)[1])


def end(engine):
    engine.dispose()
    state.keeper(engine).close()


# -- what is looked at -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("IDLE_TIMEOUT", "", "no process has used a ledger here yet"),
        ("IDLE_TIMEOUT", "soon", "IDLE_TIMEOUT='soon' is not allowed"),
        ("FAIRPOOL_LEDGER", "nonsense", "FAIRPOOL_LEDGER='nonsense' is not allowed"),
        ("FAIRPOOL_LEDGER", "none", "there is no ledger to look at"),
        ("DATABASE_URL", "s3cret", r"DATABASE_URL='\.\.\.' is not allowed"),
        # Its ledger is looked for; that it cannot be asked itself is not told.
        (
            "DATABASE_URL",
            "mysql://u:s3cret@db/app",
            r"there is no ledger at \S+/mysql-db-3306-app-\S+\.ledger: no process",
        ),
    ],
)
@pytest.mark.parametrize("command", [["stats"], ["monitor", "--once"]])
def test_what_cannot_be_looked_at(capsys, monkeypatch, command, variable, value, says):
    monkeypatch.setenv(variable, value)
    status, out, err = run(capsys, *command)
    assert (status, out) == (2, "")
    assert re.search(says, err) and "s3cret" not in err


@pytest.mark.parametrize(
    "error", [StoreAway("db: no route"), LedgerError("the ledger x is empty")]
)
def test_there_is_nothing_to_show(capsys, show, error):
    show(error)
    status, out, err = run(capsys, "monitor", "--once")
    assert (status, out) == (2, "")
    assert error.args[0] in err


# -- once ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["stats"], ["monitor", "--once"]])
def test_once(capsys, monkeypatch, show, command):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setitem(sys.modules, "textual", None)
    inspector = show(overview([*EVIL, "layer3"]))
    status, out, err = run(capsys, *command)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "2026-11-25 09:40:45 UTC  ledger /run/app.ledger"
    assert all(line.isprintable() for line in lines)
    assert inspector.closed
    status, out, _ = run(capsys, *command, "--json")
    document = json.loads(out)
    assert status == 0
    scrapers = sorted(row["scraper"] for row in document["scrapers"])
    assert scrapers == sorted([*EVIL, "layer3"])
    assert "server" not in document
    assert all(char == "\n" or char.isprintable() for char in out)
    # Only the whole screen is missing.
    monkeypatch.setattr(monitor, "_has_terminal", lambda: True)
    status, _, err = run(capsys, "monitor")
    assert status == 2
    assert "textual not installed: pip install 'sqla-fairpool[monitor]', or " in err


def test_a_url_of_another_backend_is_told(capsys, show):
    show(overview())
    args = ("--url", "mysql://u:s3cret@h/d")
    error = "that of mysql cannot be asked, this needs PostgreSQL"
    assert f"server: {error}\n" in run(capsys, "stats", *args)[1]
    assert read(capsys, *args)["server"] == {"error": error}


@pytest.mark.postgres
def test_a_pool_is_seen_by_ledger_and_server(
    capsys, tmp_path, postgres_url, monkeypatch
):
    path = str(tmp_path / "real.ledger")
    engine = create_engine(postgres_url, poolclass=FairQueuePool, ledger=path)
    tagged = engine.execution_options(scraper="layer3")
    monkeypatch.setenv("DATABASE_URL", postgres_url)
    with tagged.connect(), tagged.connect() as second:
        second.execute(text("select 1"))
        document = read(capsys, "--ledger", path)
        assert "server: 2 sess" in run(capsys, "stats", "--ledger", path)[1]
    (row,) = document["scrapers"]
    seen = row["scraper"], row["status"], row["connections"]
    assert seen == ("layer3", "active", 2)
    server = document["server"]
    assert server["sessions"] == server["scrapers"]["layer3"]["sessions"] == 2
    assert server["idle_in_transaction"] == 1
    assert [warning for warning in server["warnings"] if "bug" in warning] == []
    end(engine)


# -- again and again -------------------------------------------------------------------


@pytest.fixture
def make(path, show):
    """Make a poller of scenes; return it, its clock and its inspector."""

    def make(*scenes, path=path, server=None):
        inspector, clock = show(*scenes), VirtualClock()
        return Poller(HostStore(path), server, clock), clock, inspector

    return make


def test_the_store_away_and_back(make):
    first, second = overview(["a"]), overview(["b"])
    away = StoreAway("db:  no\nroute to postgresql://u:s3cret@h/d")
    damaged = LedgerError("the ledger \x1b[1m is damaged")
    poller, clock, inspector = make(first, away, away, damaged, second)
    seen = poller.look()
    assert (seen.overview, seen.trouble_at(clock())) == (first, None)
    clock.advance(7)
    for _ in range(2):
        seen = poller.look()
        assert seen.overview is first
    assert seen.trouble_at(clock() + 1) == (
        "the ledger is away: db: no route to postgresql://u:***@h/d, last seen 8 s ago"
    )
    assert poller.look().trouble == "the ledger \\x1b[1m is damaged"
    assert inspector.closed == 3  # whatever was broken is opened anew
    seen = poller.look()
    assert (seen.overview, seen.trouble) == (second, None)
    poller.close()
    assert inspector.closed == 4


def test_a_real_ledger_is_waited_for_and_may_be_replaced(tmp_path):
    folder = tmp_path / "folder"
    path = str(folder / "app.ledger")
    poller = Poller(HostStore(path), None)
    said = f"there is no ledger at {path}: no process has used it yet"
    assert poller.look().trouble == said
    assert not folder.exists()
    folder.mkdir()
    for _ in range(2):
        engine = StubServer().engine(ledger=path)
        with engine.connect():
            assert poller.look().trouble is None
        end(engine)
        os.unlink(path)
        assert poller.look().trouble == said
    poller.close()


def test_what_runs_in_the_background_returns_or_raises_in_front():
    assert in_background(threading.get_ident).result(PATIENCE) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        in_background(lambda number: 1 // number, 0).result(PATIENCE)


def test_a_server_that_hangs_does_not_hide_the_ledger(make, monkeypatch):
    go_on = threading.Event()
    answer = ServerFigures(others=3)
    monkeypatch.setattr(
        ServerView, "look", lambda *args: go_on.wait(PATIENCE) and answer
    )
    monkeypatch.setattr(poller, "_PATIENCE", 0.01)
    view = overview()
    watch, clock, _ = make(view, server=make_url("postgresql://h/d"))
    watch.look()
    clock.advance(8)
    seen = watch.look()
    assert seen.overview is view and seen.trouble is None
    assert seen.server.error == "does not answer, for 8 s"
    monkeypatch.setattr(poller, "_PATIENCE", PATIENCE)
    go_on.set()
    assert watch.look().server is answer
    assert watch.look().server is answer
    watch.close()


def test_a_look_that_hangs_does_not_hold_up_the_end(make):
    go_on = threading.Event()
    poller, _, inspector = make(overview())
    inspector.look = lambda: go_on.wait(PATIENCE)
    answer = poller.start()
    poller.close()
    assert not answer.done() and not inspector.closed
    go_on.set()
    answer.result(PATIENCE)


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("as_json", [False, True])
def test_again_and_again(capsys, show, monkeypatch, as_json):
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            raise EnoughError

    show(overview(), StoreAway("locked"), overview(["b"]))
    monkeypatch.setattr("sqla_fairpool.cli.monitor.time.sleep", sleep)
    with pytest.raises(EnoughError):
        main(["monitor", "9", *["--json"] * as_json])
    assert all(0 <= seconds <= 9 for seconds in slept)
    out = capsys.readouterr().out
    if as_json:
        first, second, third = map(json.loads, out.splitlines())
        assert first["pool"]["capacity"] == 20
        assert second["error"] == "the ledger is away: locked"
        assert [row["scraper"] for row in third["scrapers"]] == ["b"]
    else:
        first, second, third = out.rstrip().split("\n\n")
        assert "layer1_5" in first
        away = r"20\S+ \S+ UTC  the ledger is away: locked, last seen \d+ s ago"
        assert re.fullmatch(away, second)
        assert "\nb " in third


# -- for Prometheus --------------------------------------------------------------------


def test_served_to_prometheus(capsys, show, monkeypatch):
    show(overview(), StoreAway("locked"))
    said, scraped = "", []

    def scrape(seconds):
        nonlocal said
        said += capsys.readouterr().out
        with urlopen(said.split()[-1], timeout=PATIENCE) as answer:
            scraped.append(answer.read().decode())
        if len(scraped) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("sqla_fairpool.cli.monitor.time.sleep", scrape)
    assert run(capsys, "monitor", "--prometheus", "127.0.0.1:0")[0] == 130
    name = re.escape(os.environ["FAIRPOOL_LEDGER"])
    up = rf'sqla_fairpool_ledger_up\{{pool="{name}"\}}'
    assert re.search(up + r" 1\.0\n", scraped[0])
    assert 'tag="layer1_5"} 2.0\n' in scraped[0]
    assert re.search(up + r" 0\.0\n", scraped[1])


def test_a_scrape_does_not_wait_for_a_look_that_hangs(make, monkeypatch):
    go_on, view = threading.Event(), overview()
    watch, _, inspector = make(view)
    inspector.look = lambda: go_on.wait(PATIENCE) and view
    looks = monitor._Looks(watch)
    monkeypatch.setattr(monitor, "_SCRAPE", 0.01)
    assert looks() is None
    monkeypatch.setattr(monitor, "_SCRAPE", PATIENCE)
    go_on.set()
    assert looks() is view  # the look that was under way
    watch.close()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["host:"], "'host:' is not [HOST:]PORT"),
        (["65536"], "'65536' is not [HOST:]PORT"),
        (["1", "--json"], "--prometheus goes with neither --once nor --json"),
        (["host.invalid:0"], "cannot listen at host.invalid:0: "),
    ],
)
def test_what_cannot_be_served(capsys, show, args, says):
    show(overview())
    try:
        status = main(["monitor", "--prometheus", *args])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert says in capsys.readouterr().err


# -- on a terminal ---------------------------------------------------------------------

#: What a terminal is told when its other screen is to be shown, and left.
SHOWN, LEFT = "\x1b[?1049h", "\x1b[?1049l"


class Window:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, path, *args, **environment):
        self.master, self.slave = pty.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(self.slave)
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, path, *args],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            # The size must not keep it from seeing a new one.
            env={**os.environ, "COLUMNS": "80", "LINES": "24", **environment},
            start_new_session=True,
        )

    def resize(self, lines, columns):
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)

    def read_until(self, *texts):
        """Read until each text has been seen; return all that came.

        In any order: what is drawn first depends on how busy the machine is.
        """
        deadline = time.monotonic() + PATIENCE
        while missing := [wanted for wanted in texts if wanted not in self.text]:
            assert time.monotonic() < deadline, f"no {missing} in {self.text!r}"
            self._read(0.1)
        end = max(self.text.index(wanted) + len(wanted) for wanted in texts)
        read, self.text = self.text[:end], self.text[end:]
        return read

    def _read(self, seconds):
        if select.select([self.master], [], [], seconds)[0]:
            self.text += os.read(self.master, 65536).decode(errors="replace")

    def type(self, keys):
        os.write(self.master, keys.encode())

    def wait(self):
        """Return the exit status; what it writes meanwhile is read."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            self._read(0.05)
        self._read(0)
        return self.process.returncode

    def quit(self):
        self.type("q")
        assert self.wait() == 0
        assert self.is_restored

    @property
    def is_restored(self):
        """The modes are as they were, and the screen is the first one."""
        modes = termios.tcgetattr(self.slave)
        return modes == self.before and LEFT in self.text

    def hang_up(self):
        for end in (self.master, self.slave):
            os.close(end)
        self.master = None

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.master is not None:
            self.hang_up()


@pytest.fixture
def window(path):
    """Start the monitor in a window of its own, with an interval of a minute."""
    windows = []

    def make(until="layer1_5", **environment):
        window = Window(path, "monitor", "60", **environment)
        windows.append(window)
        window.shown = window.read_until(until)
        return window

    yield make
    for window in windows:
        window.close()


def test_on_a_terminal_until_q(window):
    window = window(SHOWN)
    window.read_until("by scraper", "layer1_5", "Quit")
    assert termios.tcgetattr(window.slave) != window.before  # it reads single keys
    for key, shown in (("s", "by connections"), ("-", "every 30 s"), (" ", "PAUSED")):
        window.type(key)
        window.read_until(shown)
    window.resize(10, 40)
    window.read_until("\x1b[10;1H", "Quit")  # the keys are in the last line
    window.quit()


@pytest.mark.parametrize(
    ("signum", "status"),
    [
        (None, 130),  # Ctrl-C as it is typed
        (signal.SIGINT, 130),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGHUP, 128 + signal.SIGHUP),
    ],
)
def test_signals_end_it_and_restore_the_terminal(window, signum, status):
    window = window()
    if signum is None:
        window.type("\x03")
    else:
        window.process.send_signal(signum)
    assert window.wait() == status
    assert window.is_restored


def test_a_terminal_that_has_gone_ends_it(window):
    window = window()
    window.hang_up()
    # Or Python's own status for standard streams that cannot be flushed at the end.
    gone = (128 + signal.SIGHUP, -signal.SIGHUP, 120)
    assert window.process.wait(PATIENCE) in gone


def test_a_look_that_hangs_does_not_keep_q_from_ending_it(window):
    window("no answer for 2 s", HANGS="1").quit()


def test_ctrl_z_leaves_the_screen_until_it_goes_on(window):
    window = window()
    window.type("\x1a")
    window.read_until(LEFT)
    os.waitid(os.P_PID, window.process.pid, os.WSTOPPED)
    window.process.send_signal(signal.SIGCONT)
    window.read_until(SHOWN, "layer1_5")
    window.quit()


def test_on_a_dumb_terminal_it_is_plain_text(window):
    window = window("slots owned", TERM="dumb", FORCE_COLOR="1")
    window.type("\x03")
    assert window.wait() == 130
    assert "layer1_5" in window.shown
    assert "\x1b" not in window.shown + window.text
