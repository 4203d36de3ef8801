"""The pool's critical section: its lock, and what is left to do after it.

Rules of this file:

* One lock. No I/O, no wake-up, no logging and no caller's code happens while it is
  held: what a transition leaves to do, bells to ring and chores, is done after it.
  Bells come first, so that nobody sleeps while a connection is being closed; chores are
  left for the next one by whoever may not wait for the database (a finaliser beside an
  event loop).
* A call may come from a finaliser or a signal handler, in the middle of anything, also
  of our own critical section on the same thread. The lock is re-entrant, so that this
  cannot deadlock, and `_busy` tells the second call that it must not touch anything.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from sqlalchemy import exc

__all__ = ["Section", "refuse_inner_call"]


class Section:
    """A lock that has something done after it.

    :param clock: seconds on a steadily rising scale.
    :param can_wait: tells if this is a place where chores may wait for the database.
    """

    __slots__ = ("_bells", "_busy", "_can_wait", "_chores", "_lock", "clock")

    def __init__(
        self, clock: Callable[[], float], can_wait: Callable[[], bool]
    ) -> None:
        self.clock = clock
        self._can_wait = can_wait

    def _begin(self) -> None:
        """Be as new, at first and in the child of a fork."""
        # Guards everything that its owner has; see the head of this file.
        self._lock = threading.RLock()
        # True in the middle of a transition.
        self._busy = False
        # What is left to do after the lock: callers to wake, and what takes time.
        self._bells: deque[Callable[[], None]] = deque()
        self._chores: deque[Callable[[], None]] = deque()

    @abstractmethod
    def _tidy(self, now: float) -> None:
        """What is done by whoever enters, and again before he leaves."""

    @abstractmethod
    def _is_unsettled(self) -> bool:
        """Tell if something has come up since that a section has to do."""

    @contextmanager
    def section(self) -> Iterator[float]:
        """A critical section off the hot path; gives the time."""
        with self._lock:
            if self._busy:
                refuse_inner_call()
            self._busy = True
            try:
                now = self.clock()
                self._tidy(now)
                yield now
                self._tidy(now)
            finally:
                self._busy = False
        if self._bells or self._chores:
            self._flush()

    def visit(self) -> None:
        """Enter and leave a critical section, which does what there is to do."""
        if not self._in_section():
            with self.section():
                pass

    def _in_section(self) -> bool:
        """Tell if this thread is in a critical section.

        The caller runs in a finaliser or a signal handler then.
        """
        with self._lock:
            return self._busy

    def _flush(self) -> None:
        """Do what was left to do after the lock."""
        try:
            while True:
                while self._bells:
                    self._next_bell()
                if self._is_unsettled():
                    self.visit()
                if not self._chores or not self._can_wait():
                    return
                self._next_chore()
        except BaseException:
            self._flush()
            raise

    def _next_bell(self) -> None:
        try:
            bell = self._bells.popleft()
        except IndexError:
            return  # another thread was faster
        try:
            bell()
        except BaseException:  # an interrupt's: ring it again, which does no harm
            self._bells.append(bell)
            raise

    def _next_chore(self) -> None:
        try:
            chore = self._chores.popleft()
        except IndexError:
            return  # another thread was faster
        chore()


def refuse_inner_call(why: str = "this call is not possible there") -> NoReturn:
    """Raise for a call in the middle of a critical section of the same thread."""
    raise exc.InvalidRequestError(
        "a signal handler or a finaliser has called the pool in the middle of the "
        f"pool's own bookkeeping, on the same thread, and {why}: let the handler set a "
        "flag and do the work outside of it, or give it an engine of its own"
    )
