"""Threads in a known order: events and polling for a state, never a plain sleep."""

from __future__ import annotations

import threading
import time

from . import state

#: How long anything that must happen may take, on a slow and busy machine.
PATIENCE = 30.0


def eventually(condition, what="the condition"):
    """Return once `condition()` is true. Waits for a state, orders nothing."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.001)


def ensure_waiting(pool, number):
    """Return once `number` callers wait in the pool."""
    eventually(lambda: state.waiting(pool) == number, f"{number} waiting")


class Caller(threading.Thread):
    """Runs a function in a thread; keeps what it returned or raised."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self._function, self._args = function, args
        self._outcome = None
        self.error = None
        self.start()

    def run(self):
        try:
            self._outcome = self._function(*self._args)
        except BaseException as error:
            self.error = error

    def result(self, patience=PATIENCE):
        """Return what the function returned, raise what it raised.

        :param patience: seconds after which it is taken to hang.
        """
        self.join(patience)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self._outcome


class VirtualClock:
    """A clock that stands still until it is told to go on."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds
