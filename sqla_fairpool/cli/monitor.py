"""``sqla-fairpool monitor`` and ``stats``: who has the connections, at a glance.

The whole screen is in :mod:`.monitor_app`, which needs Textual. Plain text and JSON are
here, and so is what looks, again and again, whatever becomes of the ledger and of its
server. One that does not answer can hold a driver for minutes, inside C code, where no
signal is handled. So everything that asks one runs in a daemon thread, see
:func:`in_background`; the main thread waits only as long as it wants to. Thread pools
are of no use: their threads are joined when the program ends.
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
from typing import Any, TypeVar

from sqlalchemy.engine import URL

from ..ledger.errors import LedgerError
from ..ledger.inspector import Inspector
from ..ledger.overview import Overview
from ..ledger.overview_text import lines, printable, seconds_text
from ..ledger.store import StoreAway
from ..options import hide_passwords
from . import EXIT_OK, CommandError, one_line
from .ledger import AnyStore, add_places, find_store, require_file
from .server import ServerFigures, ServerView

_T = TypeVar("_T")

#: Seconds from one look to the next.
_INTERVAL = 5.0

#: Seconds after which a wait for an answer handles signals, on every system.
_TICK = 0.2

#: Seconds for the server's answer, and for closing connections; both take milliseconds.
_PATIENCE = 1.0

_EPILOG = """\
examples:
  sqla-fairpool monitor                       every 5 seconds
  sqla-fairpool monitor 1 --url postgresql://app@db/app
  sqla-fairpool monitor --ledger /run/scrapers/app.ledger
  watch sqla-fairpool monitor --once
  sqla-fairpool monitor 60 --json >> pool.jsonl

keys: q quit, p pause, s sort, + and - interval; up and down choose a scraper, d or
Enter shows it in detail, Esc all of them again; left and right scroll

The column server is what the server sees of a scraper: sessions at work, of all; "-"
where it has none, "?" where the role may not see what they do.

exit status: 0 after q or --once, 2 if nothing can be shown, 130 after Ctrl-C.

The environment's FAIRPOOL_LEDGER and DATABASE_URL stand in for --ledger and --url.
Without any of them, and with one ledger in use on this host, that one is shown.
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
    stats.set_defaults(once=True, seconds=_INTERVAL)
    what = "for programs: one JSON document per look, each on a line if not once"
    for command in (parser, stats):
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help=what)
        add_places(command)


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
    store, database = find_store(arguments)
    is_asked = database is not None and (
        arguments.url is not None or database.get_backend_name() == "postgresql"
    )
    poller = Poller(store, database if is_asked else None)
    try:
        if is_live:
            from .monitor_app import Monitor  # the import takes half a second

            app = Monitor(poller.start, arguments.seconds, store.name)
            return app.run_until_quit()
        return _print(poller, arguments.seconds, arguments.once, arguments.json)
    finally:
        poller.close()


def _has_terminal() -> bool:
    """Tell if there is a terminal; Textual draws on standard error."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return os.environ.get("TERM") not in ("dumb", "unknown") and all(
        stream is not None and stream.isatty() for stream in streams
    )


# -- looks -----------------------------------------------------------------------------


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


class Poller:
    """Looks again and again, also after the ledger or its server was away.

    :param server: the URL of the server that is asked as well, if one is.
    """

    def __init__(
        self,
        store: AnyStore,
        server: URL | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._inspector = Inspector(store)
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
            require_file(self._store)
            overview = self._inspector.look()
        except (StoreAway, LedgerError) as error:
            self._inspector.close()  # the next look opens it again
            text = printable(hide_passwords(one_line(error)))
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
            sessions = self._inspector.sessions
            self._asking = in_background(self._view.look, overview, sessions)
        wait([self._asking], _PATIENCE)
        if not self._asking.done():
            silent = seconds_text(int(self._clock() - self._asked_at))
            return ServerFigures(error=f"does not answer, for {silent}")
        return self._asking.result()

    def close(self) -> None:
        """Close all connections, but for those that do not answer."""
        if self._looking is None or self._looking.done():
            wait([in_background(self._inspector.close)], _PATIENCE)
        if self._view is not None and (self._asking is None or self._asking.done()):
            wait([in_background(self._view.close)], _PATIENCE)


# -- as text ---------------------------------------------------------------------------


def _print(poller: Poller, interval: float, is_once: bool, as_json: bool) -> int:
    """Print what is seen, once or until a signal."""
    while True:
        due = time.monotonic() + interval
        answer = poller.start()
        while not answer.done():
            wait([answer], _TICK)
        picture = answer.result()
        if is_once and picture.overview is None:
            raise CommandError(picture.trouble or "nothing to be seen")
        if as_json:
            print(_document(picture, indent=1 if is_once else None), flush=True)
        else:
            print(_block(picture), end="\n" if is_once else "\n\n", flush=True)
        if is_once:
            return EXIT_OK
        time.sleep(max(due - time.monotonic(), 0.0))


def _block(picture: Picture) -> str:
    trouble = picture.trouble_at(time.monotonic())
    if trouble is not None or picture.overview is None:
        # No old figures: in a log they would be taken for new ones.
        return f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}  {trouble}"
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    found = lines(picture.overview, width)
    if picture.server is not None:
        found.append(str(picture.server))
        found += [f"Warning: {printable(text)}" for text in picture.server.warnings]
    return "\n".join(found)


def _document(picture: Picture, indent: int | None) -> str:
    if picture.trouble is not None or picture.overview is None:
        taken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        document: dict[str, Any] = {"taken_at": taken, "error": picture.trouble}
    else:
        document = picture.overview.as_dict()
        if picture.server is not None:
            document["server"] = picture.server.as_dict()
    # DEL is the one control character that json leaves as it is.
    return json.dumps(document, indent=indent).replace("\x7f", "\\u007f")
