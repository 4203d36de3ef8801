"""Everybody who shares a budget, in one picture: for scripts and the monitor.

Made of what each process says of itself (*parts*). The limits and shares are computed
here, over all of them, by the same rules that divide the connections.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..scheduling import policy
from ..stats import PoolStats

__all__ = [
    "LONG_HOLD",
    "Limits",
    "Overview",
    "Part",
    "ProcessRow",
    "ScraperRow",
    "TagFigures",
    "compile_overview",
    "figures_of",
]

#: Seconds after which a connection that is out is worth a warning.
LONG_HOLD = 60.0

#: Tags that one process names.
_MAX_TAGS = 256
_REST = ""


@dataclass(frozen=True, slots=True)
class TagFigures:
    """What one process says of one tag. Times are in seconds."""

    tag: str
    active: bool = False
    in_use: int = 0
    waiting: int = 0
    idle_for: float | None = None
    waiting_for: float | None = None
    held_for: float | None = None
    checkouts: int = 0
    timeouts: int = 0


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """A process that takes part."""

    host: str
    pid: int | None
    program: str
    #: ``answers``; ``silent``: it lives, and does not answer (it is stopped, or very
    #: busy), so its figures are those it posted last; ``dead``: its slots are to be
    #: freed.
    state: str
    tags: tuple[str, ...] = ()
    #: Slots it owns: connections it may have open.
    slots: int = 0
    #: Connections it has open; None if it does not say.
    open: int | None = None
    #: Its number in the ledger; None without one.
    number: int | None = None
    #: Seconds for which it has not reached the ledger.
    away_for: float | None = None


@dataclass(frozen=True, slots=True)
class ScraperRow:
    """A scraper, over all its processes. Times are in seconds."""

    scraper: str
    #: ``active``, ``idle``, or ``silent``: none of its processes answers.
    status: str
    active: bool
    connections: int
    #: Its ceiling, and its max-min share of what there is, given what all want now.
    limit: int
    fair_share: int
    waiting: int
    #: Of those that wait, and of the connections that are out, now.
    longest_wait: float | None
    longest_hold: float | None
    #: Since its last activity; None if it never had any.
    idle_seconds: float | None
    checkouts: int
    timeouts: int
    #: ``host:pid``, or the pid alone where all processes are on one host.
    processes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One process and its figures."""

    process: ProcessRow
    tags: Sequence[TagFigures] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """The budget, and the numbers of the rules."""

    #: Connections kept open: the capacity less what is overflow.
    size: int
    capacity: int
    soft_limit: int
    max_limit: int
    #: Slots of the dead, that nobody may have yet.
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class Overview:
    """A budget and all who share it, at one moment."""

    #: The ledger's name; None if the budget is one process's own.
    ledger: str | None
    limits: Limits
    #: Slots in use by checkouts; connections that are open, used or not.
    checked_out: int
    open: int
    waiting: int
    scrapers: tuple[ScraperRow, ...]
    processes: tuple[ProcessRow, ...]
    #: The division in force, in words.
    strategy: str
    #: What somebody should look at, one line each.
    warnings: tuple[str, ...] = ()
    #: When, UTC, in ISO 8601.
    taken_at: str = ""

    @property
    def available(self) -> int:
        """Slots that could be granted now."""
        limits = self.limits
        return max(limits.capacity - limits.quarantined - self.checked_out, 0)

    @property
    def overflow(self) -> int:
        """Open connections beyond the pool's size."""
        return max(self.open - self.limits.size, 0)

    @property
    def utilization(self) -> float:
        """checked_out as a part of the capacity, 0.0 to 1.0."""
        return self.checked_out / self.limits.capacity

    @property
    def active_scrapers(self) -> int:
        """Scrapers that count in the division."""
        return sum(row.active for row in self.scrapers)

    @property
    def average(self) -> float:
        """Connections per active scraper, 0.0 without one."""
        held = sum(row.connections for row in self.scrapers if row.active)
        return held / self.active_scrapers if self.active_scrapers else 0.0

    @property
    def jain(self) -> float | None:
        """Jain's index of what the scrapers have of their fair shares.

        1.0 when each has its share, whatever that is; None while nobody wants any.
        As in the index's definition, what counts is the part of the fair allocation
        that each gets (Jain, Chiu and Hawe, DEC-TR-301, 1984).
        """
        parts = [
            row.connections / row.fair_share for row in self.scrapers if row.fair_share
        ]
        return policy.jain(parts) if parts else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        limits = self.limits
        return {
            "taken_at": self.taken_at,
            "ledger": self.ledger,
            "pool": {
                "size": limits.size,
                "capacity": limits.capacity,
                "checked_out": self.checked_out,
                "available": self.available,
                "overflow": self.overflow,
                "open": self.open,
                "waiting": self.waiting,
                "quarantined": limits.quarantined,
                "utilization": self.utilization,
                "soft_limit": limits.soft_limit,
                "max_limit": limits.max_limit,
            },
            "scrapers": [_plain(row) for row in self.scrapers],
            "strategy": self.strategy,
            "efficiency": {
                "active_scrapers": self.active_scrapers,
                "average_connections": self.average,
                "utilization": self.utilization,
                "jain_index": self.jain,
            },
            "processes": [_plain(row) for row in self.processes],
            "warnings": list(self.warnings),
        }


def _plain(row: ScraperRow | ProcessRow) -> dict[str, Any]:
    return {k: [*v] if isinstance(v, tuple) else v for k, v in asdict(row).items()}


def figures_of(stats: PoolStats) -> list[TagFigures]:
    """Return what a process says of its tags.

    Of very many, which may come from user data, those that want most; the others are
    summed up under the name of none.
    """
    figures = [
        TagFigures(
            tag=row.name,
            active=row.active,
            in_use=row.connections,
            waiting=row.waiting,
            idle_for=row.idle_for,
            waiting_for=row.waiting_for,
            held_for=row.held_for,
            checkouts=row.checkouts,
            timeouts=row.timeouts,
        )
        for row in stats.tags
    ]
    if len(figures) <= _MAX_TAGS:
        return figures
    figures.sort(key=lambda f: (-f.in_use - f.waiting, not f.active, f.tag))
    return [*figures[:_MAX_TAGS], _Sum(figures[_MAX_TAGS:]).as_figures(_REST)]


@dataclass(slots=True)
class _Sum:
    """A tag's figures over the processes."""

    figures: list[TagFigures] = field(default_factory=list)
    processes: list[ProcessRow] = field(default_factory=list)

    def longest(self, name: str) -> float | None:
        times = [getattr(figures, name) for figures in self.figures]
        return max((seconds for seconds in times if seconds is not None), default=None)

    @property
    def active(self) -> bool:
        return any(figures.active for figures in self.figures)

    @property
    def in_use(self) -> int:
        return sum(figures.in_use for figures in self.figures)

    @property
    def waiting(self) -> int:
        return sum(figures.waiting for figures in self.figures)

    @property
    def idle_for(self) -> float | None:
        times = [f.idle_for for f in self.figures if f.idle_for is not None]
        return min(times, default=None)

    @property
    def checkouts(self) -> int:
        return sum(figures.checkouts for figures in self.figures)

    @property
    def timeouts(self) -> int:
        return sum(figures.timeouts for figures in self.figures)

    def as_figures(self, tag: str) -> TagFigures:
        return TagFigures(
            tag=tag,
            active=self.active,
            in_use=self.in_use,
            waiting=self.waiting,
            idle_for=self.idle_for,
            waiting_for=self.longest("waiting_for"),
            held_for=self.longest("held_for"),
            checkouts=self.checkouts,
            timeouts=self.timeouts,
        )

    @property
    def status(self) -> str:
        # A tag that is only registered has no process yet.
        if self.processes and all(p.state != "answers" for p in self.processes):
            return "silent"
        return "active" if self.active else "idle"


def compile_overview(
    parts: Iterable[Part],
    limits: Limits,
    *,
    ledger: str | None = None,
    registered: Iterable[str] = (),
    warnings: Iterable[str] = (),
    long_hold: float = LONG_HOLD,
    taken_at: str = "",
) -> Overview:
    """Put what the processes say into one picture.

    :param registered: scrapers that are to have a row though nobody speaks of them.
    :param warnings: more of them, to stand before those that follow from the parts.
    :param long_hold: seconds after which a connection that is out gets a warning.
    """
    parts = list(parts)
    sums = {name: _Sum() for name in registered}
    for part in parts:
        for figures in part.tags:
            total = sums.setdefault(figures.tag, _Sum())
            total.figures.append(figures)
            total.processes.append(part.process)
    processes = tuple(part.process for part in parts)
    rows = _rows(sums, limits, _labels(processes))
    return Overview(
        ledger=ledger,
        limits=limits,
        checked_out=sum(row.connections for row in rows),
        open=sum(p.slots if p.open is None else p.open for p in processes),
        waiting=sum(row.waiting for row in rows),
        scrapers=rows,
        processes=processes,
        strategy=policy.strategy(
            sum(row.active for row in rows), limits.soft_limit, limits.max_limit
        ),
        warnings=(*warnings, *_warnings(rows, processes, long_hold)),
        taken_at=taken_at,
    )


def _rows(
    sums: Mapping[str, _Sum], limits: Limits, labels: Mapping[int, str]
) -> tuple[ScraperRow, ...]:
    names = sorted(sums)
    totals = [sums[name] for name in names]
    active = sum(total.active for total in totals)
    ceilings = [
        policy.ceiling(active - total.active, limits.soft_limit, limits.max_limit)
        for total in totals
    ]
    in_use = [total.in_use for total in totals]
    # An idle tag does not count, whatever it still holds.
    demands = [
        min(held + total.waiting, most) if total.active else 0
        for total, held, most in zip(totals, in_use, ceilings, strict=True)
    ]
    there = max(limits.capacity - limits.quarantined, 0)
    shares = policy.standing_shares(in_use, demands, there)
    return tuple(
        ScraperRow(
            scraper=name,
            status=total.status,
            active=total.active,
            connections=held,
            limit=ceiling,
            fair_share=share,
            waiting=total.waiting,
            longest_wait=total.longest("waiting_for"),
            longest_hold=total.longest("held_for"),
            idle_seconds=total.idle_for,
            checkouts=total.checkouts,
            timeouts=total.timeouts,
            # One with several engines is a member several times.
            processes=tuple(dict.fromkeys(labels[id(p)] for p in total.processes)),
        )
        for name, total, ceiling, held, share in zip(
            names, totals, ceilings, in_use, shares, strict=True
        )
    )


def _labels(processes: Sequence[ProcessRow]) -> dict[int, str]:
    hosts = {process.host for process in processes}
    return {
        id(p): f"{p.pid}" if len(hosts) == 1 else f"{p.host}:{p.pid}" for p in processes
    }


def _warnings(
    rows: Sequence[ScraperRow], processes: Sequence[ProcessRow], long_hold: float
) -> Iterable[str]:
    for process in processes:
        who = f"{process.program} ({process.host}:{process.pid})"
        if process.state == "silent":
            yield f"{who} does not answer: it keeps its {process.slots} slots"
        elif process.state == "dead":
            yield f"{who} is dead: its {process.slots} slots are to be freed"
        if process.away_for is not None:
            yield f"{who} has not reached the ledger for {process.away_for:.0f} s"
    for row in rows:
        if row.longest_hold is not None and row.longest_hold >= long_hold:
            who = row.scraper or "a scraper of very many"
            yield f"{who} holds a connection for {row.longest_hold:.0f} s"
