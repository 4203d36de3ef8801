"""Who is to have how many slots: a pure function of what stands on the board.

The rules are those of :mod:`sqla_fairpool.scheduling.policy`, in two steps: max-min
shares over the tags of all members, each below its ceiling; then each tag's share, max-
min, over the members that work under it. A member's *claim* is the sum of what it got,
and its *target* the claim and what it may keep of what nobody claims.

What is promised, and tested against this definition:

1. Claims add up to ``min(capacity, what can be claimed)`` exactly, and targets to
   no more than the capacity: whoever grows to its target never has to wait for slots
   but those that others are to give back.
2. Slots that nobody claims stay with whoever has them.
3. Nothing depends on the order of the rows, on a clock or on chance. Remainders go to
   those who stand first in the *line* (see below), and stay there.
4. The claim of one that gets less than it wants does not depend on how much more it
   wants: while all are saturated, changes of demand move nothing.

The line. Each tag on the board has a place, and each member under it: numbers from a
counter, given when its demand begins. With more members than slots, those at the end
get nothing; as many at the head are then *asked* to yield, and one that yields takes a
new place, behind those who wait (round robin). While there is a slot for everybody,
nobody is asked, and places do not change.

A *stalled* member does not answer (it is stopped, say). It cannot give anything back
and takes nothing: it counts with the slots that it has, not with what it wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from ..scheduling import policy

__all__ = ["Allocation", "Limits", "Line", "Party", "allocate"]


class Line(NamedTuple):
    """What one member wants under one tag, and where it stands."""

    in_use: int = 0
    waiting: int = 0
    active: bool = False
    #: Its place among the tag's members.
    place: int = 0
    #: The ceiling that the member has for the tag, as far as it knows.
    limit: int = 0

    @property
    def wants(self) -> int:
        """Its demand."""
        return self.in_use + self.waiting


class Party(Protocol):
    """What the allocation asks of a member's row."""

    @property
    def owned(self) -> int: ...
    @property
    def stalled(self) -> bool: ...
    @property
    def lines(self) -> Mapping[str, Line]: ...


class Limits(NamedTuple):
    """The numbers of the rules."""

    #: Slots to be divided: without those in quarantine.
    capacity: int
    soft_limit: int
    max_limit: int


@dataclass(slots=True)
class Allocation:
    """The answer. Pairs are (tag, member)."""

    #: Slots each member is to have.
    targets: dict[str, int]
    #: What each member claims of them, all tags together.
    claimed: dict[str, int]
    #: The same by tag and member, those with demand only.
    claims: dict[tuple[str, str], int]
    #: Ceiling of the tag in the member's pool. It leaves room: what nobody claims.
    limits: dict[tuple[str, str], int]
    #: By tag: what it got, and its ceiling, over all members.
    shares: dict[str, int]
    ceilings: dict[str, int]
    #: The ceiling of a tag that nobody has on the board.
    newcomer: int
    #: Slots that are wanted below ceilings and that there are not.
    unmet: int
    #: By tag: members who wait there for more than their claim.
    hungry: dict[str, frozenset[str]]
    #: Who is asked to yield; and the tags that are.
    asked: set[tuple[str, str]]
    asked_tags: set[str]

    def presses(self, member: str, tags: Mapping[str, Line]) -> bool:
        """Tell if others go short of what `member` does not use."""
        return self.unmet > 0 or any(
            self.hungry.get(tag, frozenset()) - {member} for tag in tags
        )


class _Row(NamedTuple):
    """A member in a tag's line."""

    place: int
    member: str
    wants: int
    #: It waits, and it answers.
    hungry: bool
    #: What a stalled member is taken to hold here; None for one that answers.
    fixed: int | None


def allocate(
    parties: Mapping[str, Party], places: Mapping[str, int], limits: Limits
) -> Allocation:
    """Divide the capacity among the members. See the head of this file.

    :param parties: the members by id.
    :param places: the tags' places in the line of tags.

    Costs O(n log n) for n pairs of tag and member, and O(capacity * log n).
    """
    lines, active, locked = _lines(parties)
    order = sorted(lines, key=lambda tag: (places.get(tag, 0), tag))
    ceilings = {
        tag: policy.ceiling(
            len(active) - (tag in active), limits.soft_limit, limits.max_limit
        )
        for tag in order
    }
    found = Allocation(
        targets={},
        claimed=dict.fromkeys(parties, 0),
        claims={},
        limits={},
        shares={},
        ceilings=ceilings,
        newcomer=policy.ceiling(len(active), limits.soft_limit, limits.max_limit),
        unmet=0,
        hungry={},
        asked=set(),
        asked_tags=set(),
    )
    _divide_among_tags(found, order, lines, limits.capacity - locked)
    for tag in order:
        _divide_tag(found, tag, lines[tag])
    _ask_tags(found, order, lines)
    _set_targets(found, parties, limits.capacity)
    return found


def _lines(
    parties: Mapping[str, Party],
) -> tuple[dict[str, list[_Row]], set[str], int]:
    """Return the tags' lines, the active tags, and slots that nobody can have."""
    lines: dict[str, list[_Row]] = {}
    active: set[str] = set()
    locked = 0
    for member, party in parties.items():
        if party.stalled:
            in_use = [line.in_use for line in party.lines.values()]
            held = policy.fair_shares(in_use, party.owned)
            locked += party.owned - sum(held)
            for (tag, line), slots in zip(party.lines.items(), held, strict=True):
                row = _Row(line.place, member, slots, False, slots)
                lines.setdefault(tag, []).append(row)
            continue
        for tag, (in_use_now, waiting, is_active, place, _) in party.lines.items():
            row = _Row(place, member, in_use_now + waiting, waiting > 0, None)
            lines.setdefault(tag, []).append(row)
            if is_active:
                active.add(tag)
    for rows in lines.values():
        rows.sort()
    return lines, active, locked


def _divide_among_tags(
    found: Allocation, order: list[str], lines: dict[str, list[_Row]], capacity: int
) -> None:
    floors = [sum(row.fixed or 0 for row in lines[tag]) for tag in order]
    demands = [
        max(floor, min(sum(row.wants for row in lines[tag]), found.ceilings[tag]))
        for tag, floor in zip(order, floors, strict=True)
    ]
    shares = policy.fair_shares(demands, max(capacity, 0), floors=floors)
    found.shares = dict(zip(order, shares, strict=True))
    found.unmet = sum(demands) - sum(shares)


def _divide_tag(found: Allocation, tag: str, line: list[_Row]) -> None:
    """Divide a tag's share among its members, and its ceiling as their limits."""
    share, ceiling = found.shares[tag], found.ceilings[tag]
    claims, rooms, hungry, asked = _divide_line(tuple(line), share, ceiling)
    for row, claim, room in zip(line, claims, rooms, strict=True):
        if claim:
            found.claims[tag, row.member] = claim
            found.claimed[row.member] += claim
        found.limits[tag, row.member] = room
    if hungry:
        found.hungry[tag] = hungry
    found.asked.update((tag, member) for member in asked)


# Of many tags few change between two looks.
@lru_cache(maxsize=1024)
def _divide_line(
    line: tuple[_Row, ...], share: int, ceiling: int
) -> tuple[list[int], list[int], frozenset[str], list[str]]:
    """Return claims, limits, those that go short and those that are asked to yield."""
    floors = [row.fixed or 0 for row in line]
    claims = policy.fair_shares([row.wants for row in line], share, floors=floors)
    without_end = [ceiling] * len(line)
    rooms = policy.fair_shares(without_end, ceiling, floors=claims)
    # One that wants nothing now is not to wait for an answer when it does.
    rooms = [
        room if row.wants else max(room, 1)
        for row, room in zip(line, rooms, strict=True)
    ]
    pairs = [*zip(line, claims, strict=True)]
    hungry = frozenset(r.member for r, claim in pairs if r.hungry and claim < r.wants)
    # Round robin: as many of the first are asked as get nothing at all.
    empty = sum(row.hungry and not claim for row, claim in pairs)
    holders = [row.member for row, claim in pairs if claim and row.fixed is None]
    return claims, rooms, hungry, holders[:empty]


def _ask_tags(
    found: Allocation, order: list[str], lines: dict[str, list[_Row]]
) -> None:
    """Round robin among tags, when there are more of them than slots."""
    empty = sum(
        not found.shares[tag] and any(row.hungry for row in lines[tag]) for tag in order
    )
    if not empty:
        return
    for tag in order:
        rows = [
            row.member
            for row in lines[tag]
            if row.fixed is None and (tag, row.member) in found.claims
        ]
        if rows:
            found.asked_tags.add(tag)
            found.asked.update((tag, member) for member in rows)
            empty -= 1
            if not empty:
                return


def _set_targets(
    found: Allocation, parties: Mapping[str, Party], capacity: int
) -> None:
    """Let everybody keep what nobody claims; those who have most give first."""
    members = sorted(parties)
    claimed = found.claimed
    held = [
        party.owned if (party := parties[m]).stalled else claimed[m] for m in members
    ]
    spare = [
        max(parties[m].owned - slots, 0) for m, slots in zip(members, held, strict=True)
    ]
    kept = policy.fair_shares(spare, max(capacity - sum(held), 0))
    found.targets = {
        m: slots + more for m, slots, more in zip(members, held, kept, strict=True)
    }
