"""What a run shows in the terminal: a line for what is measured now, then tables."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from ..harness.figures import Figure
from ..harness.findings import Report, Section
from .plots import nice_number

__all__ = ["View", "figures_lines", "figures_table"]

#: Seconds between two lines, where there is no terminal.
_LINE_EVERY = 2.0


class View:
    """Progress on standard output.

    :param scenarios: how many there will be.
    """

    def __init__(self, scenarios: int) -> None:
        is_live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        # Told everything, or FORCE_COLOR and its like would be heeded in a file.
        self._console = (
            Console()
            if is_live
            else Console(
                file=sys.stdout, force_terminal=False, color_system=None, width=100
            )
        )
        self._status = Status("", console=self._console) if is_live else None
        self._scenarios, self._number = scenarios, 0
        self._next_line = 0.0
        if self._status is not None:
            self._status.start()

    def note(self, text: str) -> None:
        """Show a line."""
        self._console.print(text, highlight=False, markup=False)

    def section(self, title: str) -> None:
        """A scenario begins."""
        self._number += 1
        self.note(f"[{self._number}/{self._scenarios}] {title}")
        self._next_line = time.monotonic() + _LINE_EVERY

    def step(self, text: str) -> None:
        """A measurement begins."""
        if self._status is not None:
            self._status.update(Text(text))
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY
            self.note(f"      {text}")

    def found(self, section: Section) -> None:
        """A scenario has ended."""
        if section.findings.figures:
            self._console.print(figures_table(section.findings.figures))

    def close(self) -> None:
        """The run has ended, one way or another."""
        if self._status is not None:
            self._status.stop()

    def report(self, report: Report, files: Sequence[Path]) -> None:
        """Show the targets, and where the report is."""
        figures, met = report.figures, report.met
        if figures:
            self._console.print(figures_table(figures))
            style = "green" if met == len(figures) else "yellow"
            told = f"{met} of {len(figures)} targets met."
            self._console.print(Text(told, style=style))
        self.note(
            f"{report.seconds:.0f} s in all. The report: "
            f"{' and '.join(str(file) for file in files)}"
        )


def figures_table(figures: Sequence[Figure], remarks: bool = False) -> Table:
    """Return the table of the figures.

    :param remarks: show them, below the figure that they belong to.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(
        ("what", "beside", "target", "median", "middle half", "")
    ):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for figure in figures:
        median = spread = ""
        if figure.values:
            low, high = map(nice_number, figure.spread)
            median = f"{figure.median:.3f}"
            spread = f"{low} .. {high}" if low != high else ""
        style = {"met": "green", "NOT MET": "bold red"}.get(figure.verdict, "")
        remark = f"\n  {figure.remark}" if remarks and figure.remark else ""
        table.add_row(
            Text(figure.what + remark),
            figure.beside,
            str(figure.target or ""),
            median,
            spread,
            Text(figure.verdict, style=style),
        )
    return table


def figures_lines(figures: Sequence[Figure], width: int) -> list[str]:
    """Return the table with its remarks as lines of plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(figures_table(figures, remarks=True))
    return captured.get().splitlines()
