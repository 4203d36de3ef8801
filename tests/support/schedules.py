"""Threads that run one at a time, and are switched at chosen steps of their code.

A *step* is what a thread may see of another one, or show to it: an attribute, an item,
a comparison, a test for truth, a call, the next item of a loop. What bytecodes do
between two steps they do to variables of one thread: to switch there would give no
other order. :func:`stepwise` has code count its steps, by a call before each.

:class:`Schedule` runs functions in greenlets in the place of threads. After a number of
steps the turn may pass to another one; locks are cooperative, and time stands still
unless a thread moves it. So one seed is one order of all steps, which can be run again.

Two ways to choose whose turn is next: at random, or by priorities, of which the running
thread gets the lowest at the end of its turn (after PCT: Burckhardt et al., "A
randomized scheduler with probabilistic guarantees of finding bugs", ASPLOS 2010), which
finds what needs a long run of one thread in the middle of another.
"""

from __future__ import annotations

import ast
import builtins
import functools
import gc
import random
import threading
from contextlib import contextmanager, suppress
from math import inf, log
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace

from greenlet import GreenletExit, getcurrent, greenlet

#: Steps of a turn, on average, at random and by priorities: one or another, so that
#: short and long turns are tried.
_TURNS = (3, 10, 40, 160), (100, 300, 1_000, 3_000)

#: Steps until the turn of the running thread ends.
_left = inf


def step(value=None):
    """Count a step; another thread may run before it."""
    global _left
    _left -= 1
    if _left <= 0:
        Schedule.running.switch()
    return value


def _each(iterable):
    """Iterate in steps."""
    for item in step(iterable):
        yield item
        step()


# Code that is compiled so finds them there, of whichever module it is.
vars(builtins).update(__step__=step, __each__=_each)


def _counted(node, function="__step__"):
    return ast.Call(ast.Name(function, ast.Load()), [node], [])


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
            case ast.Call(keywords=[*_, last]):
                last.value = _counted(last.value)
            case ast.Call(args=[*_, last]) if not isinstance(last, ast.Starred):
                node.args[-1] = _counted(last)
            case ast.Call():
                node.func = _counted(node.func)
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


def _key(code):
    return code.co_filename, code.co_name, code.co_firstlineno, code.co_freevars


@functools.cache
def _codes(path):
    """Return all code of a module, which counts its steps."""
    codes = [compiled(Path(path).read_text("utf-8"), path)]
    for code in codes:  # and what is in it
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return {_key(code): code for code in codes}


@contextmanager
def stepwise(paths):
    """Have the code of files count its steps."""
    made = {key: code for path in paths for key, code in _codes(path).items()}
    gc.unfreeze()  # what is frozen would not be found
    former = [
        (function, function.__code__)
        for function in gc.get_objects()
        if isinstance(function, FunctionType) and _key(function.__code__) in made
    ]
    gc.freeze()
    for function, code in former:
        function.__code__ = made[_key(code)]
    try:
        yield
    finally:
        for function, code in former:
            function.__code__ = code


# -- schedules -------------------------------------------------------------------------


class Schedule:
    """One order of steps from a time on; the seed tells which."""

    def __init__(self, seed, now):
        Schedule.running = self  # for steps and locks
        chance = random.Random(seed)
        self._random = chance.random
        self._by_priority = seed % 2
        self._turn = chance.choice(_TURNS[self._by_priority])
        self._workers, self._lowest = [], 0
        self.now = now
        self.error = None  # kept: with it, what has failed is not finalised

    def run(self, *functions):
        """Run functions, each in a thread; raise what the first that fails raises."""
        global _left
        self._workers = [greenlet(function) for function in functions]
        for worker in self._workers:
            worker.priority, worker.can_go_on = self._random(), None
        try:
            while self._workers:
                worker = self._choose()
                assert worker is not None, "all threads wait: a wake-up was lost"
                worker.switch()
                self._workers = [one for one in self._workers if not one.dead]
        except BaseException as error:
            self.error, _left = error, inf
            for worker in self._workers:
                with suppress(BaseException):
                    worker.throw()  # until it has cleaned up
            raise

    def _choose(self, otherwise=None):
        """Begin a turn, and return whose it is."""
        global _left
        _left = 1 - int(self._turn * log(1 - self._random()))
        those = [one for one in self._workers if not one.can_go_on or one.can_go_on()]
        if self._by_priority:
            return max(those, key=lambda one: one.priority, default=otherwise)
        return those[int(self._random() * len(those))] if those else otherwise

    def switch(self):
        """Pass the turn on, it may be to the same thread again."""
        worker = getcurrent()
        if worker not in self._workers:  # a thread that other tests have left
            return
        if self.error is not None:
            raise GreenletExit
        if not worker.can_go_on:
            self._lowest -= 1
            worker.priority = self._lowest
        self._choose(worker.parent).switch()

    def wait_until(self, can_go_on, seconds=inf):
        """Block the running thread until it can go on, or the time is up."""
        worker, deadline = getcurrent(), self.now + seconds
        assert worker in self._workers, "another thread would wait"
        worker.can_go_on = lambda: deadline <= self.now or can_go_on()
        self.switch()
        worker.can_go_on = None


class CooperativeLock:
    """As ``threading.Lock``."""

    _owner, _count = None, 0

    def _is_free(self):
        return self._owner is None

    def acquire(self, blocking=True, timeout=-1):
        step()
        if blocking and not self._is_free():
            seconds = inf if timeout < 0 else timeout
            Schedule.running.wait_until(lambda: self._owner is None, seconds)
        if not self._is_free():
            return False
        self._owner = getcurrent()
        self._count += 1
        return True

    __enter__ = acquire

    def release(self):
        step()
        if not self._count:
            raise RuntimeError("release unlocked lock")
        self._count -= 1
        if not self._count:
            self._owner = None

    def __exit__(self, *exception):
        self.release()


class CooperativeRLock(CooperativeLock):
    """As ``threading.RLock``; is free for what a schedule that has failed cleans up."""

    def _is_free(self):
        return self._owner in (None, getcurrent()) or Schedule.running.error

    def release(self):
        assert self._owner is getcurrent() or Schedule.running.error
        super().release()


#: What stands in the place of :mod:`threading` in the code that is explored.
THREADING = SimpleNamespace(**vars(threading))
THREADING.Lock, THREADING.RLock = CooperativeLock, CooperativeRLock
THREADING.get_ident = getcurrent
