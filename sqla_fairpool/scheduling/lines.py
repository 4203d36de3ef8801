"""The lines of waiting tickets, one for each tag, and which of them is served next.

Part of the scheduler. A line is in order of arrival; of the tags with a line, the one
that :func:`.policy.rank` puts first is next, if it is below its ceiling.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import policy
from .heap import IndexedHeap
from .tags import Tags
from .ticket import TagState, Ticket

__all__ = ["Lines"]


class Lines:
    """The tags under which tickets wait."""

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
        if tag_state.in_use < self._tags.ceiling(tag_state):
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
            if tag_state.in_use < ceiling(tag_state):
                return tag_state
            self._ready.remove(tag_state)  # its ceiling has fallen
        return None

    def newest(self) -> Ticket | None:
        """Return a ticket that is likely to wait for long, None if none waits."""
        for tag_state in reversed(self._waiting):
            assert tag_state.waiters
            return next(reversed(tag_state.waiters))
        return None
