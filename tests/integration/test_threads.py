"""Threads begin, and locks are released, whatever interrupts their callers."""

from __future__ import annotations

import _thread
import ctypes
import gc
import sys
import threading

import pytest
from support import state
from support.threads import PATIENCE, Caller, eventually

from sqla_fairpool import threads
from sqla_fairpool.pool.endings import OPEN, EndWatcher
from sqla_fairpool.pool.waiters import ThreadWaiter


class Endings:
    """The watcher of sessions that end."""

    name = "sqla_fairpool-endings"

    def __init__(self, server):
        self.watcher, self.told = EndWatcher(), []

    def start(self):
        self.watcher.watch(None, 0.0, self.told.append)

    def works(self):
        return OPEN in self.told

    def has_ended(self):
        return not self.watcher._runner


class Leaks:
    """The watch for leaks."""

    name = "sqla_fairpool leak_threshold"

    def __init__(self, server):
        self.engine = server.engine(leak_threshold=0.4)

    def start(self):
        self.engine.connect().close()

    def works(self):
        return state.leak_thread(self.engine) is not None

    def has_ended(self):
        self.engine = None
        gc.collect()  # it ends with its pool
        return self.name not in names()


class Apart:
    """What opens connections ahead; one that was interrupted is not started anew."""

    name = "sqla_fairpool-min_idle"

    def __init__(self, server):
        self.begun = threading.Event()
        self.works = self.begun.is_set

    def start(self):
        ThreadWaiter.run_apart(self.begun.set)

    def has_ended(self):
        return self.name not in names()


def names():
    return [thread.name for thread in threading.enumerate()]


@pytest.fixture(params=[Endings, Leaks, Apart])
def worker(request, server):
    worker = request.param(server)
    yield worker
    eventually(worker.has_ended)


@pytest.fixture
def soon(monkeypatch):
    """Give helpers up soon, and try as many as it takes."""
    monkeypatch.setattr(threads, "_HEARD_WITHIN", 0.02)
    monkeypatch.setattr(threads, "_HELPERS", 10_000)


start_raw = _thread.start_new_thread


@pytest.mark.usefixtures("soon")
def test_new_thread_that_ends_before_its_first_instruction(worker, monkeypatch):
    """As one does that CPython 3.11 hits with the exception for another thread."""
    to_end = [1, 1]

    def start(function, args):
        return start_raw((lambda: None) if to_end and to_end.pop() else function, args)

    monkeypatch.setattr(_thread, "start_new_thread", start)
    Caller(worker.start).result()
    assert not to_end
    eventually(worker.works)


@pytest.mark.parametrize("interrupts", [1, 10])
@pytest.mark.parametrize("how", ["before", "after"])
def test_interrupt_while_the_thread_is_started(worker, monkeypatch, how, interrupts):
    """It is raised afterwards; after many of them the next call starts another."""
    left = [KeyboardInterrupt] * interrupts

    def interrupted(function, args):
        if how == "after" or not left:
            start_raw(function, args)
        if left:
            raise left.pop()

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.start()
    if interrupts > 1:
        worker.start()
    eventually(worker.works)
    eventually(lambda: names().count(worker.name) <= 1)


class HitError(Exception):
    """Thrown into a thread."""


def throw(number):
    number = ctypes.c_ulong(number)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(HitError))


@pytest.mark.usefixtures("soon")
def test_exception_thrown_in_the_first_moment(worker, monkeypatch):
    """It hits this thread, or up to CPython 3.11 the new one."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)

    def start(function, args):
        monkeypatch.setattr(_thread, "start_new_thread", start_raw)
        start_raw(function, args)
        throw(threading.get_ident())

    def call():
        for _ in range(10):
            monkeypatch.setattr(_thread, "start_new_thread", start)
            try:
                worker.start()
            except HitError:
                worker.start()

    Caller(call).result()
    eventually(worker.works)


def test_interrupt_of_a_thread_that_waits_for_a_lock_leaves_it_free():
    """In CPython 3.14 it is raised as the lock has been taken, before the block."""
    lock, waits = threads.make_lock(), threading.Event()

    def call():
        waits.set()
        with lock:
            pass

    for _ in range(20):
        lock.acquire()
        caller = Caller(call)
        assert waits.wait(PATIENCE)
        throw(caller.ident)
        lock.release()
        with pytest.raises(HitError):
            caller.result()
        assert lock.acquire(blocking=False)
        lock.release()
        waits.clear()


# -- where there are no threads ------------------------------------------------------


def refuse(*_):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    "patched", [(_thread, "start_new_thread"), (threading.Thread, "start")]
)
def test_thread_that_the_system_refuses(monkeypatch, patched):
    monkeypatch.setattr(*patched, refuse)
    failed = threading.Event()
    threads.start_thread(refuse, "refused", failed.set)
    assert failed.wait(PATIENCE)


def test_no_thread_is_heard_of_at_the_interpreters_end(monkeypatch):
    orders, failed = [], []
    monkeypatch.setattr(threads, "_HEARD_WITHIN", 0.0)
    monkeypatch.setattr(_thread, "start_new_thread", lambda *call: orders.append(call))
    threads.start_thread(refuse, "late", lambda: failed.append(1))
    assert failed == [1]
    assert len(orders) == threads._HELPERS
    for function, args in orders:  # if they are after all, it is not started
        function(*args)
    assert "late" not in names()
