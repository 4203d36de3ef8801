"""What a run shows in the terminal: a line for what is measured now, then tables."""

from __future__ import annotations

import io
import math
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

from ..harness.findings import Figure, Report
from .page import busy
from .plots import nice_number

#: Seconds between two lines, where there is no terminal.
_LINE_EVERY = 2.0


class View:
    """Progress on standard output: a line that changes, or lines in a file."""

    def __init__(self, scenarios: int) -> None:
        self._scenarios, self._number, self._next_line = scenarios, 0, 0.0
        # Told everything, or FORCE_COLOR and its like would be heeded in a file.
        plain = {"force_terminal": False, "color_system": None, "width": 80}
        is_live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._console = Console(file=sys.stdout, **({} if is_live else plain))
        self._status = Status("", console=self._console)
        if is_live:
            self._status.start()
            self._next_line = math.inf
        self.close = self._status.stop

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def section(self, title: str) -> None:
        self._number += 1
        self.note(f"[{self._number}/{self._scenarios}] {title}")

    def step(self, text: str) -> None:
        self._status.update(Text(text))
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY
            self.note(f"      {text}")

    def found(self, figures: Sequence[Figure]) -> None:
        if figures:
            self._console.print(figures_table(figures))

    def report(self, report: Report, files: Sequence[Path]) -> None:
        self.found(report.figures)
        if report.figures:
            said = busy(report.about)
            met = f"{report.met} of {len(report.figures)} targets met"
            self.note(f"{met}, {said}." if said else f"{met}.")
        paths = " and ".join(str(file) for file in files)
        self.note(f"{report.seconds:.0f} s in all. The report: {paths}")


def figures_table(figures: Sequence[Figure], remarks: bool = False) -> Table:
    """Return the table of the figures, for eighty columns."""
    caption = "x: times what it is compared with; else an index, or as it says"
    look = {"box": SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(caption=caption, **look)
    table.add_column("what")
    for heading in ("target", "median", "middle half", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        is_ratio = figure.beside not in ("", "-")
        what = figure.what + f", compared with {figure.beside}" * is_ratio
        target = median = spread = ""
        if figure.target is not None:
            better = "less" if figure.target.at_most else "more"
            target = f"{figure.target.bound:.2f} or {better}"
        if figure.values:
            low, high = map(nice_number, figure.spread)
            median = f"{figure.median:.3f}{' x' if is_ratio else '  '}"
            spread = f"{low}..{high}" if low != high else ""
        style = {"met": "green", "NOT MET": "bold red"}.get(figure.verdict, "")
        remark = f"\n  {figure.remark}" if remarks and figure.remark else ""
        verdict = Text(figure.verdict, style=style)
        table.add_row(Text(what + remark), target, median, spread, verdict)
    return table


def figures_lines(figures: Sequence[Figure], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as captured:
        console.print(figures_table(figures, remarks=True))
    return captured.get().splitlines()
