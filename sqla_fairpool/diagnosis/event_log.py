"""What an operator reads in the log: one line when something has changed.

A tag has become active or idle, and with it the others' limits; the pool is exhausted,
or is not any more. Tags are printable by definition (:func:`.options.validate_tag`)
and shown as Python shows strings, so that no line can be forged.

Rule of this file: what is called under the pool's lock only leaves to be logged after
it. Logging takes locks of its own, and somebody who holds one of those may be in a
finaliser that waits for ours.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from .report import describe_holders, duration

__all__ = ["EventLog"]

#: Seconds without anybody waiting after which an exhaustion is over. A pool that works
#: at its limit runs empty many times a second, and that is one exhaustion.
_OVER_AFTER = 5.0


class EventLog:
    """Writes to a pool's logger, and remembers what it has written.

    :param later: takes what is to be done after the lock.
    """

    def __init__(self, later: deque[Callable[[], None]]) -> None:
        #: The pool's.
        self.logger: Any = logging.getLogger(__name__)
        self._later = later
        # Since when the pool is exhausted, and when somebody last had to wait.
        self._since = self._last = math.inf
        # How many had had to wait when that was last looked at.
        self._waits = 0
        #: When it has to be looked if the exhaustion is over.
        self.next_look = math.inf

    @property
    def exhausted(self) -> bool:
        """The pool was exhausted when last looked at."""
        return self._since != math.inf

    # -- under the lock ---------------------------------------------------------------

    def changed(self, tag: str, active: bool, count: int, ceiling: int) -> None:
        """Note that a tag has become active, or idle; `count` tags are active now."""
        self._later.append(partial(self._log_change, tag, active, count, ceiling))

    def begin(
        self, tag: str, now: float, capacity: int, holders: list[tuple[str, int]]
    ) -> None:
        """Note that somebody has to wait because all slots are in use."""
        self._since = self._last = now
        self.next_look = now + _OVER_AFTER
        self._later.append(partial(self._log_begin, tag, capacity, holders))

    def look(self, now: float, waiting: int, waits: int) -> None:
        """Look if the exhaustion is over.

        :param waiting: how many wait now.
        :param waits: how many have had to wait, in all.
        """
        if waiting or waits != self._waits:
            self._last = now
            self._waits = waits
        elif now - self._last >= _OVER_AFTER:
            self._later.append(partial(self._log_end, self._last - self._since))
            self._since = self.next_look = math.inf
            return
        self.next_look = now + _OVER_AFTER

    # -- after it ---------------------------------------------------------------------

    def _log_change(self, tag: str, active: bool, count: int, ceiling: int) -> None:
        if not count:
            now = f"nobody is active, the first may have {ceiling}"
        elif count == 1:
            now = f"1 active tag, which may have {ceiling}"
        else:
            now = f"{count} active tags, at most {ceiling} each"
        self.logger.info("Tag %r is %s: %s", tag, "active" if active else "idle", now)

    def _log_begin(
        self, tag: str, capacity: int, holders: list[tuple[str, int]]
    ) -> None:
        ordered = sorted(holders, key=lambda holder: (-holder[1], holder[0]))
        self.logger.info(
            "Pool exhausted: tag %r has to wait, all %d connections are in use; %s",
            tag,
            capacity,
            describe_holders(ordered),
        )

    def _log_end(self, lasted: float) -> None:
        self.logger.info(
            "Pool no longer exhausted: nobody waits any more, after %s",
            duration(lasted),
        )
