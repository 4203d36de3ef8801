"""What an operator reads in the log: one line when something has changed.

A tag has become active or idle, and with it the others' limits; the pool is exhausted,
or is not any more. Tags are printable by definition (:func:`.options.validate_tag`)
and shown as Python shows strings, so that no line can be forged.

Rule of this file: everything is called under the pool's lock, and nothing is logged
before it is released. Logging takes locks of its own, and a thread that holds one of
those may be in a finaliser that waits for the pool's.
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

#: Seconds without a waiting caller after which an exhaustion is over. A pool that works
#: at its limit runs empty many times a second, and that is one exhaustion.
_OVER_AFTER = 5.0


class EventLog:
    """Writes to a pool's logger, and remembers what it has written.

    :param later: takes what is to be done after the lock.
    """

    def __init__(self, later: deque[Callable[[], object]]) -> None:
        #: The pool's.
        self.logger: Any = logging.getLogger(__name__)
        self._later = later
        # Since when the pool is exhausted, and when a caller last had to wait.
        self._since = self._last = math.inf
        # How many callers had had to wait at the last look.
        self._waits = 0
        #: When it has to be looked if the exhaustion is over.
        self.next_look = math.inf

    @property
    def exhausted(self) -> bool:
        """The pool was exhausted when last looked at."""
        return self._since != math.inf

    def changed(self, tag: str, active: bool, count: int, ceiling: int) -> None:
        """Log that a tag has become active, or idle; `count` tags are active now."""
        now = f"{count} active tags, at most {ceiling} each"
        if count < 2:
            is_one = "1 active tag, which" if count else "no tag is active, the first"
            now = f"{is_one} may have {ceiling}"
        self._log("Tag %r is %s: %s", tag, "active" if active else "idle", now)

    def begin(
        self, tag: str, now: float, capacity: int, holders: list[tuple[str, int]]
    ) -> None:
        """Log that a caller has to wait because all slots are in use."""
        self._since = self._last = now
        self.next_look = now + _OVER_AFTER
        self._log(
            "Pool exhausted: tag %r has to wait, all %d connections are in use; %s",
            tag,
            capacity,
            describe_holders(holders),
        )

    def look(self, now: float, waiting: int, waits: int) -> None:
        """Look if the exhaustion is over, and log it.

        :param waiting: how many callers wait now.
        :param waits: how many have had to wait, in all.
        """
        self.next_look = now + _OVER_AFTER
        if waiting or waits != self._waits:
            self._last = now
            self._waits = waits
        elif now - self._last >= _OVER_AFTER:
            self._log(
                "Pool no longer exhausted: no caller waits any more, after %s",
                duration(self._last - self._since),
            )
            self._since = self.next_look = math.inf

    def _log(self, text: str, *values: object) -> None:
        # Not isEnabledFor(), which takes a lock of logging's.
        if self.logger.getEffectiveLevel() <= logging.INFO:
            self._later.append(partial(self.logger.info, text, *values))
