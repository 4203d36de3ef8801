"""The pool's figures at one moment: plain frozen data, ready for JSON.

:class:`TagStats` is the one row of a tag. `pool.stats()` has one for each tag that the
pool remembers, `pool.metrics()` one for each that has counters of its own, and the
overview of a ledger sums up those of several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from itertools import accumulate
from typing import Any, TypeVar, cast

__all__ = ["LedgerStats", "PoolStats", "Summary", "TagStats", "quick"]


@dataclass(frozen=True, slots=True)
class Summary:
    """How long something took, over the tag's recorded life. Seconds."""

    count: int = 0
    total: float = 0.0
    max: float = 0.0
    #: How many took up to so long: (upper bound, count), cumulated; the last bound is
    #: infinite. Of waiting and holding in `pool.metrics()` only.
    buckets: tuple[tuple[float, int], ...] = ()

    @property
    def mean(self) -> float:
        """Average, 0.0 when nothing was counted."""
        return self.total / self.count if self.count else 0.0

    @classmethod
    def of(
        cls,
        bounds: Sequence[float],
        counts: Sequence[int],
        total: float,
        longest: float,
        *,
        at_once: int = 0,
    ) -> Summary:
        """Return what was counted up to each bound, the last one infinite.

        :param at_once: how many took no time, beside those in `counts`.
        """
        cumulated = list(accumulate(counts, initial=at_once))[1:]
        buckets = tuple(zip((*bounds, float("inf")), cumulated, strict=True))
        return cls(cumulated[-1], total, longest, buckets)


@dataclass(frozen=True, slots=True)
class TagStats:
    """One tag at one moment."""

    name: str
    #: It counts in the division of the capacity.
    active: bool = False
    #: Slots it holds: connections checked out or being opened under it.
    connections: int = 0
    #: Its ceiling now.
    limit: int = 0
    #: Its max-min share of the capacity, given what all tags want now.
    fair_share: int = 0
    #: Callers that wait under it.
    waiting: int = 0
    #: Its relative entitlement, its own maximum in the place of the rule for all, and
    #: the slots that are kept for it.
    weight: float = 1.0
    max: int | None = None
    reserved: int = 0
    #: Connection-seconds that it has used lately: they decay, by ``usage_half_life``.
    usage: float = 0.0
    #: Seconds since its last activity, None if it never had any.
    idle_for: float | None = None
    #: Seconds that the longest waiting caller has waited, None if none waits.
    waiting_for: float | None = None
    #: Seconds since the oldest checkout that is out, None if none is.
    held_for: float | None = None
    #: Checkouts granted.
    checkouts: int = 0
    #: Checkouts that gave up waiting.
    timeouts: int = 0
    #: How long checkouts waited; those served at once count with 0.
    wait_time: Summary = Summary()
    #: How long connections were kept, over those that came back.
    hold_time: Summary = Summary()
    #: In `pool.metrics()`, else None: checkouts refused because `max_waiting` callers
    #: waited, and because they would have waited for themselves.
    refusals: int | None = None
    deadlocks: int | None = None
    #: Likewise: how long it took to open connections, and those that could not be.
    create_time: Summary | None = None
    #: In a dry run (``enforce=False``), else None: how long checkouts would have waited
    #: that had to by the rules, and how many would have been refused.
    would_wait: Summary | None = None
    would_refuse: int | None = None
    create_failures: int | None = None

    @classmethod
    def merged(cls, name: str, rows: Sequence[TagStats]) -> TagStats:
        """Return one row for several: many tags, or one tag in several processes."""
        figures = {
            figure: merge([getattr(row, figure) for row in rows])
            for figure, merge in SHARED.items()
        }
        return cls(name, **figures)


def _known(times: Sequence[float | None]) -> list[float]:
    return [seconds for seconds in times if seconds is not None]


#: What a process tells others of a tag, and how several figures become one.
SHARED: dict[str, Callable[[Sequence[Any]], Any]] = {
    "active": any,
    "connections": sum,
    "waiting": sum,
    "idle_for": lambda times: min(_known(times), default=None),
    "waiting_for": lambda times: max(_known(times), default=None),
    "held_for": lambda times: max(_known(times), default=None),
    "usage": sum,
    "checkouts": sum,
    "timeouts": sum,
}
#: What a process tells others of each tag.
TOLD = ("name", *SHARED)

#: Tags that one process names.
_MAX_TAGS = 256
_REST = ""


def condensed(rows: Sequence[TagStats]) -> Sequence[TagStats]:
    """Return the rows that a process shows to others.

    Of very many those that want most; the others are summed up under the name of none.
    """
    if len(rows) <= _MAX_TAGS:
        return rows
    ordered = sorted(
        rows, key=lambda row: (-row.connections - row.waiting, not row.active, row.name)
    )
    rest = TagStats.merged(_REST, ordered[_MAX_TAGS:])
    return [*ordered[:_MAX_TAGS], rest]


def encode(rows: Sequence[TagStats]) -> list[dict[str, Any]]:
    """Return what a process tells others of its tags, ready for JSON."""
    return [{name: getattr(row, name) for name in TOLD} for row in condensed(rows)]


def decode(rows: Iterable[Mapping[str, Any]]) -> list[TagStats]:
    """Return the rows of :func:`encode`. A later version may tell more."""
    return [TagStats(**{n: row[n] for n in TOLD if n in row}) for row in rows]


@dataclass(frozen=True, slots=True)
class LedgerStats:
    """A ledger as a member has seen it last, and what was counted by that member."""

    #: Slots by state: ``owned`` by this pool, ``others``', ``free``, ``quarantined``.
    #: Empty while the pool is no member: it has not needed a connection yet.
    slots: Mapping[str, int] = field(default_factory=dict)
    #: Pools that are members; None while this one is not.
    members: int | None = None
    #: Transactions of this pool in the ledger's store.
    transactions: int | None = None
    #: How long it took until a slot that is due to this pool was handed over, each time
    #: that another pool had it.
    handover_time: Summary = Summary()
    #: Seconds for which this pool could not reach the ledger.
    away_time: float | None = None


@dataclass(frozen=True, slots=True)
class PoolStats:
    """The pool at one moment, taken under one hold of its lock."""

    #: ``pool_size``: connections kept open.
    size: int
    #: ``pool_size + max_overflow``: the most there may be.
    capacity: int
    #: Slots in use: connections checked out, being opened or being closed.
    checked_out: int
    #: Slots that could be granted to any tag now: capacity less checked_out, and less
    #: what is reserved for tags that do not use it.
    available: int
    #: Open connections beyond ``size``.
    overflow: int
    #: Open connections in the pool, promised to no caller.
    idle: int
    #: Callers that wait.
    waiting: int
    #: checked_out as a part of capacity, 0.0 to 1.0.
    utilization: float
    #: The division in force, in words.
    strategy: str
    #: One row per tag that the pool remembers, by name. In `pool.metrics()` one for
    #: each of the first hundred tags, and one that sums up the others as ``other``.
    tags: tuple[TagStats, ...]
    #: What tells the pool from others: ``pool_logging_name``, or a number.
    name: str = ""
    #: ``min_idle``: connections kept ready.
    min_idle: int = 0
    #: False in a dry run.
    enforce: bool = True
    #: Seconds for which no checkout has been served (`pool.pause()`, or the ledger's
    #: pause, since this pool knows of it), None else.
    paused_for: float | None = None
    #: Of a ledger's pause: since when, and by whom.
    paused_by: str = ""
    #: The tags that are paused, one by one.
    paused_tags: tuple[str, ...] = ()
    #: Connections closed, by reason.
    closures: Mapping[str, int] = field(default_factory=dict)
    #: In `pool.metrics()` of a pool with a ledger, else None.
    ledger: LedgerStats | None = None

    def tag(self, name: str) -> TagStats | None:
        """Return the row of tag `name`, None if the pool does not know it."""
        return next((row for row in self.tags if row.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        plain = asdict(self)
        plain["tags"] = [_plain(row) for row in self.tags]
        plain["ledger"] = self.ledger and _plain(self.ledger)
        return plain


_T = TypeVar("_T")


def quick(kind: type[_T]) -> Callable[..., _T]:
    """Return what makes objects of a frozen class, by position, in a fifth of the time.

    A frozen class sets each field by a call, and there may be thousands of rows. So an
    object of an ordinary class with the same fields is made, and changes its class.

    :param kind: one whose defaults may be shared.
    """
    columns = [
        (one.name, Any, field(default=one.default)) for one in fields(cast(Any, kind))
    ]
    ordinary = make_dataclass(f"_{kind.__name__}", columns, slots=True)

    def make(*values: Any) -> _T:
        made = ordinary(*values)
        made.__class__ = kind
        return cast(_T, made)

    return make


def _plain(row: TagStats | LedgerStats) -> dict[str, Any]:
    plain = asdict(row)
    for name in plain:
        summary = getattr(row, name)
        if isinstance(summary, Summary):
            del plain[name]["buckets"]  # infinity is no JSON
            plain[name]["mean"] = summary.mean
    return plain
