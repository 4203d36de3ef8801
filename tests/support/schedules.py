"""Threads that run one at a time, and are switched at chosen steps of their code.

A *step* is what a thread may see of another one, or show to it: an attribute, an item,
a comparison, a test for truth, a call, the next item of a loop. What bytecodes do
between two steps they do to variables of one thread: to switch there would give no
other order. :func:`stepwise` has code count its steps, by a call before each.

:class:`Schedule` runs functions in greenlets in the place of threads. At each step it
may pass the turn to another one; locks are cooperative, and time stands still unless a
thread moves it. So one seed is one order of all steps, which can be run again.

Two ways to choose: at random, or by priorities with a few points of change (PCT:
Burckhardt et al., "A randomized scheduler with probabilistic guarantees of finding
bugs", ASPLOS 2010), which finds what needs a long run of one thread in the middle of
another.
"""

from __future__ import annotations

import ast
import functools
import gc
import random
import sys
import threading
from contextlib import contextmanager
from math import log
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace

from greenlet import getcurrent, greenlet

#: Steps between two switches, on average, of the random way: one or another, so that
#: short and long runs are tried.
_RUNS = (3, 10, 40, 160)

#: Points of change of the way by priorities, and the steps among which they are.
_CHANGES, _LENGTHS = 4, (150, 600, 2_400, 6_000)

#: More steps than there are.
_NEVER = sys.maxsize // 2

#: The schedule that runs, and the steps until its next switch.
_running = None
_left = _NEVER


class StuckError(AssertionError):
    """All threads wait, and none can be woken: a wake-up was lost, or a deadlock."""


class _Ended(BaseException):
    """Ends the other threads of a schedule that has failed."""


# -- steps -----------------------------------------------------------------------------


def step(value=None):
    """Count a step; another thread may run before it."""
    global _left
    _left -= 1
    if _left <= 0:
        _running.switch()
    return value


def _each(iterable):
    """Iterate in steps."""
    iterator = iter(step(iterable))
    for item in iterator:
        yield item
        step()


#: What code that is compiled so refers to.
NAMES = {"__step__": step, "__each__": _each}


def _counted(node, function="__step__"):
    name = ast.Name(function, ast.Load())
    return ast.copy_location(ast.Call(name, [node], []), node)


def _truth(node):
    kinds = (ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.NamedExpr)
    return _counted(node) if isinstance(node, kinds) else node


class _Stepwise(ast.NodeTransformer):
    """Counts each step when its operands are known, so that nothing is in between."""

    def generic_visit(self, node):
        super().generic_visit(node)
        match node:
            case ast.Subscript(slice=index) if not isinstance(index, ast.Slice):
                node.slice = _counted(index)
            case ast.Attribute() | ast.AugAssign() | ast.Subscript():
                node.value = _counted(node.value)
            case (
                ast.Call(keywords=[*_, last])
                | ast.Call(args=[*_, ast.Starred() as last])
            ):
                last.value = _counted(last.value)
            case ast.Call(args=[*_, last]):
                node.args[-1] = _counted(last)
            case ast.Call(func=function) if getattr(function, "id", None) != "super":
                node.func = _counted(function)
            case ast.Compare(comparators=[*_, last]):
                node.comparators[-1] = _counted(last)
            case ast.If() | ast.IfExp() | ast.While():
                node.test = _truth(node.test)
            case ast.UnaryOp(op=ast.Not()):
                node.operand = _truth(node.operand)
            case ast.BoolOp():
                node.values = [_truth(one) for one in node.values]
            case ast.For() | ast.comprehension(is_async=0):
                node.iter = _counted(node.iter, "__each__")
        return node


def compiled(source, filename):
    """Compile a module so that it counts its steps."""
    tree = _Stepwise().visit(ast.parse(source))
    return compile(ast.fix_missing_locations(tree), filename, "exec")


@functools.cache
def _functions(path):
    """Return the code of the functions and methods of a module, by name and line."""
    found, bodies = {}, [compiled(Path(path).read_text("utf-8"), path)]
    while bodies:
        for code in bodies.pop().co_consts:
            if isinstance(code, CodeType) and code.co_flags & 2:  # not that of a class
                found[path, code.co_name, code.co_firstlineno] = code
            elif isinstance(code, CodeType):
                bodies.append(code)
    return found


@contextmanager
def stepwise(beginnings):
    """Have the code of files count its steps.

    :param beginnings: what the paths of the files begin with.
    """
    made, former = {}, []
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None) or ""
        if path.startswith(tuple(beginnings)):
            made |= _functions(path)
            vars(module).update(NAMES)
    gc.unfreeze()  # what is frozen would not be found
    for function in gc.get_objects():
        if isinstance(function, FunctionType):
            code = function.__code__
            other = made.get((code.co_filename, code.co_name, code.co_firstlineno))
            if other is not None and code.co_freevars == other.co_freevars:
                former.append((function, code))
                function.__code__ = other
    gc.freeze()
    try:
        yield
    finally:
        for function, code in former:
            function.__code__ = code


# -- schedules -------------------------------------------------------------------------


class _Worker(greenlet):
    """What runs in the place of a thread."""

    #: Tells if it can go on; None if it does not wait.
    can_go_on = None
    deadline = None
    priority = 0.0


class Schedule:
    """One order of steps.

    :param seed: tells which.
    :param now: the time as it begins.
    """

    def __init__(self, seed, now):
        global _running, _left
        _running = self
        chance = random.Random(seed)
        self._chance = chance.random
        self.now = now
        self.by_priority = bool(seed % 2)
        length = chance.choice(_LENGTHS)
        changes = (chance.randrange(length) for _ in range(_CHANGES))
        self._changes = sorted(changes, reverse=True)
        self._run_length = chance.choice(_RUNS)
        self._workers, self._current = [], None
        #: The first one of a thread.
        self.error = None
        self._planned = _left = _NEVER

    @property
    def steps(self):
        """Steps so far."""
        return self._planned - _left

    def advance(self, seconds):
        """Let time pass; who waits for that goes on in its turn."""
        self.now += seconds
        self.switch()

    def wait_until(self, can_go_on, seconds=None):
        """Block the running thread until it can go on, or the time is up."""
        worker = self._current
        if can_go_on():
            return
        assert worker is not None, "the main thread would wait"
        worker.can_go_on = can_go_on
        worker.deadline = None if seconds is None else self.now + seconds
        self.switch(blocked=True)
        worker.can_go_on = worker.deadline = None

    def run(self, *functions):
        """Run functions, each in a thread; raise what the first one that fails raises.

        :raises StuckError: if all that have not ended wait.
        """
        self._workers = [
            _Worker(functools.partial(self._guard, function)) for function in functions
        ]
        for worker in self._workers:
            worker.priority = self._chance()
        self._plan()
        while self._workers and self.error is None:
            self._current = self._choose()
            if self._current is not None:
                self._current.switch()
            self._workers = [one for one in self._workers if not one.dead]
        self._plan(_NEVER)
        while started := [worker for worker in self._workers if worker]:
            self._current = started[-1]
            self._current.throw(_Ended)  # until it has cleaned up
        self._current = None
        if self.error is not None:
            raise self.error

    def _guard(self, function):
        try:
            function()
        except _Ended:
            pass
        except BaseException as error:
            self.error = self.error or error

    def _plan(self, more=None):
        """Count the steps from here on, until the next switch."""
        global _left
        if more is None and not self.by_priority:
            more = 1 - int(self._run_length * log(1 - self._chance()))
        elif more is None:
            steps = self.steps
            while self._changes and self._changes[-1] <= steps:
                self._changes.pop()
            more = self._changes[-1] - steps if self._changes else _NEVER
        self._planned += more - _left
        _left = more

    def switch(self, blocked=False):
        """Pass the turn on, it may be to the same thread again."""
        worker = self._current
        if worker is not getcurrent():  # a thread that other tests have left
            return
        if self.error is not None:
            raise _Ended
        if self.by_priority and not blocked:
            worker.priority = min(other.priority for other in self._workers) - 1
        self._plan()
        self._current = self._choose()
        if self._current is not worker:
            (self._current or worker.parent).switch()

    def _choose(self):
        """Return who is next; without one, the schedule has failed."""
        those = self._workers
        if not self.by_priority:
            chosen = those[int(self._chance() * len(those))]
            if chosen.can_go_on is None:
                return chosen
        those = [worker for worker in those if self._is_ready(worker)]
        if not those:
            self.error = StuckError(f"all threads wait, after {self.steps} steps")
            return None
        if self.by_priority:
            return max(those, key=lambda worker: worker.priority)
        return those[int(self._chance() * len(those))]

    def _is_ready(self, worker):
        is_over = worker.deadline is not None and worker.deadline <= self.now
        return worker.can_go_on is None or is_over or worker.can_go_on()


def clock():
    """Return the time of the schedule that runs."""
    return _running.now


class CooperativeLock:
    """As ``threading.Lock``."""

    _again, _owner, _count = False, None, 0

    def acquire(self, blocking=True, timeout=-1):
        step()
        me = getcurrent()
        mine = self._again and (self._owner is me or _running.error is not None)
        if self._owner is not None and not mine:
            if blocking:
                seconds = None if timeout < 0 else timeout
                _running.wait_until(lambda: self._owner is None, seconds)
            if self._owner is not None:
                return False
        self._owner = me
        self._count += 1
        return True

    __enter__ = acquire

    def release(self):
        step()
        if self._owner is None:
            raise RuntimeError("release unlocked lock")
        self._count -= 1
        if not self._count:
            self._owner = None

    def __exit__(self, *exception):
        self.release()


class CooperativeRLock(CooperativeLock):
    """As ``threading.RLock``; is free for what a schedule that has failed cleans up."""

    _again = True

    def release(self):
        assert self._owner is getcurrent() or _running.error is not None
        super().release()


#: What stands in the place of :mod:`threading` in the code that is explored.
_replaced = {
    "Lock": CooperativeLock,
    "RLock": CooperativeRLock,
    "get_ident": getcurrent,
}
THREADING = SimpleNamespace(**{**vars(threading), **_replaced})
