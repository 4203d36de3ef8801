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
from typing import NamedTuple

from ..scheduling import policy
from .rows import Limits, Member, TagDemand

#: Two reasons for which a member is expected to look: asked to yield a place in a line;
#: and written down as stalled, so that it sees that when it goes on.
TURN, STALLED = "turn", "stalled"


@dataclass(slots=True)
class Allocation:
    """The answer. Pairs are (tag, member)."""

    #: By tag, over all members: its ceiling, and what it got.
    ceilings: dict[str, int]
    shares: dict[str, int]
    #: The ceiling of a tag that is in no row.
    newcomer: int
    #: Slots that are wanted below ceilings and that there are not.
    unmet: int
    #: What each member claims, all tags together, and the slots it is to have.
    claimed: dict[str, int]
    targets: dict[str, int] = field(default_factory=dict)
    #: The claims by tag and member, those with demand only.
    claims: dict[tuple[str, str], int] = field(default_factory=dict)
    #: Ceiling of the tag in the member's pool. It leaves room: what is not claimed.
    limits: dict[tuple[str, str], int] = field(default_factory=dict)
    #: By tag: members that wait there for more than their claim.
    starved: dict[str, frozenset[str]] = field(default_factory=dict)
    #: The pairs that are asked to yield; and the tags that are.
    asked: set[tuple[str, str]] = field(default_factory=set)
    asked_tags: set[str] = field(default_factory=set)

    def grants(self, members: Mapping[str, Member], free: int) -> dict[str, int]:
        """Divide the free slots among the members that are below their targets."""
        short = [key for key, m in members.items() if m.owned < self.targets[key]]
        owned = [members[key].owned for key in short]
        wanted = [self.targets[key] for key in short]
        shares = policy.fair_shares(wanted, free + sum(owned), floors=owned)
        return {
            key: share - had
            for key, share, had in zip(short, shares, owned, strict=True)
            if share > had
        }

    def due(self, members: Mapping[str, Member], free: int) -> dict[str, str]:
        """Return the members that are expected to look, and why."""
        grants = self.grants(members, free)
        asked = {key for _, key in self.asked}
        found = {}
        for key, member in members.items():
            if member.stalled:
                found[key] = STALLED
            elif member.owned > self.targets[key]:
                found[key] = f"give {self.targets[key]}"
            elif key in grants:
                found[key] = f"take {grants[key]}"
            elif not member.owned:
                continue
            elif self._binds_anew(key, member.tags):
                found[key] = "limit"
            elif key in asked:
                found[key] = TURN
            elif not member.pressed and self.presses(key, member.tags):
                found[key] = "press"
        return found

    def _binds_anew(self, member: str, tags: Mapping[str, TagDemand]) -> bool:
        """Tell if a ceiling that it does not know yet makes a difference."""
        return any(
            min(line.wants, line.limit) != min(line.wants, self.limits[tag, member])
            for tag, line in tags.items()
        )

    def presses(self, member: str, tags: Mapping[str, TagDemand]) -> bool:
        """Tell if others go short of what `member` does not use."""
        return self.unmet > 0 or any(
            self.starved.get(tag, frozenset()) - {member} for tag in tags
        )


class _Place(NamedTuple):
    """A member in a tag's line."""

    place: int
    member: str
    wants: int
    #: It waits, and it answers.
    waits: bool
    #: What a stalled member is taken to hold here; None for one that answers.
    fixed: int | None


def allocate(
    members: Mapping[str, Member], places: Mapping[str, int], limits: Limits
) -> Allocation:
    """Divide the capacity among the members. See the head of this file.

    Costs O(n log n) for n pairs of tag and member, and O(capacity * log n).
    """
    lines, active, locked = _lines(members)
    order = sorted(lines, key=lambda tag: (places.get(tag, 0), tag))

    def ceiling(others: int) -> int:
        return policy.ceiling(others, limits.soft_limit, limits.max_limit)

    own = {tag: limits.tags.of(tag) for tag in order}
    ceilings = {tag: own[tag].max or ceiling(len(active - {tag})) for tag in order}
    weights = [own[tag].weight for tag in order]
    floors = [sum(row.fixed or 0 for row in lines[tag]) for tag in order]
    demands = [
        max(floor, min(sum(row.wants for row in lines[tag]), ceilings[tag]))
        for tag, floor in zip(order, floors, strict=True)
    ]
    there = max(limits.capacity - locked, 0)
    shares = policy.fair_shares(
        demands, there, weights if set(weights) - {1.0} else None, floors
    )
    found = Allocation(
        ceilings=ceilings,
        shares=dict(zip(order, shares, strict=True)),
        newcomer=ceiling(len(active)),
        unmet=sum(demands) - sum(shares),
        claimed=dict.fromkeys(members, 0),
    )
    for tag in order:
        _divide_tag(found, tag, lines[tag])
    _ask_tags(found, order, lines)
    _set_targets(found, members, limits.capacity)
    return found


def _lines(
    members: Mapping[str, Member],
) -> tuple[dict[str, list[_Place]], set[str], int]:
    """Return the tags' lines, the active tags, and slots that no tag can have."""
    lines: dict[str, list[_Place]] = {}
    active: set[str] = set()
    locked = 0
    for key, member in members.items():
        held: Sequence[int | None] = [None] * len(member.tags)
        if member.stalled:
            in_use = [line.in_use for line in member.tags.values()]
            held = slots = policy.fair_shares(in_use, member.owned)
            locked += member.owned - sum(slots)
        else:
            active.update(tag for tag, line in member.tags.items() if line.active)
        for (tag, line), fixed in zip(member.tags.items(), held, strict=True):
            wants = line.wants if fixed is None else fixed
            waits = line.waiting > 0 and fixed is None
            row = _Place(line.place, key, wants, waits, fixed)
            lines.setdefault(tag, []).append(row)
    for rows in lines.values():
        rows.sort()
    return lines, active, locked


def _divide_tag(found: Allocation, tag: str, line: list[_Place]) -> None:
    """Divide a tag's share among its members, and its ceiling as their limits."""
    share, ceiling = found.shares[tag], found.ceilings[tag]
    claims, rooms, starved, asked = _divide_line(tuple(line), share, ceiling)
    for row, claim, room in zip(line, claims, rooms, strict=True):
        found.limits[tag, row.member] = room
        if claim:
            found.claims[tag, row.member] = claim
            found.claimed[row.member] += claim
    if starved:
        found.starved[tag] = starved
    found.asked.update((tag, member) for member in asked)


# Of many tags few change between two looks.
@lru_cache(maxsize=1024)
def _divide_line(
    line: tuple[_Place, ...], share: int, ceiling: int
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
    found: Allocation, order: list[str], lines: dict[str, list[_Place]]
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
    found: Allocation, members: Mapping[str, Member], capacity: int
) -> None:
    """Let each keep what is not claimed; those that have most give first."""
    keys = sorted(members)
    owned = [members[key].owned for key in keys]
    held = [
        members[key].owned if members[key].stalled else found.claimed[key]
        for key in keys
    ]
    spare = [max(had - slots, 0) for had, slots in zip(owned, held, strict=True)]
    kept = policy.fair_shares(spare, max(capacity - sum(held), 0))
    found.targets = dict(zip(keys, map(sum, zip(held, kept, strict=True)), strict=True))
