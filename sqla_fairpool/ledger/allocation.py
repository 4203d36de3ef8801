"""How the slots are divided: a pure function of the members' rows.

The rules are those of :mod:`sqla_fairpool.scheduling.policy`, in two steps: max-min
shares over the tags of all members, each below its ceiling; then each tag's share, max-
min, over the members that work under it. A member's *claim* is the sum of what it got,
and its *target* the claim and what it may keep of what is not claimed.

What is promised, and tested against this definition:

1. Claims add up to ``min(capacity, what can be claimed)`` exactly, and targets to
   no more than the capacity: a member that grows to its target never has to wait for
   slots but those that others are to give back.
2. Slots that are not claimed stay where they are.
3. Nothing depends on the order of the rows, on a clock or on chance. Remainders go to
   the first in the *line* (see below), and stay there.
4. The claim of one that gets less than it wants does not depend on how much more it
   wants: while all are saturated, changes of demand move nothing.

The line. Each tag has a place, and each member under it: numbers from a
counter, given when its demand begins. With more members than slots, those at the end
get nothing; as many at the head are then *asked* to yield, and one that yields takes a
new place, behind those that wait (round robin). While there is a slot for each, none
is asked, and places do not change.

A *stalled* member does not answer (it is stopped, say). It cannot give anything back
and takes nothing: it counts with the slots that it has, not with what it wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

from ..scheduling import policy
from ..scheduling.limits import LimitsByTag

__all__ = ["STALLED", "TURN", "Allocation", "Limits", "Line", "Party", "allocate"]

#: Two reasons for which a member is expected to look: asked to yield a place in a line;
#: and written down as stalled, so that it sees that when it goes on.
TURN, STALLED = "turn", "stalled"


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
    def pressed(self) -> bool: ...
    @property
    def stalled(self) -> bool: ...
    @property
    def tags(self) -> Mapping[str, Line]: ...


class Limits(NamedTuple):
    """The numbers of the rules."""

    #: Slots to be divided: without those in quarantine.
    capacity: int
    soft_limit: int
    max_limit: int
    tags: LimitsByTag = LimitsByTag({})


@dataclass(slots=True)
class Allocation:
    """The answer. Pairs are (tag, member)."""

    #: By tag: its ceiling, and what it got, over all members.
    ceilings: dict[str, int]
    #: The ceiling of a tag that is in no row.
    newcomer: int
    #: What each member claims, all tags together, and the slots it is to have.
    claimed: dict[str, int]
    targets: dict[str, int] = field(default_factory=dict)
    shares: dict[str, int] = field(default_factory=dict)
    #: The claims by tag and member, those with demand only.
    claims: dict[tuple[str, str], int] = field(default_factory=dict)
    #: Ceiling of the tag in the member's pool. It leaves room: what is not claimed.
    limits: dict[tuple[str, str], int] = field(default_factory=dict)
    #: Slots that are wanted below ceilings and that there are not.
    unmet: int = 0
    #: By tag: members that wait there for more than their claim.
    starved: dict[str, frozenset[str]] = field(default_factory=dict)
    #: The pairs that are asked to yield; and the tags that are.
    asked: set[tuple[str, str]] = field(default_factory=set)
    asked_tags: set[str] = field(default_factory=set)

    def grants(self, parties: Mapping[str, Party], free: int) -> dict[str, int]:
        """Divide the free slots among the members that are below their targets."""
        short = [key for key, p in parties.items() if p.owned < self.targets[key]]
        owned = [parties[key].owned for key in short]
        wanted = [self.targets[key] for key in short]
        shares = policy.fair_shares(wanted, free + sum(owned), floors=owned)
        return {
            key: share - had
            for key, share, had in zip(short, shares, owned, strict=True)
            if share > had
        }

    def due(self, parties: Mapping[str, Party], free: int) -> dict[str, str]:
        """Return the members that are expected to look, and why."""
        grants = self.grants(parties, free)
        asked = {key for _, key in self.asked}
        due = {}
        for key, party in parties.items():
            target = self.targets[key]
            if party.stalled:
                due[key] = STALLED
            elif party.owned > target:
                due[key] = f"give {target}"
            elif key in grants:
                due[key] = f"take {grants[key]}"
            elif not party.owned:
                continue
            elif self._binds_anew(key, party.tags):
                due[key] = "limit"
            elif key in asked:
                due[key] = TURN
            elif not party.pressed and self.presses(key, party.tags):
                due[key] = "press"
        return due

    def _binds_anew(self, member: str, tags: Mapping[str, Line]) -> bool:
        """Tell if a ceiling that it does not know yet makes a difference."""
        return any(
            min(line.wants, line.limit) != min(line.wants, self.limits[tag, member])
            for tag, line in tags.items()
        )

    def presses(self, member: str, tags: Mapping[str, Line]) -> bool:
        """Tell if others go short of what `member` does not use."""
        return self.unmet > 0 or any(
            self.starved.get(tag, frozenset()) - {member} for tag in tags
        )


class _Row(NamedTuple):
    """A member in a tag's line."""

    place: int
    member: str
    wants: int
    #: It waits, and it answers.
    waits: bool
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

    def ceiling(others: int) -> int:
        return policy.ceiling(others, limits.soft_limit, limits.max_limit)

    found = Allocation(
        ceilings={
            tag: limits.tags.of(tag).max or ceiling(len(active - {tag}))
            for tag in order
        },
        newcomer=ceiling(len(active)),
        claimed=dict.fromkeys(parties, 0),
    )
    weights = [limits.tags.of(tag).weight for tag in order]
    _divide_among_tags(found, order, lines, limits.capacity - locked, weights)
    for tag in order:
        _divide_tag(found, tag, lines[tag])
    _ask_tags(found, order, lines)
    _set_targets(found, parties, limits.capacity)
    return found


def _lines(
    parties: Mapping[str, Party],
) -> tuple[dict[str, list[_Row]], set[str], int]:
    """Return the tags' lines, the active tags, and slots that no tag can have."""
    lines: dict[str, list[_Row]] = {}
    active: set[str] = set()
    locked = 0
    for member, party in parties.items():
        held: Sequence[int | None] = [None] * len(party.tags)
        if party.stalled:
            in_use = [line.in_use for line in party.tags.values()]
            held = slots = policy.fair_shares(in_use, party.owned)
            locked += party.owned - sum(slots)
        else:
            active.update(tag for tag, line in party.tags.items() if line.active)
        for (tag, line), fixed in zip(party.tags.items(), held, strict=True):
            wants = line.wants if fixed is None else fixed
            waits = line.waiting > 0 and fixed is None
            row = _Row(line.place, member, wants, waits, fixed)
            lines.setdefault(tag, []).append(row)
    for rows in lines.values():
        rows.sort()
    return lines, active, locked


def _divide_among_tags(
    found: Allocation,
    order: list[str],
    lines: dict[str, list[_Row]],
    capacity: int,
    weights: list[float],
) -> None:
    floors = [sum(row.fixed or 0 for row in lines[tag]) for tag in order]
    demands = [
        max(floor, min(sum(row.wants for row in lines[tag]), found.ceilings[tag]))
        for tag, floor in zip(order, floors, strict=True)
    ]
    shares = policy.fair_shares(
        demands,
        max(capacity, 0),
        weights if set(weights) - {1.0} else None,
        floors=floors,
    )
    found.shares = dict(zip(order, shares, strict=True))
    found.unmet = sum(demands) - sum(shares)


def _divide_tag(found: Allocation, tag: str, line: list[_Row]) -> None:
    """Divide a tag's share among its members, and its ceiling as their limits."""
    share, ceiling = found.shares[tag], found.ceilings[tag]
    claims, rooms, starved, asked = _divide_line(tuple(line), share, ceiling)
    for row, claim, room in zip(line, claims, rooms, strict=True):
        if claim:
            found.claims[tag, row.member] = claim
            found.claimed[row.member] += claim
        found.limits[tag, row.member] = room
    if starved:
        found.starved[tag] = starved
    found.asked.update((tag, member) for member in asked)


# Of many tags few change between two looks.
@lru_cache(maxsize=1024)
def _divide_line(
    line: tuple[_Row, ...], share: int, ceiling: int
) -> tuple[list[int], list[int], frozenset[str], list[str]]:
    """Return claims, limits, those that go short and those that are asked to yield."""
    floors = [row.fixed or 0 for row in line]
    claims = policy.fair_shares([row.wants for row in line], share, floors=floors)
    rooms = policy.fair_shares([ceiling] * len(line), ceiling, floors=claims)
    pairs = [*zip(line, claims, strict=True)]
    # One that wants nothing now is not to wait for an answer when it does.
    least = [0 if row.wants else 1 for row in line]
    rooms = [*map(max, rooms, least)]
    starved = frozenset(r.member for r, claim in pairs if r.waits and claim < r.wants)
    # Round robin: as many of the first are asked as get nothing at all.
    empty = sum(row.waits and not claim for row, claim in pairs)
    holders = [row.member for row, claim in pairs if claim and row.fixed is None]
    return claims, rooms, starved, holders[:empty]


def _ask_tags(
    found: Allocation, order: list[str], lines: dict[str, list[_Row]]
) -> None:
    """Round robin among tags, when there are more of them than slots."""
    empty = sum(
        not found.shares[tag] and any(row.waits for row in lines[tag]) for tag in order
    )
    for tag in order if empty else ():
        rows = {
            (tag, row.member)
            for row in lines[tag]
            if row.fixed is None and (tag, row.member) in found.claims
        }
        if rows and len(found.asked_tags) < empty:
            found.asked_tags.add(tag)
            found.asked |= rows


def _set_targets(
    found: Allocation, parties: Mapping[str, Party], capacity: int
) -> None:
    """Let each keep what is not claimed; those that have most give first."""
    members = sorted(parties)
    owned = [parties[m].owned for m in members]
    held = [
        parties[m].owned if parties[m].stalled else found.claimed[m] for m in members
    ]
    spare = [max(had - slots, 0) for had, slots in zip(owned, held, strict=True)]
    kept = policy.fair_shares(spare, max(capacity - sum(held), 0))
    slots = map(sum, zip(held, kept, strict=True))
    found.targets = dict(zip(members, slots, strict=True))
