"""Why a caller waits: what a time-out, a leak report and the log can tell.

Here is who asks for a connection, a thread or a task, and where in the code it is. A
caller is known by a weak reference, which keeps nothing alive, and by identity: a new
thread may have the number of one that has ended.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import sysconfig
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType, FrameType
from typing import Any, TypeAlias

import sqlalchemy

#: A weak reference to a :class:`threading.Thread` or an :class:`asyncio.Task`.
Caller: TypeAlias = "weakref.ref[Any]"

#: A location in the code, cheap to note: the code, and the offset of the instruction.
#: No frame, which would keep its variables alive, and the connection among them.
Location: TypeAlias = tuple[CodeType, int]


# -- who ------------------------------------------------------------------------------


class _Thread(weakref.ref[threading.Thread]):
    """A thread, whose name outlives it."""

    __slots__ = ("name",)

    name: str


class ThreadHere(threading.local):
    """The current thread. An instance serves all threads."""

    def __init__(self) -> None:
        reference = _Thread(threading.current_thread())
        reference.name = threading.current_thread().name
        hash(reference)  # of a dead one it is known only if it was asked for before
        self.caller: Caller | None = reference

    def frames(self) -> Iterator[FrameType]:
        """Yield the frames that led to the caller of this method, innermost first."""
        return _up(sys._getframe(1))


class TaskHere:
    """The current task."""

    @property
    def caller(self) -> Caller | None:
        """The task, None outside of one."""
        try:
            task = asyncio.current_task()
        except RuntimeError:
            return None  # no loop is running here
        # The same reference for the same task, for as long as that is referred to.
        if task is None:
            return None
        reference = weakref.ref(task)
        hash(reference)  # as that of a thread
        return reference

    def frames(self) -> Iterator[FrameType]:
        """Yield the frames that led to the caller of this method, innermost first."""
        from greenlet import getcurrent

        yield from _up(sys._getframe(1))
        # SQLAlchemy runs its synchronous code in a greenlet below the coroutine.
        parent, task = getcurrent().parent, asyncio.current_task()
        coroutine = task and task.get_coro()  # or the generator of a types.coroutine
        outermost = getattr(coroutine, "cr_frame", getattr(coroutine, "gi_frame", None))
        for frame in _up(parent.gr_frame if parent else None):
            yield frame
            if frame is outermost:
                return  # what follows runs the loop, and asks for nothing


def has_ended(caller: Caller | None) -> bool:
    """Tell if a caller has ended, so that it returns nothing any more."""
    if caller is None:
        return False
    referent = caller()
    if referent is None:
        return True
    # By what refers to it: under gevent the main thread is no threading.Thread.
    is_thread = isinstance(caller, _Thread)
    return not referent.is_alive() if is_thread else referent.done()


def describe_caller(caller: Caller | None) -> str:
    """Return ``thread 'worker-3'`` or ``task 'fetch'``."""
    if caller is None:
        return "a caller outside of any task"
    ended = " (ended)" if has_ended(caller) else ""
    if isinstance(caller, _Thread):
        return f"thread {caller.name!r}{ended}"
    task = caller()
    return f"task {task.get_name()!r}{ended}" if task else "a task that has ended"


# -- where ----------------------------------------------------------------------------


def _up(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def frames_of(caller: Caller | None) -> list[FrameType]:
    """Return the frames in which a caller is at this moment, innermost first."""
    referent = None if caller is None else caller()
    if referent is None or has_ended(caller):
        return []  # another thread may have its number by now
    if isinstance(caller, _Thread):
        return list(_up(sys._current_frames().get(referent.ident or 0)))
    coroutine, frames = referent.get_coro(), list[Any]()
    while coroutine is not None:
        frames.insert(0, getattr(coroutine, "cr_frame", None))
        coroutine = getattr(coroutine, "cr_await", None)
    return list(filter(None, frames))


def locations(frames: Iterable[FrameType]) -> tuple[Location, ...]:
    """Note where frames are."""
    return tuple([(frame.f_code, frame.f_lasti) for frame in frames])


_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_SQLALCHEMY = os.path.dirname(os.path.abspath(sqlalchemy.__file__)) + os.sep
_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_SCRIPTS = sysconfig.get_path("scripts") + os.sep
_PACKAGES = ("site-packages", "dist-packages")
# Code without a file that libraries make: SQLAlchemy's and attrs' say "generated".
_MADE = re.compile(r"<(frozen |string>|.*(generated|sqlalchemy\.))")

#: The ranks of code, the user's first.
_OWN, _PROMPT, _COMMAND, _INSTALLED, _OTHER = range(5)


def _rank(code: CodeType) -> int:
    """Tell whose code it is: what a message shows is of the lowest rank there is."""
    name = code.co_filename
    if name.startswith((_HERE, _SQLALCHEMY)):
        return _OTHER
    if any(part in name for part in _PACKAGES) or name.startswith(_SCRIPTS):
        return _INSTALLED
    if name.startswith(_LIBRARY):
        return _OTHER
    if not name.startswith("<"):
        return _OWN
    if name == "<string>" and code.co_name == "<module>":
        return _COMMAND  # python -c; a function of that "file" may be a generated one
    return _OTHER if _MADE.match(name) else _PROMPT


def _users_location(stack: Sequence[Location]) -> Location | None:
    """Return the innermost location in the user's own code, None without a stack.

    Where all code is installed, the innermost of that.
    """
    return min(stack, key=lambda location: _rank(location[0]), default=None)


def users_level() -> int:
    """Return the ``stacklevel`` with which a warning names the user's line."""
    ranks = [_rank(frame.f_code) for frame in _up(sys._getframe(1))]
    return 1 + ranks.index(min(ranks))


def _line_of(location: Location) -> int:
    code, offset = location
    lines = [line for start, end, line in code.co_lines() if start <= offset < end]
    return next(filter(None, lines), code.co_firstlineno)


#: Parts of a path that are shown; enough to know the file, short enough for a line.
_PARTS_SHOWN = 3


def describe_location(stack: Sequence[Location], *, own: bool = False) -> str | None:
    """Return ``scrapers/layer2/fetch.py:41 in parse``, the innermost user's code.

    None without a stack. If it has to be `own`, also where only Python's library,
    SQLAlchemy and the pool are on the stack.
    """
    location = _users_location(stack)
    if location is None or (own and _rank(location[0]) == _OTHER):
        return None
    code = location[0]
    path = "/".join(code.co_filename.replace(os.sep, "/").split("/")[-_PARTS_SHOWN:])
    return f"{path}:{_line_of(location)} in {code.co_name}"


def describe_stack(stack: Sequence[Location]) -> str:
    """Return lines for a log, as a traceback has them, down to the user's last.

    Empty without a stack.
    """
    last = _users_location(stack)
    if last is None:
        return ""
    text = "\nchecked out at (most recent call last):"
    for location in reversed(stack[stack.index(last) :]):
        code, line = location[0], _line_of(location)
        text += f'\n  File "{code.co_filename}", line {line}, in {code.co_name}'
    return text


# -- in numbers ------------------------------------------------------------------------

#: Holders named in a message; the others are summed up. Six fit on a line.
HOLDERS_NAMED = 6


def duration(seconds: float) -> str:
    """Return ``0.25s``, ``41s`` or ``12m05s``."""
    if seconds < 60:
        return f"{seconds:.2f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def describe_holders(
    holders: Sequence[tuple[str, int]], elsewhere: Sequence[Any] = ()
) -> str:
    """Return ``held by web=12 jobs=6``, the largest holders first.

    With other processes: ``held by web=12 here, jobs=6 in a.py (host1:4711)``.

    :param elsewhere: :class:`.report.Elsewhere` of these.
    """
    ordered = sorted(holders, key=lambda holder: (-holder[1], holder[0]))
    named = [f"{tag}={in_use}" for tag, in_use in ordered[:HOLDERS_NAMED]]
    if rest := ordered[HOLDERS_NAMED:]:
        named.append(f"and {len(rest)} more tags={sum(n for _, n in rest)}")
    here = " ".join(named)
    if not elsewhere:
        return f"held by {here or 'no tag'}"
    others = [f"{here} here"] if here else []
    others += map(str, elsewhere[:HOLDERS_NAMED])
    if more := elsewhere[HOLDERS_NAMED:]:
        others.append(f"and {sum(one.connections for one in more)} more elsewhere")
    return f"held by {', '.join(others)}"
