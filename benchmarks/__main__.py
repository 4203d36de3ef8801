"""``python -m benchmarks``: each claim measured, beside what there is, in one run."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlalchemy import exc

from .harness.bench import Bench, Scenario
from .harness.database import BenchError, Database, open_database, reason
from .harness.findings import TARGETS, Figure, Report
from .report.page import machine, page, versions
from .report.view import View
from .scenarios import SCENARIOS, play

_EPILOG = """\
examples:
  python -m benchmarks --short
  python -m benchmarks --output results/monday
  python -m benchmarks --only alone --only peers --url postgresql://user@host/database

Let the machine be otherwise idle. What the short form leaves out is smaller: fewer
rounds, and no curves. A target that is not met is told, and does not fail the run
unless there is --check: time on a busy machine proves little.

exit status: 0, 1 if with --check a target was not met, 2 if it could not run, 130
after Ctrl-C (what has been measured is written, and nothing else left behind).
"""


def make_argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description="Measure FairQueuePool and other pools, on a real PostgreSQL "
        "and on none, and write a report with plots: PREFIX.html and PREFIX.json.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, what in {
        "--short": "the short form, some two minutes",
        "--list": "list the scenarios, and run none",
        "--check": "exit with 1 if a target is not met",
    }.items():
        parser.add_argument(flag, action="store_true", help=what)
    parser.add_argument(
        "--url",
        help="use this PostgreSQL database, and not an embedded server; tables have "
        "names of their own and are dropped at the end",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PREFIX",
        help="where the report goes, a path without a suffix; default: fairpool-bench, "
        "and the names of the scenarios that --only has chosen",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=[scenario.name for scenario in SCENARIOS],
        metavar="SCENARIO",
        help="run this scenario; may be given several times (default: all)",
    )
    return parser


def main(args: Sequence[str] | None = None) -> int:
    arguments = make_argument_parser().parse_args(args)
    if arguments.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:12} {scenario.title}")
        return 0
    chosen = [s for s in SCENARIOS if not arguments.only or s.name in arguments.only]
    try:
        report = _run(arguments, chosen)
    except (BenchError, exc.SQLAlchemyError) as error:
        print(f"benchmarks: {' '.join(reason(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 1 if arguments.check and not report.ok else 0


def _run(arguments: argparse.Namespace, scenarios: Sequence[Scenario]) -> Report:
    """Run the scenarios and write the report; of a part, if it is interrupted."""
    only = [scenario.name for scenario in scenarios if arguments.only]
    default = Path("-".join(["fairpool-bench", *only]))
    html, data = _output_files(arguments.output or default)
    began = time.monotonic()
    targets = [TARGETS[key] for s in scenarios for key in s.targets]
    report = Report(_about(arguments, None), targets=targets)
    view = View(len(scenarios))
    sessions = max(scenario.sessions for scenario in scenarios)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended as by Ctrl-C
    try:
        with ExitStack() as stack:
            stack.callback(view.close)
            database = None
            if sessions:
                if arguments.url is None:
                    view.note("starting an embedded PostgreSQL ...")
                database = stack.enter_context(open_database(arguments.url, sessions))
                report.about = _about(arguments, database)
            bench = Bench(short=arguments.short, database=database, on_step=view.step)
            for scenario in scenarios:
                view.section(scenario.title)
                section = play(bench, scenario)
                view.found(section.of(Figure))
                report.sections.append(section)
                report.seconds = time.monotonic() - began
    except KeyboardInterrupt:
        report.cut_short = "The run was interrupted: not all was measured."
        raise
    finally:
        if report.sections:
            html.write_text(page(report), encoding="utf-8")
            text = json.dumps(report.as_dict(), indent=1, ensure_ascii=False)
            data.write_text(text + "\n", encoding="utf-8")
    view.report(report, (html, data))
    return report


def _about(arguments: argparse.Namespace, database: Database | None) -> dict[str, Any]:
    server = database.about if database else None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "form": "short" if arguments.short else "full",
        "machine": machine(),
        "versions": versions() | ({"PostgreSQL": server["version"]} if server else {}),
        "server": server,
    }


def _output_files(prefix: Path) -> tuple[Path, Path]:
    """Return the report's files; find out now, not at the end, if they can be."""
    html, data = (prefix.with_name(prefix.name + end) for end in (".html", ".json"))
    try:
        for file in (html, data):
            file.open("a", encoding="utf-8").close()
            if not file.stat().st_size:
                file.unlink()
    except OSError as error:
        raise BenchError(f"--output: {error.filename}: {error.strerror}") from None
    return html, data


if __name__ == "__main__":
    sys.exit(main())
