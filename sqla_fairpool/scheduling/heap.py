"""A priority queue whose entries can be changed: one live entry per item."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

__all__ = ["IndexedHeap"]

_Item = TypeVar("_Item", bound=Hashable)

#: Dead entries tolerated beside as many live ones before the heap is rebuilt.
#: Rebuilding costs O(live) and happens after at least this many pushes.
_SLACK = 32


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
