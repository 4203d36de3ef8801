"""How a caller sleeps until it is woken: a thread's way, and a task's.

A waiter may be woken early, or twice. The caller looks at its checkout to learn what
happened.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol, TypeAlias

from sqlalchemy import exc
from sqlalchemy.util import await_only, greenlet_spawn

from ..diagnosis import TaskHere, ThreadHere
from ..threads import start_thread
from .sqlalchemy_private import in_greenlet


class Owner(Protocol):
    """Whose waiter it is."""

    #: It has gone while something is being done for it.
    orphaned: bool

    def abandon(self) -> None:
        """Called when the caller cannot be woken any more."""

    def adopt(self, outcome: Any) -> None:
        """Called with what was done for an orphan; None if that failed."""


class ThreadWaiter:
    """Blocks the calling thread.

    A bare lock, taken by its owner and released to wake it: a third of the cost
    of :class:`threading.Event`, which builds a condition on top of one. Looked up
    in :mod:`threading` at each use, so that monkey-patching reaches it.
    """

    __slots__ = ("_lock",)

    #: Tells who is asking.
    here: ClassVar[Any] = ThreadHere()
    #: A caller may be kept from everything else for a moment.
    may_block: ClassVar[bool] = True

    def __init__(self, owner: Owner | None) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, seconds: float | None) -> None:
        """Sleep until :meth:`wake` was called or `seconds` have passed."""
        if seconds is None:
            self._lock.acquire()
        elif seconds > 0:
            self._lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """End the sleep, now or when it begins. May be called from any thread."""
        try:
            self._lock.release()
        except RuntimeError:
            pass  # it is woken already

    @staticmethod
    def can_wait() -> bool:
        """Tell if the caller is where a database's answer can be waited for."""
        return True

    @staticmethod
    def run_through(function: Callable[[], Any], owner: Owner) -> Any:
        """Run something that ends though the caller is cancelled, an orphan then."""
        return function()  # a thread cannot be cancelled

    @staticmethod
    def run_apart(function: Callable[[], object]) -> None:
        """Run something apart from the caller and its context."""
        start_thread(function, "sqla_fairpool-min_idle")


class TaskWaiter:
    """Suspends the calling task, inside SQLAlchemy's greenlet.

    A bare future and a timer: ``asyncio.wait_for`` and conditions have lost wake-ups,
    or swallowed cancellations, when both came in the same moment (psycopg's issues 509,
    1275, 1345 and 1401). Here a cancellation leaves :meth:`wait` as it came. Everything
    but :meth:`wake` happens in the thread of the loop.
    """

    __slots__ = ("_future", "_loop", "_owner")

    here: ClassVar[Any] = TaskHere()
    may_block: ClassVar[bool] = False

    def __init__(self, owner: Owner | None) -> None:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise exc.MissingGreenlet(
                "a checkout from an asyncio pool would have to wait, and no event "
                "loop is running here"
            ) from None
        self._future = self._loop.create_future()
        self._owner = owner

    def wait(self, seconds: float | None) -> None:
        if seconds is None or seconds > 0:
            await_only(self._sleep(seconds))

    async def _sleep(self, seconds: float | None) -> None:
        timer = None
        if seconds is not None:
            timer = self._loop.call_later(seconds, self._ring)
        try:
            await self._future
        finally:
            if timer is not None:
                timer.cancel()
        self._future = self._loop.create_future()

    def _ring(self) -> None:
        try:
            if not self._future.done():
                self._future.set_result(None)
        except asyncio.InvalidStateError:
            pass  # a finaliser in between was faster

    def wake(self) -> None:
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            self._ring()  # a third of the cost of the way below
            return
        try:
            self._loop.call_soon_threadsafe(self._ring)
        except RuntimeError:  # the loop is closed, so no task wakes up there
            if self._owner is not None:
                self._owner.abandon()

    @staticmethod
    def can_wait() -> bool:
        return in_greenlet()

    @staticmethod
    def run_through(function: Callable[[], Any], owner: Owner) -> Any:
        if not in_greenlet():
            return function()
        running: asyncio.Task[Any] = asyncio.ensure_future(greenlet_spawn(function))
        try:
            return await_only(asyncio.shield(running))
        except BaseException as error:
            failed = running.done() and (
                running.cancelled() or running.exception() is error
            )
            if not failed:
                owner.orphaned = True
                _running_apart.add(running)
                running.add_done_callback(partial(_adopt, owner))
            raise

    @staticmethod
    def run_apart(function: Callable[[], object]) -> None:
        loop = asyncio.get_running_loop()
        running = contextvars.Context().run(loop.create_task, greenlet_spawn(function))
        _running_apart.add(running)
        running.add_done_callback(_running_apart.discard)


# A loop refers to its tasks weakly.
_running_apart: set[asyncio.Task[Any]] = set()


def _adopt(owner: Owner, running: asyncio.Task[Any]) -> None:
    _running_apart.discard(running)
    failed = running.cancelled() or running.exception() is not None
    owner.adopt(None if failed else running.result())


Waiter: TypeAlias = ThreadWaiter | TaskWaiter
