"""How connections are opened after a disconnect, until the server is back.

One caller of the pool tries at a time, and between two failures there is a pause that
grows: a server that starts, or a standby that is promoted, must not be met by every
caller of every process at once.

Rules of this file:

* While no disconnect is known, nothing is done here: one comparison for each opening.
* A caller whose own attempt fails gets that error. One whose time ends before its turn
  gets the last error of the server, not a time-out of the pool.
* A caller is in the line for as long as its :class:`_Turn` lives, so that one that was
  interrupted keeps no other caller waiting.
"""

from __future__ import annotations

import copy
import math
import random
import weakref
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import exc

from ..tagging import context_timeout
from .checkout import Checkout
from .transitions import Transitions
from .waiters import Waiter

__all__ = ["Reconnects"]

_T = TypeVar("_T")

#: Seconds of the first pause, about; each further one is twice as long.
_FIRST_PAUSE = 0.1

#: Seconds after which a caller in the line looks if those before it have gone without
#: a word: a thread that was interrupted twice.
_LOOK_AGAIN = 1.0


class _Turn:
    """The place of a caller in the line; the first one may try."""

    __slots__ = ("__weakref__", "waiter")

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter


class Reconnects:
    """Paces the opening of a pool's connections from a disconnect to the next success.

    :param waiter_class: how callers sleep.
    """

    def __init__(self, state: Transitions, waiter_class: type[Waiter]) -> None:
        self._state = state
        self._waiter_class = waiter_class
        #: The last error of the server since the disconnect; None: nothing is paced.
        self.error: BaseException | None = None
        #: Failed attempts since then, and when the next one may be.
        self.failures = 0
        self.next_attempt = -math.inf
        self._line: list[weakref.ref[_Turn]] = []

    def lost(self, error: BaseException) -> None:
        """Note that a connection turned out to be of no use. From any thread."""
        with self._state.lock.mutex:
            if self.error is None:
                self.failures, self.next_attempt = 0, -math.inf
            self.error = _without_traceback(error)

    def paced(self, attempt: Callable[[], _T], checkout: Checkout | None) -> _T:
        """Call what opens a connection, in its turn.

        :param checkout: the one for which it is, None without.
        """
        if self.error is None or not self._can_wait():
            return attempt()
        turn = _Turn(self._waiter_class(None))
        try:
            self._wait(turn, self._deadline(checkout))
            return self._try(attempt)
        finally:
            self._leave(turn)

    def _try(self, attempt: Callable[[], _T]) -> _T:
        try:
            opened = attempt()
        except exc.SQLAlchemyError:
            raise  # not the server's
        except Exception as error:
            self._failed(error)
            raise
        with self._state.lock.mutex:
            self.error = None
        return opened

    def _can_wait(self) -> bool:
        return self._waiter_class.can_wait() and not self._state.lock.in_section()

    def _deadline(self, checkout: Checkout | None) -> float:
        """Return when the time of a caller is over."""
        since, timeout = self._state.lock.clock(), None
        if checkout is not None and checkout.asked is not None and not checkout.again:
            since, timeout = checkout.asked
        if timeout is None:
            timeout = context_timeout()
        if timeout is None:
            timeout = self._state.options.timeout
        return math.inf if timeout is None else since + timeout

    def _wait(self, turn: _Turn, deadline: float) -> None:
        """Return when a caller may try; raise the server's error if it is too late."""
        lock = self._state.lock
        with lock.mutex:
            self._line.append(weakref.ref(turn))
        while (seconds := self._seconds_until(turn)) > 0:
            left = deadline - lock.clock()
            if left <= 0 and self.error is not None:
                raise _without_traceback(self.error)
            turn.waiter.wait(min(seconds, left))

    def _seconds_until(self, turn: _Turn) -> float:
        """Return how long a caller has to wait as things are, 0 to go on."""
        with self._state.lock.mutex:
            if self.error is None:
                return 0.0
            while (first := self._line[0]()) is None:
                del self._line[0]
            if first is not turn:
                return _LOOK_AGAIN
            return self.next_attempt - self._state.lock.clock()

    def in_line(self) -> list[_Turn]:
        """Return the places of callers that wait or try, the one that tries first."""
        return [turn for one in self._line if (turn := one()) is not None]

    def _leave(self, turn: _Turn) -> None:
        with self._state.lock.mutex:
            others = [one for one in self.in_line() if one is not turn]
            self._line = [weakref.ref(one) for one in others]
        for other in others:
            other.waiter.wake()

    def _failed(self, error: BaseException) -> None:
        most = self._state.options.reconnect_backoff
        with self._state.lock.mutex:
            if self.error is None:
                return
            self.error = _without_traceback(error)
            pause = min(most, _FIRST_PAUSE * 2.0 ** min(self.failures, 30))
            self.failures += 1
            pause *= random.uniform(0.5, 1.0)
            self.next_attempt = self._state.lock.clock() + pause


def _without_traceback(error: BaseException) -> BaseException:
    """Return a copy: in the frames of a traceback are connections."""
    try:
        return copy.copy(error)
    except Exception:  # its constructor wants something else than its `args`
        bare = type(error).__new__(type(error), *error.args)
        bare.__dict__.update(error.__dict__)
        return bare
