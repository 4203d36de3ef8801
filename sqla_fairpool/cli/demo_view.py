"""What people see of the demo: a live table, plain lines, or one JSON document.

The only file of the demo that knows a terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..stats import PoolStats, TagStats
from .demo_report import (
    SCRAPERS,
    Comparison,
    LoadFigures,
    Report,
    Scenario,
    Verdict,
    counts_text,
)

__all__ = ["View", "make_view"]

#: Characters; wider lines are hard to read across.
_WIDTH = 100

#: Refreshes of the live table in a second.
_FRAMES = 8

#: Seconds between two plain lines with figures.
_LINE_EVERY = 1.0


_COMPARISON_TEXT = (
    "A light scraper, with one thread, beside a heavy one, on pools of the same size. "
    "By default the heavy one may have half of a FairQueuePool while another is "
    "active; with soft_limit and max_limit at the pool's size (*), all that nobody "
    'else wants. ">": was still waiting when the measurement ended.'
)


class View:
    """Shows nothing while the demo runs. The others show something.

    :param show: shows the report, when everything else is over.
    """

    def __init__(self, show: Callable[[Report], None]) -> None:
        self.show = show
        self._steps = 0
        self._step = 0
        self._seconds = 0.0

    def begin(self, steps: int, seconds: float) -> None:
        """The demo begins: so many steps, each observed for so long."""
        self._steps, self._seconds = steps, seconds

    def note(self, text: str) -> None:
        """Something happens before the first step."""

    def server(self, server: Mapping[str, Any]) -> None:
        """The server is there."""

    def scenario(self, scenario: Scenario) -> None:
        """A scenario begins."""
        self._step += 1

    def figures(self, stats: PoolStats, server: Mapping[str, int]) -> None:
        """The figures of one moment: the pool's, and the server's counts."""

    def verdict(self, verdict: Verdict) -> None:
        """A scenario has ended."""

    def comparison(self, pool: str) -> None:
        """The measurement of a pool begins."""
        self._step += 1

    def tick(self) -> None:
        """Time passes, without figures."""

    def close(self) -> None:
        """The demo has ended, one way or another."""


class PlainView(View):
    """Lines, for a file or a pipe."""

    def __init__(self, out: TextIO) -> None:
        # Told everything, or FORCE_COLOR and its like would find their way.
        console = Console(
            file=out, force_terminal=False, color_system=None, width=_WIDTH
        )
        super().__init__(lambda report: _show_report(console, report))
        self._out = out
        self._next_line = 0.0

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def note(self, text: str) -> None:
        self._print(text)

    def server(self, server: Mapping[str, Any]) -> None:
        self._print(_server_text(server))

    def scenario(self, scenario: Scenario) -> None:
        super().scenario(scenario)
        self._print(
            f"[{self._step}/{self._steps}] {scenario.title}: "
            f"expected {_expected_text(scenario)}"
        )
        self._next_line = time.monotonic() + _LINE_EVERY

    def figures(self, stats: PoolStats, server: Mapping[str, int]) -> None:
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + _LINE_EVERY
        parts = [
            f"{row.name} {row.connections} (server {server.get(row.name, 0)}, "
            f"waiting {row.waiting})"
            for row in stats.tags
        ]
        self._print(f"      {', '.join(parts)}")

    def verdict(self, verdict: Verdict) -> None:
        pool, server = _seen_texts(verdict)
        self._print(
            f"      pool {pool}, server {server}: {_verdict_text(verdict)} "
            f"({verdict.samples} samples)"
        )

    def comparison(self, pool: str) -> None:
        super().comparison(pool)
        self._print(f"[{self._step}/{self._steps}] light beside heavy: {pool}")


class LiveView(View):
    """A table that follows the pool, on a terminal."""

    def __init__(
        self, console: Console, show: Callable[[Report], None] | None = None
    ) -> None:
        super().__init__(show or (lambda report: _show_report(console, report)))
        # Refreshed by us: no thread, and nothing is drawn in a signal's middle.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._began = time.monotonic()
        self._next_frame = 0.0
        self._title = ""
        self._server = ""
        self._figures: Table | None = None
        self._verdicts: list[Verdict] = []

    def begin(self, steps: int, seconds: float) -> None:
        super().begin(steps, seconds)
        self._live.start()

    def note(self, text: str) -> None:
        self._new_title(text)

    def server(self, server: Mapping[str, Any]) -> None:
        self._server = _server_text(server)

    def scenario(self, scenario: Scenario) -> None:
        super().scenario(scenario)
        self._new_title(f"{scenario.title}: expected {_expected_text(scenario)}")

    def figures(self, stats: PoolStats, server: Mapping[str, int]) -> None:
        if time.monotonic() >= self._next_frame:
            bar_width = 20 if self._live.console.width >= _WIDTH else 10
            self._figures = _figures_table(stats, server, bar_width)
            self._draw()

    def verdict(self, verdict: Verdict) -> None:
        self._verdicts.append(verdict)

    def comparison(self, pool: str) -> None:
        super().comparison(pool)
        self._figures = None
        self._new_title(f"a light scraper beside a heavy one: {pool}")

    def tick(self) -> None:
        if time.monotonic() >= self._next_frame:
            self._draw()

    def close(self) -> None:
        self._live.stop()

    def _new_title(self, title: str) -> None:
        self._title = title
        self._began = time.monotonic()
        self._draw()

    def _draw(self) -> None:
        self._next_frame = time.monotonic() + 1 / _FRAMES
        parts: list[Any] = [Text(self._server, style="dim", overflow="ellipsis")]
        parts.append(self._progress())
        if self._figures is not None:
            parts.append(self._figures)
        if self._verdicts:
            parts.append(_verdicts_table(self._verdicts))
        self._live.update(Group(*parts), refresh=True)

    def _progress(self) -> Table:
        # A step also settles before it is observed: not full before it ends.
        elapsed = (time.monotonic() - self._began) / self._seconds
        done = max(self._step - 1, 0) + (min(elapsed, 0.95) if self._step else 0)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text(f"{self._step}/{self._steps}"),
            ProgressBar(total=self._steps, completed=done, width=24),
            Text(self._title, style="bold"),
        )
        return grid


def make_view(as_json: bool) -> View:
    """Return the view that fits standard output and the wish for JSON."""
    if as_json:
        if _is_terminal(sys.stderr):
            return LiveView(Console(stderr=True), _print_json)
        return View(_print_json)
    if _is_terminal(sys.stdout):
        return LiveView(Console())
    return PlainView(sys.stdout)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _print_json(report: Report) -> None:
    print(json.dumps(report.as_dict(), indent=2))


def _server_text(server: Mapping[str, Any]) -> str:
    where = "started for this demo" if server["embedded"] else server["url"]
    return f"PostgreSQL {server['version']}, {where}, table {server['table']}"


def _expected_text(scenario: Scenario) -> str:
    order = " in any order" if scenario.any_order else ""
    return counts_text(scenario.expected) + order


def _seen_texts(verdict: Verdict) -> tuple[str, str]:
    pool, server = (
        "nothing" if seen is None else counts_text(seen.median)
        for seen in (verdict.pool, verdict.server)
    )
    return pool, server


def _verdict_text(verdict: Verdict) -> Text:
    if verdict.ok:
        return Text("ok", style="green")
    return Text("FAILED", style="bold red")


def _figures_table(
    stats: PoolStats, server: Mapping[str, int], bar_width: int
) -> Table:
    table = _table()
    table.caption_justify = "left"
    table.caption = (
        f"{stats.checked_out} of {stats.capacity} connections in use, "
        f"{stats.waiting} callers wait; {stats.strategy}"
    )
    table.add_column("scraper")
    table.add_column("status")
    table.add_column("connections", min_width=bar_width + 3)
    for name in ("limit", "fair\nshare", "waiting", "on\nserver", "checkouts"):
        table.add_column(name, justify="right")
    names = dict.fromkeys([*SCRAPERS, *(row.name for row in stats.tags)])
    for name in names:
        row = stats.tag(name)
        if row is None:
            table.add_row(name, Text("-", style="dim"))
            continue
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            f"{row.connections:2d}",
            ProgressBar(stats.capacity, row.connections, width=bar_width),
        )
        table.add_row(*_figures_row(row, bar, server.get(name, 0)))
    return table


def _figures_row(row: TagStats, bar: Table, on_server: int) -> list[Any]:
    status = Text("active", "green") if row.active else Text("idle", "yellow")
    numbers = (row.limit, row.fair_share, row.waiting, on_server, row.checkouts)
    return [row.name, status, bar, *(f"{number:,}" for number in numbers)]


def _verdicts_table(verdicts: list[Verdict]) -> Table:
    table = _table()
    names = [
        "scenario",
        "expected",
        "observed\n(pool)",
        "observed\n(server)",
        "verdict",
    ]
    for name in names:
        table.add_column(name)
    for verdict in verdicts:
        expected = counts_text(verdict.scenario.expected)
        table.add_row(
            verdict.scenario.title,
            expected,
            *_seen_texts(verdict),
            _verdict_text(verdict),
        )
    return table


def _comparison_table(comparisons: tuple[Comparison, ...]) -> Table:
    table = _table()
    table.add_column("pool")
    table.add_column("scraper")
    names = ["checkouts\nper s", "p99 wait\nms", "longest\nwait ms", "time-\nouts"]
    for name in [*names, "threads\nnever served"]:
        table.add_column(name, justify="right")
    for comparison in comparisons:
        pool = comparison.pool
        for load in comparison.scrapers:
            table.add_row(pool, load.scraper, *_load_texts(load))
            pool = ""
    return table


def _load_texts(load: LoadFigures) -> list[Text]:
    starved = "bold red" if load.never_served else ""
    return [
        Text(f"{load.checkouts_per_second:,.0f}"),
        Text(_wait_text(load.wait_p99, load.p99_still_waiting)),
        Text(_wait_text(load.wait_longest, load.longest_still_waiting)),
        Text(f"{load.timeouts}"),
        Text(f"{load.never_served} of {load.threads}", style=starved),
    ]


def _wait_text(seconds: float, still_waiting: bool) -> str:
    milliseconds = seconds * 1000
    number = f"{milliseconds:,.1f}" if milliseconds < 100 else f"{milliseconds:,.0f}"
    return f"> {number}" if still_waiting else number


def _table() -> Table:
    # Narrow gaps and headings on two lines: eighty columns are enough.
    return Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _show_report(console: Console, report: Report) -> None:
    console.print(_verdicts_table(list(report.verdicts)))
    for verdict in report.verdicts:
        for problem in verdict.problems:
            console.print(Text(f"{verdict.scenario.title}: {problem}", style="red"))
    console.print(_COMPARISON_TEXT, highlight=False)
    console.print(_comparison_table(report.comparisons))
    outcome = (
        Text("All scenarios came out as expected", style="green")
        if report.ok
        else Text("Not all scenarios came out as expected", style="bold red")
    )
    console.print(outcome.append(f", {report.seconds:.1f} s in all.", style="default"))
