"""``sqla-fairpool monitor`` and ``stats``: who has the connections, at a glance."""

from __future__ import annotations

import argparse
import errno
import json
import math
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from typing import Any

from ..ledger.overview_text import lines, printable, slots_text, wrapped
from .common import EXIT_OK, CommandError
from .errand import Errand
from .interrupts import Interrupted, Interrupts
from .monitor_board import Board
from .monitor_live import Live
from .server_view import server_text
from .terminal import Keys, Terminal, is_terminal
from .watching import Picture, Watch, find_place

__all__ = ["add_command"]

#: Seconds from one look to the next.
_INTERVAL = 5.0

#: Seconds after which a wait for an answer hears of signals, on every system.
_TICK = 0.2

_EPILOG = """\
examples:
  sqla-fairpool monitor                       every 5 seconds
  sqla-fairpool monitor 1 --url postgresql://app@db/app
  sqla-fairpool monitor --ledger /run/scrapers/app.ledger
  watch sqla-fairpool monitor --once
  sqla-fairpool monitor 60 --json >> pool.jsonl

keys: q quit, p pause, s sort, + and - interval

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
    _add_arguments(parser)
    parser.set_defaults(run=run)
    stats = commands.add_parser(
        "stats",
        help="tell once who has the connections",
        description="Tell once who has the connections, as monitor --once does.",
    )
    _add_arguments(stats)
    stats.set_defaults(run=run, once=True, seconds=_INTERVAL)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="for programs: one JSON document per look, on a line if there are more",
    )
    parser.add_argument(
        "--ledger", help="default: the environment's FAIRPOOL_LEDGER, or host"
    )
    parser.add_argument(
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
    :raises KeyboardInterrupt: after a signal; Ctrl-C just ends the live view.
    """
    is_live = not (arguments.once or arguments.json) and is_terminal(sys.stdout)
    # Names may have characters that the terminal's encoding has not.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace" if is_live else "backslashreplace")
    if is_live and find_spec("rich") is None:
        raise CommandError("rich not installed: pip install 'sqla-fairpool[monitor]'")
    place = find_place(arguments)
    watch = Watch(place, time.monotonic)
    looker = Errand(watch.look, watch.close)
    try:
        if is_live:
            return _live(looker, Board(arguments.seconds, place.name))
        if arguments.once:
            return _once(looker, arguments.json)
        return _repeat(looker, arguments.json, arguments.seconds)
    finally:
        looker.close()


# -- on the whole screen ---------------------------------------------------------------


class _Heard(Keys):
    """Keys. A signal is raised while they are read, never while a picture is drawn."""

    def __init__(self, keys: Keys, interrupts: Interrupts) -> None:
        self._keys = keys
        self._interrupts = interrupts

    def read(self, seconds: float) -> str:
        with self._interrupts.raising():
            return self._keys.read(seconds)

    def suspend(self) -> None:
        self._keys.suspend()


def _live(looker: Errand[Picture], board: Board) -> int:
    from .monitor_view import Screen

    try:
        with Interrupts() as interrupts, Terminal() as terminal, Screen() as screen:
            keys = _Heard(terminal, interrupts)
            Live(board, looker, keys, screen, time.monotonic).run()
    except Interrupted as interrupted:
        if interrupted.signum != signal.SIGINT:
            raise
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CommandError("the terminal is gone") from None
    return EXIT_OK


# -- as text ---------------------------------------------------------------------------


def _once(looker: Errand[Picture], as_json: bool) -> int:
    picture = _wait(looker)
    if picture.overview is None:
        raise CommandError(picture.trouble or "nothing to be seen")
    print(_document(picture, indent=1) if as_json else _block(picture))
    return EXIT_OK


def _repeat(looker: Errand[Picture], as_json: bool, interval: float) -> int:
    with Interrupts() as interrupts, interrupts.raising():
        between = ""
        while True:
            due = time.monotonic() + interval
            picture = _wait(looker)
            if as_json:
                print(_document(picture), flush=True)
            else:
                print(f"{between}{_block(picture)}", flush=True)
                between = "\n"
            time.sleep(max(due - time.monotonic(), 0.0))


def _wait(looker: Errand[Picture]) -> Picture:
    looker.ask()
    while True:
        picture = looker.poll(_TICK)
        if picture is not None:
            return picture


def _block(picture: Picture) -> str:
    trouble = picture.trouble_at(time.monotonic())
    if trouble is not None or picture.overview is None:
        # Nothing old: in a log it would be taken for new.
        taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return f"{taken}  {trouble}"
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    more = [slots_text(picture.overview)]
    if picture.server is not None:
        more.append(server_text(picture.server))
        more += [f"Warning: {printable(text)}" for text in picture.server.warnings]
    return "\n".join([*lines(picture.overview, width), *wrapped(more, width)])


def _document(picture: Picture, indent: int | None = None) -> str:
    if picture.trouble is not None or picture.overview is None:
        taken = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        document: dict[str, Any] = {"taken_at": taken, "error": picture.trouble}
    else:
        document = picture.overview.as_dict()
        if picture.server is not None:
            document["server"] = picture.server.as_dict()
    # The one control character that JSON lets stand as it is.
    return json.dumps(document, indent=indent).replace("\x7f", "\\u007f")
