"""The monitor on the whole screen: a Textual application.

It starts looks and shows what they bring. It never waits for one, so keys always work.
Everything happens in :meth:`Monitor.tick`, a few times per second, and in the actions
of the keys.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, ClassVar

from rich.color import Color
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.renderables.bar import Bar
from textual.renderables.sparkline import Sparkline
from textual.scrollbar import ScrollBarRender
from textual.widgets import DataTable, Footer, ProgressBar, Static

from ..ledger import overview_text as texts
from ..ledger.overview import Overview, ScraperRow
from . import EXIT_OK, EXIT_SIGNAL
from .poller import Picture
from .server import Sessions

#: Looks that are kept for the history, and how many of them share a cell.
_LOOKS, _PER_CELL = 60, 3

#: Seconds from one tick to the next.
_TICK = 0.1

#: Steps of the interval, in seconds.
_STEPS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

#: Seconds without an answer after which the screen says so.
_SLOW = 2.0

#: Seconds in which a signal must have ended the program.
_GRACE = 5

_STATUS = {"active": "green", "idle": "yellow", "silent": "bold red"}

#: The orders of the rows, by the headings of their columns; ties are by name.
_ORDERS: dict[str, Callable[[ScraperRow], tuple[float, ...]]] = {
    "scraper": lambda row: (),
    "connections": lambda row: (-row.connections,),
    "waiting": lambda row: (-row.waiting, -(row.waiting_for or 0.0)),
    "idle": lambda row: (-(row.idle_for or -1.0),),
}

#: What the detail view shows of a scraper, in all and of each process.
_DETAILS: dict[str, Callable[[Any], str]] = {
    "connections": lambda row: str(row.connections),
    "longest hold": lambda row: texts.seconds_text(row.held_for),
    "waiting": lambda row: str(row.waiting),
    "longest wait": lambda row: texts.seconds_text(row.waiting_for),
    "checkouts": lambda row: f"{row.checkouts:,}",
    "time-outs": lambda row: f"{row.timeouts:,}",
    "used lately": lambda row: texts.seconds_text(row.usage),
    "own limits": texts.own_text,
}


def use_ascii() -> None:
    """Have Textual draw bars in this process with nothing but ASCII's characters."""
    Bar.HALF_BAR_LEFT = Bar.BAR = Bar.HALF_BAR_RIGHT = "="
    Sparkline.BARS = "_.:-=+*#"
    ScrollBarRender.VERTICAL_BARS = ScrollBarRender.HORIZONTAL_BARS = [" "] * 8


class Monitor(App[None]):
    """Shows who has the connections, until the user quits.

    :param look: starts a look, in the background.
    :param interval: seconds from one look to the next.
    :param name: the ledger's.
    """

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("Q,ctrl+d", "quit", show=False, priority=True),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
        Binding("p,space", "pause", "Pause"),
        Binding("s", "sort", "Sort"),
        Binding("plus,equals_sign", "interval(1)", "Interval", key_display="+/-"),
        Binding("minus,underscore", "interval(-1)", show=False),
        Binding("d", "detail", "Detail"),
        Binding("escape", "leave", show=False),
        Binding("ctrl+z", "suspend_process", show=False, priority=True),
    ]
    VERTICAL_BREAKPOINTS = [(0, "-low"), (16, "-high")]  # noqa: RUF012  (as Textual has it)
    CSS = """
    Static, Horizontal { height: auto; }
    Horizontal > Static { width: auto; }
    ProgressBar, Bar { width: 1fr; max-width: 40; }
    DataTable { height: 1fr; min-height: 3; }
    DataTable > .datatable--fixed { background: transparent; }
    #warnings { height: auto; max-height: 30%; }
    .paused { text-style: reverse; }
    .-high #figures, .-high #said { margin-bottom: 1; }
    .-low #ledger, .-low #figures, .-low #said { display: none; }
    """

    def __init__(
        self,
        look: Callable[[], Future[Picture]],
        interval: float,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.theme = "ansi-dark"  # the terminal's own colours
        self.interval = interval
        self.is_paused = False
        self.order = "scraper"
        #: The scraper that is shown in detail, None for the table of all.
        self.detail: str | None = None
        self.picture = Picture()
        #: The connections of the scrapers at the last looks.
        self.history: deque[dict[str, int]] = deque([{}] * _LOOKS, maxlen=_LOOKS)
        self._look = look
        self._ledger = texts.printable(name)
        self._clock = clock
        self._answer: Future[Picture] | None = None
        self._asked_at = self._due = clock()
        self._troubles = Text()
        try:
            self._marks = "▲▼"
            # What Textual draws on.
            self._marks.encode(getattr(sys.__stderr__, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            self._marks = "^v"
            use_ascii()

    def run_until_quit(self) -> int:
        """Return the exit status, after a key or a signal has ended it."""
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)  # they would hide a new size of the terminal
        asyncio.run(self._run_with_signals())
        return self.return_code or EXIT_OK

    async def _run_with_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def end(signum: int, frame: object) -> None:
            # Textual hangs when its terminal has gone: then the alarm ends it.
            signal.alarm(_GRACE)
            status = EXIT_SIGNAL + signum
            loop.call_soon_threadsafe(lambda: self.exit(return_code=status))

        outer = {}
        if sys.platform != "win32":
            signums = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
            outer = {signum: signal.signal(signum, end) for signum in signums}
        try:
            await self.run_async()
        finally:
            for signum, handler in outer.items():
                signal.signal(signum, handler)

    def compose(self) -> ComposeResult:
        """Return the widgets, from top to bottom."""
        yield Static(id="head")
        yield Static(f"ledger {self._ledger}", id="ledger", markup=False)
        with Horizontal():
            yield Static("pool ")
            yield ProgressBar(show_eta=False, show_percentage=False)
            yield Static(id="use")
        yield Static(id="figures")
        yield DataTable(cursor_type="row", fixed_columns=1)
        yield Static(id="said", markup=False)
        with VerticalScroll(id="warnings"):
            yield Static(id="troubles")
        yield Footer()

    def on_mount(self) -> None:
        """Begin."""
        # After Ctrl-Z the terminal shows an empty screen, and not what was drawn on it.
        self.app_resume_signal.subscribe(self, lambda _: self._draw_all())
        self._show()
        self.set_interval(_TICK, self.tick)
        self.tick()

    def _draw_all(self) -> None:
        self.screen.refresh(layout=True)
        for widget in self.screen.walk_children():
            widget.refresh()

    def tick(self) -> None:
        """Take an answer that has come, start a look that is due."""
        now = self._clock()
        if self._answer is not None and self._answer.done():
            self.picture, self._answer = self._answer.result(), None
            overview = self.picture.overview
            if overview is not None and self.picture.trouble is None:
                rows = overview.scrapers
                self.history.append({row.name: row.connections for row in rows})
            self._show()
        if self._answer is None and not self.is_paused and now >= self._due:
            self._answer, self._asked_at = self._look(), now
            self._due = now + self.interval
        self._show_troubles(now)

    # -- keys --------------------------------------------------------------------------

    def action_interrupt(self) -> None:
        """End as every command does after Ctrl-C."""
        self.exit(return_code=EXIT_SIGNAL + signal.SIGINT)

    def action_pause(self) -> None:
        """Look no more, or again: then at once."""
        self.is_paused = not self.is_paused
        self._due = self._clock()
        self._show()

    def action_sort(self) -> None:
        """Sort by something else."""
        orders = list(_ORDERS)
        self.order = orders[(orders.index(self.order) + 1) % len(orders)]
        self._show()

    def action_interval(self, direction: int) -> None:
        """Look less often (1), or more often (-1)."""
        steps = [s for s in _STEPS if (s - self.interval) * direction > 0]
        if steps:
            self.interval = min(steps, key=lambda s: abs(s - self.interval))
        self._due = self._asked_at + self.interval
        self._show()

    def action_detail(self) -> None:
        """Show the scraper under the cursor in detail, or all of them again."""
        is_table = self.detail is None
        self.detail = self._under_cursor() if is_table else None
        self._show()

    def on_data_table_row_selected(self) -> None:
        """Take Enter as ``d``."""
        self.action_detail()

    def action_leave(self) -> None:
        """Show all scrapers again."""
        self.detail = None
        self._show()

    # -- what is shown -----------------------------------------------------------------

    def _say(self, widget: str, text: str | Text) -> None:
        self.query_one(f"#{widget}", Static).update(text)

    def _show(self) -> None:
        """Show the picture, and what the keys have set."""
        overview = self.picture.overview
        taken = "" if overview is None else f"  {texts.time_text(overview)}"
        state = "PAUSED" if self.is_paused else f"every {self.interval:g} s"
        self._say("head", f"sqla-fairpool{taken}  {state}, by {self.order}")
        self.query_one("#head").set_class(self.is_paused, "paused")
        if overview is None:
            return
        used, capacity = overview.checked_out, overview.limits.capacity
        self.query_one(ProgressBar).update(total=capacity, progress=used)
        part, waiting = texts.percent(overview.utilization), overview.waiting
        self._say("use", f" {part}  {used} of {capacity} in use, {waiting} waiting")
        self._say("figures", texts.pool_text(overview))
        said = [] if overview.scrapers else ["no scrapers"]
        said += texts.summary(overview)
        if self.picture.server is not None:
            said.append(str(self.picture.server))
        self._say("said", "\n".join(said))
        order = _ORDERS[self.order]
        rows = sorted(overview.scrapers, key=order)  # those came by name
        shown = [row for row in rows if row.name == self.detail]
        if shown:
            self._fill(self._details(shown[0]))
        else:
            self.detail = None
            self._fill((row.name, self._cells(row, overview)) for row in rows)

    def _under_cursor(self) -> str | None:
        table = self.query_one(DataTable)
        if not table.row_count:
            return None
        return table.ordered_rows[table.cursor_row].key.value

    def _fill(self, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Fill the table; it stays where it is scrolled to, the cursor on its row."""
        table: DataTable[Any] = self.query_one(DataTable)
        (x, y), chosen = table.scroll_offset, self._under_cursor()
        table.clear(columns=True)
        for name, cells in rows:
            if not table.columns:
                for heading, cell in cells.items():
                    mark = self._marks[self.order != "scraper"]
                    text = heading + (mark if heading == self.order else "")
                    label = Text(text, justify=getattr(cell, "justify", None))
                    width = _LOOKS // _PER_CELL if heading == "history" else None
                    table.add_column(label, width=width)
            table.add_row(*cells.values(), key=name)
        names = [row.key.value for row in table.ordered_rows]
        if chosen in names:
            table.move_cursor(row=names.index(chosen), scroll=False)
        table.scroll_to(x, y, animate=False)

    def _cells(self, row: ScraperRow, overview: Overview) -> dict[str, Any]:
        """Return the cells of a scraper by their headings."""
        cells: dict[str, Any] = {}
        for column in texts.columns(overview):
            justify: Any = "right" if column.is_number else "left"
            cells[column.heading] = Text(column.text(row), justify=justify)
        cells["status"].stylize(_STATUS.get(row.status, ""))
        cells["waiting"].stylize("bold yellow" if row.waiting else "dim")
        if row.connections > row.limit:  # they drain as they come back
            cells["connections"].stylize("yellow")
        if self.picture.server is not None:
            # At work, of all.
            seen = self.picture.server.scrapers.get(row.name, Sessions())
            active = "?" if seen.hidden else seen.active
            text = f"{active}/{seen.sessions}" if seen.sessions else "-"
            style = "yellow" if seen.idle_in_transaction else ""
            cells["server"] = Text(text, style, justify="right")
        samples = [look.get(row.name, 0) for look in self.history]
        cells["history"] = _blocks(samples, overview.limits.capacity)
        cells["processes"] = cells.pop("processes")  # the last one
        return cells

    def _details(self, row: ScraperRow) -> Iterable[tuple[str, dict[str, Any]]]:
        """Yield the rows of the detail view: the scraper, and each of its processes."""
        rows: list[tuple[str, str, Any]] = [(texts.scraper_text(row), row.status, row)]
        for process, figures in row.parts:
            rows.append((texts.printable(f"  {process.who}"), process.state, figures))
        for number, (name, state, figures) in enumerate(rows):
            cells = {"scraper, processes": Text(name), "status": Text(state)}
            for heading, text in _DETAILS.items():
                cells[heading] = Text(text(figures), justify="right")
            yield str(number) if number else row.name, cells

    def _show_troubles(self, now: float) -> None:
        """Show what is wrong: first with the looks, then what they have found."""
        overview, server = self.picture.overview, self.picture.server
        trouble = self.picture.trouble_at(now)
        found = []
        if self._answer is not None and now - self._asked_at >= _SLOW:
            silent = texts.seconds_text(int(now - self._asked_at))
            found.append(f"no answer for {silent}")
        if overview is None and trouble is None:
            found.append(f"looking at {self._ledger} ...")
        found += server.warnings if server is not None else ()
        found += overview.warnings if overview is not None else ()
        lines = [Text(f"! {texts.printable(text)}", "yellow") for text in found]
        if trouble is not None:
            lines.insert(0, Text(f"! {trouble}", "bold red"))
        text = Text("\n").join(lines)
        if text != self._troubles:
            self._troubles = text
            self._say("troubles", text)


def _blocks(samples: list[int], capacity: int) -> Sparkline[int]:
    """Return the samples as blocks, each for the highest of some of them.

    The scale of a Sparkline is the range of its data. Here it is to be the capacity, so
    its ends are added to the data, where the cell cuts them off.
    """
    top = len(Sparkline.BARS) - 1
    # Rounded up: one connection is seen.
    levels = [-(-sample * top // capacity) for sample in samples]
    levels += [0] * _PER_CELL + [top] * _PER_CELL
    width, cyan = len(levels) // _PER_CELL, Color.parse("cyan")
    return Sparkline(levels, width=width, min_color=cyan, max_color=cyan)
