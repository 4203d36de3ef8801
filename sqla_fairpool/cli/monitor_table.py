"""The table of the monitor's screen, a line for each scraper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from ..ledger.overview import Overview, ScraperRow
from ..ledger.overview_text import name_text, printable, seconds_text
from .monitor_board import Board

__all__ = ["bar", "table"]

_FULL, _EMPTY, _SPARKS = "█", "░", "▁▂▃▄▅▆▇█"

_STATUS = {"active": "green", "idle": "yellow", "silent": "bold red"}

#: Columns of a terminal from which on there is room for wider gaps.
_WIDE = 100


def bar(part: float, length: int, style: str) -> Text:
    """Return a bar of so many blocks; part of it, if there is any, is full."""
    full = min(round(part * length), length)
    full = max(full, 1) if part > 0 else full
    return Text.assemble(
        (_FULL * full, style), (_EMPTY * (length - full), "bright_black")
    )


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


def table(
    board: Board,
    overview: Overview,
    rows: Sequence[ScraperRow],
    width: int,
    height: int,
) -> list[Text]:
    """Return the table's lines, no more than `height`, or none if two are too many.

    :param rows: in their order.
    """
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
    return 2 if width >= _WIDE else 1


def _columns(
    board: Board, overview: Overview, rows: Sequence[ScraperRow], width: int
) -> list[_Column]:
    capacity = overview.limits.capacity
    longest = max(cell_len(name_text(row)) for row in rows)
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
            digits + 1 + min(capacity, 12),
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
            ("trend", "history"),
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
    # What is over goes to whoever can use it: to headings, then to names and bars.
    for column in kept:
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
    return Text(name_text(row))


def _status(row: ScraperRow, size: int) -> Text:
    return Text(printable(row.status), style=_STATUS.get(row.status, ""))


def _connections(row: ScraperRow, size: int, digits: int, capacity: int) -> Text:
    cell = Text(f"{row.connections:>{digits}}")
    length = size - digits - 1
    if length > 0:
        # Above the limit: what is over drains as it comes back.
        style = "yellow" if row.connections > row.limit else "cyan"
        cell.append(" ").append_text(bar(row.connections / capacity, length, style))
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
    for count in range(min(len(names), size), 0, -1):
        more = f" +{len(names) - count}" if count < len(names) else ""
        text = " ".join(names[:count]) + more
        if cell_len(text) <= size:
            return Text(text)
    if len(names) > 1:
        return Text(f"+{len(names)}")
    return Text("".join(names) or "-", style="" if names else "dim")
