"""What a pool wants, what the ledger allots to it, and when the two have to meet.

The store is written when something changed that could move a slot, and else left
alone: how long a line is does not matter while it gets less than it wants. A rise is
posted at once. A fall is posted when others go short, after it has lasted for a moment
(`linger`): what a loop uses does not travel in between. It is much shorter when as many
as `_PROOFS` slots were given up of which none was wanted back within `linger`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from ..scheduling.counters import Histogram
from .rows import Gone, Member, Session, TagDemand, Terms
from .store import LedgerError
from .watch import Pace

#: Tags of one process in its row; those beyond are summed up under the name of none.
_MAX_TAGS = 256
_REST = ""

_NOTHING = TagDemand()

#: How often that has to be seen, and how much shorter it is then.
_PROOFS, _SHORTER = 8, 16

#: Beats between looks at a pool without a user: all but a new tag rings before.
_REST_BEATS = 4

Tags = Mapping[str, TagDemand]


class Local(Protocol):
    """The pool in this process. Called by the keeper's thread only."""

    def demand(self) -> tuple[int, Tags]:
        """Return the connections that are open, and what is wanted by tag.

        A connection counts from before it is opened until after it is closed. In use is
        the most since the last call: between two checkouts demand does not fall.
        """
        ...

    def sessions(self) -> Collection[Session]:
        """Return the server sessions, each from before it is used until its end."""
        ...

    def server(self) -> str | None:
        """Return the identity of the server where they are, None until it is known."""
        ...

    def lost(self) -> Sequence[Session | None]:
        """Return those whose end is not known; they count as open until buried."""
        ...

    def buried(self, lost: Sequence[Session | None]) -> None:
        """Forget these, the first of :meth:`lost`; lower the allotment by as many."""

    def allot(
        self,
        slots: int,
        ceilings: Mapping[str, int],
        other: int,
        reserves: Mapping[str, int],
        elsewhere: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Open a connection only while there are less than `slots`, at first 0.

        :param reserves: by tag, how many of these no other tag may use.
        :param elsewhere: by tag and other member, what it has used there lately.
        """

    def close_surplus(self) -> None:
        """Close idle connections above the allotment."""

    def read(self, rows: Mapping[str, str], member: str) -> None:
        """Note the ledger's rows in the last transaction, and who this process is."""

    def adopt(self, terms: Terms) -> None:
        """Have the ledger's limits in force, in the place of those asked for."""

    def pause(self, pauses: Mapping[str, str]) -> None:
        """Serve no checkout of just these tags, `ALL` for all: since when, by whom."""

    def freeze(self) -> None:
        """Use what is open, and open nothing until the next :meth:`allot`."""

    def press(self, pressed: bool) -> None:
        """Ring from now on when a connection falls idle, or do not any more."""

    def refuse(self, error: LedgerError) -> None:
        """Raise this in the callers that wait now."""


class TagBounds(NamedTuple):
    """What the tags may have in a pool, see :meth:`Local.allot`."""

    ceilings: Mapping[str, int] = MappingProxyType({})
    #: The ceiling of any other tag.
    other: int = 0
    reserves: Mapping[str, int] = MappingProxyType({})
    elsewhere: Mapping[str, Mapping[str, float]] = MappingProxyType({})


class State(NamedTuple):
    """What the keeper has seen in the pool at one moment, see :class:`Local`."""

    open: int
    tags: Tags
    #: Without those of `lost`.
    sessions: frozenset[Session]
    lost: tuple[Session | None, ...]
    server: str | None

    @property
    def wants(self) -> bool:
        return bool(self.open) or any(want.wants for want in self.tags.values())


def condense(demand: Tags, named: Collection[str] = ()) -> Tags:
    """Return the demand with a bounded number of tags.

    :param named: tags that have limits of their own: these are not summed up.
    """
    if len(demand) <= _MAX_TAGS:
        return demand
    ordered = sorted(demand, key=lambda t: (t not in named, -demand[t].wants, t))
    first = {tag: demand[tag] for tag in ordered[:_MAX_TAGS]}
    rest = [demand[tag] for tag in ordered[_MAX_TAGS:]]
    in_use, waiting = sum(d.in_use for d in rest), sum(d.waiting for d in rest)
    return {**first, _REST: TagDemand(in_use, waiting, any(d.active for d in rest))}


class PoolSide:
    """The pool, what it was told, and the most it has had in use in a round."""

    def __init__(self, local: Local) -> None:
        self.local = local
        #: Tags that have limits of their own.
        self.named: Collection[str] = ()
        # Slots, and bounds for tags; None if it may open nothing until it is told anew.
        self._told: tuple[int, TagBounds] | None = None
        self._peaks: dict[str, int] = {}
        self._pauses: Mapping[str, str] = {}

    @property
    def allowed(self) -> int:
        """How many connections it may have, as far as it was told."""
        return self._told[0] if self._told else 0

    def look(self) -> State:
        """Return what it has and wants, with what was in use in this round."""
        local, tags, peaks = self.local, {}, self._peaks
        open_, wanted = local.demand()
        sessions, lost = frozenset(local.sessions()), tuple(local.lost())
        for tag, want in wanted.items():
            peaks[tag] = max(peaks.get(tag, 0), want.in_use)
            tags[tag] = want._replace(in_use=peaks[tag])
        sessions -= frozenset(lost)
        return State(open_, condense(tags, self.named), sessions, lost, local.server())

    def forget_peaks(self) -> None:
        self._peaks.clear()

    def tell(self, slots: int, bounds: TagBounds) -> None:
        """Have it open no more than that, unless it was told so the last time."""
        if (slots, bounds) != self._told:
            self.local.allot(slots, *bounds)
            self._told = slots, bounds

    def pause(self, pauses: Mapping[str, str]) -> None:
        """Have it serve no checkout of just these tags, see :class:`Local`."""
        if pauses != self._pauses:
            self.local.pause(pauses)
            self._pauses = pauses

    def shrink(self, slots: int) -> None:
        """Have it open no more than `slots`, before the row says so."""
        if self._told is not None and slots < self.allowed:
            self.tell(slots, self._told[1])
            self.local.close_surplus()

    def close(self) -> None:
        """Have it open nothing, and close what is idle."""
        self.tell(0, self._told[1] if self._told else TagBounds())
        self.local.close_surplus()

    def bury(self, lost: Sequence[Session | None]) -> None:
        self.local.buried(lost)
        if self._told is not None:
            self._told = max(self._told[0] - len(lost), 0), self._told[1]

    def freeze(self) -> None:
        """Have it open nothing until it is told anew."""
        self.local.freeze()
        self._told = None


@dataclass(frozen=True, slots=True)
class Allotment:
    """What a member learns from a transaction."""

    #: The limits in force.
    terms: Terms
    #: The tags of which no checkout is to be served: since when, and by whom.
    pauses: Mapping[str, str]
    #: Its row: the slots that it owns, what it posted.
    row: Member
    #: The slots that it is to have.
    target: int
    #: By tag, what it got of what it posted: without what is only kept for the tag.
    claims: Mapping[str, int]
    bounds: TagBounds
    #: Slots wanted by any member that there are not.
    unmet: int
    #: Tags under which it is asked to yield, and how many are asked of all members.
    asked: frozenset[str]
    turns: int
    #: How many members go short, and how many there are.
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

    @property
    def vain(self) -> frozenset[str]:
        """The tags under which it waits for more than it got."""
        return frozenset(
            tag
            for tag, line in self.row.tags.items()
            if line.waiting and self.claims[tag] < line.wants
        )

    @property
    def short(self) -> frozenset[str]:
        """The tags that go short: that one more waits under them is no news."""
        tags, claims = self.row.tags, self.claims
        return self.vain.union(t for t in tags if 0 < claims[t] < tags[t].wants)

    def slack(self, demand: Tags) -> int:
        """Return how many slots are claimed here and not wanted."""
        return sum(
            max(claim - demand.get(tag, _NOTHING).wants, 0)
            for tag, claim in self.claims.items()
        )


class Demand:
    """What one process wants, beside what the ledger knows of that."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.allotment: Allotment | None = None  # while we are a member
        # Since when: less is wanted than claimed; no caller waits any more under a
        # tag that goes short; each tag has had its slot.
        self._slack_since: float | None = None
        self._gone_since: float | None = None
        self._had_since: dict[str, float] = {}
        self._turn = pace.turn
        # Since when a slot was not wanted that was given up; how many in a row were not
        # wanted back at once.
        self._given_since: float | None = None
        self._proofs = 0
        #: How long each slot took that is due here and was another member's.
        self.handovers = Histogram()
        self._due_since: float | None = None
        # When the pool was asked last, and is to be asked again; if it does not ring.
        self._asked_at = self._ask_at = self.rests_until = float("-inf")

    @property
    def known(self) -> Allotment:
        assert self.allotment is not None
        return self.allotment

    def rung(self, now: float) -> None:
        """See later if what fell idle stays so: the pool has rung."""
        self._ask_at, self.rests_until = now + self._linger, now

    def is_news(self, tags: Tags, now: float) -> bool:
        """Tell if the store has to hear of what is wanted here."""
        known = self.known
        # What is in use is the most since the pool was asked last: a fall began then.
        since, self._asked_at = self._asked_at, now
        busy = known.row.pressed or known.asked or any(w.wants for w in tags.values())
        self.rests_until = now if busy else now + _REST_BEATS * self._pace.beat
        rises = any(self._rises(tag, want) for tag, want in tags.items())
        self._learn(rises, now)
        self._slack_since = _since(self._slack_since, known.slack(tags) > 0, since)
        gone = any(not tags.get(tag, _NOTHING).waiting for tag in known.short)
        self._gone_since = _since(self._gone_since, gone, now)
        active = {tag for tag, want in tags.items() if want.active}
        return (
            active != {tag for tag, line in known.row.tags.items() if line.active}
            or rises
            or any(tag in known.asked for tag in self.ready(now))
            or (known.row.pressed and self._is_slack(now))
            or _over(self._gone_since, self._pace.beat, now)
        )

    def _learn(self, rises: bool, now: float) -> None:
        """See if what was given up is wanted back at once."""
        given, longest = self._given_since, self._pace.linger
        if _over(given, longest, now):
            self._proofs, self._given_since = self._proofs + 1, None
        elif given is not None and rises:
            self._proofs, self._given_since = 0, None

    def _rises(self, tag: str, want: TagDemand) -> bool:
        """Tell if more is wanted than posted, and what was posted is the limit."""
        if not want.waiting:
            return False
        line, claim = self.known.row.tags.get(tag, _NOTHING), self.known.claims.get(tag)
        if claim:
            return want.wants > line.wants and claim >= line.wants
        return not line.waiting

    @property
    def _linger(self) -> float:
        longest = self._pace.linger
        return longest if self._proofs < _PROOFS else longest / _SHORTER

    def _is_slack(self, now: float) -> bool:
        return _over(self._slack_since, self._linger, now)

    def steady(self, tags: Tags, now: float) -> Tags:
        """Return the demand to be posted: what has only just fallen is as it was."""
        if self._is_slack(now):
            return tags
        steady = dict(tags)
        for tag, claim in self.known.claims.items():
            want = tags.get(tag, _NOTHING)
            if want.wants < claim:
                steady[tag] = want._replace(in_use=claim - want.waiting)
        return steady

    def spare(self, tags: Tags, now: float) -> int:
        """Return how many slots are unused that others go short of."""
        known = self.known
        if not (known.row.pressed and self._is_slack(now)):
            return 0
        unused = known.row.owned - sum(want.wants for want in tags.values())
        return max(min(known.unmet, known.slack(tags), unused), 0)

    def ready(self, now: float) -> list[str]:
        """Return the tags whose turn is over."""
        return [t for t, s in self._had_since.items() if _over(s, self._turn, now)]

    def note(self, allotment: Allotment, now: float) -> None:
        before = self.allotment.row if self.allotment else Member(0)
        old, row = before.tags, allotment.row
        if self._due_since is not None:
            for _ in range(row.owned - before.owned):
                self.handovers.add(now - self._due_since)
        is_due = row.owned < allotment.target and allotment.fresh is None
        self._due_since = _since(self._due_since, is_due, now)
        if row.owned < before.owned and self._is_slack(now):
            self._given_since = self._slack_since
        self.allotment, self._slack_since, self._gone_since = allotment, None, None
        self._turn = self._pace.turn_length(allotment.turns)
        self._had_since = {
            tag: self._had_since.get(tag, now)
            if tag in old and old[tag].place == row.tags[tag].place
            else now  # a new place, a new turn
            for tag, claim in allotment.claims.items()
            if claim and row.owned
        }

    def times(self, now: float) -> Iterator[float]:
        """Yield the times at which something may have to be said."""
        if (has := self.allotment) is None:
            return
        if has.row.tags:
            yield max(now + self._pace.beat, self.rests_until)
        if has.row.pressed:
            if self._slack_since is not None:
                yield self._slack_since + self._linger
            if self._ask_at > now:
                yield self._ask_at
        for tag in has.asked:
            yield self._had_since.get(tag, now) + self._turn


def _since(since: float | None, is_so: bool, now: float) -> float | None:
    """Return since when it is so, None if it is not."""
    return (now if since is None else since) if is_so else None


def _over(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since >= seconds
