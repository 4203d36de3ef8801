"""What the scheduler keeps, and questions about it.

Nothing here grants a slot or takes one back: the transitions are in :mod:`.scheduler`,
and what is promised stands at the head of that file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from . import policy
from .tags import IndexedHeap, Tags
from .ticket import TagLimits, TagState, Ticket
from .usage import Usage


class Lines:
    """The lines of waiting tickets, one for each tag, and which of them is next.

    A line is in order of arrival; of the tags with a line, the one that
    :func:`.policy.rank` puts first is next, if it is below its ceiling.
    """

    def __init__(self, tags: Tags) -> None:
        self._tags = tags
        # In the order in which they began to wait.
        self._waiting: dict[TagState, None] = {}
        # While there are two or more, those of them that are below their ceiling, by
        # `policy.rank`. May hold some that are not any more, or do not wait; they are
        # dropped when they come first.
        self._ready: IndexedHeap[TagState] = IndexedHeap()

    def __iter__(self) -> Iterator[TagState]:
        return iter(self._waiting)

    def begun(self, tag_state: TagState) -> None:
        """Note that a tag has a line now."""
        self._waiting[tag_state] = None
        if len(self._waiting) == 2:  # the first one was alone and not ranked
            self.changed(next(iter(self._waiting)))
        self.changed(tag_state)

    def head_left(self, tag_state: TagState) -> None:
        """Note that a line has another head, or none."""
        if tag_state.waiters:
            self.changed(tag_state)
        else:
            self._waiting.pop(tag_state, None)  # an interrupt may have hit `begun`
            self._ready.remove(tag_state)

    def changed(self, tag_state: TagState) -> None:
        """Rank a tag with a line anew: what it holds, or its ceiling, has changed."""
        if len(self._waiting) == 1:
            return  # no other tag to be ranked with
        if (
            tag_state.in_use < tag_state.safe_ceiling.value  # known without a call
            or tag_state.in_use < self._tags.ceiling(tag_state)
        ):
            self._ready.put(tag_state, self.rank(tag_state))
        else:
            self._ready.remove(tag_state)

    def all_changed(self) -> None:
        """Rank all anew: ceilings have changed. O(tags with a line)."""
        for tag_state in self._waiting:
            self.changed(tag_state)

    def rank(self, tag_state: TagState) -> policy.Rank:
        """Return the key by which a tag with a line is ranked."""
        assert tag_state.waiters
        head = next(iter(tag_state.waiters))
        return policy.rank(
            tag_state.in_use,
            tag_state.weight,
            tag_state.charged + tag_state.lift,
            head.number,
            tag_state.reserved,
        )

    def next(self) -> TagState | None:
        """Return the tag whose head is to get the next free slot."""
        ceiling = self._tags.ceiling
        if len(self._waiting) == 1:
            tag_state = next(iter(self._waiting))
            return tag_state if tag_state.in_use < ceiling(tag_state) else None
        while (first := self._ready.first()) is not None:
            tag_state = first[1]
            if (
                tag_state.in_use < tag_state.safe_ceiling.value
                or tag_state.in_use < ceiling(tag_state)
            ):
                return tag_state
            self._ready.remove(tag_state)  # its ceiling has fallen
        return None

    def newest(self) -> Ticket | None:
        """Return a ticket that is likely to wait for long, None if none waits."""
        for tag_state in reversed(self._waiting):
            assert tag_state.waiters
            return next(reversed(tag_state.waiters))
        return None


class SchedulerState:
    """The slots, the tags, and who waits.

    :param capacity: most slots granted at a time.
    :param soft_limit: ceiling of each tag while two or more are active.
    :param max_limit: ceiling of a tag that is alone.
    :param idle_timeout: seconds without activity after which a tag is idle.
    :param reallocation_interval: seconds between looks for idle tags.
    :param now: the time at which it starts.
    :param max_waiting: most requests that may wait, None for no limit.
    :param silent_tag: the tag for which only :meth:`activity` is activity.
    :param limits: of tags that have their own, see :class:`.ticket.LimitsByTag`.
    :param usage_half_life: seconds in which what a tag has used counts half.
    """

    def __init__(
        self,
        *,
        capacity: int,
        soft_limit: int,
        max_limit: int,
        idle_timeout: float,
        reallocation_interval: float,
        now: float,
        max_waiting: int | None = None,
        silent_tag: str | None = None,
        limits: Mapping[str, TagLimits] | None = None,
        usage_half_life: float = 10.0,
    ) -> None:
        self.capacity = capacity
        self.reallocation_interval = reallocation_interval
        self.max_waiting = max_waiting
        self.tags = Tags(
            soft_limit=soft_limit,
            max_limit=max_limit,
            idle_timeout=idle_timeout,
            silent_tag=silent_tag,
            capacity=capacity,
            limits=limits or {},
        )
        self.in_use = 0
        #: Slots reserved for tags that do not use them now.
        self.kept_free = self.tags.reserved
        self.waiting = 0
        #: When idleness is to be looked for next: the shell calls `tick` then.
        self.next_tick = now + reallocation_interval
        #: What is known of each tag.
        self.tag_states = self.tags.tag_states
        #: Requests that had to wait, in all.
        self.arrivals = 0
        #: What was in use when the capacity last changed.
        self.drains_from = 0
        self.lines = Lines(self.tags)
        self.usage = Usage(usage_half_life, now, self.tag_states)
        self.usage.moved = self.lines.all_changed
        #: The scheduler by whose rules the limits and shares of tags are: this one.
        self.rules: SchedulerState = self
        #: Returns the most slots that a tag may hold now.
        self.ceiling = self.tags.ceiling

    def free_for(self, tag_state: TagState) -> int:
        """Return the slots that are free, but for those reserved for others.

        Only if the tag has used up its own reserve; else, those that are free at all.
        """
        if tag_state.in_use < tag_state.reserved:
            return self.capacity - self.in_use
        return self.capacity - self.in_use - self.kept_free

    def room_for_others(self, tag: str) -> int:
        """Return how many slots of others could be moved to a tag. Reads only."""
        tag_state = self.tag_states.get(tag)
        if tag_state is None or self.waiting or self.tags.reserved:
            return 0
        if self.in_use > self.capacity:
            return 0
        return max(tag_state.safe_ceiling.value - tag_state.in_use, 0)

    def wanted(self, ticket: Ticket) -> bool:
        """Tell if releasing this granted ticket would grant another one."""
        if not self.waiting or self.in_use > self.capacity:
            return False
        tag_state = ticket.tag_state
        is_kept = tag_state.in_use <= tag_state.reserved
        if (
            tag_state.waiters
            and tag_state.in_use <= self.ceiling(tag_state)
            and (is_kept or self.free_for(tag_state) >= 0)
        ):
            return True
        waiting = self.lines.next()
        if waiting is None:
            return False
        of_its_own = waiting.in_use < waiting.reserved
        return self.free_for(waiting) + (of_its_own or not is_kept) > 0

    def place(self, ticket: Ticket) -> int:
        """Return a waiting ticket's place in its line, from 1. O(place)."""
        line = ticket.tag_state.waiters or ()
        return next(place for place, t in enumerate(line, 1) if t is ticket)

    def knows(self, ticket: Ticket) -> bool:
        """Tell if the ticket was last used here, not with another scheduler."""
        tag_state = ticket.tag_state
        return self.tag_states.get(tag_state.tag) is tag_state

    def _is_next(self, newcomer: TagState) -> bool:
        """Tell if a request under `newcomer`, arriving now, would be granted."""
        free = self.free_for(newcomer)
        if newcomer.waiters or free <= 0 or newcomer.in_use >= self.ceiling(newcomer):
            return False
        waiting = self.lines.next()
        if waiting is None or self.free_for(waiting) <= 0:
            return True  # no other one
        of_its_own = waiting.in_use < waiting.reserved
        if free > 1 or (of_its_own and newcomer.in_use >= newcomer.reserved):
            return True  # a slot for each
        used = newcomer.charged + newcomer.lift
        rank = policy.rank(
            newcomer.in_use,
            newcomer.weight,
            used,
            self.arrivals + 1,
            newcomer.reserved,
        )
        return rank < self.lines.rank(waiting)

    def _reserved_unused(self) -> int:
        used = (min(a.in_use, a.reserved) for a in self.tag_states.values())
        return self.tags.reserved - sum(used)
