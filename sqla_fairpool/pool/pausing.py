"""Pausing: no checkout is served, for a migration or before the process ends.

Rules of this file:

* While a pool is paused, every ceiling is 0, or that of a paused tag: who asks waits,
  and its own time-out goes on. Nothing is taken away.
* A pool is paused by itself or by its ledger. It serves when neither pauses it.
* :meth:`Pausing.pause` and :meth:`Pausing.resume` are transitions. They are put into
  the lock's inbox, so that a signal handler may call them in the middle of a section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sqlalchemy.util import greenlet_spawn

from ..checks import validate_tag, validate_timeout
from ..scheduling.tags import ALL, Pause
from .housekeeping import Housekeeping
from .transitions import Transitions
from .waiters import Waiter

#: Seconds after which is looked again if all is back: for what ends without a word.
_LOOK_AGAIN = 0.5


class Pausing:
    """Stops a pool from serving, and waits for what is out.

    :param waiter_class: how callers sleep.
    """

    def __init__(
        self,
        state: Transitions,
        housekeeping: Housekeeping,
        waiter_class: type[Waiter],
    ) -> None:
        self._state = state
        self._housekeeping = housekeeping
        self._waiter_class = waiter_class
        # By tag: by calls of this pool's methods, and by the ledger.
        self._own: Mapping[str, Pause] = {}
        self._ledgers: Mapping[str, Pause] = {}

    def pause(self, tag: str, now: float) -> None:
        """Serve no checkout of a tag from now on. Caller is in a section."""
        self._put_in_force({tag: Pause(now), **self._own}, self._ledgers, now)

    def resume(self, tag: str, now: float) -> None:
        """Serve again, those that wait first. Caller is in a section."""
        own = {other: pause for other, pause in self._own.items() if other != tag}
        self._put_in_force(own, self._ledgers, now)

    def obey(self, pauses: Mapping[str, str], now: float) -> None:
        """Have just these tags paused by the ledger: by whom, since when."""
        new = {tag: Pause(now, by) for tag, by in pauses.items()}
        known = {tag: p for tag, p in self._ledgers.items() if pauses.get(tag) == p.by}
        self._put_in_force(self._own, new | known, now)

    def _put_in_force(
        self, own: Mapping[str, Pause], ledgers: Mapping[str, Pause], now: float
    ) -> None:
        self._own, self._ledgers = own, ledgers
        pauses = {**own, **ledgers}
        scheduler = self._state.scheduler
        if pauses != scheduler.tags.pauses:
            self._state.deliver(scheduler.pause(pauses, now))
            self._state.connections.release_soon(now)
            self._state.slots.recounted()  # with a ledger: it is to hear of it

    def drain(self, timeout: float | None) -> bool:
        """Pause, and close connections as they come back; tell if all are closed."""
        lock, drainers = self._state.lock, self._state.drainers
        lock.do(partial(self.pause, ALL))
        if lock.in_section():
            return False  # no thread can return anything before this one goes on
        waiter, since = self._waiter_class(None), lock.clock()
        drainers.append(waiter)
        try:
            while True:
                lock.run(self._close_returned)
                left = lock.run(self._left)  # after what was closed is closed
                if not left:
                    return left == 0
                seconds = _LOOK_AGAIN
                if timeout is not None:
                    seconds = min(seconds, since + timeout - lock.clock())
                if seconds <= 0:
                    return False
                waiter.wait(seconds)
        finally:
            drainers.remove(waiter)

    def _close_returned(self, now: float) -> None:
        if ALL in self._own:
            self._housekeeping.doom(now)
            self._housekeeping.close_idle(now)

    def _left(self, now: float) -> int | None:
        """Return how many connections there are, None if the pool serves again."""
        state = self._state
        if ALL not in self._own:
            return None
        return state.scheduler.in_use + len(state.slots.existing)


class Pausable:
    """The methods of a pool."""

    _core: Any
    logger: Any

    def pause(self, tag: str | None = None) -> None:
        """Serve no checkout until :meth:`resume`, or none of a tag.

        Who asks waits, and its own time-out goes on. What is out stays out. A signal
        handler may call this, at any moment.

        :raises sqlalchemy.exc.ArgumentError: for what is no tag.
        """
        self._do(self._core.pausing.pause, tag, "paused")

    def resume(self, tag: str | None = None) -> None:
        """Serve checkouts again, also after :meth:`drain`; or those of a paused tag.

        What its ledger has paused stays so until ``sqla-fairpool ledger resume``.
        """
        self._do(self._core.pausing.resume, tag, "resumed")

    def _do(self, change: Callable[..., None], tag: str | None, done: str) -> None:
        which = ALL if tag is None else validate_tag(tag)
        self._core.lock.do(partial(change, which))
        self.logger.info("Pool %s%s", done, f" for tag {which!r}" if which else "")

    def drain(self, timeout: float | None = None) -> Any:
        """Serve no checkout any more, and close the connections, each when it is back.

        Returns when all are closed, True then. False if `timeout` seconds have passed,
        or another caller has resumed: the rest is closed when it comes back. In a
        signal handler :meth:`pause` is the one to call: what the interrupted thread has
        cannot come back before the handler ends.

        :param timeout: seconds, None to wait without limit.
        :raises sqlalchemy.exc.ArgumentError: for a bad time-out.
        """
        if timeout is not None:
            timeout = validate_timeout(timeout, "timeout")
        is_closed = self._core.pausing.drain(timeout)
        self.logger.info("Pool drained" if is_closed else "Pool paused, not drained")
        return is_closed


class AsyncPausable(Pausable):
    """The methods of a pool for asyncio."""

    async def drain(self, timeout: float | None = None) -> bool:
        """As :meth:`Pausable.drain`, while other tasks go on."""
        return bool(await greenlet_spawn(super().drain, timeout))
