"""Threads that are started, and locks that are taken, whatever interrupts a caller.

An interrupt is an exception that is thrown into a thread: by the handler of a signal,
or by ``PyThreadState_SetAsyncExc``.

Threads: ``Thread.start()`` returns when the new thread runs. In CPython 3.10 and 3.11
an interrupt of the starting thread (``PyThreadState_SetAsyncExc``) may hit the new one
instead, before its first instruction. That one ends, and the wait for it does not. So a
helper is started here first, and another one if it is not heard of. No thread but the
helper calls ``Thread.start()``, and none knows its number.

Locks: up to CPython 3.13, ``with lock:`` takes the lock and enters the block in one
step. In 3.14 an interrupt may come in between, and the lock is never released
(python/cpython issue 148874). :func:`make_lock` returns one that is released.
"""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable
from typing import cast

#: Seconds that are waited for a sign of a helper: the system has to start a thread.
_HEARD_WITHIN = 1.0

#: How many helpers are tried. None is heard of while the interpreter ends.
_HELPERS = 3


def start_thread(
    target: Callable[[], object], name: str, failed: Callable[[], object] = lambda: None
) -> None:
    """Start a daemon thread, once.

    An interrupt is raised when it has been started. If several come, it may not be.

    :param failed: called, from this thread or another one, if it cannot be started: at
      the interpreter's end, or if the system has no more threads.
    """
    heard, done = threading.Event(), threading.Event()
    order = threading.Lock()  # which is never released: one thread gets it

    def help_out() -> None:
        heard.set()  # first: the caller may hold a lock that is needed below
        if order.acquire(blocking=False):
            try:
                threading.Thread(target=target, name=name, daemon=True).start()
            except RuntimeError:
                failed()
            done.set()

    interrupt = None
    for _ in range(_HELPERS):
        try:
            _thread.start_new_thread(help_out, ())
            if heard.wait(_HEARD_WITHIN):
                done.wait(_HEARD_WITHIN)
                break
        except RuntimeError:
            break
        except BaseException as error:
            interrupt = error
    if not heard.is_set() and order.acquire(blocking=False):
        failed()
    if interrupt is not None:
        raise interrupt


class Lock:
    """A re-entrant lock for ``with``, which an interrupt leaves as it was before."""

    # `with` finds the lock's own `__exit__`. A function of Python can be interrupted as
    # it begins, before it has released anything.
    __slots__ = ("__exit__", "__weakref__", "acquire", "release")
    __exit__: Callable[..., None]

    def __init__(self) -> None:
        lock = threading.RLock()
        self.acquire, self.release = lock.acquire, lock.release
        self.__exit__ = lock.__exit__

    def __enter__(self) -> None:
        # Taken and noted by one call of C, so that no interrupt comes in between. None
        # comes either as this function returns (but it did in CPython 3.10).
        taken: list[bool] = []
        try:
            taken.extend(map(self.acquire, (True,)))
        except BaseException:
            if taken:
                self.release()
            raise


def make_lock() -> Lock:
    """Return a re-entrant lock, for ``with`` in a thread that may be interrupted."""
    if sys.version_info >= (3, 14):
        return Lock()
    return cast(Lock, threading.RLock())
