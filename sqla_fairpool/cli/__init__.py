"""The command line, ``sqla-fairpool``.

A sub-command is a module with ``add_command(commands)``, which adds its parser and
sets its function as the default of ``run``; list it in `_COMMANDS`. Only the one that
is called is imported: a script waits for its launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from .common import EXIT_SIGNAL, CommandError, hide_passwords

__all__ = ["main", "make_argument_parser"]

_PROGRAM = "sqla-fairpool"

#: The modules, by the commands that they add.
_COMMANDS = {
    "run": "run",
    "monitor": "monitor",
    "stats": "monitor",
    "ledger": "ledger",
    "demo": "demo",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # It quotes what it did not understand, which may be a URL.
        super().error(hide_passwords(message))


def make_argument_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the program.

    :param command: the only sub-command that is needed. Default: all.
    """
    parser = _Parser(
        prog=_PROGRAM,
        description="Share the connections of a SQLAlchemy pool fairly among tags.",
    )
    parser.add_argument(
        "--version", action="version", version=f"{_PROGRAM} {_version()}"
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="command", required=True
    )
    needed = _COMMANDS.values() if command is None else [_COMMANDS[command]]
    for module in dict.fromkeys(needed):
        import_module(f".{module}", __package__).add_command(commands)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Run the program, return its exit status.

    :param args: the arguments, ``sys.argv`` without the program's name by default.
    """
    args = sys.argv[1:] if args is None else args
    command = args[0] if args and args[0] in _COMMANDS else None
    arguments = make_argument_parser(command).parse_args(args)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except CommandError as error:
        text = hide_passwords(" ".join(str(error).split()))
        print(f"{_PROGRAM} {arguments.command}: {text}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):  # the terminal may have gone
            print(f"{_PROGRAM} {arguments.command}: interrupted", file=sys.stderr)
        return EXIT_SIGNAL + getattr(error, "signum", signal.SIGINT)
    except BrokenPipeError:
        # The reader has gone, as in `sqla-fairpool demo | head`. What is left in
        # the buffer would raise again when the interpreter flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SIGNAL + getattr(signal, "SIGPIPE", 13)


def _version() -> str:
    try:
        return version(_PROGRAM)
    except PackageNotFoundError:
        return "(not installed)"
