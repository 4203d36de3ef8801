"""An overview as plain text, and the phrases of which every view of one is made.

Names of scrapers, programs and hosts come from outside. Every text that leaves this
module has been through :func:`printable`, so that it cannot control a terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..stats import TagStats
from .overview import Overview, ScraperRow

#: Characters of the bar that shows the utilization.
_BAR = 20
#: Columns of a name in the table.
_LONGEST_NAME = 40

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def printable(text: str) -> str:
    """Return `text` with control characters and the like escaped, as ``\x1b``."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def describe(
    who: Mapping[str, Any], form: str = "{since} by {program} ({host}:{pid})"
) -> str:
    """Return a process, as it has described itself for people, in this form."""
    keys = ("since", "program", "host", "pid")
    return printable(form.format(**{key: str(who.get(key, "?")) for key in keys}))


def seconds_text(seconds: float | None) -> str:
    """Return a duration: ``0.3 s``, ``41 s``, ``2 m 05 s``, ``3 h 07 m``, or such."""
    if seconds is None:
        return "-"
    if isinstance(seconds, float) and seconds < 9.95:
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
    """Return a part of one in percent. Only all is 100 %, and only nothing is 0 %."""
    whole = round(part * 100)
    if part > 0:
        whole = max(whole, 1)
    if part < 1:
        whole = min(whole, 99)
    return f"{whole} %"


def time_text(overview: Overview) -> str:
    taken = printable(overview.taken_at).replace("T", " ")
    return f"{taken[:-1]} UTC" if taken.endswith("Z") else taken


def pool_text(overview: Overview) -> str:
    limits = overview.limits
    return (
        f"total {limits.capacity}, in use {overview.checked_out}, "
        f"available {overview.available}, overflow {overview.overflow}, "
        f"open {overview.open}, waiting {overview.waiting}, "
        f"quarantined {limits.quarantined}"
    )


def summary(overview: Overview) -> list[str]:
    """Return how the connections are divided, how well, and what the ledger says."""
    jain = "-" if overview.jain is None else f"{overview.jain:.2f}"
    found = [
        f"Allocation: {printable(overview.strategy)}",
        f"Efficiency: {overview.active_scrapers} active, "
        f"{overview.average:.1f} connections each, "
        f"{percent(overview.utilization)} utilization, Jain index {jain}",
    ]
    if overview.ledger is not None:
        owned = sum(process.slots for process in overview.processes)
        capacity, used = overview.limits.capacity, overview.checked_out
        found.append(f"ledger: {owned} of {capacity} slots owned, {used} in use")
    return found


class Column(NamedTuple):
    """A column of the table of scrapers, here and in the monitor."""

    heading: str
    text: Callable[[ScraperRow], str]
    is_number: bool = True


def scraper_text(row: ScraperRow) -> str:
    """Return a scraper's name."""
    # A process with very many tags sums up the smallest of them under no name.
    return cut(printable(row.name) or "(others)", _LONGEST_NAME)


COLUMNS: Sequence[Column] = (
    Column("scraper", scraper_text, False),
    Column("status", lambda row: printable(row.status), False),
    Column("connections", lambda row: str(row.connections)),
    Column("limit", lambda row: str(row.limit)),
    Column("share", lambda row: str(row.fair_share)),
    Column("waiting", lambda row: str(row.waiting)),
    Column("longest", lambda row: seconds_text(row.waiting_for)),
    Column("idle", lambda row: seconds_text(row.idle_for)),
    Column("processes", lambda row: printable(" ".join(row.processes)) or "-", False),
)


def own_text(row: TagStats) -> str:
    """Return what a tag has of its own: ``weight 3, max 2, 1 reserved``."""
    found = [f"weight {row.weight:g}"] if row.weight != 1 else []
    found += [f"max {row.max}"] if row.max is not None else []
    found += [f"{row.reserved} reserved"] if row.reserved else []
    return ", ".join(found) or "-"


#: Where it matters what is a tag's own, and what it has used.
_OWN_COLUMNS = (
    Column("used", lambda row: seconds_text(row.usage)),
    Column("own limits", own_text, False),
)


def columns(overview: Overview) -> Sequence[Column]:
    """Return the columns of the table.

    With those of tags' own limits and usage if there are such limits, or more tags
    than connections.
    """
    rows, capacity = overview.scrapers, overview.limits.capacity
    is_plain = all(own_text(row) == "-" for row in rows)
    if is_plain and overview.active_scrapers <= capacity:
        return COLUMNS
    return (*COLUMNS[:-1], *_OWN_COLUMNS, COLUMNS[-1])


def cells(text: str) -> int:
    """Return how many terminal columns a text takes: two for a wide character."""
    return sum(
        2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
        if unicodedata.category(char) not in ("Mn", "Me")
    )


def cut(text: str, width: int) -> str:
    """Return a text of at most `width` terminal columns, with dots for the rest."""
    if cells(text) <= width:
        return text
    dots = "..."[:width]
    while cells(text) > width - len(dots):
        text = text[:-1]
    return text + dots


def _table(overview: Overview) -> list[str]:
    rows, shown = overview.scrapers, columns(overview)
    if not rows:
        return ["no scrapers"]
    table = [[column.heading for column in shown]]
    table += [[column.text(row) for column in shown] for row in rows]
    widths = [max(map(cells, texts)) for texts in zip(*table, strict=True)]
    lines = []
    for texts in table:
        padded = []
        for text, width, column in zip(texts, widths, shown, strict=True):
            space = " " * (width - cells(text))
            padded.append(space + text if column.is_number else text + space)
        lines.append("  ".join(padded).rstrip())
    return lines


def lines(overview: Overview, width: int | None = None) -> list[str]:
    """Return the overview as lines of plain text, none of them empty.

    :param width: cut the lines of the table, but not the sentences, to so many columns.
    """
    where = "this process alone"
    if overview.ledger is not None:
        where = f"ledger {printable(overview.ledger)}"
    full = min(round(overview.utilization * _BAR), _BAR)
    bar = f"[{'#' * full}{'-' * (_BAR - full)}]"
    table = _table(overview)
    return [
        f"{time_text(overview)}  {where}".strip(),
        f"Pool: {pool_text(overview)}",
        f"utilization {percent(overview.utilization)} {bar}",
        *(table if width is None else (cut(line, width) for line in table)),
        *summary(overview),
        *(f"Warning: {printable(warning)}" for warning in overview.warnings),
    ]
