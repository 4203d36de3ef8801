"""What people see of a run of the benchmarks: a progress bar or lines, then tables.

The only file of the command that knows a terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .figures import Figure
from .report import Report, Section
from .svg import nice_number

__all__ = ["View", "make_view"]

#: Characters of a plain line.
_WIDTH = 100

#: Seconds between two plain lines.
_LINE_EVERY = 2.0


class View:
    """Plain lines, for a file or a pipe.

    :param scenarios: how many there will be.
    """

    def __init__(self, console: Console, scenarios: int) -> None:
        self._console = console
        self._scenarios = scenarios
        self._number = 0
        self._next_line = 0.0

    def note(self, text: str) -> None:
        """Something happens before the first scenario."""
        self._console.print(text, highlight=False, markup=False)

    def section(self, title: str) -> None:
        self._number += 1
        self.note(f"[{self._number}/{self._scenarios}] {title}")
        self._next_line = time.monotonic() + _LINE_EVERY

    def step(self, text: str, done: float) -> None:
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + _LINE_EVERY
            self.note(f"      {done:4.0%} {text}")

    def found(self, section: Section) -> None:
        if section.findings.figures:
            self._console.print(_figures_table(section.findings.figures))

    def close(self) -> None:
        """The run has ended, one way or another."""

    def report(self, report: Report, files: Sequence[Path]) -> None:
        """Show the targets, and where the report is."""
        figures, missing = report.figures, report.missing
        if figures or missing:
            self._console.print(_targets_table(report))
            met = sum(figure.verdict == "met" for figure in figures)
            total = len(figures) + len(missing)
            style = "green" if met == total else "yellow"
            self._console.print(Text(f"{met} of {total} targets met.", style=style))
        self.note(
            f"{report.seconds:.0f} s in all. The report: "
            f"{' and '.join(str(file) for file in files)}"
        )


class LiveView(View):
    """A progress bar, for a terminal."""

    def __init__(self, console: Console, scenarios: int) -> None:
        super().__init__(console, scenarios)
        self._progress = Progress(
            TimeElapsedColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=scenarios)
        self._progress.start()

    def section(self, title: str) -> None:
        self._number += 1
        self._progress.update(self._task, completed=self._number - 1, description=title)

    def step(self, text: str, done: float) -> None:
        self._progress.update(
            self._task, completed=self._number - 1 + done, description=text
        )

    def found(self, section: Section) -> None:
        self._console.print(Text(section.title, style="bold"))
        super().found(section)

    def close(self) -> None:
        self._progress.stop()


def make_view(scenarios: int) -> View:
    """Return the view that fits standard output."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return LiveView(Console(), scenarios)
    # Told everything, or FORCE_COLOR and its like would find their way.
    plain = Console(
        file=sys.stdout, force_terminal=False, color_system=None, width=_WIDTH
    )
    return View(plain, scenarios)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right")
    return table


def _spread(figure: Figure) -> str:
    low, high = figure.spread
    return f"{nice_number(low)} .. {nice_number(high)}" if low != high else ""


def _figures_table(figures: Sequence[Figure]) -> Table:
    table = _table("what", "beside", "median", "middle half")
    for figure in figures:
        table.add_row(
            figure.what, figure.beside, nice_number(figure.median), _spread(figure)
        )
    return table


def _targets_table(report: Report) -> Table:
    table = _table("target", "beside", "", "median", "middle half", "")
    for figure in report.figures:
        is_met = figure.verdict == "met"
        table.add_row(
            figure.what,
            figure.beside,
            str(figure.target),
            f"{figure.median:.3f}",
            _spread(figure),
            Text(figure.verdict, style="green" if is_met else "bold red"),
        )
    for target in report.missing:
        table.add_row(target.what, target.beside, str(target), "", "", "not run")
    return table
