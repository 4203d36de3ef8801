"""The command line, ``sqla-fairpool``.

A sub-command is a module with ``add_command(commands)``, which adds its parser and
sets its function as the default of ``run``; list it in `_COMMANDS`. Only the one that
is called is imported: a script waits for its launcher. What all of them have in common
is here: the exit codes, the error that ends one, and which ledger is meant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from sqlalchemy import exc
from sqlalchemy.engine import URL

from ..checks import hide_passwords
from ..launch import DATABASE, LEDGER, Settings
from ..ledger.addresses import known_ledgers, make_store
from ..ledger.host import HostStore
from ..ledger.inspector import read
from ..ledger.postgres import PostgresStore
from ..ledger.store import LedgerError, RowBroken, StoreAway
from ..options import OPTIONS

_PROGRAM = "sqla-fairpool"

#: The modules, by the commands that they add.
_COMMANDS = {
    "run": ".cli.run",
    "monitor": ".cli.monitor",
    "stats": ".cli.monitor",
    "explain": ".cli.monitor",
    "ledger": ".cli.ledger",
    "demo": ".demo",
}

#: Everything came out as it should.
EXIT_OK = 0
#: The command ran, and something did not come out as expected.
EXIT_NOT_AS_EXPECTED = 1
#: The command could not run: bad arguments (argparse uses the same number),
#: something that is not installed, a server that cannot be reached.
EXIT_CANNOT_RUN = 2
#: Plus the number of the signal that ended it, as shells count: 130 for Ctrl-C.
EXIT_SIGNAL = 128


class CommandError(Exception):
    """A command cannot do its work; the text, on one line, says why.

    :param status: what the program exits with.
    :param items: what the text speaks of, each to be shown on a line of its own.
    """

    def __init__(
        self, text: str, status: int = EXIT_CANNOT_RUN, items: Sequence[str] = ()
    ) -> None:
        super().__init__(text)
        self.status = status
        self.items = items


def contents(value: str, name: str) -> str:
    """Return a value, or for ``@path`` what stands in that file."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text()
    except (OSError, ValueError) as error:
        raise CommandError(f"{name}={value} cannot be read: {error}") from None


class _Parser(argparse.ArgumentParser):
    def __init__(self, **more: Any) -> None:
        more.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**more)

    def format_help(self) -> str:
        """Return the help, for 80 columns, with the address of its page."""
        paragraphs = super().format_help().rstrip().split("\n\n")
        text = "\n\n".join(map(_narrow, paragraphs))
        page = f"{_documentation()}/reference/command-line.md"
        return f"{text}\n\ndocumentation:\n  {page}#{self.prog.replace(' ', '-')}\n"

    def error(self, message: str) -> NoReturn:
        # It quotes what it did not understand, which may be a URL.
        super().error(hide_passwords(message))


def _narrow(paragraph: str) -> str:
    """Return a paragraph of prose with lines of less than 80 characters."""
    lines = paragraph.splitlines()
    is_prose = not any(line.startswith(" ") for line in lines)
    if is_prose and max(map(len, lines), default=0) >= 80:
        return textwrap.fill(paragraph, 79)
    return paragraph


def _documentation() -> str:
    """Return where the documentation is, which the package's metadata knows."""
    with contextlib.suppress(PackageNotFoundError):
        for link in metadata(_PROGRAM).get_all("Project-URL") or ():
            name, address = str(link).split(", ", 1)
            if name == "Documentation":
                return address
    return "docs"


def one_line(error: object) -> str:
    """Return what an error says, without line ends."""
    return " ".join(str(error).split())


def make_argument_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the program.

    :param command: the only sub-command that is needed. Default: all.
    """
    parser = _Parser(
        prog=_PROGRAM,
        description="Share the connections of a SQLAlchemy pool fairly among tags.",
    )
    try:
        found = version(_PROGRAM)
    except PackageNotFoundError:
        found = "(not installed)"
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {found}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="command", required=True
    )
    needed = _COMMANDS.values() if command is None else [_COMMANDS[command]]
    for module in dict.fromkeys(needed):
        import_module(module, "sqla_fairpool").add_command(commands)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Run the program, return its exit status.

    :param args: the arguments, ``sys.argv`` without the program's name by default.
    """
    args = sys.argv[1:] if args is None else args
    command = args[0] if args and args[0] in _COMMANDS else None
    program = f"{_PROGRAM} {command}" if command else _PROGRAM
    try:
        try:
            arguments = make_argument_parser(command).parse_args(args)
            status: int = arguments.run(arguments)
            return status
        finally:
            sys.stdout.flush()
    except CommandError as error:
        print(f"{program}: {hide_passwords(one_line(error))}", file=sys.stderr)
        for item in error.items:
            print(f"  {item}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt as error:
        with contextlib.suppress(OSError):  # the terminal may have gone
            print(f"{program}: interrupted", file=sys.stderr)
        return EXIT_SIGNAL + (error.args[0] if error.args else signal.SIGINT)
    except OSError as error:
        # What is left in the buffer would raise again when the interpreter flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            # The reader has gone, as in `sqla-fairpool demo | head`.
            return EXIT_SIGNAL + getattr(signal, "SIGPIPE", 13)
        what = error.filename or "the output cannot be written"
        print(f"{program}: {what}: {error.strerror or error}", file=sys.stderr)
        return EXIT_CANNOT_RUN


# -- which ledger a command means: its arguments, the environment, or the only one -----

AnyStore: TypeAlias = HostStore | PostgresStore


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which ledger is meant, see :func:`find_store`."""
    parser.add_argument(
        "--ledger",
        help="a path, 'host' (this host's file for the database of --url), 'database' "
        "(in that database), or a PostgreSQL's URL; default: FAIRPOOL_LEDGER of the "
        "environment, or host",
    )
    parser.add_argument(
        "--url",
        help="the database of the pools, whose server is asked for its sessions; "
        "default: DATABASE_URL of the environment",
    )


def find_store(arguments: argparse.Namespace) -> tuple[AnyStore, URL | None]:
    """Return the ledger, closed, and the pools' database if it is known.

    It is what arguments and environment name, or else this user's only one.
    """
    named = {"ledger": arguments.ledger} if arguments.ledger else {}
    given = {name: OPTIONS[name].from_text(text) for name, text in named.items()}
    try:
        settings = Settings.read()
        ledger = settings.with_arguments(given)["ledger"]
        database = settings.database(arguments.url, "--url")
        if ledger == "host" and database is None:
            ledger = _only_ledger()
        if ledger is None:
            raise CommandError(
                f"there is no ledger to look at ({LEDGER} says so, or the system has "
                "no default one): give --ledger"
            )
        with settings.naming(given):
            return make_store(ledger, database, observes=True), database
    except (exc.ArgumentError, LedgerError) as error:
        raise CommandError(str(error)) from None
    except ImportError as error:
        raise missing_driver(error) from None


def _only_ledger() -> str:
    paths = known_ledgers()
    if not paths:
        raise CommandError(
            f"no process has used a ledger here yet, and no {DATABASE} says which "
            "one to wait for: give --url or --ledger PATH"
        )
    # Files that are left from earlier do not count, beside one that is in use.
    paths = [path for path in paths if _is_in_use(path)] or paths
    if len(paths) > 1:
        text = f"there are {len(paths)} ledgers, give --url or --ledger PATH:"
        raise CommandError(text, items=[str(path) for path in paths])
    return str(paths[0])


def _is_in_use(path: Path) -> bool:
    store = HostStore(path)
    try:
        store.open()
        return bool(read(store).living)
    except (StoreAway, RowBroken):
        return True  # it may be
    except LedgerError:  # no member has ever joined
        return False
    finally:
        store.close()


def require_file(store: AnyStore) -> None:
    """Raise `LedgerError` if the ledger's file is not there: it would be created."""
    if isinstance(store, HostStore) and not os.path.exists(store.name):
        raise LedgerError(
            f"there is no ledger at {store.name}: no process has used it yet"
        )


@contextmanager
def opened(store: AnyStore) -> Iterator[AnyStore]:
    """Open a ledger for a block; a `CommandError` if it cannot be used."""
    try:
        require_file(store)
        store.open()
        yield store
    except RowBroken as error:
        raise CommandError(f"{store.name}: {error}", EXIT_NOT_AS_EXPECTED) from None
    except (StoreAway, LedgerError) as error:
        raise CommandError(str(error)) from None
    finally:
        store.close()


def missing_driver(error: ImportError) -> CommandError:
    """Return what to say where a driver of PostgreSQL is not installed."""
    return CommandError(
        f"{error.name} is not installed: pip install 'sqla-fairpool[postgresql]'"
    )
