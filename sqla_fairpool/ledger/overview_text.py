"""An overview as plain text, and the phrases that every view of one is made of.

Names of scrapers, programs and hosts come from elsewhere. Whatever leaves this file has
been through :func:`printable`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

from .overview import Overview, ScraperRow

__all__ = [
    "allocation_text",
    "cells",
    "cut",
    "efficiency_text",
    "lines",
    "name_text",
    "percent",
    "pool_text",
    "printable",
    "seconds_text",
    "slots_text",
    "time_text",
    "wrapped",
]

#: Characters of the bar of utilization.
_BAR = 20

#: A scraper's name is cut to no less than this many columns.
_SHORTEST_NAME = 10

#: Columns between two of the table's.
_GAP = 2

_MINUTE, _HOUR, _DAY = 60, 3600, 86400

_Cell = Callable[[ScraperRow], str]


# -- phrases ---------------------------------------------------------------------------


def printable(text: str) -> str:
    r"""Return `text` with everything escaped that could do more than be seen.

    Control characters, line ends and what changes the direction of writing, as
    ``str.isprintable`` has it: ``\x1b``, ``\n``, ``\u202e``.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def name_text(row: ScraperRow) -> str:
    """Return whose row it is."""
    # What a process sums up of very many scrapers has no name.
    return printable(row.scraper) or "(others)"


def seconds_text(seconds: float | None) -> str:
    """Return a time for people: ``0.3 s``, ``41 s``, ``2 m 05 s``, ``3 h 07 m``.

    Without tenths if it is an integer.
    """
    if seconds is None:
        return "-"
    if isinstance(seconds, int) and seconds < _MINUTE:
        return f"{seconds} s"
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} m {whole % _MINUTE:02d} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} m"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR:02d} h"


def percent(part: float) -> str:
    """Return a part of one in percent. 100 % is all, and 0 % nothing at all."""
    whole = round(part * 100)
    if part > 0:
        whole = max(whole, 1)
    if part < 1:
        whole = min(whole, 99)
    return f"{whole} %"


def time_text(overview: Overview) -> str:
    """Return when the overview was taken."""
    taken = printable(overview.taken_at).replace("T", " ")
    return f"{taken[:-1]} UTC" if taken.endswith("Z") else taken


def pool_text(overview: Overview) -> str:
    """Return the figures of the global pool."""
    limits = overview.limits
    return (
        f"total {limits.capacity}, in use {overview.checked_out}, "
        f"available {overview.available}, overflow {overview.overflow}, "
        f"open {overview.open}, waiting {overview.waiting}, "
        f"quarantined {limits.quarantined}"
    )


def allocation_text(overview: Overview) -> str:
    """Return the division in force."""
    return f"Allocation: {printable(overview.strategy)}"


def efficiency_text(overview: Overview) -> str:
    """Return how well the connections are used, and how fairly."""
    jain = "-" if overview.jain is None else f"{overview.jain:.2f}"
    return (
        f"Efficiency: {overview.active_scrapers} active, "
        f"{overview.average:.1f} connections each, "
        f"{percent(overview.utilization)} utilization, Jain index {jain}"
    )


def slots_text(overview: Overview) -> str:
    """Return what the ledger says of its slots."""
    owned = sum(process.slots for process in overview.processes)
    return (
        f"ledger: {owned} of {overview.limits.capacity} slots owned, "
        f"{overview.checked_out} in use"
    )


# -- columns of a terminal -------------------------------------------------------------


def cells(text: str) -> int:
    """Return how many columns a text takes: a wide character two, an accent none."""
    if text.isascii():
        return len(text)
    return sum(map(_cells, text))


def _cells(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text: str, width: int) -> str:
    """Return a text that takes no more than so many columns, with dots for the rest."""
    if cells(text) <= width:
        return text
    dots = "..."[:width]
    room = width - len(dots)
    kept = []
    for char in text:
        room -= _cells(char)
        if room < 0:
            break
        kept.append(char)
    return "".join(kept) + dots


def _padded(text: str, width: int, is_number: bool) -> str:
    space = " " * (width - cells(text))
    return space + text if is_number else text + space


# -- the whole -------------------------------------------------------------------------


def lines(overview: Overview, width: int | None = None) -> list[str]:
    """Return the overview as lines of plain text, none of them empty.

    :param width: most columns of a line; without it nothing is cut nor wrapped.
    """
    before = [
        f"{time_text(overview)}  {_ledger_text(overview)}".strip(),
        f"Pool: {pool_text(overview)}",
        f"utilization {percent(overview.utilization)} {_bar(overview)}",
    ]
    after = [
        allocation_text(overview),
        efficiency_text(overview),
        *(f"Warning: {printable(warning)}" for warning in overview.warnings),
    ]
    table = _table(overview.scrapers, width)
    return [*wrapped(before, width), *table, *wrapped(after, width)]


def wrapped(texts: Iterable[str], width: int | None) -> Iterator[str]:
    """Yield texts in lines of no more than so many columns.

    :param width: without it nothing is wrapped. Words that are too long are cut.
    """
    for text in texts:
        if width is None or cells(text) <= width:
            yield text
            continue
        line = ""
        for word in text.split():
            longer = f"{line} {word}" if line else cut(word, width)
            if cells(longer) <= width:
                line = longer
            else:
                yield line
                line = cut(f"  {word}", width)
        yield line


def _ledger_text(overview: Overview) -> str:
    if overview.ledger is None:
        return "this process alone"
    return f"ledger {printable(overview.ledger)}"


def _bar(overview: Overview) -> str:
    full = min(round(overview.utilization * _BAR), _BAR)
    return f"[{'#' * full}{'-' * (_BAR - full)}]"


#: Heading, text of a row, and if it is a number.
_COLUMNS: Sequence[tuple[str, _Cell, bool]] = (
    ("scraper", name_text, False),
    ("status", lambda row: printable(row.status), False),
    ("connections", lambda row: str(row.connections), True),
    ("limit", lambda row: str(row.limit), True),
    ("share", lambda row: str(row.fair_share), True),
    ("waiting", lambda row: str(row.waiting), True),
    ("longest", lambda row: seconds_text(row.longest_wait), True),
    ("idle", lambda row: seconds_text(row.idle_seconds), True),
    ("processes", lambda row: printable(" ".join(row.processes)) or "-", False),
)


def _table(rows: Sequence[ScraperRow], width: int | None) -> list[str]:
    if not rows:
        return [*wrapped(["no scrapers"], width)]
    table = [[heading for heading, _, _ in _COLUMNS]]
    table += [[text(row) for _, text, _ in _COLUMNS] for row in rows]
    widths = [max(map(cells, column)) for column in zip(*table, strict=True)]
    if width is not None:
        widths = _fitting(widths, width)
    return [
        "  ".join(
            _padded(cut(text, columns), columns, is_number)
            # Columns that have no room are missing at the end.
            for text, columns, (_, _, is_number) in zip(  # noqa: B905
                row, widths, _COLUMNS
            )
        ).rstrip()
        for row in table
    ]


def _fitting(widths: list[int], width: int) -> list[int]:
    """Return the widths of the first columns, as many as there is room for.

    The name gives way to the figures, the processes may be cut.
    """
    *figures, processes = widths
    over = sum(figures) + _GAP * (len(figures) - 1) - width
    if over > 0:
        figures[0] = max(figures[0] - over, min(figures[0], _SHORTEST_NAME))
    kept: list[int] = []
    left = width + _GAP
    for size in figures:
        left -= size + _GAP
        if left < 0:
            return kept
        kept.append(size)
    last = min(processes, left - _GAP)
    return [*kept, last] if last >= len(_COLUMNS[-1][0]) else kept
