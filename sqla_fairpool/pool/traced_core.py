"""The core of a pool with ``leak_threshold``: it notes where callers check out."""

from __future__ import annotations

from ..diagnosis.callers import locations
from ..diagnosis.event_log import LeakWatch
from ..options import PoolOptions
from .checkout import Opener, Record
from .core import PoolCore

__all__ = ["TracedCore"]


class TracedCore(PoolCore):
    """Notes where connections are checked out, and reports those out for too long."""

    __slots__ = ()

    def _begin(self, options: PoolOptions) -> None:
        super()._begin(options)
        assert options.leak_threshold is not None
        self.state.leaks = LeakWatch(self.state, options.leak_threshold)

    def checkout(
        self, tag: str, opener: Opener, timeout: float | None = None
    ) -> Record:
        assert self.state.leaks is not None
        self.state.leaks.start()
        stack = locations(self.here.frames())
        record = super().checkout(tag, opener, timeout)
        record.fair.checkout.stack = stack
        return record
