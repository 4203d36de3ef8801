"""Who asks for a connection, a thread or a task, and where in the code it is.

A caller is known by a weak reference, so that nobody is kept alive for having asked,
and by identity, so that a thread that gets a finished one's number is not taken
for it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import sysconfig
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any, TypeAlias

import sqlalchemy

__all__ = [
    "Caller",
    "Place",
    "TaskHere",
    "ThreadHere",
    "coroutines_of",
    "describe_caller",
    "describe_place",
    "describe_stack",
    "frames_of",
    "has_ended",
    "places",
    "users_level",
    "users_place",
]

#: A weak reference to a :class:`threading.Thread` or an :class:`asyncio.Task`.
Caller: TypeAlias = "weakref.ref[Any]"

#: A place in the code, cheap to note: the code, and how far it has come. No frame:
#: that would keep its variables, and the connection among them.
Place: TypeAlias = tuple[CodeType, int]


class _Thread(weakref.ref[threading.Thread]):
    """A thread, whose name outlives it."""

    __slots__ = ("name",)

    name: str


class ThreadHere(threading.local):
    """Tells who is asking, among threads."""

    def __init__(self) -> None:
        thread = threading.current_thread()
        #: The current thread.
        self.caller: Caller | None = _Thread(thread)
        setattr(self.caller, "name", thread.name)  # noqa: B010

    def frames(self) -> Iterator[FrameType]:
        """Yield the frames that led to the caller of this method, innermost first."""
        return _up(sys._getframe(1))


class TaskHere:
    """Tells who is asking, among tasks."""

    @property
    def caller(self) -> Caller | None:
        """The current task, None outside of one."""
        try:
            task = asyncio.current_task()
        except RuntimeError:
            return None  # no loop is running here
        # The same object for the same task, for as long as anybody has it.
        return None if task is None else weakref.ref(task)

    def frames(self) -> Iterator[FrameType]:
        """Yield the frames that led to the caller of this method, innermost first.

        SQLAlchemy runs its synchronous code in a greenlet below the coroutine.
        """
        from greenlet import getcurrent

        yield from _up(sys._getframe(1))
        parent = getcurrent().parent
        if parent is not None:
            yield from _up(parent.gr_frame)


def _up(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


# -- what somebody else is doing ------------------------------------------------------


def coroutines_of(task: asyncio.Task[Any]) -> Iterator[Any]:
    """Yield the coroutines that a task consists of, the innermost last."""
    coroutine: Any = task.get_coro()
    while coroutine is not None:
        yield coroutine
        coroutine = getattr(coroutine, "cr_await", None)


def frames_of(caller: Caller | None) -> list[FrameType]:
    """Return the frames in which a caller is at this moment, innermost first."""
    someone = caller() if caller is not None else None
    if someone is None or has_ended(caller):
        return []  # another thread may have its number by now
    if isinstance(caller, _Thread):
        return list(_up(sys._current_frames().get(someone.ident or 0)))
    found = [getattr(c, "cr_frame", None) for c in coroutines_of(someone)]
    return [frame for frame in reversed(found) if frame is not None]


# -- places --------------------------------------------------------------------------


def places(frames: Iterable[FrameType]) -> tuple[Place, ...]:
    """Note where frames are."""
    return tuple([(frame.f_code, frame.f_lasti) for frame in frames])


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_SQLALCHEMY = os.path.dirname(os.path.abspath(sqlalchemy.__file__)) + os.sep
_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = ("site-packages", "dist-packages")


def _is_users(code: CodeType) -> bool:
    """Tell if code is neither ours, SQLAlchemy's nor the standard library's."""
    name = code.co_filename
    # The second are functions that SQLAlchemy generates, as a decorator's.
    if name.startswith("<frozen ") or (name[0] == "<" and "sqlalchemy." in name):
        return False
    if name.startswith((_HERE, _SQLALCHEMY)):
        return False
    return not name.startswith(_LIBRARY) or any(part in name for part in _INSTALLED)


def users_place(stack: Sequence[Place]) -> Place | None:
    """Return the innermost place in the user's code, None without a stack."""
    for place in stack:
        if _is_users(place[0]):
            return place
    return stack[0] if stack else None


def users_level() -> int:
    """Return the ``stacklevel`` with which a warning of the caller names the user's
    line.
    """
    for level, frame in enumerate(_up(sys._getframe(1)), 1):
        generated = frame.f_code.co_filename.startswith("<")  # SQLAlchemy's wrappers
        if _is_users(frame.f_code) and not generated:
            return level
    return 1


def line_of(place: Place) -> int:
    """Return the line number of a place."""
    code, offset = place
    line = code.co_firstlineno
    for start, end, number in code.co_lines():
        if start <= offset < end and number is not None:
            line = number
    return line


#: Parts of a path that are shown; enough to know the file, short enough for a line.
_PARTS_SHOWN = 3


def describe_place(place: Place | None) -> str | None:
    """Return ``scrapers/layer2/fetch.py:41 in parse``."""
    if place is None:
        return None
    code = place[0]
    parts = code.co_filename.replace(os.sep, "/").split("/")
    path = "/".join(parts[-_PARTS_SHOWN:])
    return f"{path}:{line_of(place)} in {code.co_name}"


def describe_stack(stack: Sequence[Place]) -> str:
    """Return lines for a log, as a traceback has them, down to the user's last.

    Empty without a stack.
    """
    last = users_place(stack)
    if last is None:
        return ""
    users = list(stack)[stack.index(last) :]
    lines = [
        f'\n  File "{code.co_filename}", line {line_of((code, offset))}, in '
        f"{code.co_name}"
        for code, offset in reversed(users)
    ]
    return "\nchecked out at (most recent call last):" + "".join(lines)


def has_ended(caller: Caller | None) -> bool:
    """Tell if a caller is no more, so that nobody will return what he took."""
    if caller is None:
        return False
    someone = caller()
    if someone is None:
        return True
    # By what refers to it: under gevent the main thread is no threading.Thread.
    return not someone.is_alive() if isinstance(caller, _Thread) else someone.done()


# -- in words ------------------------------------------------------------------------


def describe_caller(caller: Caller | None) -> str:
    """Return ``thread 'worker-3'`` or ``task 'fetch'``."""
    if caller is None:
        return "a caller outside of any task"
    someone = caller()
    if isinstance(caller, _Thread):
        return f"thread {caller.name!r}" + (" (ended)" if has_ended(caller) else "")
    if someone is None:
        return "a task that has ended"
    return f"task {someone.get_name()!r}" + (" (ended)" if has_ended(caller) else "")
