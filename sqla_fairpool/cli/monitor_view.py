"""The monitor's screen: made of rich's texts, and shown on a terminal.

Every line is cut to the width, and the lines to the height. What is less important goes
first, whole columns and whole lines.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..ledger.overview import Overview
from ..ledger.overview_text import (
    allocation_text,
    efficiency_text,
    percent,
    printable,
    slots_text,
    time_text,
)
from .monitor_board import KEYS, Board
from .monitor_table import bar, table
from .server_view import server_text

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Screen", "frame"]

#: Rows of the table that other lines make room for, as far as there are that many.
_ROWS_WANTED = 5

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
        try:
            # Of the terminal: COLUMNS and LINES, which libraries like readline set,
            # would outlive its next size.
            columns, lines = os.get_terminal_size(self._console.file.fileno())
        except (OSError, ValueError):
            return self._console.size
        return columns or 80, lines or 24

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
            # The terminal may be gone.
            with suppress(OSError):
                live.stop()

    def draw(self, board: Board, now: float) -> None:
        """Show the board."""
        assert self._live is not None
        size = self.size
        self._console.size = size
        self._live.update(frame(board, *size, now), refresh=True)

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
    top, bottom = _head(board, width), _footer(board, width)
    room = max(height - 2, 0)
    overview = board.picture.overview
    if overview is None:
        middle = _warnings(board, now, width, room)
        if not middle:
            middle = [Text(f"looking at {printable(board.name)} ...")]
    else:
        # Warnings may have this much, and what is left when all else has its place.
        reserved = max(height // 4, 1)
        warnings = _warnings(board, now, width, reserved)
        middle = _body(board, overview, width, height, room - len(warnings))
        middle += _warnings(board, now, width, max(room - len(middle), reserved))
    middle = middle[:room]
    middle += [Text()] * (room - len(middle))
    lines = [top, *middle, bottom][:height]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Text("\n", no_wrap=True, overflow="crop", end="").join(lines)


def _body(
    board: Board, overview: Overview, width: int, height: int, room: int
) -> list[Text]:
    """Return the pool, the table and what is below it, in so many lines."""
    before, after = _sections(board, overview, width)
    rows = board.rows()
    wanted = min(len(rows), max(height // 2, _ROWS_WANTED)) + 1
    ranks = sorted(rank for rank, _ in (*before, *after))
    kept = set(ranks[: max(room - wanted, 0)])
    lines = [text for rank, text in before if rank in kept]
    lines += table(board, overview, rows, width, room - len(kept))
    return lines + [text for rank, text in after if rank in kept]


#: How important a line is, the smaller the more, with its place in its text, and it.
_Rank = tuple[int, int]
_Ranked = tuple[_Rank, Text]


# -- lines beside the table ------------------------------------------------------------


def _is_narrow(width: int) -> bool:
    return width < 64


def _head(board: Board, width: int) -> Text:
    overview = board.picture.overview
    parts: list[str | tuple[str, str]] = [("sqla-fairpool", "bold")]
    if overview is not None:
        taken = time_text(overview)
        # Without the date.
        parts.append(f"  {taken[11:] if _is_narrow(width) else taken}")
    if board.is_paused:
        parts += ["  ", ("PAUSED", "reverse yellow")]
    elif not _is_narrow(width):
        parts.append(f"  every {board.interval:g} s")
    return Text.assemble(*parts)


def _footer(board: Board, width: int) -> Text:
    footer = Text()
    values = {"sort": board.sort, "interval": f"{board.interval:g} s"}
    for key, what in KEYS:
        if what == "pause" and board.is_paused:
            what = "go on"
        value = values.get(what)
        if _is_narrow(width):
            footer.append(key, style="reverse").append(f" {value or what}  ")
        else:
            footer.append(f" {key} ", style="reverse")
            footer.append(f" {what}{f': {value}' if value else ''}  ")
    return footer


def _sections(
    board: Board, overview: Overview, width: int
) -> tuple[list[_Ranked], list[_Ranked]]:
    """Return the lines above and below the table."""
    server = board.picture.server
    before = [
        (6, _ledger(board, width)),
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
    if server is not None:
        is_odd = server.error is not None or server.is_elsewhere
        after.append((3, Text(server_text(server), style="yellow" if is_odd else "")))
    after.append((10, Text(slots_text(overview))))
    return _wrapped(before, width), _wrapped(after, width)


def _ledger(board: Board, width: int) -> Text:
    name = Text(printable(board.name))
    room = max(width - len("ledger "), 1)
    if name.cell_len > room:
        # The end of a path tells more than its beginning.
        while name.cell_len > room - 1 and name:
            name = name[1:]
        name = Text("\u2026").append_text(name)
    return Text("ledger ", style="dim").append_text(name)


def _wrapped(texts: Sequence[tuple[int, Text]], width: int) -> list[_Ranked]:
    return [
        ((rank, number), line)
        for rank, text in texts
        for number, line in enumerate(_wrap(text, width) if text else [text])
    ]


def _wrap(text: Text, width: int) -> list[Text]:
    """Return a text in two lines at most. What comes after them is cut."""
    lines = list(text.wrap(_WRAPPER, width))
    for line in lines:
        line.rstrip()
    return [*lines[:1], Text(" ").join(lines[1:])] if len(lines) > 2 else lines


def _pool_bar(overview: Overview, width: int) -> Text:
    used, capacity = overview.checked_out, overview.limits.capacity
    part = percent(overview.utilization)
    told = f" {part:>5}  {used} of {capacity} in use, {overview.waiting} waiting"
    if _is_narrow(width):
        told = f" {part:>5} {used}/{capacity}, {overview.waiting} waiting"
    length = max(min(width - len(told) - 5, 40), 8)
    style = "yellow" if overview.waiting else "green"
    return Text.assemble(
        ("pool ", "bold"), bar(overview.utilization, length, style), told
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
    indent = "" if _is_narrow(width) else " " * 5
    return Text(indent + "  ".join(figures))


def _warnings(board: Board, now: float, width: int, most: int) -> list[Text]:
    """Return what is wrong, in no more than so many lines."""
    lines: list[Text] = []
    troubles = board.troubles(now)
    for number, trouble in enumerate(troubles):
        is_trouble = number == 0 and board.picture.trouble is not None
        text = Text(
            f"! {printable(trouble)}", style="bold red" if is_trouble else "yellow"
        )
        wrapped = _wrap(text, width)
        left = len(troubles) - number
        if len(lines) + len(wrapped) > most - (left > 1):
            more = Text(f"! ... and {left} more", style="yellow")
            return [*lines, more] if lines else [text]
        lines += wrapped
    return lines
