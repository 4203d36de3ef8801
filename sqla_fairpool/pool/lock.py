"""The pool's lock, and what is left to do after it.

Rules of this file:

* One lock. No I/O, no wake-up, no logging and no caller's code happens while it is
  held. A section leaves these for afterwards: first the wake-ups, so that no caller
  sleeps while a connection is being closed, then the deferred work. This is done also
  when a section fails: it may have granted slots before. What waits for the database
  is left to the next caller where it cannot be awaited (in a finaliser beside an event
  loop).
* A finaliser or a signal handler may call in the middle of anything, also of a section
  of the same thread. The lock is re-entrant, so that such a call cannot deadlock; the
  busy flag tells it that it must not touch anything. It puts its work into the inbox.
* What is in the inbox is done when a section begins, and again before it ends. Each
  piece of work leaves the inbox when it is done, so an interrupt loses none: it can be
  done twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from threading import get_ident
from typing import Any, NoReturn, TypeVar

from ..checks import BadState
from ..threads import make_lock

_T = TypeVar("_T")


class PoolLock:
    """A re-entrant lock, an inbox, and what is done after the lock.

    :param clock: seconds on a steadily rising scale.
    :param can_wait: tells if the caller may wait for the database.
    """

    def __init__(
        self, clock: Callable[[], float], can_wait: Callable[[], bool]
    ) -> None:
        self.clock = clock
        self._can_wait = can_wait
        self.charge_borrowed: Callable[[], None] = lambda: None
        self.reset()

    def reset(self) -> None:
        """Be as new, also in the child of a fork."""
        #: The lock itself, to read or note something, also in the middle of a section.
        self.mutex = make_lock()
        #: The thread that is in a section, None if none is.
        self.busy_in: int | None = None
        #: What is to be done in a section, this one or the next; called with the time.
        self.inbox: deque[Callable[[float], object]] = deque()
        #: What :mod:`.warm` has lent. A section has it charged before it does anything.
        self.borrowed: dict[Any, None] = {}
        #: How many may be lent until the next section, -1 if it was not counted since.
        self.lendable = -1
        #: What is to be done after the lock: callers to wake, and what takes time.
        self.wake_ups: deque[Callable[[], object]] = deque()
        self.deferred: deque[Callable[[], object]] = deque()

    def run(self, transition: Callable[..., _T], *args: Any) -> _T:
        """Call a function in a section, with the time as its last argument.

        No context manager: an exception that is thrown into the thread as the block of
        one is entered or left keeps it open for as long as the traceback lives.
        """
        if self.busy_in is not None and self.in_section():
            refuse_inner_call()
        try:
            try:
                with self.mutex:
                    self.busy_in = get_ident()
                    try:
                        self.lendable = -1  # first, see `borrow`
                        now = self.clock()
                        if self.inbox or self.borrowed:
                            self._empty_inbox(now)
                        result = transition(*args, now)
                        if self.inbox:
                            self._empty_inbox(now)
                    finally:
                        self.busy_in = None
            finally:
                if self.wake_ups or self.deferred or self.inbox:
                    self.flush()
        except BaseException:  # an interrupt, as flush() was called
            if self.wake_ups or self.inbox:
                self.flush()
            raise
        return result

    def in_section(self) -> bool:
        """Tell if this thread is in a section, so in a finaliser or a handler."""
        return self.busy_in == get_ident()

    def visit(self) -> None:
        """Begin and end a section, which does what is in the inbox."""
        if not self.in_section():
            self.run(_do_nothing)

    def do(self, work: Callable[[float], object]) -> None:
        """Do something in a section: now, or in the one that this call interrupts."""
        self.inbox.append(work)
        self.visit()

    def _empty_inbox(self, now: float) -> None:
        inbox = self.inbox
        if self.borrowed:
            self.charge_borrowed()
        while inbox:
            inbox[0](now)
            inbox.popleft()

    # -- after the lock -------------------------------------------------------------

    def flush(self) -> None:
        """Do what was left to do after the lock."""
        try:
            while True:
                while self.wake_ups:
                    self._wake_next()
                if self.inbox:
                    self.visit()
                if not self.deferred or not self._can_wait():
                    return
                self._do_next()
        except BaseException:
            self.flush()
            raise

    def _wake_next(self) -> None:
        """Wake one caller; after an interrupt it is woken again, which does no harm."""
        taken: deque[Callable[[], object]] = deque()
        try:
            # Moved by one call: an interrupt as popleft() returns would lose it.
            taken.extend(islice(iter(self.wake_ups.popleft, None), 1))
            taken[0]()
        except IndexError:
            if taken:
                raise
            # else another thread was faster
        except BaseException:
            self.wake_ups.extend(taken)
            raise

    def _do_next(self) -> None:
        try:
            work = self.deferred.popleft()
        except IndexError:
            return  # another thread was faster
        work()


def _do_nothing(now: float) -> None:
    """The inbox is emptied all the same."""


def refuse_inner_call(why: str = "this call is not possible there") -> NoReturn:
    """Raise for a call in the middle of a section of the same thread."""
    raise BadState(
        "a signal handler or a finaliser has called the pool in the middle of the "
        f"pool's own bookkeeping, on the same thread, and {why}: let the handler set a "
        "flag and do the work outside of it, or give it an engine of its own"
    )
