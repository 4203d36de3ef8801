"""All processes that share a budget, in one picture: for scripts and the monitor.

Made of what each process tells of itself (*parts*). The limits and shares are computed
here, over all of them, by the same rules that divide the connections.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from time import gmtime, strftime
from typing import Any, NamedTuple

from ..options import PoolOptions
from ..scheduling import policy
from ..scheduling.ticket import LimitsByTag, TagLimits
from ..stats import TOLD, TagStats

#: Seconds after which a connection that is out is worth a warning.
_LONG_HOLD = 60.0
_FREE = "are free for whoever comes next"


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """A process that takes part."""

    host: str
    pid: int | None
    program: str
    #: ``answers``; ``silent``: it lives, and does not answer (it is stopped, or very
    #: busy), so its figures are those it posted last; ``dead``: it has ended and not
    #: left the ledger, see :class:`LeftRow`.
    state: str
    tags: tuple[str, ...] = ()
    #: Slots it owns: connections it may have open.
    slots: int = 0
    #: Connections it has open; None if it does not say.
    open: int | None = None
    #: Its number in the ledger; None without one.
    number: int | None = None
    #: Limits that it asked for when it joined, which are not those of the ledger.
    asked: str = ""
    #: The tags of which it serves no checkout, `ALL` for all.
    paused: tuple[str, ...] = ()
    #: Connections that its users have taken out of the pool.
    detached: int = 0

    @property
    def who(self) -> str:
        return f"{self.program} ({self.host}:{self.pid})"


@dataclass(frozen=True, slots=True)
class LeftRow:
    """Slots that a process which has ended, or a connection, has left behind."""

    number: int
    slots: int
    #: ``program (host:pid)``
    who: str
    #: Why they are in quarantine; None if the process only did not leave the ledger.
    why: str | None = None
    #: No session at the server has them: a process that needs slots gets them.
    is_free: bool = False

    def __str__(self) -> str:
        if self.is_free:
            how = "has ended" if self.why in (None, "died") else self.why
            return f"{self.who} {how}: its {self.slots} slots {_FREE}"
        if self.why is not None:
            return f"{self.slots} slots in quarantine: {self.who} {self.why}"
        return (
            f"{self.who} has ended without leaving: its {self.slots} slots are free "
            "when the server has no session of it"
        )


@dataclass(frozen=True, slots=True)
class ScraperRow(TagStats):
    """A scraper, over all its processes."""

    #: ``active``, ``idle``, or ``silent``: none of its processes answers.
    status: str = "idle"
    #: ``host:pid``, or the pid alone where all processes are on one host.
    processes: tuple[str, ...] = ()
    #: Those processes, with what each says of the scraper.
    parts: tuple[tuple[ProcessRow, TagStats], ...] = ()


#: The figures of a scraper in JSON, and what they are called here. Times: seconds.
_IN_JSON = (
    *("scraper", "status", "active", "connections", "limit", "fair_share", "waiting"),
    *("longest_wait", "longest_hold", "idle_seconds", "checkouts", "timeouts"),
    *("weight", "max", "reserved", "usage"),
)
_OTHER_NAMES = {
    "scraper": "name",
    "longest_wait": "waiting_for",
    "longest_hold": "held_for",
    "idle_seconds": "idle_for",
}


class Part(NamedTuple):
    """One process, and what it says of each tag."""

    process: ProcessRow
    tags: Sequence[TagStats] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """The budget, and the numbers of the rules."""

    #: Connections kept open: the capacity less what is overflow.
    size: int
    capacity: int
    soft_limit: int
    max_limit: int
    #: Slots of processes that have died, which no other one may have yet.
    quarantined: int = 0
    #: Of tags that have their own.
    tags: LimitsByTag = LimitsByTag({})  # noqa: RUF009  (it is not changed)

    @classmethod
    def of(cls, options: PoolOptions) -> Limits:
        """Return those of one process's own pool."""
        limits = options.capacity, options.soft_limit, options.max_limit
        tags = LimitsByTag(options.tags or {})
        return cls(options.pool_size, *limits, tags=tags)


@dataclass(frozen=True, slots=True)
class Overview:
    """A budget and all processes that share it, at one moment."""

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
    #: What an operator should look at, one line each.
    warnings: tuple[str, ...] = ()
    #: When, UTC, in ISO 8601.
    taken_at: str = ""
    #: What those have left behind that are gone.
    left: tuple[LeftRow, ...] = ()
    #: The tags that the ledger has paused, `ALL` for all: since when, and by whom.
    paused: Mapping[str, str] = field(default_factory=dict)

    @property
    def available(self) -> int:
        """Slots that could be granted now."""
        there = self.limits.capacity - self.limits.quarantined
        return max(there - self.checked_out, 0)

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

        1.0 when each has its share; None while none wants any. As in the definition
        (Jain, Chiu and Hawe, DEC-TR-301, 1984), the part of the fair share counts.
        """
        parts = [r.connections / r.fair_share for r in self.scrapers if r.fair_share]
        return policy.jain(parts) if parts else None

    def with_sessions(self, numbers: Collection[int]) -> Overview:
        """Return it with what the server says: only these members have sessions."""
        left = tuple(
            replace(row, is_free=row.is_free or row.number not in numbers)
            for row in self.left
        )
        texts = {str(a): str(b) for a, b in zip(self.left, left, strict=True)}
        warnings = tuple(texts.get(text, text) for text in self.warnings)
        limits = replace(self.limits, quarantined=_kept(left))
        return replace(self, left=left, limits=limits, warnings=warnings)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        pool, tags = asdict(self.limits), self.limits.tags.given
        pool["tags"] = {tag: asdict(own) for tag, own in tags.items()}
        figures = "checked_out available overflow open waiting utilization"
        means = {"average_connections": self.average, "jain_index": self.jain}
        return {
            "taken_at": self.taken_at,
            "ledger": self.ledger,
            "paused": dict(self.paused),
            "pool": {**pool, **self._figures(figures)},
            "scrapers": [
                {key: getattr(row, _OTHER_NAMES.get(key, key)) for key in _IN_JSON}
                | {"processes": list(row.processes)}
                for row in self.scrapers
            ],
            "strategy": self.strategy,
            "efficiency": {**self._figures("active_scrapers utilization"), **means},
            "processes": [asdict(row) for row in self.processes],
            "warnings": list(self.warnings),
        }

    def _figures(self, names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names.split()}


def _kept(left: Iterable[LeftRow]) -> int:
    return sum(row.slots for row in left if not row.is_free)


def utc_now() -> str:
    """Return the time of day in ISO 8601."""
    return strftime("%Y-%m-%dT%H:%M:%SZ", gmtime())


def compile_overview(
    parts: Iterable[Part],
    limits: Limits,
    *,
    ledger: str | None = None,
    registered: Iterable[str] = (),
    left: Sequence[LeftRow] = (),
    warnings: Iterable[str] = (),
    taken_at: str = "",
    paused: Mapping[str, str] | None = None,
) -> Overview:
    """Put what the processes tell into one picture.

    :param registered: scrapers that have a row though no process tells of them.
    :param warnings: more of them, to stand before those that follow from the parts.
    """
    parts = list(parts)
    limits = replace(limits, quarantined=limits.quarantined + _kept(left))
    processes = tuple(part.process for part in parts)
    found: dict[str, list[tuple[ProcessRow, TagStats]]] = {n: [] for n in registered}
    for process, rows in parts:
        for row in rows:
            found.setdefault(row.name, []).append((process, row))
    scrapers, paused = _scrapers(found, limits), paused or {}
    active = sum(row.active for row in scrapers)
    found_now = *_pauses(paused), *map(str, left), *_warnings(scrapers, processes)
    return Overview(
        ledger=ledger,
        limits=limits,
        checked_out=sum(row.connections for row in scrapers),
        open=sum(p.slots if p.open is None else p.open for p in processes),
        waiting=sum(row.waiting for row in scrapers),
        scrapers=scrapers,
        processes=processes,
        strategy=policy.strategy(active, limits.soft_limit, limits.max_limit),
        warnings=(*warnings, *found_now),
        taken_at=taken_at,
        left=tuple(left),
        paused=paused,
    )


def _pauses(paused: Mapping[str, str]) -> Iterable[str]:
    """Return what an operator is to know of what the ledger has paused."""
    for tag, since in sorted(paused.items()):
        what, flag = (f"tag {tag!r}", f" --tag {tag}") if tag else ("all", "")
        yield f"{what} paused since {since}, until `ledger resume{flag}`"


def _rules(
    tags: Sequence[TagStats], own: Sequence[TagLimits], limits: Limits
) -> tuple[list[int], list[int]]:
    """Return the ceilings of tags, and their fair shares."""
    active, room = sum(tag.active for tag in tags), limits.capacity
    ceilings, wanted = list[int](), list[policy.Party]()
    for tag, one in zip(tags, own, strict=True):
        others, left = active - tag.active, room - limits.tags.reserved + one.reserved
        rule = policy.ceiling(others, limits.soft_limit, limits.max_limit)
        ceilings.append(policy.own_ceiling(rule, one.max, one.reserved, left))
        held = tag.active, tag.connections, tag.waiting
        wanted.append(policy.Party(*held, ceilings[-1], one.weight, one.reserved))
    unknown = limits.tags.reserved - sum(one.reserved for one in own)
    there = max(limits.capacity - limits.quarantined - unknown, 0)
    return ceilings, policy.shares_of_tags(wanted, there)


def _scrapers(
    found: Mapping[str, Sequence[tuple[ProcessRow, TagStats]]], limits: Limits
) -> tuple[ScraperRow, ...]:
    names = sorted(found, key=_natural)
    tags = [TagStats.merged(name, [row for _, row in found[name]]) for name in names]
    own = [limits.tags.of(tag.name) for tag in tags]
    ceilings, shares = _rules(tags, own, limits)
    several = len({process.host for rows in found.values() for process, _ in rows}) > 1
    scrapers = []
    for tag, one, ceiling, share in zip(tags, own, ceilings, shares, strict=True):
        processes = [process for process, _ in found[tag.name]]
        status = "active" if tag.active else "idle"
        # A tag that is only registered has no process yet.
        if processes and all(process.state != "answers" for process in processes):
            status = "silent"
        whose = (f"{p.host}:{p.pid}" if several else f"{p.pid}" for p in processes)
        row = ScraperRow(
            **{name: getattr(tag, name) for name in TOLD},
            limit=ceiling,
            fair_share=share,
            weight=one.weight,
            max=one.max,
            reserved=one.reserved,
            status=status,
            # A process with several engines is a member several times.
            processes=tuple(dict.fromkeys(whose)),
            parts=tuple(found[tag.name]),
        )
        scrapers.append(row)
    return tuple(scrapers)


def _natural(name: str) -> list[str | int]:
    """Return what sorts ``spider_2`` before ``spider_10``."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]


def _warnings(
    rows: Sequence[ScraperRow], processes: Sequence[ProcessRow]
) -> Iterable[str]:
    for process in processes:
        if process.state == "silent":
            yield f"{process.who} does not answer: it keeps its {process.slots} slots"
        if process.asked:
            asked = f"asked for {process.asked}"
            yield f"{process.who} {asked}: the ledger has other limits"
    for row in rows:
        if row.held_for is not None and row.held_for >= _LONG_HOLD:
            who = row.name or "a scraper of very many"
            yield f"{who} holds a connection for {row.held_for:.0f} s"
