"""The monitor's screen, made of rich's texts. Knows sizes, and nothing of a terminal.

Every line is cut to the width, and the lines to the height. What is less important goes
first, whole columns and whole lines.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..overview import Overview, ScraperRow
from ..overview_text import (
    allocation_text,
    efficiency_text,
    percent,
    printable,
    seconds_text,
    slots_text,
    time_text,
)
from .monitor_board import KEYS, Board
from .server_view import server_text

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Screen", "frame"]

_FULL, _EMPTY, _SPARKS = "█", "░", "▁▂▃▄▅▆▇█"

_STATUS = {"active": "green", "idle": "yellow", "silent": "bold red"}

#: Rows of the table that other lines make room for, as far as there are that many.
_ROWS_WANTED = 5

#: Most lines of one warning.
_WARNING_LINES = 2

#: For wrapping alone.
_WRAPPER = Console(file=io.StringIO(), force_terminal=False, color_system=None)


class Screen:
    """Context manager: the terminal's other screen, which the view has for itself."""

    def __init__(self, console: Console | None = None) -> None:
        # It has been found to be a terminal; variables must not say otherwise.
        self._console = console or Console(force_terminal=True)
        self._live: Live | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, now."""
        return self._console.size

    def __enter__(self) -> Self:
        # Refreshed by us: no thread, one write for each picture.
        self._live = Live(
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        return self

    def __exit__(self, *details: object) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def draw(self, board: Board, now: float) -> None:
        """Show the board."""
        assert self._live is not None
        self._live.update(frame(board, *self.size, now), refresh=True)

    @contextmanager
    def left(self) -> Iterator[None]:
        """Leave the screen for the block."""
        self.__exit__()
        yield
        self.__enter__()


def frame(board: Board, width: int, height: int, now: float) -> Text:
    """Return the screen: lines, none wider than `width`, no more than `height`.

    :param now: what the clock says.
    """
    top = _head(board, width)
    bottom = [_footer(board)]
    warnings = _warnings(board, now, width, max(height // 4, 1))
    overview = board.picture.overview
    if overview is None:
        waiting = "" if board.picture.trouble else f"looking at {board.name} ..."
        body = [Text(printable(waiting))]
        return _joined([*top, Text(), *warnings, *body], bottom, width, height)
    before, after = _sections(board, overview, width)
    rows = board.rows()
    room = height - len(top) - len(bottom) - len(warnings)
    wanted = min(len(rows), _ROWS_WANTED) + 1
    kept = _fitting([*before, *after], room - wanted)
    table_room = room - sum(rank in kept for rank, _ in (*before, *after))
    middle = [text for rank, text in before if rank in kept]
    middle += _table(board, overview, rows, width, table_room)
    middle += [text for rank, text in after if rank in kept]
    return _joined([*top, *middle, *warnings], bottom, width, height)


#: The rank of a line, the smaller the more important, and the line.
_Ranked = tuple[int, Text]


def _fitting(lines: Sequence[_Ranked], room: int) -> set[int]:
    """Return the ranks of the lines that have room."""
    return set(sorted(rank for rank, _ in lines)[: max(room, 0)])


def _joined(
    lines: Sequence[Text], bottom: Sequence[Text], width: int, height: int
) -> Text:
    shown = list(lines)[: max(height - len(bottom), 0)]
    shown += [Text()] * (height - len(bottom) - len(shown))
    shown += bottom
    for line in shown:
        line.truncate(width, overflow="ellipsis")
    joined = Text("\n", no_wrap=True, end="").join(shown[:height])
    joined.no_wrap, joined.end, joined.overflow = True, "", "crop"
    return joined


# -- lines beside the table ------------------------------------------------------------


def _head(board: Board, width: int) -> list[Text]:
    overview = board.picture.overview
    parts: list[str | tuple[str, str]] = [("sqla-fairpool", "bold")]
    if overview is not None:
        parts.append(f"  {time_text(overview)}")
    if board.is_paused:
        parts += ["  ", ("PAUSED", "reverse yellow")]
    else:
        parts.append(f"  every {board.interval:g} s")
    return [Text.assemble(*parts)]


def _footer(board: Board) -> Text:
    footer = Text()
    for key, what in KEYS:
        footer.append(f" {key} ", style="reverse")
        more = {"sort": f": {board.sort}", "interval": f": {board.interval:g} s"}
        if what == "pause" and board.is_paused:
            what = "go on"
        footer.append(f" {what}{more.get(what, '')}  ")
    return footer


def _sections(
    board: Board, overview: Overview, width: int
) -> tuple[list[_Ranked], list[_Ranked]]:
    """Return the lines above and below the table."""
    before = [
        (6, Text(f"ledger {printable(board.name)}", style="dim")),
        (9, Text()),
        (1, _pool_bar(overview, width)),
        (4, _pool_figures(overview, width)),
        (8, Text()),
    ]
    after = [
        (7, Text()),
        (2, Text(allocation_text(overview))),
        (5, Text(efficiency_text(overview))),
    ]
    if board.picture.server is not None:
        is_error = board.picture.server.error is not None
        style = "yellow" if is_error or board.picture.server.is_elsewhere else ""
        after.append((3, Text(server_text(board.picture.server), style=style)))
    after.append((10, Text(slots_text(overview))))
    return before, after


def _pool_bar(overview: Overview, width: int) -> Text:
    used = overview.utilization
    told = (
        f" {percent(used):>5}  {overview.checked_out} of "
        f"{overview.limits.capacity} in use, {overview.waiting} waiting"
    )
    length = max(min(width - len(told) - 5, 40), 8)
    style = "red" if overview.waiting else "green"
    return Text.assemble(("pool ", "bold"), _bar(used, length, style), told)


def _bar(part: float, length: int, style: str) -> Text:
    full = min(round(part * length), length)
    full = max(full, 1) if part > 0 else full
    return Text.assemble(
        (_FULL * full, style), (_EMPTY * (length - full), "bright_black")
    )


def _pool_figures(overview: Overview, width: int) -> Text:
    limits = overview.limits
    figures = [
        f"total {limits.capacity}",
        f"available {overview.available}",
        f"overflow {overview.overflow}",
        f"open {overview.open}",
        f"quarantined {limits.quarantined}",
    ]
    return Text("     " + "  ".join(figures))


def _warnings(board: Board, now: float, width: int, most: int) -> list[Text]:
    """Return what is wrong, in no more than so many lines."""
    lines: list[Text] = []
    troubles = board.troubles(now)
    for number, trouble in enumerate(troubles):
        is_trouble = number == 0 and board.picture.trouble is not None
        style = "bold red" if is_trouble else "yellow"
        text = Text(f"! {printable(trouble)}", style=style)
        wrapped = list(text.wrap(_WRAPPER, width))
        if len(wrapped) > _WARNING_LINES:
            rest = Text(" ").join(wrapped[_WARNING_LINES - 1 :])
            wrapped[_WARNING_LINES - 1 :] = [rest]
        is_last = number == len(troubles) - 1
        if len(lines) + len(wrapped) > most - (not is_last):
            if not lines:
                return [Text(text.plain, style=style)]
            left = len(troubles) - number
            return [*lines, Text(f"! ... and {left} more warnings", style="yellow")]
        lines += wrapped
    return lines


# -- the table -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table.

    :param heading: the short one, and the one for where there is room.
    :param cell: makes a row's cell, which gets the column's width.
    :param rank: the greater, the sooner the column goes.
    :param least: columns of the terminal that it needs.
    :param most: those it can make use of.
    """

    heading: tuple[str, str]
    cell: Callable[[ScraperRow, int], Text]
    rank: int
    least: int
    most: int = 0
    is_number: bool = True


def _table(
    board: Board,
    overview: Overview,
    rows: Sequence[ScraperRow],
    width: int,
    height: int,
) -> list[Text]:
    if height < 2:
        return []
    if not rows:
        return [Text("no scrapers", style="dim")]
    shown = rows if len(rows) < height else rows[: max(height - 2, 1)]
    columns = _chosen(_columns(board, overview, shown, width), width)
    gap = _gap(width)
    lines = [_line([_heading(column, size) for column, size in columns], columns, gap)]
    for row in shown:
        cells = [column.cell(row, size) for column, size in columns]
        lines.append(_line(cells, columns, gap))
    if len(shown) < len(rows) and height > 2:
        lines.append(Text(f"... and {len(rows) - len(shown)} more", style="dim"))
    return lines


def _gap(width: int) -> int:
    return 2 if width >= 100 else 1


def _columns(
    board: Board, overview: Overview, rows: Sequence[ScraperRow], width: int
) -> list[_Column]:
    capacity = overview.limits.capacity
    longest = max(cell_len(printable(row.scraper)) for row in rows)
    # A long name must not take the place of all figures.
    name = min(longest, max(width // 4, 10))
    digits = max(len(str(capacity)), 2)
    processes = max(len(" ".join(row.processes)) for row in rows)
    columns = [
        _Column(("scraper",) * 2, _name, 0, max(name, 7), max(longest, 7), False),
        _Column(("status",) * 2, _status, 4, 6, is_number=False),
        _Column(
            ("in use", "connections"),
            lambda row, size: _connections(row, size, digits, capacity),
            1,
            max(digits + 5, 6),
            digits + 1 + min(capacity, 20),
            False,
        ),
        _Column(("limit",) * 2, lambda row, _: Text(str(row.limit)), 3, 5),
        _Column(
            ("share", "fair share"), lambda row, _: Text(f"{row.fair_share}"), 5, 5
        ),
        _Column(("waits", "waiting"), _waiting, 2, 5),
        _Column(("longest", "longest wait"), _longest_wait, 6, 7),
        _Column(("idle",) * 2, _idle, 7, 6),
    ]
    if board.picture.server is not None:
        columns.append(_server_column(board))
    history = board.history
    return [
        *columns,
        _Column(
            ("history",) * 2,
            lambda row, size: _spark(history.of(row.scraper, size), size, capacity),
            9,
            6,
            60,
            False,
        ),
        _Column(
            ("pid", "processes"),
            _processes,
            10,
            min(max(processes, 3), 8),
            processes,
            False,
        ),
    ]


def _chosen(columns: list[_Column], width: int) -> list[tuple[_Column, int]]:
    """Return the columns that have room, and how wide each is."""
    gap = _gap(width)
    kept = list(columns)
    while len(kept) > 1 and sum(c.least + gap for c in kept) - gap > width:
        kept.remove(max(kept, key=lambda column: column.rank))
    sizes = {column.rank: column.least for column in kept}
    left = width - sum(size + gap for size in sizes.values()) + gap
    # What is over goes to whoever can use it: the headings, names, processes, bars.
    for column in (*kept, *sorted(kept, key=lambda column: column.most)):
        size = sizes[column.rank]
        wanted = max(len(column.heading[1]), size)
        if left >= wanted - size:
            left -= wanted - size
            sizes[column.rank] = wanted
    for column in sorted(kept, key=lambda column: column.most):
        more = min(max(column.most - sizes[column.rank], 0), max(left, 0))
        sizes[column.rank] += more
        left -= more
    return [(column, sizes[column.rank]) for column in kept]


def _heading(column: _Column, size: int) -> Text:
    short, long = column.heading
    return Text(long if len(long) <= size else short, style="bold")


def _line(
    cells: Sequence[Text], columns: Sequence[tuple[_Column, int]], gap: int
) -> Text:
    line = Text()
    for number, (cell, (column, size)) in enumerate(zip(cells, columns, strict=True)):
        cell.truncate(size, overflow="ellipsis")
        space = " " * (size - cell.cell_len)
        if number:
            line.append(" " * gap)
        if column.is_number:
            line.append(space)
        line.append_text(cell)
        if not column.is_number:
            line.append(space)
    line.rstrip()
    return line


# -- cells -----------------------------------------------------------------------------


def _name(row: ScraperRow, size: int) -> Text:
    return Text(printable(row.scraper))


def _status(row: ScraperRow, size: int) -> Text:
    return Text(printable(row.status), style=_STATUS.get(row.status, ""))


def _connections(row: ScraperRow, size: int, digits: int, capacity: int) -> Text:
    cell = Text(f"{row.connections:>{digits}}")
    length = size - digits - 1
    if length > 0:
        # Above the limit: what is over drains as it comes back.
        style = "yellow" if row.connections > row.limit else "cyan"
        cell.append(" ").append_text(_bar(row.connections / capacity, length, style))
    return cell


def _waiting(row: ScraperRow, size: int) -> Text:
    return Text(str(row.waiting), style="bold yellow" if row.waiting else "dim")


def _longest_wait(row: ScraperRow, size: int) -> Text:
    return _seconds(row.longest_wait)


def _idle(row: ScraperRow, size: int) -> Text:
    return _seconds(row.idle_seconds)


def _seconds(seconds: float | None) -> Text:
    # Narrow: 2m05s.
    text = seconds_text(seconds).replace(" ", "")
    return Text(text, style="dim" if seconds is None else "")


def _server_column(board: Board) -> _Column:
    server = board.picture.server
    scrapers: Any = {} if server is None else server.scrapers

    def cell(row: ScraperRow, size: int) -> Text:
        sessions = scrapers.get(row.scraper)
        if sessions is None:
            return Text("-", style="dim")
        active = "?" if sessions.hidden else sessions.active
        style = "yellow" if sessions.idle_in_transaction else ""
        return Text(f"{active}/{sessions.sessions}", style=style)

    return _Column(("server",) * 2, cell, 8, 6)


def _spark(samples: Sequence[int | None], size: int, capacity: int) -> Text:
    """Return the samples as blocks, the newest at the right end."""
    top = len(_SPARKS) - 1
    text = "".join(
        " " if sample is None else _SPARKS[min(-(-sample * top // capacity), top)]
        for sample in samples
    )
    return Text(text.rjust(size), style="cyan")


def _processes(row: ScraperRow, size: int) -> Text:
    """Return as many of them as there is room for, and how many there are more."""
    names = [printable(name) for name in row.processes]
    for count in range(len(names), 0, -1):
        more = f" +{len(names) - count}" if count < len(names) else ""
        text = " ".join(names[:count]) + more
        if cell_len(text) <= size:
            return Text(text)
    return (
        Text(f"{len(names)} processes" if size >= 12 else f"{len(names)}")
        if (len(names) > 1)
        else Text("".join(names) or "-")
    )
