"""Can anybody but these callers get at a connection?

The answer is found in the interpreter: from object to object through whatever
refers to it, up to where nothing does but variables of the callers' own functions.
"Yes" whenever that is not certain: what a module, a class, a thread or another task
has, anybody may return.

A step takes some milliseconds per hundred thousand objects of the program, so it is
asked only when everything else says that there is a deadlock.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Collection, Iterable, Sequence
from inspect import CO_OPTIMIZED
from types import CoroutineType, FrameType, ModuleType

from .callers import Caller, frames_of

__all__ = ["held_by_others"]

#: Steps from a connection to the last one who has it, and objects on the way. A
#: session in a context manager's generator in an object in a list is at nine.
_MOST_STEPS = 16
_MOST_OBJECTS = 500

#: Before Python 3.13 (PEP 667) one sees a copy of a function's variables. To it are
#: three references while nobody else looks: the frame's, ours, and the question's.
_IS_A_COPY = sys.version_info < (3, 13)
_REFERENCES = 3

#: Held by who looks. The patience is for a forked child, whose parent may have held it.
_looking = threading.Lock()
_PATIENCE = 1.0

#: What has such an owner is everybody's, or somebody's whom we do not know.
_PUBLIC = (ModuleType, type, threading.Thread, asyncio.Future)


def held_by_others(
    connections: Sequence[object],
    callers: Collection[Caller],
    own_frames: Iterable[FrameType],
) -> bool:
    """Tell if somebody else than `callers` may be able to return a connection.

    :param connections: what the pool has handed out (``PoolProxiedConnection``).
    :param callers: one of them is the current thread or task.
    :param own_frames: that one's frames.
    """
    # One at a time: two that look at each other's frames would tie a knot of them, and
    # of the connections that these have found.
    if not _looking.acquire(timeout=_PATIENCE):
        return True
    try:
        # A coroutine is one of theirs if it runs in one of their frames.
        frames = {id(frame) for caller in callers for frame in frames_of(caller)}
        frames.update(map(id, own_frames))
        found = _owners(connections, frames)
        return found is None or _in_other_threads(found, callers)
    finally:
        _looking.release()


def _owners(
    connections: Sequence[object], frames: Collection[int]
) -> dict[int, object] | None:
    """Return all objects that lead to the connections; None if one is public."""
    found = {id(one): one for one in connections}
    new = list(connections)
    for _ in range(_MOST_STEPS):
        if not new:
            return found
        referrers = gc.get_referrers(*new)
        mine = {id(found), id(new), id(referrers), id(connections)}
        new = []
        mine.add(id(new))
        for one in referrers:
            if id(one) in found or id(one) in mine or isinstance(one, FrameType):
                continue  # variables are looked at by thread
            if isinstance(one, CoroutineType):
                if id(one.cr_frame) in frames:
                    continue
                return None
            if isinstance(one, _PUBLIC):
                return None
            found[id(one)] = one
            new.append(one)
        del referrers
        if len(found) > _MOST_OBJECTS:
            return None
    return None


def _in_other_threads(found: dict[int, object], callers: Collection[Caller]) -> bool:
    """Tell if another thread has one of the objects in a variable."""
    threads = [caller() for caller in callers]
    idents = {getattr(thread, "ident", None) for thread in threads}
    idents.add(threading.get_ident())
    # No frame in a variable: if it were this one, that would be a cycle, and keep the
    # connections until the collector comes.
    return any(
        _in_frames(found, sys._current_frames().get(ident))
        for ident in list(sys._current_frames())
        if ident not in idents
    )


def _in_frames(found: dict[int, object], frame: FrameType | None) -> bool:
    while frame is not None:
        variables = frame.f_locals
        there = any(id(value) in found for value in list(variables.values()))
        copied = _IS_A_COPY and frame.f_code.co_flags & CO_OPTIMIZED
        if copied and sys.getrefcount(variables) <= _REFERENCES:
            # The frame keeps the copy, and with it what its thread drops. Unless that
            # uses it at this moment it is not needed: it is made anew.
            variables.clear()
        # No more of others' frames and variables is kept than the next step needs.
        frame = None if there else frame.f_back
        del variables
        if there:
            return True
    return False
