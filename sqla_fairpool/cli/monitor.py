"""``sqla-fairpool monitor`` and ``stats``: who has the connections, at a glance.

A server that does not answer can hold a driver for minutes, inside C code, where no
signal is handled. So everything that asks a ledger or a server runs in a daemon thread,
:func:`in_background`; the main thread waits only as long as it wants to.

The whole screen is in :mod:`.monitor_app`, which needs Textual; plain text and JSON,
which are here, do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import exc
from sqlalchemy.engine import URL

from ..launch.environment import DATABASE, LEDGER, Settings
from ..ledger.addresses import known_ledgers, make_store
from ..ledger.errors import LedgerError
from ..ledger.host import HostStore
from ..ledger.inspector import Observer
from ..ledger.overview import Overview
from ..ledger.overview_text import lines, printable, seconds_text, slots_text
from ..ledger.postgres import PostgresStore
from ..ledger.report import read
from ..ledger.store import StoreAway
from .common import EXIT_OK, CommandError, hide_passwords
from .server_view import ServerFigures, ServerView

__all__ = ["Picture", "Watch", "add_command", "in_background"]

_T = TypeVar("_T")

#: Seconds from one look to the next.
_INTERVAL = 5.0

#: Seconds for the server's answer, and for closing connections; both take milliseconds.
_PATIENCE = 1.0

#: Seconds after which a wait for an answer handles signals, on every system.
_TICK = 0.2

_EPILOG = """\
examples:
  sqla-fairpool monitor                       every 5 seconds
  sqla-fairpool monitor 1 --url postgresql://app@db/app
  sqla-fairpool monitor --ledger /run/scrapers/app.ledger
  watch sqla-fairpool monitor --once
  sqla-fairpool monitor 60 --json >> pool.jsonl

keys: q quit, p pause, s sort, + and - interval, arrows scroll

The environment's FAIRPOOL_LEDGER and DATABASE_URL stand in for --ledger and --url.
Without any of them, and with one ledger on this host, that one is shown.
"""


def add_command(commands: Any) -> None:
    """Add ``monitor`` and ``stats``."""
    parser = commands.add_parser(
        "monitor",
        help="watch who has the connections, on the whole screen",
        description="Watch who has the connections of a budget that processes share. "
        "On a terminal on the whole screen, else as plain text.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "seconds",
        nargs="?",
        type=_seconds,
        default=_INTERVAL,
        metavar="SECONDS",
        help="from one look to the next (default: %(default)g)",
    )
    parser.add_argument("--once", action="store_true", help="look once, as plain text")
    stats = commands.add_parser(
        "stats",
        help="tell once who has the connections",
        description="Tell once who has the connections, as monitor --once does.",
    )
    stats.set_defaults(once=True)
    for command in (parser, stats):
        command.set_defaults(run=run)
        command.add_argument(
            "--json",
            action="store_true",
            help="for programs: one JSON document per look, each on a line if not once",
        )
        command.add_argument(
            "--ledger", help="default: the environment's FAIRPOOL_LEDGER, or host"
        )
        command.add_argument(
            "--url",
            help="the database of the pools; a PostgreSQL is asked what it sees "
            "(default: the environment's DATABASE_URL)",
        )


def _seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number <= 3600:
        raise argparse.ArgumentTypeError(
            f"{value!r} is not a number of seconds, more than 0, at most 3600"
        )
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the monitor, return the exit status.

    :raises CommandError: if there is nothing to watch.
    """
    is_live = not (arguments.once or arguments.json) and _has_terminal()
    if is_live and find_spec("textual") is None:
        raise CommandError(
            "textual not installed: pip install 'sqla-fairpool[monitor]'"
        )
    # A name may have characters that the output's encoding has not.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    watch = find_watch(arguments)
    try:
        if is_live:
            from .monitor_app import Monitor  # the import takes half a second

            return Monitor(watch.start, arguments.seconds, watch.name).run_until_quit()
        if arguments.once:
            return _once(watch, arguments.json)
        return _repeat(watch, arguments.json, arguments.seconds)
    finally:
        watch.close()


def _has_terminal() -> bool:
    """Tell if there is a terminal to draw on and to read keys from.

    Textual draws on standard error.
    """
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return os.environ.get("TERM") not in ("dumb", "unknown") and all(
        stream is not None and stream.isatty() for stream in streams
    )


# -- as text ---------------------------------------------------------------------------


def _once(watch: Watch, as_json: bool) -> int:
    picture = _wait(watch)
    if picture.overview is None:
        raise CommandError(picture.trouble or "nothing to be seen")
    print(_document(picture, indent=1) if as_json else _block(picture))
    return EXIT_OK


def _repeat(watch: Watch, as_json: bool, interval: float) -> int:
    between = ""
    while True:
        due = time.monotonic() + interval
        picture = _wait(watch)
        if as_json:
            print(_document(picture), flush=True)
        else:
            print(f"{between}{_block(picture)}", flush=True)
            between = "\n"
        time.sleep(max(due - time.monotonic(), 0.0))


def _wait(watch: Watch) -> Picture:
    answer = watch.start()
    while not answer.done():
        wait([answer], _TICK)
    return answer.result()


def _block(picture: Picture) -> str:
    trouble = picture.trouble_at(time.monotonic())
    if trouble is not None or picture.overview is None:
        # No old figures: in a log they would be taken for new ones.
        return f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}  {trouble}"
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    found = [*lines(picture.overview, width), slots_text(picture.overview)]
    if picture.server is not None:
        found.append(str(picture.server))
        found += [f"Warning: {printable(text)}" for text in picture.server.warnings]
    return "\n".join(found)


def _document(picture: Picture, indent: int | None = None) -> str:
    if picture.trouble is not None or picture.overview is None:
        taken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        document: dict[str, Any] = {"taken_at": taken, "error": picture.trouble}
    else:
        document = picture.overview.as_dict()
        if picture.server is not None:
            document["server"] = picture.server.as_dict()
    # DEL is the one control character that json leaves as it is.
    return json.dumps(document, indent=indent).replace("\x7f", "\\u007f")


# -- what is looked at -----------------------------------------------------------------


def find_watch(arguments: argparse.Namespace) -> Watch:
    """Return a watch on what the arguments and the environment name.

    :raises CommandError: if that is nothing, or something is wrong with it.
    """
    given = {} if arguments.ledger is None else {"ledger": arguments.ledger}
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
            store = make_store(ledger, database, observes=True)
    except (exc.ArgumentError, LedgerError) as error:
        raise CommandError(str(error)) from None
    except ImportError as error:
        raise CommandError(
            f"{error.name} is not installed: pip install 'sqla-fairpool[postgresql]'"
        ) from None
    is_asked = database is not None and (
        arguments.url is not None or database.get_backend_name() == "postgresql"
    )
    return Watch(store, database if is_asked else None)


def _only_ledger() -> str:
    """Return the host ledger that is meant when no URL says which database."""
    paths = known_ledgers()
    if not paths:
        raise CommandError(
            f"nobody has used a ledger here yet, and no {DATABASE} says which one to "
            "wait for: give --url or --ledger PATH"
        )
    # Files that are left from earlier do not count, beside one that is in use.
    paths = [path for path in paths if _is_in_use(path)] or paths
    if len(paths) > 1:
        found = ", ".join(str(path) for path in paths)
        raise CommandError(
            f"there are {len(paths)} ledgers, {found}: give --url or --ledger PATH"
        )
    return str(paths[0])


def _is_in_use(path: Path) -> bool:
    """Tell if a member of a host ledger lives, or may live."""
    store = HostStore(path)
    try:
        store.open()
        report = read(store)
        return report is not None and any(member.alive for member in report.members)
    except (StoreAway, LedgerError):
        return True
    finally:
        store.close()


# -- looking ---------------------------------------------------------------------------


def in_background(function: Callable[..., _T], *arguments: Any) -> Future[_T]:
    """Run a function in a new daemon thread, which is left behind if it hangs."""
    future: Future[_T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)  # for the thread that asks for the result

    threading.Thread(target=work, daemon=True).start()
    return future


@dataclass(frozen=True, slots=True)
class Picture:
    """What was seen last, and what is wrong now."""

    #: None if nothing was ever seen.
    overview: Overview | None = None
    server: ServerFigures | None = None
    #: When the overview was taken, on the clock.
    seen_at: float = 0.0
    #: Why the last look failed, None if it did not.
    trouble: str | None = None

    def trouble_at(self, now: float) -> str | None:
        """Return the trouble, and how old the overview is by now."""
        if self.trouble is None or self.overview is None:
            return self.trouble
        age = seconds_text(max(int(now - self.seen_at), 0))
        return f"{self.trouble}, last seen {age} ago"


class Watch:
    """Looks again and again, also after the ledger or its server was away.

    :param store: the ledger.
    :param server: the URL of the server that is asked as well, if one is.
    :param clock: seconds.
    """

    def __init__(
        self,
        store: HostStore | PostgresStore,
        server: URL | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = store.name
        self._is_file = isinstance(store, HostStore)
        self._observer = Observer(store)
        self._view = None if server is None else ServerView(server)
        self._clock = clock
        self._last = Picture()
        self._looking: Future[Picture] | None = None
        #: The last question to the server, and when it was asked.
        self._asking: Future[ServerFigures] | None = None
        self._asked_at = 0.0

    def start(self) -> Future[Picture]:
        """Begin a look, in the background. The one before must have ended."""
        self._looking = in_background(self.look)
        return self._looking

    def look(self) -> Picture:
        """Return the picture of this moment, or the last one and what is wrong."""
        last = self._last
        try:
            if self._is_file and not os.path.exists(self.name):  # it would be created
                raise LedgerError(
                    f"there is no ledger at {self.name}: nobody has used it yet"
                )
            overview = self._observer.look()
        except (StoreAway, LedgerError) as error:
            self._observer.close()  # the next look opens it again
            text = printable(hide_passwords(" ".join(str(error).split())))
            if isinstance(error, StoreAway):
                text = f"the ledger is away: {text}"
            self._last = Picture(last.overview, last.server, last.seen_at, text)
        else:
            now = self._clock()
            self._last = Picture(overview, self._ask_server(overview), now)
        return self._last

    def _ask_server(self, overview: Overview) -> ServerFigures | None:
        """Return what the server says, soon: it must not hold up the ledger's figures.

        While it does not answer, it is not asked again; a late answer is dropped.
        """
        if self._view is None:
            return None
        if self._asking is None or self._asking.done():
            self._asked_at = self._clock()
            self._asking = in_background(
                self._view.look, overview, self._observer.sessions
            )
        wait([self._asking], _PATIENCE)
        if not self._asking.done():
            silent = seconds_text(int(self._clock() - self._asked_at))
            return ServerFigures(error=f"does not answer, for {silent}")
        return self._asking.result()

    def close(self) -> None:
        """Close all connections, but for those that do not answer."""
        if self._looking is None or self._looking.done():
            wait([in_background(self._observer.close)], _PATIENCE)
        if self._view is not None and (self._asking is None or self._asking.done()):
            wait([in_background(self._view.close)], _PATIENCE)
