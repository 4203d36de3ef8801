"""Execution options of engines and connections: the tag, and how long a checkout waits.

The pool is asked for a connection without an argument, so what options say is left
with the thread, as a :class:`Request`. The pool takes it from there before it does
anything else, so that nothing else sees it: not another task of the thread, not
another pool that a listener uses. SQLAlchemy reports options as they are set, to the
dialect of the engine:

* an engine's: its ``raw_connection()``, the public method through which every
  :class:`~sqlalchemy.engine.Connection` is filled, is wrapped on that engine, so
  that it makes the request. Engines derived from it report themselves in the same way.
* a connection's: it has been checked out by then, and is charged to its tag, or waits
  for it. SQLAlchemy has stored the options by then, so they are taken back if that is
  refused.

Hooks are set on one dialect object, which belongs to one engine and those derived from
it; nothing else in the process is touched.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.pool import PoolProxiedConnection

from ..checks import BadOption, BadState, validate_tag, validate_timeout
from ..options import PoolOptions
from . import sqlalchemy_private
from .checkout import TIMES_TOLD, Checkout
from .events import tell

#: The execution option that says how long a checkout may wait.
TIMEOUT_OPTION = "fairpool_timeout"

#: What is set on a dialect, to recognise it when a pool is recreated.
_MARK = "_sqla_fairpool_tag_option"

#: What is set on an engine or a connection: those of its options that were accepted.
_ACCEPTED = "_sqla_fairpool_accepted"


@dataclass(frozen=True, slots=True)
class Request:
    """What options say about one checkout, None where they say nothing."""

    #: The dialect of the pool which is meant; other pools ignore the request.
    dialect: Dialect
    tag: str | None
    timeout: float | None
    #: It is made for a connection, whose options go before those of its engine.
    is_connections: bool = False


class _Begun:
    """The checkout that begins on a thread."""

    __slots__ = ("request",)

    def __init__(self) -> None:
        #: Set for the few instructions between a connection or an engine and its pool.
        #: No task gives way in between, and a context variable would cost five times as
        #: much.
        self.request: Request | None = None


class _Current(threading.local):
    """The current thread's. In one object: each look at a thread-local takes time."""

    def __init__(self) -> None:
        self.begun = _Begun()


#: Read first by every checkout.
current = _Current()


def check_server(dialect: Any, options: PoolOptions) -> None:
    """Raise if only PostgreSQL could be told what it is to be told."""
    name = getattr(dialect, "name", "postgresql")  # a pool without an engine
    if options.tells_server and name != "postgresql":
        why = f"because {name} is not PostgreSQL"
        if options.server_tag:
            raise BadOption("server_tag", True, f"False, {why}")
        given = {tag: one.times for tag, one in (options.tags or {}).items()}
        times = {tag: one for tag, one in given.items() if one}
        raise BadOption("tags", times, f"no time limits, {why}")


def watch_dialect(dialect: Dialect, options: PoolOptions) -> None:
    """Hear of the options and statements of a dialect's engines and connections.

    Once for each dialect, however many pools it gets in turn.
    """
    option = options.tag_option
    check_server(dialect, options)
    seen = getattr(dialect, _MARK, None)
    if seen != option:
        hooks = _Hooks(dialect, option)
        dialect.set_engine_execution_options = hooks.set_on_engine  # type: ignore[method-assign]  # a hook
        dialect.set_connection_execution_options = hooks.set_on_connection  # type: ignore[method-assign]  # a hook
        setattr(dialect, _MARK, option)
    if seen is None:
        sqlalchemy_private.note_statements(dialect)


class _Hooks:
    """What a dialect does, from now on, when options are set."""

    def __init__(self, dialect: Dialect, option: str) -> None:
        self._option = option
        self._ours = {option, TIMEOUT_OPTION}
        self._check_out = self._check_out_again  # made once, not for each connection
        self._apply_to_engine = dialect.set_engine_execution_options
        self._apply = dialect.set_connection_execution_options

    def set_on_engine(self, engine: Engine, opts: Mapping[str, Any]) -> None:
        # All its options, not only the new ones: a derived engine has its tag
        # from its parent and reports only what it adds.
        options = engine.get_execution_options()
        try:
            request = self._request(engine.dialect, options)
        except exc.ArgumentError:
            without = {key: options[key] for key in options if key not in opts}
            before = vars(engine).get(_ACCEPTED, type(options)(without))
            sqlalchemy_private.set_options(engine, before)
            raise
        vars(engine)[_ACCEPTED] = options
        if request.tag is not None or request.timeout is not None:
            _tag_engine(engine, request)
        self._apply_to_engine(engine, opts)

    def set_on_connection(
        self, connection: Connection, opts: Mapping[str, Any]
    ) -> None:
        if not self._ours.issuperset(opts):
            self._set_with_others(connection, opts)
            return
        before = getattr(connection, _ACCEPTED, None)
        try:
            if TIMEOUT_OPTION in opts and opts[TIMEOUT_OPTION] is not None:
                validate_timeout(opts[TIMEOUT_OPTION], TIMEOUT_OPTION)
            setattr(connection, _ACCEPTED, connection.get_execution_options())
            record = sqlalchemy_private.check_out_by(connection, self._check_out)
            if self._option in opts:
                _retag(connection, record, opts[self._option], self._option)
        except BaseException:
            setattr(connection, _ACCEPTED, before)
            sqlalchemy_private.set_options(connection, _accepted_of(connection))
            raise

    def _set_with_others(self, connection: Connection, opts: Mapping[str, Any]) -> None:
        """Set ours, and then options of SQLAlchemy's."""
        before, after = _accepted_of(connection), connection.get_execution_options()
        ours = {key: opts[key] for key in opts if key in self._ours}
        try:
            if ours:
                sqlalchemy_private.set_options(connection, before.union(ours))
                self.set_on_connection(connection, ours)
                sqlalchemy_private.set_options(connection, after)
            self._apply(connection, opts)
            setattr(connection, _ACCEPTED, after)
        except BaseException:
            if connection.invalidated:  # nothing is there which could have ours
                setattr(connection, _ACCEPTED, before)
            sqlalchemy_private.set_options(connection, _accepted_of(connection))
            raise

    def _check_out_again(self, ref: weakref.ref[Connection]) -> PoolProxiedConnection:
        """Check out again for a connection that has none.

        SQLAlchemy does not apply the options then, an isolation level say.
        """
        connection = ref()
        assert connection is not None
        options, begun = _accepted_of(connection), current.begun
        outer = begun.request
        begun.request = self._request(connection.dialect, options, is_connections=True)
        try:
            proxied = sqlalchemy_private.check_out(connection)
        finally:
            begun.request = outer
        try:
            self._apply(connection, options)
        except BaseException as error:
            connection.invalidate(error)
            raise
        return proxied

    def _request(
        self, dialect: Dialect, options: Mapping[str, Any], is_connections: bool = False
    ) -> Request:
        """Return the tag and the time-out that stand among execution options."""
        tag, timeout = options.get(self._option), options.get(TIMEOUT_OPTION)
        return Request(
            dialect,
            None if tag is None else validate_tag(tag, self._option),
            None if timeout is None else validate_timeout(timeout, TIMEOUT_OPTION),
            is_connections,
        )


def _accepted_of(connection: Connection) -> Any:
    """Return the options that are in force on a connection, as SQLAlchemy has them."""
    accepted = getattr(connection, _ACCEPTED, None)
    # The first that are set on it follow those with which it was made.
    return connection.engine.get_execution_options() if accepted is None else accepted


def _tag_engine(engine: Engine, request: Request) -> None:
    """Have each checkout of `engine` begin with a request."""
    dialect, root = request.dialect, sqlalchemy_private.root_of(engine)

    def raw_connection() -> PoolProxiedConnection:
        begun = current.begun
        outer = begun.request
        if outer is not None and outer.is_connections and outer.dialect is dialect:
            return root.pool.connect()
        begun.request = request
        try:
            return root.pool.connect()
        finally:
            # Another one is there if a signal handler runs this in the middle of a
            # checkout; ours is if it was not taken: by another kind of pool, say.
            if begun.request is not outer:
                begun.request = outer

    # A reference cycle, so engines that are dropped wait for the collector. They hold
    # no connection; and with a weak reference engine.execution_options(...)
    # .raw_connection() in one expression would fail.
    setattr(engine, raw_connection.__name__, raw_connection)


def _retag(connection: Connection, record: Any, value: object, option: str) -> None:
    """Charge a connection to the tag that was set on it, or have it wait there.

    If it is refused, it checks out again under its former tag when it is used next.
    """
    try:
        checkout: Checkout = record.fair.checkout
    except AttributeError:  # none, or another class of pool's
        validate_tag(value, option)
        return
    tag = checkout.tag_state.tag
    if value != tag:  # None is refused: it would say nothing
        tag = validate_tag(value, option)
    if not checkout.borrowed and tag == checkout.tag_state.tag:
        return
    core = checkout.core
    if connection.in_transaction():
        raise BadState(
            "This connection has already initialized a SQLAlchemy Transaction() "
            f"object via begin() or autobegin; {core.options.tag_option} may not "
            "be altered unless rollback() or commit() is called first."
        )
    try:
        if core.warm.claim(checkout, tag):
            return
        if not core.move(checkout, tag):
            sqlalchemy_private.check_out_again(connection)
        elif (
            core.options.server_tag
            or TIMES_TOLD in record.info
            or checkout.tag_state.limits.times
        ):
            _tell(connection)
    except BaseException as error:
        connection.invalidate(error)
        raise


def _tell(connection: Connection) -> None:
    """Tell the server the new tag of a connection, on another one if that fails."""
    record = sqlalchemy_private.record_of(connection)
    assert record is not None
    dialect = connection.dialect
    try:
        tell(record.dbapi_connection, record, dialect)
    except (exc.DisconnectionError, dialect.loaded_dbapi.Error) as error:
        connection.invalidate(error)
        sqlalchemy_private.check_out_again(connection)
