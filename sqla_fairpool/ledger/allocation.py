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
4. A slot that is reserved for a tag is claimed under that tag only, by the members that
   work under it, wanted or not; while no member does, it stays free.
5. The claim of one that gets less than it wants does not depend on how much more it
   wants: while all are saturated, changes of demand move nothing.

The line. Each tag has a place, and each member under it: numbers from a
counter, given when its demand begins. With more members than slots, those at the end
get nothing; as many at the head are then *asked* to yield, and one that yields takes a
new place, behind those that wait (round robin). With more tags than slots, each tag
that has one is asked, and goes back by a turn over its weight: so tags get time by
weight over all members (stride scheduling: Waldspurger and Weihl, MIT/LCS/TM-528).
While there is a slot for each, none is asked, and places do not change.

A *stalled* member does not answer (it is stopped, say). It cannot give anything back
and takes nothing: it counts with the slots that it has, not with what it wanted.
"""

from __future__ import annotations

import operator
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
    #: Of the claims what is from the tag's reserve; and the slots that are reserved for
    #: tags under which no member works.
    reserves: dict[tuple[str, str], int] = field(default_factory=dict)
    kept_free: int = 0
    #: The pairs that are asked to yield; and the tags that are.
    asked: set[tuple[str, str]] = field(default_factory=set)
    asked_tags: set[str] = field(default_factory=set)

    def grants(self, members: Mapping[str, Member], free: int) -> dict[str, int]:
        """Divide the free slots among the members that are below their targets.

        First go the slots that are reserved for tags and that no member keeps for them.
        """
        short = [key for key, m in members.items() if m.owned < self.targets[key]]
        owned = [members[key].owned for key in short]
        wanted = [self.targets[key] for key in short]
        missing = [self._missing(key, members[key]) for key in short]
        floors = [*map(operator.add, owned, policy.fair_shares(missing, free))]
        rest = max(free - self.kept_free - sum(missing), 0)
        shares = policy.fair_shares(wanted, rest + sum(floors), floors=floors)
        return {
            key: share - had
            for key, share, had in zip(short, shares, owned, strict=True)
            if share > had
        }

    def _reserved_at(self, key: str, member: Member) -> dict[str, int]:
        found = {tag: self.reserves.get((tag, key), 0) for tag in member.tags}
        return {tag: slots for tag, slots in found.items() if slots}

    def _missing(self, key: str, member: Member) -> int:
        """Return what a member lacks of reserved slots."""
        missing = sum(self._reserved_at(key, member).values()) - member.kept
        return max(min(missing, self.targets[key] - member.owned), 0)

    def kept_at(self, key: str, member: Member, more: int) -> dict[str, int]:
        """Return how many of a member's slots are each tag's alone, of its reserve.

        :param more: slots that it gets now.
        """
        reserves = self._reserved_at(key, member)
        owned = member.owned + more
        if owned >= self.claimed[key]:
            return reserves
        slots = min(member.kept + min(self._missing(key, member), more), owned)
        kept = policy.fair_shares([*reserves.values()], slots)
        return {tag: n for tag, n in zip(reserves, kept, strict=True) if n}

    def due(self, members: Mapping[str, Member]) -> dict[str, str]:
        """Return the members that are expected to look, and why."""
        asked = {key for _, key in self.asked}
        found = {}
        for key, member in members.items():
            if member.stalled:
                found[key] = STALLED
            elif member.owned > self.targets[key]:
                found[key] = f"give {self.targets[key]}"
            elif not member.owned:
                continue
            elif self._binds_anew(key, member):
                found[key] = "limit"
            elif key in asked:
                found[key] = TURN
            elif not member.pressed and self.presses(key, member.tags):
                found[key] = "press"
        return found

    def _binds_anew(self, key: str, member: Member) -> bool:
        """Tell if a ceiling that it does not know yet makes a difference.

        So does a reserve.
        """
        return any(
            min(line.wants, line.limit) != min(line.wants, self.limits[tag, key])
            for tag, line in member.tags.items()
        ) or self.kept_at(key, member, 0) != {
            tag: line.kept for tag, line in member.tags.items() if line.kept
        }

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
    reserves, room = limits.tags.reserves, limits.capacity - limits.tags.reserved
    order = sorted({*lines, *reserves}, key=lambda tag: (places.get(tag, 0), tag))

    def ceiling(others: int) -> int:
        return policy.ceiling(others, limits.soft_limit, limits.max_limit)

    own = {tag: limits.tags.of(tag) for tag in order}
    ceilings = {tag: own[tag].max or ceiling(len(active - {tag})) for tag in order}
    if reserves:
        ceilings = {
            tag: policy.own_ceiling(
                most, None, own[tag].reserved, max(room + own[tag].reserved, 1)
            )
            for tag, most in ceilings.items()
        }
    weights = [own[tag].weight for tag in order]
    there = max(limits.capacity - locked, 0)
    fixed = [sum(row.fixed or 0 for row in lines.get(tag, ())) for tag in order]
    kept = _kept([own[tag].reserved for tag in order], fixed, there)
    floors = [*map(operator.add, fixed, kept)]
    demands = [
        max(floor, min(sum(row.wants for row in lines.get(tag, ())), ceilings[tag]))
        for tag, floor in zip(order, floors, strict=True)
    ]
    shares = policy.fair_shares(
        demands, there, weights if set(weights) - {1.0} else None, floors
    )
    found = Allocation(
        ceilings=ceilings,
        shares=dict(zip(order, shares, strict=True)),
        newcomer=min(ceiling(len(active)), max(room, 1))
        if reserves
        else ceiling(len(active)),
        unmet=sum(demands) - sum(shares),
        claimed=dict.fromkeys(members, 0),
    )
    for tag, slots in zip(order, kept, strict=True):
        _divide_tag(found, tag, lines.get(tag, []), slots)
    above = [tag for tag in order if found.shares[tag] > own[tag].reserved]
    _ask_tags(found, above, lines)
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


def _kept(reserved: list[int], fixed: list[int], there: int) -> list[int]:
    """Return what is to be kept for each tag, beside what stalled members hold."""
    missing = [max(n - held, 0) for n, held in zip(reserved, fixed, strict=True)]
    if not any(missing):
        return missing
    return policy.fair_shares(missing, max(there - sum(fixed), 0))


def _divide_tag(found: Allocation, tag: str, line: list[_Place], kept: int) -> None:
    """Divide a tag's share among its members, and its ceiling as their limits.

    :param kept: slots of the share that are the tag's whether it wants them or not.
    """
    if not any(row.fixed is None for row in line):
        found.kept_free += kept
        kept = 0
    share, ceiling = found.shares[tag], found.ceilings[tag]
    claims, rooms, starved, asked = _divide_line(tuple(line), share, ceiling, kept)
    for row, claim, room in zip(line, claims, rooms, strict=True):
        found.limits[tag, row.member] = room
        if claim:
            found.claims[tag, row.member] = claim
            found.claimed[row.member] += claim
    if kept:
        most = [
            0 if r.fixed is not None else c for r, c in zip(line, claims, strict=True)
        ]
        for row, slots in zip(line, policy.fair_shares(most, kept), strict=True):
            found.reserves[tag, row.member] = slots
    if starved:
        found.starved[tag] = starved
    found.asked.update((tag, member) for member in asked)


# Of many tags few change between two looks.
@lru_cache(maxsize=1024)
def _divide_line(
    line: tuple[_Place, ...], share: int, ceiling: int, kept: int
) -> tuple[list[int], list[int], frozenset[str], list[str]]:
    """Return claims, limits, those that go short and those that are asked to yield."""
    floors = [row.fixed or 0 for row in line]
    wants = [row.wants for row in line]
    answered = sum(row.wants for row in line if row.fixed is None)
    if answered < kept:
        most = [
            row.wants if row.fixed is not None else max(row.wants, kept) for row in line
        ]
        wants = policy.fair_shares(most, sum(wants) + kept - answered, floors=wants)
    claims = policy.fair_shares(wants, share, floors=floors)
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
    """Have tags take turns, when there are more of them than slots."""
    empty = sum(
        not share and any(row.waits for row in lines.get(tag, ()))
        for tag, share in found.shares.items()
    )
    for tag in order if empty else ():
        rows = {
            (tag, row.member)
            for row in lines[tag]
            if row.fixed is None and (tag, row.member) in found.claims
        }
        found.asked |= rows
        found.asked_tags.update(asked for asked, _ in rows)


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
    kept = policy.fair_shares(spare, max(capacity - found.kept_free - sum(held), 0))
    found.targets = dict(zip(keys, map(sum, zip(held, kept, strict=True)), strict=True))
