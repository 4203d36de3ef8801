"""The tag of a block of code, and of what runs from here on: ``tag`` and ``set_tag``.

A context variable holds the blocks that have begun and not ended, the innermost last.
The pool reads it at a checkout for which no option of an engine or a connection says a
tag. (Those options are :mod:`.pool.execution_options`.)

Rules of this file:

* A block takes out its own entry, wherever that stands. No tokens of the context
  variable: blocks of generators end in any order, and in other contexts than they began
  in.
* Where a block ends in a copy of its context, as in the task in which a loop ends an
  abandoned generator, its entry in the original is marked as ended. Not always, because
  a task keeps the tag of the block in which it was created, though the block ends.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

from .checks import BadArgument, validate_tag, validate_timeout

__all__ = ["set_tag", "tag"]

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(slots=True, eq=False)
class _Block:
    """One block that has begun."""

    #: The object with which it was written.
    source: object = None
    timeout: float | None = None
    #: The generator or coroutine in which it is written, None in a function.
    frame: int | None = None
    #: The thread or task in which it began.
    caller: int = 0
    #: It ended in another context than it began in, where its entry is left.
    has_ended: bool = False


#: What a block stands for in one context: its tag, which `set_tag` replaces.
_Entry: TypeAlias = tuple[str | None, _Block]

#: Stands for the code around all blocks, to which `set_tag` may give a tag.
_AROUND = _Block()

#: The code of what is suspended, so that a block in it may end in any order.
_SUSPENDABLE = (
    inspect.CO_GENERATOR
    | inspect.CO_ASYNC_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ITERABLE_COROUTINE
)

_blocks: ContextVar[tuple[_Entry, ...]] = ContextVar("sqla_fairpool_blocks", default=())

#: The blocks of the context, for most callers none; the pool's first look.
blocks = _blocks.get


def context_tag() -> str | None:
    """Return the tag of the innermost ``with tag(...)``, None without."""
    for name, block in reversed(blocks()):
        if not block.has_ended:
            return name
    return None


def context_timeout() -> float | None:
    """Return how long the blocks let a checkout wait, None if they do not say."""
    for _, block in reversed(blocks()):
        if not block.has_ended and block.timeout is not None:
            return block.timeout
    return None


class tag:  # noqa: N801  (read as a verb: with tag(...))
    """Tag the checkouts of a block, or of a function, that carry no tag.

    ::

        with sqla_fairpool.tag("reports"):
            with engine.connect() as connection:
                ...


        @sqla_fairpool.tag("reports")
        async def report(session): ...

    Follows asyncio tasks and ``asyncio.to_thread``; a thread that is started in
    the block begins without it. An engine's or a connection's option wins. One object
    may be used by many threads and tasks, and by one of them for several blocks.

    :param name: the tag, a non-empty string of at most 128 printable characters.
    :param timeout: seconds that each checkout in the block may wait, instead of the
      pool's ``timeout``. Default: as outside of the block. The execution option
      ``fairpool_timeout`` of an engine or a connection wins.
    :raises sqlalchemy.exc.ArgumentError: for a bad value, naming it.
    """

    __slots__ = ("_name", "_open", "_timeout")

    def __init__(self, name: str, *, timeout: float | None = None) -> None:
        self._name = validate_tag(name)
        if timeout is not None:
            timeout = validate_timeout(timeout, "timeout")
        self._timeout = timeout
        # The open blocks by where they are written: a generator or coroutine, None for
        # functions. None as well instead of a block where several are open at once.
        self._open: dict[int | None, _Block | None] = {}

    def __enter__(self) -> None:
        outer, code = blocks(), sys._getframe(1)
        frame = id(code) if code.f_code.co_flags & _SUSPENDABLE else None
        block = _Block(self, self._timeout, frame, _here())
        try:
            self._open[frame] = None if frame in self._open else block
            _blocks.set((*_not_ended(outer), (self._name, block)))
        except BaseException:  # an interrupt: the block is not entered
            _blocks.set(outer)
            raise

    def __exit__(self, *exc_info: object) -> None:
        # Without calls, comprehensions among them, until the entry is out: a handler
        # of a signal is more likely to run, and to raise, in a function that begins.
        entries, code = blocks(), sys._getframe(1)
        frame = id(code) if code.f_code.co_flags & _SUSPENDABLE else None
        # Which of this object's blocks ends: that of the generator; or the innermost
        # of the context; or the only one there is, which is in another context.
        innermost = alike = None
        for _, block in entries:
            if block.source is self:
                innermost = block
                if block.frame == frame:
                    alike = block
        exact = None if frame is None else self._open.get(frame)
        ended = exact or alike or innermost
        if ended is None and len(self._open) == 1:
            (ended,) = self._open.values()
        if ended is None:
            return
        left = []
        for entry in entries:
            if entry[1] is not ended:
                left.append(entry)
        _blocks.set(tuple(left))
        is_only = self._open.get(ended.frame) is ended
        if is_only or ended.frame is not None:
            self._open.pop(ended.frame, None)
        if is_only and (len(left) == len(entries) or ended.caller != _here()):
            ended.has_ended = True

    def __call__(self, function: _F) -> _F:
        """Tag every call of `function`, which may be a coroutine function."""
        block = functools.partial(tag, self._name, timeout=self._timeout)
        is_generator = inspect.isgeneratorfunction(function)
        if is_generator or inspect.isasyncgenfunction(function):
            # Its body runs in pieces, and what runs between them would be tagged.
            raise BadArgument(
                f"a generator function cannot be tagged: {function!r}; "
                f"write `with tag({self._name!r}):` inside, around what checks out"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def tagged(*args: Any, **kwargs: Any) -> Any:
                with block():
                    return await function(*args, **kwargs)
        else:

            @functools.wraps(function)
            def tagged(*args: Any, **kwargs: Any) -> Any:
                with block():
                    return function(*args, **kwargs)

        return cast(_F, tagged)


def set_tag(name: str | None) -> None:
    """Tag what the current thread or task checks out from now on.

    For frameworks that call one function when a request or a job begins and
    another one when it ends, where no block could be written. Same reach as
    :class:`tag`. In a block it lasts until the block ends.

    :param name: the tag, None for none again.
    :raises sqlalchemy.exc.ArgumentError: if it cannot be one.
    """
    name = None if name is None else validate_tag(name)
    entries = _not_ended(blocks())
    block = entries[-1][1] if entries else _AROUND
    if name is None and block is _AROUND:
        _blocks.set(())
    else:
        _blocks.set((*entries[:-1], (name, block)))


@contextmanager
def outside_of_blocks() -> Iterator[None]:
    """Run what is in the block as if no ``with tag(...)`` were around it.

    That is how connections are opened: tasks and callbacks that the driver starts for
    a connection live as long as it does, and serve all tags that have it in turn.
    """
    entries = blocks()
    _blocks.set(())
    try:
        yield
    finally:
        _blocks.set(entries)


def _not_ended(entries: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
    """Return the entries of those blocks that have not ended elsewhere."""
    for _, block in entries:
        if block.has_ended:
            return tuple([entry for entry in entries if not entry[1].has_ended])
    return entries


def _here() -> int:
    """Tell threads and tasks apart."""
    # None where no loop runs, whereas asyncio.current_task() raises there.
    loop = asyncio._get_running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    return threading.get_ident() if task is None else id(task)
