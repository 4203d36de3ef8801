"""What a pool wants, what the ledger allots to it, and when the two have to meet.

The store is written when something changed that could move a slot, and else left
alone: how long a line is does not matter while it gets less than it wants. A rise is
posted at once. A fall is posted when others go short, after it has lasted for a moment
(`linger`): a slot that is used again and again does not travel in between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .allocation import Line
from .errors import LedgerError
from .rows import Gone, Member, Session

__all__ = ["Allotment", "Demand", "Local", "Pace", "State", "TagDemand"]

#: Tags of one process in its row. Tags may be made from user data; those beyond are
#: summed up under the name of none.
_MAX_TAGS = 256
_REST = ""


class TagDemand(NamedTuple):
    """What a process wants under one tag, now."""

    #: The most that were in use at once since this was asked last.
    in_use: int = 0
    waiting: int = 0
    active: bool = False

    @property
    def wants(self) -> int:
        """Its demand."""
        return self.in_use + self.waiting


_NOTHING = TagDemand()


class Local(Protocol):
    """The pool in this process. Called by the keeper's thread only."""

    def demand(self) -> tuple[int, Mapping[str, TagDemand]]:
        """Return the connections that are open, and what is wanted by tag.

        A connection counts as open from before it is opened until after it is closed,
        detached ones included. One that was in use since the last call counts as in
        use: else a moment between two checkouts would look like a fall of demand.
        """
        ...

    def sessions(self) -> Collection[Session]:
        """Return the server sessions that exist now, as far as they are known.

        One is known before it is used for anything but to learn that, and until it has
        ended.
        """
        ...

    def server(self) -> str | None:
        """Return the identity of the server where they are, None until it is known."""
        ...

    def lost(self) -> Sequence[Session | None]:
        """Return what cannot be told to have ended: the sessions, None where unknown.

        They are to be put into quarantine, and count as open until :meth:`buried`.
        """
        ...

    def buried(self, lost: Sequence[Session | None]) -> None:
        """Forget these, and lower the allotment by their number, in one step.

        Their slots are in quarantine now.

        :param lost: what :meth:`lost` has returned the last time, all of it.
        """

    def allot(self, slots: int, ceilings: Mapping[str, int], other: int) -> None:
        """Open a connection only while there are less than `slots` from now on.

        Until the first call, that is none. Nothing that is checked out is taken away.
        The ceilings are by tag, `other` that of any tag not named.
        """

    def close_surplus(self) -> None:
        """Close idle connections above the allotment."""

    def freeze(self) -> None:
        """Open no connection any more, until the next :meth:`allot`.

        Those that are open may be used. One that is closed is not replaced.
        """

    def press(self, pressed: bool) -> None:
        """Ring from now on when a connection falls idle, or do not any more."""

    def refuse(self, error: LedgerError) -> None:
        """Raise this in those who wait now."""


class State(NamedTuple):
    """What the keeper has seen in the pool at one moment, see :class:`Local`."""

    open: int
    tags: Mapping[str, TagDemand]
    sessions: frozenset[Session]
    #: Of these the sessions are in `sessions` no more.
    lost: tuple[Session | None, ...]
    server: str | None

    @property
    def wants(self) -> bool:
        """Tell if there is a reason to be a member."""
        return bool(self.open) or any(want.wants for want in self.tags.values())

    @classmethod
    def of(cls, local: Local) -> State:
        """Look at a pool.

        The order matters: what is open is counted before, and what is lost in between
        has to be seen as lost, not to be missed.
        """
        open_, tags = local.demand()
        sessions = frozenset(local.sessions())
        lost = tuple(local.lost())
        return cls(open_, tags, sessions - frozenset(lost), lost, local.server())


def condense(demand: Mapping[str, TagDemand]) -> Mapping[str, TagDemand]:
    """Return the demand with a bounded number of tags."""
    if len(demand) <= _MAX_TAGS:
        return demand
    by_wants = sorted(demand, key=lambda tag: (-demand[tag].wants, tag))
    in_use, waiting, active = zip(
        *(demand[t] for t in by_wants[_MAX_TAGS:]), strict=True
    )
    named = {tag: demand[tag] for tag in by_wants[:_MAX_TAGS]}
    named[_REST] = TagDemand(sum(in_use), sum(waiting), any(active))
    return named


@dataclass(frozen=True, slots=True)
class Allotment:
    """What a member learns from a transaction."""

    #: Its row: the slots that it owns, what it posted.
    row: Member
    #: The slots that it is to have.
    target: int
    #: By tag: what it got of what it posted, and what is the most for its pool.
    claims: Mapping[str, int]
    ceilings: Mapping[str, int]
    #: Ceiling of any other tag.
    other: int
    #: Slots wanted by any member that there are not.
    unmet: int
    #: Tags under which it is asked to yield, and how many are asked of all members.
    asked: frozenset[str]
    turns: int
    #: Members that go short, and members.
    starved: int
    members: int
    gone: Mapping[int, Gone]
    #: Of the lost connections those that are in quarantine.
    buried: tuple[Session | None, ...]
    #: As many slots are owned as connections are open.
    covered: bool
    #: The members, while there may be others that are in no row; or else None.
    fresh: frozenset[str] | None
    #: Why it is expected to look again, if it is.
    due: str | None
    #: The members to be rung.
    bells: tuple[str, ...]

    @property
    def vain(self) -> frozenset[str]:
        """The tags under which it waits for more than it got."""
        return frozenset(
            tag
            for tag, line in self.row.tags.items()
            if line.waiting and self.claims[tag] < line.wants
        )

    def slack(self, demand: Mapping[str, TagDemand]) -> int:
        """Return how many slots are claimed here and not wanted."""
        return sum(
            max(claim - demand.get(tag, _NOTHING).wants, 0)
            for tag, claim in self.claims.items()
        )


@dataclass(frozen=True, slots=True)
class Pace:
    """The keeper's times, in seconds. None of them keeps a promise of safety.

    :param beat: between two looks of one that goes short.
    :param slow: between two looks of one that does not.
    :param turn: how long one keeps its place in a line while others get nothing.
    :param linger: how long a slot is unused before it is given to another process. The
      time that a loop needs between two checkouts, as a rule; a part of what a slot
      needs from one process to another.
    :param patience: how long one may fail to answer before it is taken to be stopped.
    :param grace: how long slots of dead members are in quarantine at least.
    :param reclaim_after: how long, where the server cannot be asked.
    :param retry: longest time between two tries to reach the store.
    """

    beat: float = 1.0
    slow: float = 10.0
    turn: float = 1.0
    linger: float = 0.01
    patience: float = 3.0
    grace: float = 0.5
    reclaim_after: float = 10.0
    retry: float = 5.0

    def turn_length(self, asked: int) -> float:
        """Return how long a turn is when so many are asked to yield."""
        return max(self.turn, asked / _TURNS)


#: Slots that change hands per second, because others are to have a turn. Each costs
#: three transactions with all the rows, milliseconds where there are a thousand
#: members: where more are asked, turns last longer.
_TURNS = 50.0


class Demand:
    """What one process wants, beside what the ledger knows of that."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        # Since when: less is wanted than claimed; nobody waits any more of those who
        # are posted; each tag has had its slot.
        self._slack_since: float | None = None
        self._gone_since: float | None = None
        self._had_since: dict[str, float] = {}
        self._turn = pace.turn
        # When the pool was asked last, and is to be asked again.
        self._asked_at = self._ask_at = float("-inf")

    def rung(self, now: float) -> None:
        """The pool has rung. If something fell idle, see later if it stays so."""
        self._ask_at = now + self._pace.linger

    def is_news(
        self, allotment: Allotment, demand: Mapping[str, TagDemand], now: float
    ) -> bool:
        """Tell if the store has to hear of what is wanted here."""
        # What is in use is the most since the pool was asked last: a fall began then.
        since, self._asked_at = self._asked_at, now
        has_slack = allotment.slack(demand) > 0
        self._slack_since = _since(self._slack_since, has_slack, since)
        active = {tag for tag, want in demand.items() if want.active}
        return (
            active != {tag for tag, line in allotment.row.tags.items() if line.active}
            or any(self._rises(allotment, tag, want) for tag, want in demand.items())
            or any(tag in allotment.asked for tag in self.ready(now))
            or self._falls(allotment, demand, now)
        )

    @staticmethod
    def _rises(allotment: Allotment, tag: str, want: TagDemand) -> bool:
        """Tell if more is wanted than posted, and what was posted is the limit."""
        if not want.waiting:
            return False
        line, claim = allotment.row.tags.get(tag, Line()), allotment.claims.get(tag, 0)
        if claim:
            return want.wants > line.wants and claim >= line.wants
        return not line.waiting

    def _falls(
        self, allotment: Allotment, demand: Mapping[str, TagDemand], now: float
    ) -> bool:
        """Tell if less has been wanted for a while than others could use."""
        gone = any(not demand.get(tag, _NOTHING).waiting for tag in allotment.vain)
        self._gone_since = _since(self._gone_since, gone, now)
        return (allotment.row.pressed and self._is_slack(now)) or _over(
            self._gone_since, self._pace.beat, now
        )

    def _is_slack(self, now: float) -> bool:
        return _over(self._slack_since, self._pace.linger, now)

    def steady(
        self, allotment: Allotment, demand: Mapping[str, TagDemand], now: float
    ) -> Mapping[str, TagDemand]:
        """Return the demand as it is to be posted, for whatever reason it is.

        What has only just fallen is posted as it was.
        """
        if self._is_slack(now):
            return demand
        steady = dict(demand)
        for tag, claim in allotment.claims.items():
            want = demand.get(tag, _NOTHING)
            if want.wants < claim:
                steady[tag] = want._replace(in_use=claim - want.waiting)
        return steady

    def spare(
        self, allotment: Allotment, demand: Mapping[str, TagDemand], now: float
    ) -> int:
        """Return how many slots are unused that others go short of."""
        if not (allotment.row.pressed and self._is_slack(now)):
            return 0
        unused = allotment.row.owned - sum(want.wants for want in demand.values())
        return max(min(allotment.unmet, allotment.slack(demand), unused), 0)

    def ready(self, now: float) -> list[str]:
        """Return the tags whose turn is over."""
        return [t for t, s in self._had_since.items() if _over(s, self._turn, now)]

    def note(self, before: Allotment | None, allotment: Allotment, now: float) -> None:
        """Take note of a new allotment."""
        self._slack_since = self._gone_since = None
        self._turn = self._pace.turn_length(allotment.turns)
        old = {t: line.place for t, line in before.row.tags.items()} if before else {}
        self._had_since = {
            tag: self._had_since.get(tag, now)
            if old.get(tag) == allotment.row.tags[tag].place
            else now  # a new place, a new turn
            for tag, claim in allotment.claims.items()
            if claim and allotment.row.owned
        }

    def times(self, allotment: Allotment, now: float) -> Iterator[float]:
        """Yield the times at which something may have to be said."""
        if allotment.row.tags:
            yield now + self._pace.beat
        if allotment.row.pressed:
            if self._slack_since is not None:
                yield self._slack_since + self._pace.linger
            if self._ask_at > now:
                yield self._ask_at
        for tag in allotment.asked:
            yield self._had_since.get(tag, now) + self._turn


def _since(since: float | None, is_so: bool, now: float) -> float | None:
    """Return since when it is so, None if it is not."""
    if not is_so:
        return None
    return now if since is None else since


def _over(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since >= seconds
