"""Who is asking: from execution options and the context to the current tag.

The pool is asked for a connection without an argument, so what options say travels
in a context variable, as a :class:`Request`. The pool takes it out of there before it
does anything else, so that nothing else sees it: not a task that the driver starts
while it connects, not another pool that a listener uses. SQLAlchemy reports options as
they are set, to the dialect of the engine:

* an engine's: its ``raw_connection()``, the public method through which every
  :class:`~sqlalchemy.engine.Connection` is filled, is wrapped on that engine, so
  that it makes the request. Engines derived from it report themselves in the same way.
* a connection's: it has been checked out by then. What happens is the pool's
  decision, so the pool's function is called. SQLAlchemy has stored the options by
  then as well, so they are taken back if it refuses.

Both are set on one dialect object, which belongs to one engine and those derived
from it; nothing else in the process is touched.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

from sqlalchemy import exc
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.pool import PoolProxiedConnection

from .options import validate_tag, validate_timeout
from .pool import sqlalchemy_private

__all__ = [
    "TIMEOUT_OPTION",
    "Request",
    "blocks",
    "context_tag",
    "context_timeout",
    "follow",
    "make_request",
    "outside_of_blocks",
    "requested",
    "requesting",
    "set_tag",
    "tag",
]

#: The execution option that says how long a checkout may wait.
TIMEOUT_OPTION = "fairpool_timeout"

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Request:
    """What options say about one checkout, None where they say nothing."""

    #: That of the pool which is meant; another pool takes no notice.
    dialect: Dialect
    tag: str | None
    timeout: float | None
    #: It is made for a connection, whose options go before those of its engine.
    is_connections: bool = False


class _Block:
    """One block that has begun."""

    __slots__ = ("caller", "frame", "has_ended", "source", "timeout")

    def __init__(
        self,
        source: object,
        timeout: float | None,
        frame: int | None = None,
        caller: int = 0,
    ) -> None:
        #: The object with which it was written.
        self.source = source
        self.timeout = timeout
        #: The generator or coroutine in which it is written, None in a function.
        self.frame = frame
        #: The thread or task in which it began.
        self.caller = caller
        #: It ended in another context than it began in, where it still stands.
        self.has_ended = False


#: Stands for the code around all blocks, to which ``set_tag`` may give a tag.
_AROUND = _Block(None, None)

#: What is suspended, so that a block in it may end in any order and anywhere.
_SUSPENDABLE = (
    inspect.CO_GENERATOR
    | inspect.CO_ASYNC_GENERATOR
    | inspect.CO_COROUTINE
    | inspect.CO_ITERABLE_COROUTINE
)


#: What a block stands for in one context, its tag; `set_tag` replaces it.
_Entry: TypeAlias = tuple[str | None, _Block]


def _here() -> int:
    """Tell threads and tasks apart."""
    # None where no loop runs, whereas asyncio.current_task() raises there.
    loop = asyncio._get_running_loop()
    task = None if loop is None else asyncio.current_task(loop)
    return threading.get_ident() if task is None else id(task)


# Set for the few instructions between who has options and the pool.
_request: ContextVar[Request | None] = ContextVar("sqla_fairpool_request", default=None)
# The blocks that have begun and not ended in a context, the innermost last.
_blocks: ContextVar[tuple[_Entry, ...]] = ContextVar("sqla_fairpool_blocks", default=())

#: The request of the checkout that begins; first read by every checkout.
requested = _request.get
#: Make a request, or with None take it back.
make_request = _request.set

#: The blocks in force, empty for most; first read by a checkout without a request.
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


#: What is set on a dialect, to recognise it when a pool is recreated.
_MARK = "_sqla_fairpool_tag_option"

#: What is set on an engine or a connection: those of its options that were accepted.
_ACCEPTED = "_sqla_fairpool_accepted"


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
        self._timeout = (
            None if timeout is None else validate_timeout(timeout, "timeout")
        )
        # The open blocks by where they are written: a generator or coroutine, None for
        # functions. None as well instead of a block where several are open at once.
        self._open: dict[int | None, _Block | None] = {}

    # A block takes out its own entry, wherever that stands. No tokens: blocks of
    # generators end in any order, and in other contexts than they began in. Where one
    # ends in a copy of its context, in the task in which a loop ends an abandoned
    # generator say, the entry in the original is marked. Not always, because a task
    # keeps the tag of the block in which it was created, though the block ends.

    def __enter__(self) -> None:
        outer, caller = blocks(), sys._getframe(1)
        frame = id(caller) if caller.f_code.co_flags & _SUSPENDABLE else None
        block = _Block(self, self._timeout, frame, _here())
        try:
            self._open[frame] = None if frame in self._open else block
            _blocks.set((*_open(outer), (self._name, block)))
        except BaseException:  # an interrupt: the block is not entered
            _blocks.set(outer)
            raise

    def __exit__(self, *exc_info: object) -> None:
        # Without calls, comprehensions among them, until the entry is out: a handler
        # of a signal is more likely to run, and to raise, in a function that begins.
        entries, caller = blocks(), sys._getframe(1)
        frame = id(caller) if caller.f_code.co_flags & _SUSPENDABLE else None
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
        name, timeout = self._name, self._timeout
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(
            function
        ):
            # Its body runs in pieces, between which the tag would be everybody's.
            raise exc.ArgumentError(
                f"a generator function cannot be tagged: {function!r}; "
                f"write `with tag({name!r}):` inside, around what checks out"
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def tagged(*args: Any, **kwargs: Any) -> Any:
                with tag(name, timeout=timeout):
                    return await function(*args, **kwargs)
        else:

            @functools.wraps(function)
            def tagged(*args: Any, **kwargs: Any) -> Any:
                with tag(name, timeout=timeout):
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
    entries = _open(blocks())
    block = entries[-1][1] if entries else _AROUND
    if name is None and block is _AROUND:
        _blocks.set(())
    else:
        _blocks.set((*entries[:-1], (name, block)))


@contextmanager
def outside_of_blocks() -> Iterator[None]:
    """Run what is in the block as if no ``with tag(...)`` were around it.

    That is how connections are opened: what the driver starts for one, tasks and
    callbacks, lives as long as it does, and serves whichever tag has it then.
    """
    entries = blocks()
    _blocks.set(())
    try:
        yield
    finally:
        _blocks.set(entries)


def _open(entries: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
    """Return the entries of those blocks that have not ended elsewhere."""
    for _, block in entries:
        if block.has_ended:
            return tuple([entry for entry in entries if not entry[1].has_ended])
    return entries


@contextmanager
def requesting(request: Request) -> Iterator[None]:
    """Let the checkout in the block be that of a connection with options of its own."""
    outer = requested()
    make_request(request)
    try:
        yield
    finally:
        make_request(outer)


def follow(
    dialect: Dialect, option: str, retag: Callable[[Connection, str | None], None]
) -> bool:
    """Watch the options of a dialect's engines and connections: tag and time-out.

    Does so once, however many pools the dialect gets in turn; tells if this was
    the first time.

    :param option: the execution option that carries the tag.
    :param retag: called when an option is set on a connection, with the connection
      and its tag. What it raises refuses the options.
    """
    seen = getattr(dialect, _MARK, None)
    if seen == option:
        return False
    hooks = _Hooks(dialect, option, retag)
    # Set by name: to the type checker they are methods, here they are hooks.
    for hook in (
        hooks.set_engine_execution_options,
        hooks.set_connection_execution_options,
    ):
        setattr(dialect, hook.__name__, hook)
    setattr(dialect, _MARK, option)
    return seen is None


class _Hooks:
    """What a dialect does, from now on, when options are set."""

    def __init__(
        self,
        dialect: Dialect,
        option: str,
        retag: Callable[[Connection, str | None], None],
    ) -> None:
        self._option = option
        self._retag = retag
        self._apply_to_engine = dialect.set_engine_execution_options
        self._apply = dialect.set_connection_execution_options

    def set_engine_execution_options(
        self, engine: Engine, opts: Mapping[str, Any]
    ) -> None:
        # All its options, not only the new ones: a derived engine has its tag
        # from its parent and reports only what it adds.
        options = engine.get_execution_options()
        try:
            name, timeout = self._read(options)
        except exc.ArgumentError:
            without = {key: options[key] for key in options if key not in opts}
            sqlalchemy_private.set_options(
                engine, vars(engine).get(_ACCEPTED, type(options)(without))
            )
            raise
        vars(engine)[_ACCEPTED] = options
        if name is not None or timeout is not None:
            _tag_engine(engine, name, timeout)
        self._apply_to_engine(engine, opts)

    def set_connection_execution_options(
        self, connection: Connection, opts: Mapping[str, Any]
    ) -> None:
        before = accepted = _accepted_of(connection)
        ours = {key: opts[key] for key in (self._option, TIMEOUT_OPTION) if key in opts}
        try:
            if ours:
                if self._option in ours:
                    validate_tag(ours[self._option], self._option)  # None says nothing
                name, _ = self._read(before.union(ours))
                vars(connection)[_ACCEPTED] = before.union(ours)
                sqlalchemy_private.check_out_by(connection, self._check_out)
                self._retag(connection, name)
                accepted = before.union(ours)
            self._apply(connection, opts)
        except BaseException:
            if connection.invalidated:
                accepted = before  # there is nothing of which they could be true
            vars(connection)[_ACCEPTED] = accepted
            sqlalchemy_private.set_options(connection, accepted)
            raise
        vars(connection)[_ACCEPTED] = before.union(opts)

    def _check_out(
        self, connection: Connection, check_out: Callable[[], PoolProxiedConnection]
    ) -> PoolProxiedConnection:
        """Check out again for a connection that has none, and apply its options.

        SQLAlchemy does not apply them: a connection that was lost, or given back for
        another tag, would have an isolation level in name only.
        """
        options = _accepted_of(connection)
        name, timeout = self._read(options)
        request = Request(connection.dialect, name, timeout, is_connections=True)
        with requesting(request):
            proxied = check_out()
        try:
            self._apply(connection, options)
        except BaseException as error:
            connection.invalidate(error)
            raise
        return proxied

    def _read(self, options: Mapping[str, Any]) -> tuple[str | None, float | None]:
        """Return the tag and the time-out that stand among execution options."""
        name, timeout = options.get(self._option), options.get(TIMEOUT_OPTION)
        return (
            None if name is None else validate_tag(name, self._option),
            None if timeout is None else validate_timeout(timeout, TIMEOUT_OPTION),
        )


def _accepted_of(connection: Connection) -> Any:
    """Return the options that are in force on a connection, as SQLAlchemy has them."""
    accepted = vars(connection).get(_ACCEPTED)
    # The first that are set on it follow those with which it was made.
    return connection.engine.get_execution_options() if accepted is None else accepted


def _tag_engine(engine: Engine, name: str | None, timeout: float | None) -> None:
    """Have `engine` check out under tag `name`, waiting for `timeout` at most."""
    dialect = engine.dialect
    request = Request(dialect, name, timeout)

    def raw_connection() -> PoolProxiedConnection:
        outer = requested()
        if outer is not None and outer.is_connections and outer.dialect is dialect:
            return engine.pool.connect()
        make_request(request)
        try:
            return engine.pool.connect()
        finally:
            # Another one is there if a signal handler runs this in the middle of a
            # checkout; ours is if it was not taken: by another kind of pool, say.
            if requested() is not outer:
                make_request(outer)

    # A reference cycle, so engines that are dropped wait for the collector. They
    # hold no connection; and a weak reference would fail whoever calls
    # engine.execution_options(...).raw_connection() in one breath.
    setattr(engine, raw_connection.__name__, raw_connection)
