"""Threads that run one at a time, and are switched at chosen bytecodes.

:class:`Schedule` runs functions in real threads, of which one is awake at any time. At
each bytecode of the files that are explored it may pass the turn to another one; locks
are cooperative, and time stands still unless a thread moves it. So one seed is one
order of all bytecodes, which can be run again.

Two ways to choose: at random, or by priorities with a few points of change (PCT:
Burckhardt et al., "A randomized scheduler with probabilistic guarantees of finding
bugs", ASPLOS 2010), which finds what needs a long run of one thread in the middle of
another.
"""

from __future__ import annotations

import _thread
import random
import sys
import threading
from types import SimpleNamespace

#: Bytecodes between two switches, on average, of the random way: one or another, so
#: that short and long runs are tried.
_RUNS = (3, 10, 40, 160)

#: Points of change of the way by priorities, and the bytecodes among which they are.
_CHANGES, _LENGTH = 4, 6_000


class StuckError(AssertionError):
    """All threads wait, and none can be woken: a wake-up was lost, or a deadlock."""


class _Ended(BaseException):
    """Ends the other threads of a schedule that has failed."""


class _Worker:
    def __init__(self, function):
        self.function = function
        self.turn = _thread.allocate_lock()
        self.turn.acquire()
        #: Tells if it can go on; None if it does not wait.
        self.can_go_on = None
        self.deadline = None
        self.ended = False
        self.priority = 0.0


class Schedule:
    """One order of bytecodes.

    :param seed: tells which.
    :param files: the code in which threads are switched, beginnings of paths.
    """

    def __init__(self, seed, files):
        self._random = random.Random(seed)
        self._files = tuple(files)
        self.now = 1000.0
        #: Bytecodes so far.
        self.steps = 0
        self.by_priority = bool(seed % 2)
        changes = (self._random.randrange(_LENGTH) for _ in range(_CHANGES))
        self._changes = sorted(changes, reverse=True)
        self._run_length = self._random.choice(_RUNS)
        self._left = self._next_run()
        self._workers, self._current = [], None
        self._error = None
        self._traced = {}

    # -- what the threads see -------------------------------------------------------

    def clock(self):
        return self.now

    def advance(self, seconds):
        """Let time pass; who waits for that goes on in its turn."""
        self.now += seconds
        self._switch()

    def module(self):
        """What stands in the place of :mod:`threading` in the files."""
        names = {"Lock": self._lock, "RLock": lambda: CooperativeRLock(self)}
        return SimpleNamespace(**{**vars(threading), **names})

    def _lock(self):
        return CooperativeLock(self)

    def wait_until(self, can_go_on, seconds=None):
        """Block the running thread; return False if the time was up before."""
        worker = self._current
        if worker is None or worker.ended:
            assert can_go_on(), "the main thread would wait"
            return True
        if not can_go_on():
            worker.can_go_on = can_go_on
            worker.deadline = None if seconds is None else self.now + seconds
            self._switch(blocked=True)
            worker.can_go_on = worker.deadline = None
        return can_go_on()

    # -- the run ----------------------------------------------------------------------

    def run(self, *functions):
        """Run functions, each in a thread; raise what the first one that fails raises.

        :raises StuckError: if all that have not ended wait.
        """
        self._workers = [_Worker(function) for function in functions]
        for worker in self._workers:
            worker.priority = self._random.random()
        done = _thread.allocate_lock()
        done.acquire()
        threads = [
            threading.Thread(target=self._work, args=(worker, done), daemon=True)
            for worker in self._workers
        ]
        for thread in threads:
            thread.start()
        self._current = self._choose()
        self._current.turn.release()
        done.acquire()
        for thread in threads:
            thread.join()
        self._current = None
        if self._error is not None:
            raise self._error

    def _work(self, worker, done):
        worker.turn.acquire()
        sys.settrace(self._trace_calls)
        try:
            if self._error is None:
                worker.function()
        except _Ended:
            pass
        except BaseException as error:
            if self._error is None:
                self._error = error
        finally:
            sys.settrace(None)
            worker.ended = True
            self._pass_on(worker, done)

    def _pass_on(self, worker, done):
        if all(other.ended for other in self._workers):
            done.release()
            return
        try:
            self._current = self._choose()
        except StuckError as error:
            self._fail(error)
        self._current.turn.release()

    def _fail(self, error):
        """Have all threads end, one after the other."""
        if self._error is None:
            self._error = error
        self._current = next(other for other in self._workers if not other.ended)

    def _trace_calls(self, frame, event, argument):
        code = frame.f_code
        traced = self._traced.get(code)
        if traced is None:
            traced = self._traced[code] = code.co_filename.startswith(self._files)
        if not traced:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._trace

    def _trace(self, frame, event, argument):
        if event == "opcode":
            self.steps += 1
            self._left -= 1
            if self._left <= 0:
                self._switch()
        return self._trace

    def _next_run(self):
        """Return the bytecodes until the next switch."""
        if not self.by_priority:
            return 1 + int(self._random.expovariate(1 / self._run_length))
        while self._changes and self._changes[-1] <= self.steps:
            self._changes.pop()
        return self._changes[-1] - self.steps if self._changes else sys.maxsize

    def _switch(self, blocked=False):
        worker = self._current
        if worker is None:
            return
        if self.by_priority and not blocked:
            worker.priority = min(other.priority for other in self._workers) - 1
        self._left = self._next_run()
        try:
            chosen = self._choose()
        except StuckError as error:
            self._fail(error)
            chosen = self._current
        if chosen is not worker:
            self._current = chosen
            chosen.turn.release()
            worker.turn.acquire()
        if self._error is not None:
            sys.settrace(None)
            raise _Ended

    def _choose(self):
        ready = [worker for worker in self._workers if self._is_ready(worker)]
        if not ready:
            raise StuckError(f"all threads wait, after {self.steps} bytecodes")
        if self.by_priority:
            return max(ready, key=lambda worker: worker.priority)
        return self._random.choice(ready)

    def _is_ready(self, worker):
        if worker.ended:
            return False
        is_over = worker.deadline is not None and worker.deadline <= self.now
        return worker.can_go_on is None or is_over or worker.can_go_on()


class CooperativeLock:
    """As ``threading.Lock``."""

    def __init__(self, schedule):
        self._schedule = schedule
        self._locked = False

    def acquire(self, blocking=True, timeout=-1):
        if self._locked and blocking:
            seconds = None if timeout < 0 else timeout
            self._schedule.wait_until(lambda: not self._locked, seconds)
        if self._locked:
            return False
        self._locked = True
        return True

    __enter__ = acquire

    def release(self):
        if not self._locked:
            raise RuntimeError("release unlocked lock")
        self._locked = False

    def __exit__(self, *exception):
        self.release()


class CooperativeRLock:
    """As ``threading.RLock``."""

    def __init__(self, schedule):
        self._schedule = schedule
        self._owner, self._count = None, 0

    def _is_free(self):
        return self._owner in (None, threading.get_ident())

    def acquire(self, blocking=True, timeout=-1):
        me = threading.get_ident()
        if self._owner not in (None, me):
            if not blocking:
                return False
            self._schedule.wait_until(lambda: self._owner is None)
        self._owner = me
        self._count += 1
        return True

    __enter__ = acquire

    def release(self):
        assert self._owner == threading.get_ident()
        self._count -= 1
        if not self._count:
            self._owner = None

    def __exit__(self, *exception):
        self.release()
