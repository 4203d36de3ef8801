"""What people see of the demo: a live table on a terminal, elsewhere plain lines.

Nothing is drawn but in a call: there is no thread.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from ..stats import PoolStats

__all__ = ["Verdict", "View", "counts_text"]

_COMPARISON = (
    "A light scraper beside a heavy one, which may have half of a FairQueuePool, or, "
    "with soft_limit and max_limit at the pool's size (*), all that no other wants."
)


class Verdict(NamedTuple):
    """How a scenario came out; the pool's and the server's counts are medians."""

    scenario: str
    expected: tuple[int, ...]
    pool: tuple[int, ...]
    server: tuple[int, ...]
    problems: list[str]


class View:
    """Shows a run on standard output, and in the end what came out."""

    def __init__(self, steps: int, as_json: bool) -> None:
        self._steps, self._as_json = steps, as_json
        # Whatever FORCE_COLOR says: no colours in a file.
        is_terminal = sys.stdout.isatty()
        self._console = Console(quiet=as_json, force_terminal=is_terminal)
        # Where it cannot redraw, it shows nothing, and there are lines instead.
        self.live = Live(console=self._console, auto_refresh=False, transient=True)
        self._began = time.monotonic()
        self._next_look = 0.0
        self._step, self._title = 0, ""
        #: Figures of the pool, and the server's counts.
        self.seen: tuple[PoolStats, Mapping[str, int]] | None = None
        self.verdicts: list[Verdict] = []
        self.comparison: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, title: str) -> None:
        """A step begins."""
        self._step += 1
        self._title, self.seen = title, None
        if self._console.is_dumb_terminal or not self._console.is_terminal:
            self.note(f"[{self._step}/{self._steps}] {title}")

    def look(self) -> None:
        """Draw, if the last time is long enough ago."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + 0.125
        bar = ProgressBar(total=self._steps, completed=self._step - 0.5, width=24)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(f"{self._step}/{self._steps}", bar, f"[bold]{self._title}")
        parts = [grid, _verdicts_table(self.verdicts)]
        if self.seen is not None:
            parts.insert(1, _tags_table(*self.seen))
        self.live.update(Group(*parts), refresh=True)

    def report(self) -> bool:
        """Show what came out; return whether all of it is as expected."""
        ok = not any(verdict.problems for verdict in self.verdicts)
        if self._as_json:
            scenarios = [verdict._asdict() for verdict in self.verdicts]
            report = {"ok": ok, "scenarios": scenarios, "comparison": self.comparison}
            print(json.dumps(report, indent=2))
        show = self._console.print
        show(_verdicts_table(self.verdicts))
        for verdict in self.verdicts:
            for problem in verdict.problems:
                show(f"[red]{verdict.scenario}: {problem}")
        show(_COMPARISON, highlight=False)
        show(_comparison_table(self.comparison))
        outcome = "[green]All" if ok else "[bold red]Not all"
        seconds = time.monotonic() - self._began
        show(f"{outcome} scenarios came out as expected[/], {seconds:.1f} s in all.")
        return ok


def counts_text(counts: Iterable[int]) -> str:
    """Return ``7 / 7 / 6``."""
    return " / ".join(map(str, counts)) or "nothing"


def _table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    # Narrow gaps and headings on two lines: eighty columns are enough.
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _tags_table(stats: PoolStats, server: Mapping[str, int]) -> Table:
    numbers = ("limit", "fair\nshare", "waiting", "on\nserver", "checkouts")
    table = _table("scraper", "status", "connections", numbers=numbers)
    table.caption = f"{stats.checked_out} of {stats.capacity} in use; {stats.strategy}"
    for row in stats.tags:
        status = "[green]active" if row.active else "[yellow]idle"
        bar = f"{row.connections:2d} [magenta]{'━' * row.connections:15}"
        on_server = server.get(row.name, 0)
        counts = (row.limit, row.fair_share, row.waiting, on_server, row.checkouts)
        table.add_row(row.name, status, bar, *(f"{count:,}" for count in counts))
    return table


def _verdicts_table(verdicts: Iterable[Verdict]) -> Table:
    observed = ("observed\n(pool)", "observed\n(server)")
    table = _table("scenario", "expected", *observed, "verdict")
    for verdict in verdicts:
        sides = (verdict.expected, verdict.pool, verdict.server)
        outcome = "[bold red]FAILED" if verdict.problems else "[green]ok"
        table.add_row(verdict.scenario, *map(counts_text, sides), outcome)
    return table


def _comparison_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    numbers = ("checkouts\nper s", "longest\nwait ms", "threads\nnever served")
    table = _table("pool", "scraper", numbers=numbers)
    for row in rows:
        table.add_row(
            row["pool"] if row["scraper"] == "light" else "",
            row["scraper"],
            f"{row['checkouts_per_second']:,.0f}",
            f"{row['longest_wait'] * 1000:,.1f}",
            f"{row['never_served']} of {row['threads']}",
            style="bold red" if row["never_served"] else "",
        )
    return table
