"""Why a tag has what it has now: the facts, then the text.

:func:`facts_of` copies what there is to know, under the lock; :func:`explain` works it
out after that, and needs no scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from . import policy
from .counters import Counters
from .state import SchedulerState
from .ticket import TagLimits, TagState

#: Tags that are named as being before it.
_RIVALS_NAMED = 5


@dataclass(frozen=True, slots=True)
class Rival:
    """A tag that is served before the one that is explained."""

    name: str
    connections: int
    weight: float
    usage: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a tag has the connections that it has now. ``str()`` of it is a few lines."""

    tag: str
    active: bool
    connections: int
    waiting: int
    #: What it may have of its own.
    weight: float
    max: int | None
    reserved: int
    #: Connection-seconds that it has used lately.
    usage: float
    #: The most that it may hold now, and from which rule that comes: ``max`` (its own),
    #: ``max_limit``, ``soft_limit``, ``reserved``, ``reserved for others``, ``ledger``
    #: or ``paused``.
    ceiling: int
    ceiling_rule: str
    #: Its ceiling if it were the only active tag.
    ceiling_alone: int
    #: Its fair share, of how many connections, among how many active tags.
    fair_share: int
    shared: int
    active_tags: int
    #: Connections that it could have without any coming back.
    free: int
    #: It is the n-th of the tags that wait below their ceiling; None if it is none.
    place: int | None
    waiting_tags: int
    #: The first of those before it.
    before: tuple[Rival, ...]
    #: Connections that have to come back, of any tag, until it gets one more; None if
    #: only one of its own can help, or no caller waits.
    returns_needed: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as dicts, lists and numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(
            [self._has(), self._may(), self._ought(), self._stands(), self._needs()]
        )

    def _has(self) -> str:
        state = "active" if self.active else "idle"
        return (
            f"{self.tag} ({state}) has {self.connections}, {self.waiting} wait; "
            f"it used {self.usage:.1f} connection-seconds lately"
        )

    def _may(self) -> str:
        others = "1 tag is" if self.active_tags == 1 else f"{self.active_tags} tags are"
        rules = {
            "max": "its own maximum",
            "max_limit": "max_limit, no other tag is active",
            "soft_limit": f"soft_limit, {others} active",
            "reserved": "what is reserved for it",
            "reserved for others": "the rest is reserved for others",
            "ledger": "given by the ledger",
            "paused": "no checkout is served while it is paused",
        }
        return f"limit {self.ceiling}: {rules[self.ceiling_rule]}"

    def _ought(self) -> str:
        own = f"weight {self.weight:g}"
        if self.reserved:
            own += f", {self.reserved} reserved"
        return (
            f"fair share {self.fair_share} of {self.shared}: max-min among "
            f"{self.active_tags} active tags, by what they want now ({own})"
        )

    def _stands(self) -> str:
        if self.place is None:
            return f"not in line; {self.waiting_tags} tags wait below their limits"
        line = f"place {self.place} of {self.waiting_tags} tags in line"
        if not self.before:
            return line
        named = ", ".join(
            f"{one.name} (has {one.connections}, used {one.usage:.1f})"
            for one in self.before
        )
        more = self.place - 1 - len(self.before)
        return f"{line}; before it: {named}" + (f" and {more} more" if more else "")

    def _needs(self) -> str:
        if self.returns_needed is not None:
            return f"one more: when {self.returns_needed} of any tag have come back"
        if self.ceiling_rule == "paused":
            return "one more: when it is resumed"
        if self.connections >= self.ceiling:
            text = "one more: when its own come back until it is below its limit"
            if self.ceiling_alone > self.ceiling:
                text += f", or when it is the only active tag ({self.ceiling_alone})"
            return text
        if self.free:
            return "one more: at once, when a caller asks"
        return "one more: when a caller asks, and it is its turn"


class TagFacts(NamedTuple):
    """A tag as it is observed."""

    name: str
    party: policy.Party
    limits: TagLimits
    usage: float
    #: Its key in the line of tags that wait below their ceiling, None without.
    rank: policy.Rank | None


class Observed(NamedTuple):
    """What was copied in one hold of the lock."""

    tag: TagFacts
    others: Sequence[TagFacts]
    capacity: int
    reserved: int
    #: The limits of the rules; None if a ledger gives the ceilings.
    limits: tuple[int, int] | None
    free: int
    missing: int
    is_paused: bool


def facts_of(scheduler: SchedulerState, tag: str, now: float) -> Observed:
    """Copy what there is to know of a tag, which may be a new one. O(tags)."""
    tags = scheduler.tags
    states = dict(scheduler.tag_states)
    own = states.pop(tag, None) or tags.new_state(tag, Counters())
    return Observed(
        _observed(scheduler, own, now),
        [_observed(scheduler, state, now) for state in states.values()],
        scheduler.capacity,
        tags.limits.reserved,
        None if tags.imposed is not None else (tags.soft_limit, tags.max_limit),
        max(scheduler.free_for(own), 0),
        max(scheduler.in_use - scheduler.capacity, 0),
        tags.paused(tag) is not None,
    )


def _observed(scheduler: SchedulerState, state: TagState, now: float) -> TagFacts:
    ceiling = scheduler.ceiling(state)
    in_line = state.waiters and state.in_use < ceiling
    return TagFacts(
        state.tag,
        policy.Party(
            state.active,
            state.in_use,
            state.waiting,
            ceiling,
            state.weight,
            state.reserved,
        ),
        state.limits,
        scheduler.usage.seconds(state, now),
        scheduler.lines.rank(state) if in_line else None,
    )


def explain(observed: Observed) -> Explanation:
    """Work out why a tag has what it has. O(tags log tags)."""
    tag, others = observed.tag, observed.others
    party, own = tag.party, tag.limits
    active = sum(other.party.active for other in others)
    for_others = observed.reserved - own.reserved
    known = own.reserved + sum(other.limits.reserved for other in others)
    parties = [party, *(other.party for other in others)]
    unknown = observed.reserved - known
    line = sorted((o for o in (tag, *others) if o.rank is not None), key=_rank)
    place = line.index(tag) + 1 if tag.rank is not None else None
    before = line[: min(place - 1, _RIVALS_NAMED)] if place else []
    alone = policy.ceiling(0, *observed.limits) if observed.limits else party.ceiling
    room = observed.capacity - for_others
    return Explanation(
        tag=tag.name,
        active=party.active,
        connections=party.in_use,
        waiting=party.waiting,
        weight=own.weight,
        max=own.max,
        reserved=own.reserved,
        usage=tag.usage,
        ceiling=party.ceiling,
        ceiling_rule=_ceiling_rule(observed, active, room),
        ceiling_alone=policy.own_ceiling(alone, own.max, own.reserved, room),
        fair_share=policy.shares_of_tags(parties, observed.capacity - unknown)[0],
        shared=room,
        active_tags=active + party.active,
        free=max(min(observed.free, party.ceiling - party.in_use), 0),
        place=place,
        waiting_tags=len(line),
        before=tuple(
            Rival(o.name, o.party.in_use, o.party.weight, o.usage) for o in before
        ),
        returns_needed=None if place is None else place + observed.missing,
    )


def _rank(tag: TagFacts) -> policy.Rank:
    assert tag.rank is not None
    return tag.rank


def _ceiling_rule(observed: Observed, others: int, room: int) -> str:
    """Return from which rule a tag's ceiling comes: see `policy.own_ceiling`."""
    own, ceiling = observed.tag.limits, observed.tag.party.ceiling
    if observed.is_paused:
        return "paused"
    if own.max is not None and ceiling == own.max:
        return "max"
    if observed.limits is None:
        return "ledger"
    if own.max is None and ceiling == policy.ceiling(others, *observed.limits):
        return "soft_limit" if others else "max_limit"
    return "reserved" if ceiling == own.reserved else "reserved for others"
