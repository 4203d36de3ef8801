"""Snapshots of the pool: plain frozen data, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["PoolStats", "Summary", "TagStats"]


@dataclass(frozen=True, slots=True)
class Summary:
    """How long something took, over the tag's recorded life. Seconds."""

    count: int = 0
    total: float = 0.0
    max: float = 0.0

    @property
    def mean(self) -> float:
        """Average, 0.0 when nothing was counted."""
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class TagStats:
    """One tag at one moment."""

    name: str
    #: It counts in the division of the capacity.
    active: bool
    #: Slots it holds: connections checked out or being opened under it.
    connections: int
    #: Its ceiling now.
    limit: int
    #: Its max-min share of the capacity, given what everybody wants now.
    fair_share: int
    #: Callers that wait under it.
    waiting: int
    #: Seconds since its last activity, None if it never had any.
    idle_for: float | None
    #: Seconds for which the one has waited who waits longest, None if nobody waits.
    waiting_for: float | None
    #: Seconds for which the connection has been out that has been longest, None
    #: without one.
    held_for: float | None
    #: Checkouts granted.
    checkouts: int
    #: Checkouts that gave up waiting.
    timeouts: int
    #: How long checkouts waited; those served at once count with 0.
    wait_time: Summary
    #: How long connections were kept, over those that came back.
    hold_time: Summary


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The pool at one moment, taken under one hold of its lock."""

    #: ``pool_size``: connections kept open.
    size: int
    #: ``pool_size + max_overflow``: the most there may be.
    capacity: int
    #: Slots in use: connections checked out, being opened or being closed.
    checked_out: int
    #: Slots that could be granted now: capacity less checked_out.
    available: int
    #: Open connections beyond ``size``.
    overflow: int
    #: Open connections in the pool, promised to nobody.
    idle: int
    #: Callers that wait.
    waiting: int
    #: checked_out as a part of capacity, 0.0 to 1.0.
    utilization: float
    #: The division in force, in words.
    strategy: str
    #: One row per tag that the pool remembers, by name.
    tags: tuple[TagStats, ...]

    def tag(self, name: str) -> TagStats | None:
        """Return the row of tag `name`, None if the pool does not know it."""
        return next((row for row in self.tags if row.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        plain = asdict(self)
        plain["tags"] = [dict(row) for row in plain["tags"]]
        for row, tag in zip(plain["tags"], self.tags, strict=True):
            row["wait_time"]["mean"] = tag.wait_time.mean
            row["hold_time"]["mean"] = tag.hold_time.mean
        return plain
