"""The warm cache: connections that keep their slot, for the next checkout of a tag.

While no caller waits, a connection that comes back is kept *warm*: its slot stays with
its tag, and the next checkout under that tag takes it without the lock. A caller that
has said no tag may *borrow* it: the slot stays charged to that tag until the caller
says one, or the next section charges it to the default tag. Nothing is granted before.

Rules of this file:

* Checkouts and checkins use the lists without the lock, by operations of ``list`` that
  are atomic. `listed` is set before and after a record is added: a section that has
  emptied the list in between finds the record next time.
* A list that is in use is in the lock's inbox: the next section gives up all that is
  warm before it does anything else, so no caller misses a slot that is kept here. After
  a record was added it is looked if a caller waits, so a caller that found nothing here
  is not forgotten.
* What is borrowed the lock knows: before anything else, a section has it charged.
"""

from __future__ import annotations

from collections.abc import Callable

from ..scheduling.scheduler import Scheduler
from .checkout import Checkout, Record
from .lock import PoolLock

#: To make a list anew for each checkin costs more than a microsecond.
_EMPTY_LISTS_KEPT = 100

#: How many may be lent is being counted. A section sets the number to -1.
_COUNTING = -2


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

    :param give_up: called in a section for each record that is kept warm no more.
    :param charge: called in a section for each checkout that is borrowed no more.
    """

    def __init__(
        self,
        lock: PoolLock,
        scheduler: Scheduler,
        give_up: Callable[[Record, float], None],
        charge: Callable[[Checkout], None],
    ) -> None:
        #: No more than `_EMPTY_LISTS_KEPT`, and those used since the last section.
        self.by_tag: dict[str, WarmRecords] = {}
        self._lock = lock
        self._scheduler = scheduler
        self.give_up = give_up
        #: What may be borrowed: the list to which a record came last.
        self.latest = WarmRecords(self, "")
        #: What is borrowed. Who takes it out decides to which tag it is charged.
        self.borrowed: dict[Checkout, None] = lock.borrowed
        lock.charge_borrowed = self._charge_borrowed
        self._charge = charge
        self.inbox = lock.inbox

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
        self.latest = records

    def borrow(self, record: Record, tag: str) -> bool:
        """Leave what was taken charged where it is, or put it back; tell which.

        :param tag: to which it will be charged if its caller says none.
        """
        checkout = record.fair.checkout
        checkout.borrowed = True
        self.borrowed[checkout] = None
        # From here on a section charges this before it grants anything. Before it looks
        # what there is to charge, it has said that the number holds no longer. If this
        # is there last of all, none has come in between that found no room for it.
        lock = self._lock
        if lock.lendable < 0:
            self._count_lendable(tag)
        if len(self.borrowed) <= lock.lendable and checkout in self.borrowed:
            return True
        if not self._end_loan(checkout):
            self._lock.visit()  # a section has charged it by then, if the tag has room
        if not checkout.borrowed:
            return True
        checkout.borrowed, checkout.warm = False, True
        self.put(checkout.tag_state.tag, record)
        return False

    def _count_lendable(self, tag: str) -> None:
        """Note how many could be charged to `tag`, unless this is in a section."""
        lock = self._lock
        with lock.mutex:  # no other thread is in a section
            if lock.busy_in is None:
                lock.lendable = _COUNTING
                lendable = self._scheduler.room_for_others(tag)
                if lock.lendable == _COUNTING:  # else a signal handler was in one
                    lock.lendable = lendable

    def claim(self, checkout: Checkout, tag: str) -> bool:
        """Have what is borrowed from a tag be that tag's; tell if it could.

        Needs no lock.
        """
        tag_state = checkout.tag_state
        # What `_end_loan` does, without its frame.
        if tag_state.tag != tag or self.borrowed.pop(checkout, self) is not None:
            return False
        checkout.borrowed = False
        checkout.again += 1
        tag_state.last_activity = self._lock.clock()
        return True

    def _end_loan(self, checkout: Checkout) -> bool:
        """Decide to which tag it is charged; tell if no section has. Needs no lock."""
        return self.borrowed.pop(checkout, self) is None

    def _charge_borrowed(self) -> None:
        """Charge all that is borrowed to the default tag. Caller is in a section.

        In their order: for the last ones it may not have been looked if there is room.
        """
        for checkout in list(self.borrowed):
            if self._end_loan(checkout):  # else its caller was faster
                self._charge(checkout)

    def pop_any(self) -> Record | None:
        """Take a record of any tag, None if there is none."""
        for records in list(self.by_tag.values()):
            try:
                return records.pop()
            except IndexError:
                pass
        return None
