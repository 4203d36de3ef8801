"""Who is asking: from execution options and the context to the current tag.

The pool is asked for a connection without an argument, so the tag travels in a
context variable; greenlets, threads' contexts and asyncio tasks carry it along.
SQLAlchemy reports options as they are set, to the dialect of the engine:

* an engine's: its ``raw_connection()``, the public method through which every
  :class:`~sqlalchemy.engine.Connection` is filled, is wrapped on that engine, so
  that the tag is in force for just that call. Engines derived from it report
  themselves in the same way.
* a connection's: it has been checked out by then. What happens is the pool's
  decision, so the pool's function is called.

Both are set on one dialect object, which belongs to one engine and those derived
from it; nothing else in the process is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.pool import PoolProxiedConnection

from .options import validate_tag

__all__ = ["asked", "asked_by_connection", "context_tag", "follow", "tag"]

# Set for the length of one checkout by whoever has options: an engine, or a
# connection that checks out again.
_asked: ContextVar[str | None] = ContextVar("sqla_fairpool_asked", default=None)
_connection_tag: ContextVar[str | None] = ContextVar(
    "sqla_fairpool_connection_tag", default=None
)
_context_tag: ContextVar[str | None] = ContextVar("sqla_fairpool_tag", default=None)

#: The tag of the options in force, None without; first read by every checkout.
asked = _asked.get

#: The tag of the innermost ``with tag(...)``, None without.
context_tag = _context_tag.get

#: What is set on a dialect, to recognise it when a pool is recreated.
_MARK = "_sqla_fairpool_tag_option"


@contextmanager
def tag(name: str) -> Iterator[None]:
    """Tag the checkouts of a block that carry no tag of their own.

    ::

        with sqla_fairpool.tag("reports"):
            with engine.connect() as connection:
                ...

    Follows asyncio tasks and ``asyncio.to_thread``; a thread that is started in
    the block begins without it. An engine's or a connection's option wins.

    :param name: the tag, a non-empty string of at most 128 printable characters.
    :raises sqlalchemy.exc.ArgumentError: if it is not.
    """
    validate_tag(name)
    # No token: an interrupt could come between setting and keeping it.
    outer = _context_tag.get()
    try:
        _context_tag.set(name)
        yield
    finally:
        _context_tag.set(outer)


@contextmanager
def asked_by_connection(name: str) -> Iterator[None]:
    """Let the next checkout be that of a connection whose own tag is `name`."""
    outer = _connection_tag.get(), _asked.get()
    try:
        _connection_tag.set(name)
        _asked.set(name)
        yield
    finally:
        _connection_tag.set(outer[0])
        _asked.set(outer[1])


def follow(
    dialect: Dialect, option: str, retag: Callable[[Connection, str], bool]
) -> bool:
    """Watch the execution option `option` of a dialect's engines and connections.

    Does so once, however many pools the dialect gets in turn; tells if this was
    the first time.

    :param retag: called when the option is set on a connection, with the
      connection and its tag. Tells if the connection has another DBAPI
      connection now, so that its other options must be applied again.
    """
    seen = getattr(dialect, _MARK, None)
    if seen == option:
        return False
    set_on_engine = dialect.set_engine_execution_options
    set_on_connection = dialect.set_connection_execution_options

    def set_engine_execution_options(engine: Engine, opts: Mapping[str, Any]) -> None:
        # All its options, not only the new ones: a derived engine has its tag
        # from its parent and reports only what it adds.
        name = engine.get_execution_options().get(option)
        if name is not None:
            _tag_engine(engine, validate_tag(name, option))
        set_on_engine(engine, opts)

    def set_connection_execution_options(
        connection: Connection, opts: Mapping[str, Any]
    ) -> None:
        if option in opts:
            name = validate_tag(opts[option], option)
            if retag(connection, name):
                opts = connection.get_execution_options()
        set_on_connection(connection, opts)

    # Set by name: to the type checker they are methods, here they are hooks.
    hooks = (set_engine_execution_options, set_connection_execution_options)
    for hook in hooks:
        setattr(dialect, hook.__name__, hook)
    setattr(dialect, _MARK, option)
    return seen is None


def _tag_engine(engine: Engine, name: str) -> None:
    """Have `engine` check out under tag `name`."""
    set_asked, connection_tag = _asked.set, _connection_tag.get

    def raw_connection() -> PoolProxiedConnection:
        # A connection that checks out again goes first, see `asked_by_connection`.
        outer = asked()
        try:
            set_asked(connection_tag() or name)
            return engine.pool.connect()
        finally:
            set_asked(outer)

    # A reference cycle, so engines that are dropped wait for the collector. They
    # hold no connection; and a weak reference would fail whoever calls
    # engine.execution_options(...).raw_connection() in one breath.
    setattr(engine, raw_connection.__name__, raw_connection)
