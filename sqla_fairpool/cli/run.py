"""``sqla-fairpool run``: an unchanged script, whose engines get the pool.

All is checked here. What the script's process needs to know goes through its
environment, where the hook in `launch/sitecustomize.py` finds it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import URL

from ..checks import hide_passwords, naming, validate_tag
from ..launch import DATABASE, LEDGER, RUN, VARIABLES, Run, Settings, say, show_place
from ..ledger.addresses import (
    database_place,
    default_ledger,
    make_store,
    needs_database,
)
from ..ledger.host import HostStore
from ..ledger.inspector import read
from ..ledger.rows import Terms
from ..ledger.store import LedgerError, StoreAway
from ..options import OPTIONS, PoolOptions
from . import (
    EXIT_SIGNAL,
    AnyStore,
    CommandError,
    contents,
    missing_driver,
    one_line,
)
from .server import ask_room, connected, need

_EPILOG = """\
examples:
  DATABASE_URL=postgresql://app@db/app sqla-fairpool run scrapers/layer3.py
  sqla-fairpool run --scraper layer3 --pool-size 30 -m scrapers.layer3 --all
  sqla-fairpool run --scraper news scrapy crawl news
  sqla-fairpool run --url postgresql://app@db/app --strict -v layer3.py

Options of this command come before SCRIPT; all that follows it is the script's. A
COMMAND is a Python program on PATH, if there is no file of that name here. Several
scripts share one budget as long as they have the same options and the same ledger.
"""

#: The directory with the sitecustomize for the script's process.
_HOOK = str(Path(__file__).parent.parent.absolute() / "launch")


def add_command(commands: Any) -> None:
    """Add ``run``."""
    parser = commands.add_parser(
        "run",
        help="run an unchanged script on the shared pool",
        usage="%(prog)s [options] (SCRIPT | COMMAND | -m MODULE) [ARGS...]",
        description="Run an unchanged Python script, whose SQLAlchemy engines share "
        "their\nconnections with those of other such scripts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviation would be looked for among the script's options as well.
        allow_abbrev=False,
    )
    _add_options(parser)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="do not start unless the server has room for the connections",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say what is done, on stderr"
    )
    # Not the module as its value: what comes after it is the module's, like -v.
    parser.add_argument(
        "-m", action="store_true", dest="module", help="SCRIPT is a module's name"
    )
    # One for the script and its arguments: argparse would look for options of ours
    # between two, and drop a "--".
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scraper",
        metavar="NAME",
        help="the tag of what the script does not tag itself; default: its file's name "
        "without .py, a module's full name",
    )
    parser.add_argument(
        "--url",
        help="the database whose engines are meant; default: DATABASE_URL, or without "
        "it every database. All users of this host can read a password in a command "
        "line, which is not so in DATABASE_URL",
    )
    group = parser.add_argument_group("the pool of all scripts together")
    defaults = PoolOptions.parse(ledger=default_ledger())
    for name in VARIABLES.values():
        option, default = OPTIONS[name], getattr(defaults, name)
        what = {int: "N", float: "SECONDS"}.get(type(default), name.upper())
        none = f"; none {option.none}" if option.none else ""
        none += "; @PATH for a file with it" if name == "tags" else ""
        text = f"{option.meaning}{none}; default: {option.variable}, or {default}"
        group.add_argument(_flag(name), metavar=what, help=text.replace("`", ""))


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _run(arguments: argparse.Namespace) -> int:
    program = arguments.program
    if program[:1] == ["--"]:
        program = program[1:]
    if not program:
        what = "MODULE" if arguments.module else "SCRIPT"
        raise CommandError(f"{what} is missing: what is to be run?")
    environment = dict(os.environ)
    if environment.get(LEDGER):
        environment[LEDGER] = _absolute(environment[LEDGER])
    try:
        settings = Settings.read(environment)
        url, place = _database(settings, arguments.url)
        given = _given(arguments)
        pool = _checked(settings, given, url)
        run = Run(_tag(arguments, program[0]), place, given, arguments.verbose)
    except (exc.ArgumentError, LedgerError) as error:
        raise CommandError(str(error)) from None
    except ImportError as error:  # a ledger's driver
        raise missing_driver(error) from None
    above = settings.run
    if above is not None:  # of a launcher that started the script that starts this one
        run = replace(
            run,
            options={**above.options, **run.options},
            verbose=above.verbose or run.verbose,
        )
    if run.verbose:
        meant = "every database" if run.database is None else show_place(run.database)
        say(f"tag {run.scraper!r}, for engines of {meant}")
    _check_budget(url, pool, arguments.strict, run.verbose)
    environment[RUN] = run.text
    environment["PYTHONPATH"] = _python_path(environment.get("PYTHONPATH"))
    if arguments.module:
        return _start([sys.executable, "-m", *program], environment)
    return _start([*_command(program[0]), *program[1:]], environment)


# -- what the script's process is told -------------------------------------------------


def _database(
    settings: Settings, given: str | None
) -> tuple[URL | None, tuple[str, ...] | None]:
    url = settings.database(given, "--url")
    place = None if url is None else database_place(url)
    above = settings.run
    if given is None and above is not None and above.database not in (None, place):
        return None, above.database  # a --url wins over DATABASE_URL from there as well
    return url, place


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    found = {name: getattr(arguments, name) for name in VARIABLES.values()}
    given = {n: OPTIONS[n].from_text(v) for n, v in found.items() if v is not None}
    if tags := given.get("tags"):
        given["tags"] = contents(tags, _flag("tags"))
    if ledger := given.get("ledger"):
        given["ledger"] = _absolute(ledger)
    return given


def _checked(
    settings: Settings, given: Mapping[str, Any], url: URL | None
) -> PoolOptions:
    """Return the options of the script's pools; errors name them as they were given."""
    with naming({name: _flag(name) for name in given}):
        options = settings.with_arguments(given)
        ledger = options["ledger"]
        pool = PoolOptions.among(options)
        if ledger is not None and (url is not None or not needs_database(ledger)):
            with settings.naming(given):
                store = make_store(ledger, url, observes=True)
            folder = Path(store.name).parent
            if not (needs_database(ledger) or "://" in ledger or folder.is_dir()):
                why = f"the directory {folder} does not exist: make it, or mend the "
                raise LedgerError(f"{why}path of the ledger {store.name}")
            _compare(store, pool)
        return pool


def _compare(store: AnyStore, pool: PoolOptions) -> None:
    """Tell if those that use the ledger now have other limits than this script's.

    :raises LedgerError: for a file that cannot be one.
    """
    is_file = isinstance(store, HostStore)
    if is_file and not os.path.exists(store.name):
        return  # the script's pool makes it
    try:
        store.open()
        is_file = False  # it may be empty
        report = read(store)
    except (StoreAway, LedgerError) as error:
        if is_file and isinstance(error, LedgerError):
            raise
        return  # the script's pool waits for it, or makes it
    finally:
        store.close()
    ours, theirs = Terms(**pool.terms), report.book.terms
    if report.living and ours != theirs:
        there, here = theirs.differences(ours), ours.differences(theirs)
        say(
            f"the ledger {store.name} is in use with {_as_flags(there)}: these limits "
            f"are in force, not {_as_flags(here)}"
        )


def _as_flags(terms: str) -> str:
    # A pool of the launcher has no overflow.
    terms = terms.replace("capacity=", "pool_size=")
    return re.sub(r"(\w+)=", lambda match: f"{_flag(match[1])} ", terms)


def _tag(arguments: argparse.Namespace, name: str) -> str:
    if arguments.scraper is not None:
        return validate_tag(arguments.scraper, "--scraper")
    if not arguments.module:
        path = Path(name)
        name = (path if path.name else path.absolute()).name
        name = name.removesuffix(".py") or name
    try:
        return validate_tag(name)
    except exc.ArgumentError as error:
        raise CommandError(
            f"the script's name is no tag, so give --scraper: {error}"
        ) from None


def _absolute(ledger: str) -> str:
    """Return a ledger's name, for whatever directory the script changes to."""
    if "/" not in ledger or "://" in ledger:
        return ledger
    return os.path.abspath(os.path.expanduser(ledger))


def _python_path(given: str | None) -> str:
    others = given.split(os.pathsep) if given else []
    return os.pathsep.join([_HOOK, *(entry for entry in others if entry != _HOOK)])


# -- the server ------------------------------------------------------------------------


def _check_budget(
    url: URL | None, pool: PoolOptions, strict: bool, verbose: bool
) -> None:
    """Warn in one line if the server may not have room, or refuse if `strict`."""
    if url is None or url.get_backend_name() != "postgresql":
        if strict:
            raise CommandError(
                "--strict asks a PostgreSQL server: name one by --url or "
                f"{DATABASE}{'' if url is None else f', not {url.get_backend_name()}'}"
            )
        return
    # With this process alone: how many others there will be is not known.
    needed = need(pool.capacity, 1, url, pool.ledger)
    try:
        with connected(url) as connection:
            room = ask_room(connection)
        problem = "; ".join(room.problems(needed.total, needed.of_role))
        if problem:
            problem += f"; {needed}; lower --pool-size, or raise the server's limit"
    except CommandError as error:
        fit = f"whether {needed.total} connections fit"
        problem = f"{fit} could not be checked: {error}"
    if problem and strict:
        raise CommandError(problem)
    if problem:
        say(f"warning: {hide_passwords(one_line(problem))}")
    elif verbose:
        say(f"{needed.total} connections fit {show_place(database_place(url))}")


# -- the start -------------------------------------------------------------------------

#: How a Python program on PATH begins; the second way is for interpreters whose paths
#: are too long for the first, or have blanks in them.
_SHEBANG = re.compile(
    rb"#! ?(?:\S*/env (?:-S )?)?(\S*python[\w.-]*)"
    rb"|#! ?/bin/sh\n'''exec' [\"']?([^\"'\n]*python[\w.-]*)"
)


def _command(script: str) -> list[str]:
    """Return what starts a script: a file, or else a Python program on PATH.

    The latter with its own interpreter, as the shell would.
    """
    found = None
    if not (os.path.exists(script) or os.path.dirname(script) or script == "-"):
        found = shutil.which(script)
    if found is None:
        return [sys.executable, script]  # which says what is wrong
    if os.name == "nt":  # there it is a zip archive behind a start program
        return [sys.executable, found]
    with open(found, "rb") as file:
        match = _SHEBANG.match(file.read(1024))
    if match is None:
        raise CommandError(
            f"{found} is no Python program: name the module that it starts, by -m"
        )
    interpreter = os.fsdecode(match[1] or match[2])
    return [shutil.which(interpreter) or interpreter, found]


def _start(command: list[str], environment: Mapping[str, str]) -> int:
    """Become the script; where there is no exec, wait for it."""
    if not command[0]:
        raise CommandError("this Python does not know its executable")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if os.name != "nt":
            os.execve(command[0], command, environment)
        return _wait(command, environment)
    except (OSError, ValueError) as error:
        raise CommandError(f"{command[0]} cannot be started: {error}") from None


def _wait(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end and return its status.

    For Windows: with its exec the shell goes on while the program runs. Ctrl-C reaches
    both processes there, and the script handles it.
    """
    with subprocess.Popen(command, env=environment) as process:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            status = process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
    return status if status >= 0 else EXIT_SIGNAL - status
