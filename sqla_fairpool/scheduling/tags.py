"""Which tags are known, which of them are active, and so how high they may go.

A tag is *active* from its first activity until it had none for `idle_timeout`;
while a request waits under it, it stays active. What is known of a tag that is
idle and holds nothing is forgotten after a while, or earlier when there are very
many: tags may be made from user data.

Part of the scheduler: called under the same lock, with the time as an argument.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from . import policy
from .counters import Counters, CountersByTag
from .ticket import NO_LIMITS, LimitsByTag, SafeCeiling, TagLimits, TagState

_Item = TypeVar("_Item", bound=Hashable)

#: In the place of a tag: all of them.
ALL = ""

#: For how many idle timeouts the figures of an idle tag are kept: long enough
#: for a monitor to show a scraper that has stopped, five minutes by default.
_RETENTION = 5.0

#: Most tags remembered that hold nothing and wait for nothing. 10,000 tags are
#: ordinary; of a million that pass by, no more than this stay.
_MAX_REMEMBERED = 16_384

#: How many tags are looked at to find one that may be forgotten early.
_FORGET_TRIES = 4

#: Dead entries tolerated beside as many live ones before the heap is rebuilt, which
#: costs O(live) after as many pushes. With few live ones, more dead ones cost more.
_SLACK = 4


class IndexedHeap(Generic[_Item]):
    """Items ordered by a key that changes often.

    A heap with lazy deletion: :meth:`put` under a new key leaves the old entry
    in the heap as a dead one, recognised because it is not the item's own any
    more. ``put`` costs O(log n); ``first`` and ``remove`` O(1) amortised.
    """

    __slots__ = ("_heap", "_live", "_serial")

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, _Item]] = []
        self._live: dict[_Item, tuple[Any, int, _Item]] = {}
        # Breaks ties before the items themselves would be compared.
        self._serial = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, item: object) -> bool:
        return item in self._live

    def put(self, item: _Item, key: Any) -> None:
        """Enter `item` under `key`, or move it there."""
        self._serial += 1
        entry = (key, self._serial, item)
        # In this order: an interrupt in between leaves a dead entry, no lost item.
        heapq.heappush(self._heap, entry)
        self._live[item] = entry
        if len(self._heap) > 2 * len(self._live) + _SLACK:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)

    def remove(self, item: _Item) -> None:
        """Strike `item` off, if it is there."""
        self._live.pop(item, None)

    def first(self) -> tuple[Any, _Item] | None:
        """Return (key, item) of the smallest key, None when empty."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if self._live.get(entry[2]) is entry:
                return entry[0], entry[2]
            heapq.heappop(heap)
        return None


class Pause(NamedTuple):
    """Since when a tag gets no slot."""

    at: float
    #: Of a ledger's: who has paused it, and since when, for people.
    by: str = ""


class Tags:
    """What is known of each tag, and the ceiling in force.

    :param silent_tag: the tag for which asking, waiting and returning are no
      activity.
    """

    def __init__(
        self,
        *,
        soft_limit: int,
        max_limit: int,
        idle_timeout: float,
        silent_tag: str | None,
        capacity: int,
        limits: Mapping[str, TagLimits],
    ) -> None:
        self.soft_limit = soft_limit
        self.max_limit = max_limit
        self.idle_timeout = idle_timeout
        self.silent_tag = silent_tag
        self.capacity = capacity
        self.limits = LimitsByTag(limits)
        #: Slots reserved here, by tag, and for all together.
        self.reserves: Mapping[str, int] = self.limits.reserves
        self.reserved = self.limits.reserved
        self.tag_states: dict[str, TagState] = {}
        self.counters = CountersByTag()
        #: How many tags are active.
        self.active = 0
        #: Ceilings from outside, by tag, and for all others; None without.
        self.imposed: Mapping[str, int] | None = None
        self.imposed_other = 0
        # The lowest of those of tags without a maximum of their own.
        self._imposed_lowest = 0
        #: The tags that get no slot, :data:`ALL` among them or not.
        self.pauses: Mapping[str, Pause] = {}
        #: For every active tag without a maximum of its own: the ceiling, which is the
        #: same for all without a reserve; while ceilings are imposed, the lowest.
        #: Code that looks only at this one errs on the safe side.
        self.common_ceiling = SafeCeiling(self._lowest_ceiling(0))
        #: The same for the silent tag, which has a ceiling while it is not active, too.
        self.silent_ceiling = SafeCeiling(self._lowest_ceiling(0))
        self._silent_is_active = False
        #: Called after a tag has become active or idle: its name, which of the two, how
        #: many are active, and the ceiling that follows.
        self.on_change: Callable[[str, bool, int, int], None] | None = None
        # When to look at a tag again: is it idle, may it be forgotten?
        self._review: IndexedHeap[TagState] = IndexedHeap()

    def ceiling(self, tag_state: TagState) -> int:
        """Return the most slots a tag may hold now."""
        if self.pauses and self.paused(tag_state.tag) is not None:
            return 0
        if self.imposed is not None:
            imposed = self.imposed.get(tag_state.tag, self.imposed_other)
            most = tag_state.limits.max
            return imposed if most is None else min(imposed, most)
        limits = tag_state.limits
        if limits is NO_LIMITS and tag_state.active:
            return self.common_ceiling.value
        others = self.active - tag_state.active
        rule = policy.ceiling(others, self.soft_limit, self.max_limit)
        return policy.own_ceiling(
            rule, limits.max, limits.reserved, self._room(limits.reserved)
        )

    def _room(self, reserved: int) -> int:
        """Return the most that is not reserved for others."""
        return self.capacity - self.limits.reserved + reserved

    def impose(
        self, ceilings: Mapping[str, int], other: int, reserves: Mapping[str, int]
    ) -> None:
        """Replace the rules for ceilings and reserves by numbers from outside."""
        self.imposed, self.imposed_other = ceilings, other
        self.reserves, self.reserved = reserves, sum(reserves.values())
        for tag, tag_state in self.tag_states.items():
            tag_state.reserved = reserves.get(tag, 0)
        rest = [n for tag, n in ceilings.items() if self.limits.of(tag).max is None]
        self._imposed_lowest = min([other, *rest])
        self._set_ceilings()

    def pause(self, pauses: Mapping[str, Pause]) -> None:
        """Let the ceilings of these tags be 0, and the others what they are else."""
        self.pauses = pauses
        self._set_ceilings()

    def paused(self, tag: str) -> Pause | None:
        """Return since when a tag gets no slot, None if it may get one."""
        return self.pauses.get(ALL) or self.pauses.get(tag)

    def _set_ceilings(self) -> None:
        others = self.active - self._silent_is_active
        self.common_ceiling.value = self._lowest_ceiling(max(self.active - 1, 0))
        self.silent_ceiling.value = self._lowest_ceiling(others)
        for tag, tag_state in self.tag_states.items():
            tag_state.safe_ceiling = self._safe_ceiling(tag, tag_state.limits)

    def _lowest_ceiling(self, others: int) -> int:
        if ALL in self.pauses:
            return 0
        if self.imposed is not None:
            return self._imposed_lowest
        rule = policy.ceiling(others, self.soft_limit, self.max_limit)
        return min(rule, self.capacity - self.limits.reserved)

    def get(self, tag: str, now: float) -> TagState:
        """Return what is known of `tag`, all new if nothing is. O(log tags)."""
        tag_state = self.tag_states.get(tag)
        if tag_state is None:
            if len(self.tag_states) >= _MAX_REMEMBERED:
                self._forget_one(now)
            tag_state = self.new_state(tag, self.counters.of(tag))
            self.tag_states[tag] = tag_state
        return tag_state

    def new_state(self, tag: str, counters: Counters) -> TagState:
        """Return what is known of a tag of which nothing is; keeps nothing of it."""
        limits, silent = self.limits.of(tag), tag == self.silent_tag
        ceiling, reserved = self.common_ceiling, self.reserves.get(tag, 0)
        if limits is not NO_LIMITS or silent or self.pauses:
            ceiling = self._safe_ceiling(tag, limits)
        return TagState(tag, limits, reserved, silent, counters, ceiling)

    def _safe_ceiling(self, tag: str, limits: TagLimits) -> SafeCeiling:
        if self.pauses and self.paused(tag) is not None:
            return SafeCeiling(0)
        if limits.max is None:
            return (
                self.silent_ceiling if tag == self.silent_tag else self.common_ceiling
            )
        if self.imposed is not None:
            imposed = self.imposed.get(tag, self.imposed_other)
            return SafeCeiling(min(imposed, limits.max))
        return SafeCeiling(min(limits.max, self._room(limits.reserved)))

    def reconfigure(
        self,
        soft_limit: int,
        max_limit: int,
        idle_timeout: float,
        capacity: int,
        limits: Mapping[str, TagLimits],
    ) -> None:
        """Change the limits, and when a tag is idle. O(tags)."""
        self.capacity = capacity
        self.limits = LimitsByTag(limits)
        if self.imposed is None:
            self.reserves, self.reserved = self.limits.reserves, self.limits.reserved
        self.soft_limit = soft_limit
        self.max_limit = max_limit
        self.idle_timeout = idle_timeout
        self._set_ceilings()
        for tag, tag_state in self.tag_states.items():
            own = self.limits.of(tag)
            reserved = self.reserves.get(tag, 0)
            tag_state.limit(own, reserved, self._safe_ceiling(tag, own))
            if tag_state.active:
                self._review.put(tag_state, self._idle_at(tag_state))

    def touch(self, tag_state: TagState, now: float) -> None:
        """Note activity: the tag counts from now on."""
        tag_state.last_activity = now
        if not tag_state.active:
            # In this order: an interrupt must not leave it active for ever.
            self._review.put(tag_state, now + self.idle_timeout)
            self._set_active(tag_state, True)

    def review(self, now: float) -> bool:
        """Look at the tags whose time has come; tell if any became idle."""
        active_before = self.active
        while (due := self._review.first()) is not None and due[0] <= now:
            tag_state = due[1]
            when = self._reviewed(tag_state, now)
            if when is None:
                self._review.remove(tag_state)
            else:
                self._review.put(tag_state, when)
        return self.active < active_before

    def _reviewed(self, tag_state: TagState, now: float) -> float | None:
        """Let the tag become idle or be forgotten; return when to look again."""
        if tag_state.waiters and not tag_state.silent:
            return math.nextafter(now, math.inf)  # that is, at the next review
        if tag_state.active:
            idle_at = self._idle_at(tag_state)
            if idle_at > now:
                return idle_at
            self._set_active(tag_state, False)
            return now + _RETENTION * self.idle_timeout
        if not tag_state.in_use and not tag_state.waiters:
            self.tag_states.pop(tag_state.tag, None)
        return None  # what it still holds makes it active when it comes back

    def _idle_at(self, tag_state: TagState) -> float:
        assert tag_state.last_activity is not None
        return tag_state.last_activity + self.idle_timeout

    def _forget_one(self, now: float) -> None:
        """Make room: forget the tag that was quiet longest, if a few looks find it."""
        for _ in range(_FORGET_TRIES):
            due = self._review.first()
            if due is None:
                return
            when, tag_state = due
            if tag_state.in_use or tag_state.waiters:
                self._review.put(tag_state, now + self.idle_timeout)
            elif tag_state.active and self._idle_at(tag_state) > when:
                self._review.put(tag_state, self._idle_at(tag_state))
            else:
                if tag_state.active:
                    self._set_active(tag_state, False)
                self.tag_states.pop(tag_state.tag, None)
                self._review.remove(tag_state)
                return

    def _set_active(self, tag_state: TagState, active: bool) -> None:
        prompt = active and not tag_state.silent
        count = self.active + (1 if active else -1)
        silent_is_active = active if tag_state.silent else self._silent_is_active
        ceiling = self._lowest_ceiling(max(count - 1, 0))
        of_silent = self._lowest_ceiling(count - silent_is_active)
        common, silent = self.common_ceiling, self.silent_ceiling
        # From here in one go, see the head of scheduler.py.
        tag_state.active = active
        tag_state.prompt = prompt
        self.active = count
        common.value = ceiling
        self._silent_is_active = silent_is_active
        silent.value = of_silent
        if self.on_change is not None and not tag_state.silent:
            self.on_change(tag_state.tag, active, count, ceiling)

    def is_reviewed(self, tag_state: TagState) -> bool:
        """Tell if the tag is looked at again, to learn if it is idle."""
        return tag_state in self._review
