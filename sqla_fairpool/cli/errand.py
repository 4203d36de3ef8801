"""A function that is run in a thread of its own, whenever it is asked for.

A server that does not answer can hold a driver for minutes, in C. Keys and signals have
to be heard meanwhile, so whoever asks waits no longer than he wants to.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Errand"]

_T = TypeVar("_T")

#: Seconds for the end; what is in order takes no time.
_PATIENCE = 1.0


class Errand(Generic[_T]):
    """See the head of this file.

    :param run: what is run, never twice at a time.
    :param at_end: runs there too, after :meth:`close`.
    """

    def __init__(self, run: Callable[[], _T], at_end: Callable[[], None]) -> None:
        self._run = run
        self._at_end = at_end
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[_T | BaseException] = queue.SimpleQueue()
        # A thread that hangs is left behind when the program ends.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while self._asked.get():
            try:
                self._answers.put(self._run())
            except BaseException as error:
                self._answers.put(error)  # for the thread that polls
        self._at_end()

    def ask(self) -> None:
        """Have it run. Returns at once."""
        self._asked.put(True)

    def poll(self, seconds: float = 0.0) -> _T | None:
        """Return what it returned, once, or raise what it raised; None if it runs.

        :param seconds: how long to wait for it.
        """
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End the thread, if it does not hang."""
        self._asked.put(False)
        self._thread.join(_PATIENCE)
