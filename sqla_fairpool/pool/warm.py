"""The warm cache: connections that keep their slot, for the next checkout of a tag.

While no caller waits, a connection that comes back is kept *warm*: its slot stays with
its tag, and the next checkout under that tag takes it without the lock.

Rules of this file:

* Checkouts and checkins use the lists without the lock, by operations of ``list`` that
  are atomic. `listed` is set before and after a record is added: a section that has
  emptied the list in between finds the record next time.
* A list that is in use is in the lock's inbox: the next section gives up all that is
  warm before it does anything else, so no caller misses a slot that is kept here. After
  a record was added it is looked if a caller waits, so a caller that found nothing here
  is not forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .checkout import Record

__all__ = ["WarmCache", "WarmRecords"]

#: To make a list anew for each checkin costs more than a microsecond.
_EMPTY_LISTS_KEPT = 100


class WarmRecords(list[Record]):
    """What is kept warm for one tag. Called by the next section, with the time."""

    __slots__ = ("_cache", "listed", "tag")

    def __init__(self, cache: WarmCache, tag: str) -> None:
        super().__init__()
        self._cache = cache
        self.tag = tag
        #: It is in the inbox.
        self.listed = False

    def __call__(self, now: float) -> None:
        """Give up all that is warm. Caller is in a section."""
        self.listed = False  # first: what is added from now on is listed again
        while self:
            try:
                record = self.pop(0)
            except IndexError:
                break  # a checkout was faster
            self._cache.give_up(record, now)
        by_tag = self._cache.by_tag
        if len(by_tag) > _EMPTY_LISTS_KEPT and by_tag.get(self.tag) is self:
            del by_tag[self.tag]

    def list(self) -> None:
        """Have the next section call this. Needs no lock."""
        self.listed = True  # no call is between the two lines, so no interrupt either
        self._cache.inbox.append(self)


class WarmCache:
    """What each tag's next checkout may take without the lock.

    :param inbox: the lock's.
    :param give_up: called in a section for each record that is kept warm no more.
    """

    def __init__(
        self,
        inbox: deque[Callable[[float], object]],
        give_up: Callable[[Record, float], None],
    ) -> None:
        #: No more than `_EMPTY_LISTS_KEPT`, and those used since the last section.
        self.by_tag: dict[str, WarmRecords] = {}
        self.inbox = inbox
        self.give_up = give_up

    def of(self, tag: str) -> WarmRecords:
        """Return the list of a tag."""
        try:
            return self.by_tag[tag]
        except KeyError:
            return self.by_tag.setdefault(tag, WarmRecords(self, tag))

    def put(self, tag: str, record: Record) -> None:
        """Add a record, or put one back that was taken."""
        records = self.of(tag)
        records.list()
        records.append(record)
        records.list()

    def pop_any(self) -> Record | None:
        """Take a record of any tag, None if there is none."""
        for records in list(self.by_tag.values()):
            try:
                return records.pop()
            except IndexError:
                pass
        return None
