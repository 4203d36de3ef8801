"""The records of a pool: which lie idle, in which order they are handed out.

Rules of this file:

* All of it is guarded by the pool's lock. But a signal handler may take an idle record
  in the middle of a section of the same thread (see :mod:`.nested`): a section takes a
  record before it decides, and iterates over copies.
"""

from __future__ import annotations

import weakref
from collections import deque

from ..scheduling.ticket import GRANTED
from .checkout import Checkout, Generation, Record
from .server_tag import TOLD

__all__ = ["Connections"]


class Connections:
    """Records: all of them, those that lie idle, and those that a former pool has left.

    :param use_lifo: hand out the record that came back last, not first.
    """

    __slots__ = (
        "_take",
        "all",
        "end",
        "idle",
        "left",
        "opening",
        "owner",
    )

    def __init__(self, use_lifo: bool) -> None:
        #: Records in the pool, the one that came back first on the left.
        self.idle: deque[Record] = deque()
        #: Every record there is, for the child of a fork.
        self.all: weakref.WeakSet[Record] = weakref.WeakSet()
        #: Checkouts for which a connection is opened. Weak: one that an interrupted
        #: caller has dropped gives its slot back.
        self.opening: weakref.WeakSet[Checkout] = weakref.WeakSet()
        #: The pool whose records are kept, and what is left of those before it.
        self.owner = Generation()
        self.left: weakref.WeakSet[Record] = weakref.WeakSet()
        self.hand_out(last_first=use_lifo)

    def hand_out(self, *, last_first: bool) -> None:
        """Set which of the records that came back is the next."""
        #: Where the next one is: -1 or 0, as an index.
        self.end = -1 if last_first else 0
        self._take = self.idle.pop if last_first else self.idle.popleft

    # -- what lies idle --------------------------------------------------------------

    def pop(self) -> Record | None:
        """Take the idle record that is next, None if there is none."""
        try:
            return self._take()
        except IndexError:
            return None

    def prefer(self, tag: str) -> None:
        """Make a record the next one that the server knows under `tag`, if there is."""
        for record in list(self.idle):
            if record.info.get(TOLD) == tag and self.remove(record):
                self.put_back(record)
                return

    def remove(self, record: Record) -> bool:
        """Take an idle record; tell if it was there."""
        try:
            self.idle.remove(record)
        except ValueError:
            return False  # a signal handler took it a moment ago
        return True

    def put_back(self, record: Record) -> None:
        """Undo :meth:`pop`."""
        if self.end:
            self.idle.append(record)
        else:
            self.idle.appendleft(record)

    def count_open(self) -> int:
        """Return how many idle records have a connection."""
        return len([r for r in list(self.idle) if r.dbapi_connection is not None])

    # -- what is out -----------------------------------------------------------------

    def granted(self) -> list[Checkout]:
        """Return the checkouts whose records are out."""
        checkouts = [record.fair.checkout for record in self.all]
        return [checkout for checkout in checkouts if checkout.state is GRANTED]

    def release_soon(self) -> None:
        """Have what is out now looked at when it comes back, and not be kept warm."""
        for checkout in self.granted():
            checkout.may_keep = False
