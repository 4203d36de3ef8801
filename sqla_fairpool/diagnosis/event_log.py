"""What an operator reads in the log: what has changed, and what is out for too long.

A tag has become active or idle, and with it the others' limits; the pool is exhausted,
or is not any more; with ``leak_threshold``, a connection does not come back. Tags are
printable by definition (:func:`.checks.validate_tag`) and shown as Python shows
strings, so that no line can be forged.

Rule of this file: nothing is logged under the pool's lock. Logging takes locks of its
own, and a thread that holds one of those may be in a finaliser that waits for the
pool's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..threads import start_thread
from . import describe_holders, describe_stack, duration
from .capture import Checkout, Out, Pool

if TYPE_CHECKING:
    from .report import Elsewhere

#: Seconds without a waiting caller after which an exhaustion is over. A pool that works
#: at its limit runs empty many times a second, and that is one exhaustion.
_OVER_AFTER = 5.0

#: Looks for leaks within one threshold, and the longest time between two. A look costs
#: some microseconds; a leak is reported that much late at most.
_LOOKS = 4
_LONGEST_PAUSE = 1.0


class EventLog:
    """Writes to a pool's logger. All is called under the pool's lock.

    :param later: takes what is to be done after the lock.
    """

    def __init__(self, later: deque[Callable[[], object]]) -> None:
        #: The pool's.
        self.logger: Any = logging.getLogger(__name__)
        self._later = later
        # Since when the pool is exhausted, and when a caller last had to wait.
        self._since = self._last = math.inf
        # With a ledger: tags that have become active, or idle, since it was read.
        self._changed: dict[str, bool] = {}
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

    @contextlib.contextmanager
    def apart(self) -> Iterator[deque[Callable[[], object]]]:
        """Collect what is to be done after the lock, for a thread of the ledger's.

        That does nothing else which is left for after the lock of a pool of tasks.
        """
        later, self._later = self._later, deque()
        try:
            yield self._later
        finally:
            self._later = later

    def will_change(self, tag: str, active: bool, *_: int) -> None:
        """As :meth:`changed`, with numbers that only the ledger knows."""
        if self._changed.pop(tag, active) == active:  # else it is as it was
            self._changed[tag] = active

    def change(self, count: int, ceiling: int) -> None:
        """Log what has changed: `count` tags are active now in all processes."""
        while self._changed:
            tag = next(iter(self._changed))
            self.changed(tag, self._changed.pop(tag), count, ceiling)

    @property
    def has_changes(self) -> bool:
        return bool(self._changed)

    def begin(
        self,
        tag: str,
        now: float,
        capacity: int,
        holders: list[tuple[str, int]],
        elsewhere: Sequence[Elsewhere] = (),
    ) -> None:
        """Log that a caller has to wait because all slots are in use."""
        self._since = self._last = now
        self.next_look = now + _OVER_AFTER
        held = describe_holders(holders, elsewhere)
        text = "Pool exhausted: tag %r has to wait, all %d connections are in use; %s"
        self._log(text, tag, capacity, held)

    def look(self, now: float, waiting: int, waits: int) -> None:
        """Look if the exhaustion is over: how many wait now, and have had to in all."""
        self.next_look = now + _OVER_AFTER
        if waiting or waits != self._waits:
            self._last = now
            self._waits = waits
        elif now - self._last >= _OVER_AFTER:
            lasted = duration(self._last - self._since)
            text = "Pool no longer exhausted: no caller waits any more, after %s"
            self._log(text, lasted)
            self._since = self.next_look = math.inf

    def _log(self, text: str, *values: object) -> None:
        # Not isEnabledFor(), which takes a lock of logging's.
        if self.logger.getEffectiveLevel() <= logging.INFO:
            self._later.append(partial(self.logger.info, text, *values))


class LeakWatch:
    """Reports what is out for `threshold` seconds, once for each checkout.

    A daemon thread looks, because a pool may never be called again once all its
    connections have leaked. Nothing is ever taken away.
    """

    def __init__(self, pool: Pool, threshold: float) -> None:
        self._pool = weakref.ref(pool)
        self._threshold = threshold
        # The thread: the first that is entered is it. An interrupt in the middle of
        # starting one leaves no entry.
        self._runner: dict[str, threading.Thread] = {}

    def start(self) -> None:
        """Have a thread look from now on, if there is none yet."""
        if not self._runner:
            pause = min(self._threshold / _LOOKS, _LONGEST_PAUSE)
            watch = partial(_watch, weakref.ref(self), pause)
            start_thread(watch, "sqla_fairpool leak_threshold")

    def is_runner(self) -> bool:
        """Tell if this thread is the one that looks; no other does."""
        this = threading.current_thread()
        return self._runner.setdefault("runner", this) is this

    def look(self) -> None:
        """Report what is out for too long and was not reported yet."""
        pool = self._pool()
        if pool is None:
            return
        text = "Connection out for %s, longer than leak_threshold %s: %s%s"
        limit = duration(self._threshold)
        for out, now in pool.run(self._late, pool):
            holding, stack = out.as_holding(now), describe_stack(out.stack)
            pool.logger.warning(text, duration(holding.age), limit, holding, stack)

    def _late(self, pool: Pool, now: float) -> list[tuple[Out, float]]:
        late = []
        for out in pool.checkouts_out():
            if now - out.since >= self._threshold and not out.checkout.reported:
                out.checkout.reported = True
                out.checkout.may_keep = False  # its return is to be noticed
                late.append((out, now))
        return late

    def returned(self, checkout: Checkout, now: float) -> Callable[[], None]:
        """Return what logs that a reported connection has come back."""
        pool = self._pool()
        assert pool is not None
        checkout.reported = False
        logger, out = pool.logger, Out.of(checkout)

        def log() -> None:
            holding = out.as_holding(now, look_up=False)
            logger.warning("Connection back that was out for too long: %s", holding)

        return log


def _watch(ref: weakref.ref[LeakWatch], pause: float) -> None:
    never = threading.Event()
    while (watch := ref()) is not None and watch.is_runner():
        watch.look()
        del watch
        never.wait(pause)
