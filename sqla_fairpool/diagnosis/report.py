"""Why a caller waits in vain: the facts, and the sentences made of them.

Pure: from what was copied of the pool under its lock to what an operator reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import HOLDERS_NAMED, describe_holders, duration

#: Oldest checkouts that a message tells of.
_OLDEST_NAMED = 3

#: A connection without a statement for so many seconds is unused: its caller does
#: something else. Where a statement takes longer, the caller's location shows that.
_QUIET = 5.0

#: A checkout that is so many times as old as the wait that it has made vain is the
#: one to look at.
_OLD = 4.0


@dataclass(frozen=True, slots=True)
class Holding:
    """A connection that is out, or being opened."""

    tag: str
    #: Seconds since it was checked out.
    age: float
    #: Who has it: ``thread 'worker-3'``.
    caller: str
    #: Where it was checked out, if that is noted (`leak_threshold`).
    taken_at: str | None = None
    #: Where the caller is now.
    now_at: str | None = None
    #: Seconds since its last statement began; None if it had none in this checkout.
    statement_age: float | None = None
    #: It is being opened: the database has not answered yet.
    opening: bool = False
    #: Its caller is the one that waited in vain.
    own: bool = False
    #: Its caller waits for one more, too.
    waits: bool = False
    #: Its caller has ended and left it behind.
    abandoned: bool = False

    @property
    def quiet_for(self) -> float:
        """Seconds since anything was done with it."""
        return self.age if self.statement_age is None else self.statement_age

    def __str__(self) -> str:
        statement = "no statement yet"
        if self.statement_age is not None:
            statement = f"last statement {duration(self.statement_age)} ago"
        parts = (
            f"{self.tag!r} for {duration(self.age)} by {self.caller}",
            self.taken_at and f"taken at {self.taken_at}",
            "still connecting" if self.opening else statement,
            "waits for one more" if self.waits and not self.own else None,
            f"now at {self.now_at}" if self.now_at and not self.own else None,
        )
        return ", ".join(filter(None, parts))


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Connections of another process that shares the ledger, by what it has posted."""

    #: None for those that no caller uses.
    tag: str | None
    connections: int
    program: str
    host: str
    pid: int | None
    #: ``in use``; ``unused``, so that it gives them back; ``in quarantine``, since it
    #: has ended or lost them.
    state: str = "in use"

    def __str__(self) -> str:
        n = self.connections
        what = f"{n} {self.state} of" if self.tag is None else f"{self.tag}={n} in"
        return f"{what} {self.program} ({self.host}:{self.pid})"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the pool looked like when a checkout was given up."""

    #: Who waited, and for how many seconds.
    tag: str
    waited: float
    #: What the tag held, its ceiling, how many waited under it, and the caller's
    #: position in that line.
    in_use: int
    ceiling: int
    waiting: int
    position: int
    #: How many tags were active, in all processes: the reason for the ceiling.
    active_tags: int
    #: The pool's slots in use, how many there are, connections in the pool.
    pool_in_use: int
    capacity: int
    idle: int
    #: Connections by tag, the largest holders first.
    holders: tuple[tuple[str, int], ...]
    #: What is out, the oldest first.
    holdings: tuple[Holding, ...]
    #: Where the caller waited, in the user's code; None where none of it is on the
    #: caller's stack. And the thread or task.
    asked_at: str | None = None
    asked_by: str = ""
    #: With a ledger: how many connections it let this process have, and why it could
    #: not be reached, if it could not.
    allotted: int | None = None
    ledger_trouble: str | None = None
    #: With a ledger: connections of other processes, the largest holders first.
    elsewhere: tuple[Elsewhere, ...] = ()
    #: Tags that hold connections and are not active.
    uncounted: tuple[str, ...] = ()
    #: What the tag has of its own, and the connection-seconds that it used lately.
    weight: float = 1.0
    max: int | None = None
    reserved: int = 0
    usage: float = 0.0
    #: Connections that are free, and reserved for other tags.
    kept_free: int = 0
    #: Seconds since `pool.pause()`, None if the tag was not paused.
    paused_for: float | None = None
    #: Of a ledger's pause: since when, and by whom.
    paused_by: str = ""
    #: If it was paused: the tag alone, not the pool.
    paused_tag: bool = False

    def __str__(self) -> str:
        oldest = "; ".join(map(str, self.oldest[:_OLDEST_NAMED]))
        text = f"{self.figures}; oldest: {oldest}" if oldest else self.figures
        where = f"at {self.asked_at}" if self.asked_at else f"by {self.asked_by}"
        return f"{text}; asked for {where}"

    @property
    def figures(self) -> str:
        """The counts, on one line."""
        paused = "" if self.paused_for is None else "paused "
        of_tag, of_pool = (paused, "") if self.paused_tag else ("", paused)
        tags = ", ".join(map(repr, self.uncounted[:HOLDERS_NAMED]))
        uncounted = f" (uncounted: {tags}, without a statement lately)" if tags else ""
        # With a ledger, others may hold some of which it has not told yet.
        is_all = self.allotted is None or bool(self.holders or self.elsewhere)
        return (
            f"tag {self.tag!r} {of_tag}in_use={self.in_use} limit={self.ceiling} "
            f"waiting={self.waiting} position={self.position}{self._own}; "
            f"pool {of_pool}in_use={self.pool_in_use}/{self.capacity} idle={self.idle} "
            f"active_tags={self.active_tags}{uncounted}; "
            f"{describe_holders(self.holders, self.elsewhere)}"
            f"{'' if is_all else ' here'}"
        )

    @property
    def _own(self) -> str:
        own = ""
        if self.weight != 1:
            own += f" weight={self.weight:g}"
        if self.max is not None:
            own += f" max={self.max}"
        if self.reserved:
            own += f" reserved={self.reserved}"
        return f"{own} usage={self.usage:.1f}s" if own else ""

    @property
    def at_ceiling(self) -> bool:
        """The tag had all it may have."""
        return self.in_use >= self.ceiling

    @property
    def goes_short(self) -> bool:
        """A ledger let the pool have less than its capacity."""
        return self.allotted is not None and self.allotted < self.capacity

    @property
    def oldest(self) -> tuple[Holding, ...]:
        """What would have had to come back: the tag's own, or any tag's."""
        if not self.at_ceiling:
            return self.holdings
        return tuple(h for h in self.holdings if h.tag == self.tag)

    @property
    def without_caller(self) -> int:
        """Slots of those that would have helped with which no caller has a connection.

        That is being closed, or opened ahead, or handed over.
        """
        there = self.capacity if self.allotted is None else self.allotted
        slots = self.in_use if self.at_ceiling else there
        return max(slots - len(self.oldest), 0)

    @property
    def advice(self) -> str:
        """One sentence that fits the case.

        What others have done wrong comes before what is the caller's own, unless no
        other caller could have helped.
        """
        return next(text for fits in _ADVICE for text in fits(self, self.oldest))


# -- one sentence of advice: each yields its own if that fits the case -----------------


def _paused(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    if case.paused_for is None:
        return
    what, how = "the pool", "pool.resume()"
    if case.paused_by:
        what, how = "the ledger", "`sqla-fairpool ledger resume`"
    if case.paused_tag:
        what = f"tag {case.tag!r}"
        how = how.replace("()", f"({case.tag!r})").replace("e`", f"e --tag {case.tag}`")
    since = f"is paused since {case.paused_by}"
    if not case.paused_by:
        since = f"was paused {duration(case.paused_for)} ago"
    yield f"{what} {since}, and serves again after {how}"


def _only_nested(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    alone = all(h.own or h.waits for h in held) and not case.without_caller
    if alone and (case.at_ceiling or not case.goes_short):
        yield from _nested(case, case.holdings)


def _nested(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    for own in [h for h in held if h.own][:1]:
        yield (
            f"the caller itself holds a connection of {own.tag!r}, "
            f"taken{_taken_at(own)} {duration(own.age)} ago, and waits for one more: "
            "return the first before, or pass it on"
        )


def _no_ledger(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    if case.ledger_trouble is not None:
        yield (
            f"without the ledger, no more than {case.allotted} connections may be open "
            f"here: {case.ledger_trouble}"
        )


def _other_processes(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    if case.goes_short:
        most = f", most of them {case.elsewhere[0]}" if case.elsewhere else ""
        yield (
            f"the ledger lets this process have {case.allotted} of {case.capacity} "
            f"connections now, other processes have the others{most}: sqla-fairpool "
            "monitor shows whose"
        )


def _connecting(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    opening = [h for h in held if h.opening and h.age >= case.waited / 2]
    if _are_most(opening, held):
        yield (
            f"{len(opening)} of {len(held)} connections are being opened, the first "
            f"for {duration(opening[0].age)}: the database does not answer"
        )


def _without_caller(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    number = case.without_caller
    if number and number >= sum(not h.own for h in held):
        yield (
            f"{number} of {number + len(held)} connections are with no caller: they "
            "are being closed, opened ahead or handed over, and the database is slow "
            "to answer; if this lasts, the pool has lost them"
        )


def _leaked(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    held = [h for h in held if not h.own]
    old = [h for h in held if h.abandoned or h.age >= _OLD * max(case.waited, _QUIET)]
    if not old or (2 * len(old) > len(held) > 2 and not old[0].abandoned):
        return  # when most are old, it is how they work
    first = old[0]
    where = f", taken{_taken_at(first)}" if first.taken_at else ""
    how = "" if first.taken_at else "; leak_threshold would tell where it was taken"
    yield (
        f"a connection of {first.tag!r} is out for {duration(first.age)} "
        f"({first.caller}{where}): it may never come back{how}"
    )


def _idle_holder(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    idle = [h for h in held if not (h.own or h.opening or h.abandoned)]
    quiet = [h for h in idle if h.quiet_for >= _QUIET]
    if not _are_most(quiet, held):
        return
    tag = Counter(h.tag for h in quiet).most_common(1)[0][0]
    most = [h for h in quiet if h.tag == tag]
    first = next((h for h in most if h.now_at or h.taken_at), most[0])
    where = f" (one was taken{_taken_at(first)})" if first.taken_at else ""
    if first.now_at:
        where = f" ({first.caller} is at {first.now_at})"
    yield (
        f"{tag!r} keeps {len(most)} of {len(held)} connections unused, the last "
        f"statement was {duration(min(h.quiet_for for h in most))} ago{where}: end the "
        "transaction and close before waiting for something else"
    )


def _ceiling(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    if case.at_ceiling and case.pool_in_use < case.capacity:
        why = f"alone it may have {case.ceiling} (max_limit)"
        if case.active_tags > 1:
            why = f"of {case.active_tags} active tags each may have {case.ceiling} "
            why += "(soft_limit)"
        if case.max == case.ceiling:
            why = f"it may have {case.max} (max, its own)"
        elif case.kept_free:
            why += f", and {case.kept_free} of these are reserved for others"
        yield (
            f"tag {case.tag!r} is at its limit while the pool has "
            f"{case.capacity - case.pool_in_use} free: {why}"
        )


def _flood(case: Diagnosis, held: Sequence[Holding]) -> Iterator[str]:
    yield (
        f"all {case.capacity} connections are at work and {case.waiting} wait under "
        f"{case.tag!r} alone: hold them for shorter, or give the pool more"
    )


def _taken_at(holding: Holding) -> str:
    return f" at {holding.taken_at}" if holding.taken_at else ""


def _are_most(some: Sequence[Holding], held: Sequence[Holding]) -> bool:
    """Tell if they are half, or more, of what others than the caller hold."""
    return bool(some) and 2 * len(some) >= sum(not h.own for h in held)


#: What an advice may be about; the first that fits is given. The last one always does.
_ADVICE = (
    _paused,
    _only_nested,
    _no_ledger,
    _connecting,
    _without_caller,
    _idle_holder,
    _leaked,
    _other_processes,
    _nested,
    _ceiling,
    _flood,
)
