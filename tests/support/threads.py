"""Threads in a known order: events and polling for a state, never a plain sleep."""

from __future__ import annotations

import threading
import time

import sqla_fairpool

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
        #: Somebody has seen how it ended.
        self.asked = False
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
        self.asked = True
        self.join(patience)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self._outcome


class Gate:
    """A place where a function stops: `server.before["close"] = gate`, for example."""

    def __init__(self):
        self._reached, self._open = threading.Event(), threading.Event()

    def __call__(self, *args):
        self._reached.set()
        assert self._open.wait(PATIENCE), "the gate was not opened"

    def reached(self):
        """Return once a thread has come to the gate."""
        assert self._reached.wait(PATIENCE), "no thread came to the gate"

    def open(self):
        """Let all pass from now on."""
        self._open.set()


def connect(pool, tag="a"):
    """Check a connection out under a tag; "unknown" means without one."""
    if tag == "unknown":
        return pool.connect()
    with sqla_fairpool.tag(tag):
        return pool.connect()


def take(pool, number, tag="a"):
    """Check so many connections out under a tag."""
    return [connect(pool, tag) for _ in range(number)]


def give(connections):
    """Return all of them; the list is empty then."""
    while connections:
        connections.pop().close()


def wait_in_line(pool, tag="a", count=1):
    """Start callers under a tag, one after the other; return them in that order."""
    callers = []
    for _ in range(count):
        before = state.waiting(pool)
        callers.append(Caller(connect, pool, tag))
        ensure_waiting(pool, before + 1)
    return callers


class VirtualClock:
    """A clock that stands still until it is told to go on."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds
