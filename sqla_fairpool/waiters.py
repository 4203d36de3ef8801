"""How a caller sleeps until it is woken. A thread's way; a task's will stand here.

A waiter is a dumb bell: it may ring early or twice. Whoever wakes looks at its
ticket to learn what happened.
"""

from __future__ import annotations

import threading
from typing import Protocol

__all__ = ["ThreadWaiter", "Waiter"]


class Waiter(Protocol):
    """What the pool asks of a waiter."""

    def wait(self, seconds: float | None) -> None:
        """Sleep until :meth:`wake` was called or `seconds` have passed."""

    def wake(self) -> None:
        """End the sleep, now or when it begins. May be called from any thread."""


class ThreadWaiter:
    """Blocks the calling thread.

    A bare lock, taken by its owner and released to wake it: a third of the cost
    of :class:`threading.Event`, which builds a condition on top of one. Looked up
    in :mod:`threading` at each use, so that monkey-patching reaches it.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, seconds: float | None) -> None:
        if seconds is None:
            self._lock.acquire()
        elif seconds > 0:
            self._lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        try:
            self._lock.release()
        except RuntimeError:
            pass  # the bell was ringing already
