"""The store for any number of hosts: tables in a PostgreSQL database.

The tables are in :mod:`.postgres_tables`. One session per process, the *control
connection*, does everything: it holds the sign of life, a session advisory lock that
the server releases exactly when the session ends; it listens for the bell, a
notification; and it runs the transactions, which are exclusive by another advisory
lock.

Rules of this file:

* Only the keeper's thread uses the control connection; a nudge goes through a pipe.
* The server may be far away. What can be said at once is one message of several
  statements; while the lock is held there is one round trip, from the reading of the
  rows to the message that writes and commits. The server serves the lock in turn.
* Each message is answered within :data:`_ANSWER_WITHIN`, or the connection is hung up
  on, and lost.
* A session that ends takes the sign of life with it while the process lives on. That
  is known from then on (`signed`), until the store is opened again.
* Tables may be dropped, or restored from a copy, while members live. So what all
  members of a ledger have in common besides them, locks and channels, follows from the
  ledger's *place*: the database and the ledger's name.
"""

from __future__ import annotations

import ctypes
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from . import watch
from .postgres_tables import (
    Heard,
    Line,
    Tables,
    channel,
    execute,
    first_line,
    literal,
    literals,
    lock_key,
    make_engine,
    notifications,
)
from .store import LedgerError, Store, StoreAway, drain, notify, wait_for

#: How long a transaction waits for another one, and for the server.
_LOCK_TIMEOUT, _STATEMENT_TIMEOUT = "4s", "5s"
#: Seconds until an answer is there, or the connection is taken to be lost: the server
#: itself answers within its time limits, with an error if need be.
_ANSWER_WITHIN = 5.5
#: What a notification says when its receiver is to publish.
_ASK = "ask"
#: First key of the locks for transactions (any number would do; this one is "fair"),
#: and the second of the one for creating tables.
_EXCLUSIVE, _CREATION = 0x66616972, 0
#: SQLSTATEs for a table and for a schema that does not exist.
_MISSING = frozenset({"42P01", "3F000"})
#: And the one for a write on a server that may not be the one to write to any more.
_DEMOTED = "25006"
_NOTIFY = "SELECT pg_notify(name, {what}) FROM unnest(ARRAY[{names}]) name"
_LOCK = f"SELECT pg_advisory_xact_lock({_EXCLUSIVE}, {{lock}})"
_NOT_DURABLE = "SET LOCAL synchronous_commit = off"


class PostgresStore(Store):
    """See the head of this file, and :class:`.store.Store` for the methods.

    :param observes: it is opened by a process that is no member: it gives no sign of
      life, and does not count among those that may have connections.
    """

    kind = "postgresql"
    can_lose_sign = True
    #: The tables are looked at in each transaction, and not in between.
    watches_place = False

    def __init__(
        self, url: URL, ledger: str = "default", *, observes: bool = False
    ) -> None:
        self._url = url
        self._engine = make_engine(url, self._connected)
        self._observes = observes
        # Of the place: the lock that each member shares, as a key of its own and as a
        # second one, and the channel to which all listen.
        self._place = lock_key(f"place {ledger}")
        self._everybody = channel(f"place_{self._place:x}")
        self._exclusion = self._place & 0x7FFFFFFF
        host = url.host or url.query.get("host") or "localhost"
        port = f":{url.port}" if url.port else ""
        self.name = f"postgresql://{host}{port}/{url.database} ledger {ledger!r}"
        self._tables = Tables(ledger, self.name, self._run)
        self._begin()

    def _begin(self) -> None:
        self.member = uuid.uuid4().hex
        self.signed = True
        #: The identity of the server, once it is connected; and that it is the pool's,
        #: too: a crash that loses commits ends the sessions that they count.
        self.server: str | None = None
        self.serves_pool = False
        self._connection: Connection | None = None
        self._line: Line | None = None
        # The tables were found. Not the same as being connected: see `_miss_tables`.
        self._is_open = False
        self._inbox: list[Heard] = []
        self._pipe: tuple[int, int] | None = None
        self.asked = False

    @property
    def key(self) -> int:
        return self._tables.number

    @property
    def sign(self) -> int:
        """The key of the advisory lock that is this process's sign of life."""
        return lock_key(self.member)

    @property
    def control_connections(self) -> int:
        return int(self._connection is not None)

    def open(self) -> None:
        if self._is_open:
            return
        if self._pipe is None:
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
        is_connected = self._connection is not None
        try:
            if not is_connected:
                with self._translated():
                    self._connection = self._engine.connect()
                self._prepare()
            if not self._tables.find():
                with self._rolled_back():
                    self._run("BEGIN", _LOCK, lock=_CREATION)
                    self._tables.open()
                    self._run("COMMIT")
            if not is_connected and not self._observes:
                self._appear()
        except BaseException:
            # One that was there before has a sign of life, which is not given up.
            if not is_connected:
                self._drop()
            raise
        self.signed = self._is_open = True

    def _connected(self, driver_connection: Any) -> None:
        self._line = Line(driver_connection.fileno())
        self._line.expect(_ANSWER_WITHIN)  # to what the dialect asks first

    def _prepare(self) -> None:
        # A process that is stopped in a transaction must not keep the others from
        # theirs. Its session is ended, and with it its sign of life: it finds that out.
        self._run(
            f"SET lock_timeout = '{_LOCK_TIMEOUT}'",
            f"SET statement_timeout = '{_STATEMENT_TIMEOUT}'",
            f"SET idle_in_transaction_session_timeout = '{_STATEMENT_TIMEOUT}'",
            # A level that a role may have by default would show the rows as they were
            # before the lock was there.
            "SET default_transaction_isolation = 'read committed'",
        )
        driver, add = self._driver, self._inbox.append
        with self._cursor() as cursor:
            try:
                self.server, *_ = watch.identify(cursor, driver.info.backend_pid)
            except LedgerError as error:
                raise self._tables.unusable(error) from None
        if hasattr(driver, "add_notify_handler"):
            # psycopg gives those that come while a statement runs to nobody else.
            driver.add_notify_handler(lambda n: add((n.channel, n.payload, n.pid)))

    def _appear(self) -> None:
        """Give the sign of life, at this place, and listen."""
        # The session before this one may hold it still: where only we have learned of
        # its end, the server would take minutes or hours to notice.
        channels = (channel(self.member), self._everybody)
        self._run(
            watch.END_HOLDERS,
            *(f"LISTEN {one}" for one in channels),
            "SELECT pg_advisory_lock({sign}), pg_advisory_lock_shared({place})",
            sign=self.sign,
            place=self._place,
        )

    def close(self) -> None:
        self._drop()
        self._close_pipe()
        self._begin()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        line, self._line = self._line, None
        self._is_open, self.serves_pool, self._inbox = False, False, []
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.invalidate()
                connection.close()
        if line is not None:
            line.close()

    def _close_pipe(self) -> None:
        for end in self._pipe or ():
            os.close(end)

    def after_fork(self) -> None:
        if self._connection is not None:
            # Never to be deallocated, which would say goodbye to the parent's server;
            # and without its socket, or the parent would live as long as we do.
            with suppress(Exception):
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, self._driver.fileno(), inheritable=False)
                os.close(nothing)
            for one in (self._driver, self._connection):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
        if self._line is not None:
            self._line.after_fork()
        # Another thread may be in the first connect of this one, under a lock.
        self._engine = make_engine(self._url, self._connected)
        self._close_pipe()
        self._begin()

    @contextmanager
    def transaction(
        self, bells: Collection[str] = (), *, durable: bool = True
    ) -> Iterator[MutableMapping[str, str]]:
        with self._rolled_back():
            before = self._rows("BEGIN", _LOCK)
            rows = dict(before)
            yield rows
            last = [_NOTIFY] if bells else []
            if self.serves_pool and not durable:
                last.append(_NOT_DURABLE)
            names = literals([*map(channel, bells)])
            self._tables.write(before, rows, *last, "COMMIT", names=names, what="")

    def read(self) -> Mapping[str, str]:
        return self._rows()

    def swap(self, key: str, before: str, after: str) -> bool:
        first = [_NOT_DURABLE] * self.serves_pool + [_LOCK.format(lock=self._exclusion)]
        return self._tables.swap("; ".join(first), key, before, after)

    def _rows(self, *before: str) -> dict[str, str]:
        if not self._is_open:
            raise StoreAway("the ledger is not open")
        rows = self._tables.read(*before, lock=self._exclusion)
        if rows is None:
            self._miss_tables()
            why = "the ledger was deleted from its tables, or made anew"
            raise StoreAway(f"{self.name}: {why}")
        if not (self._tables.writable or self._observes):
            # There is another one to write to, or there will be. Not to be found out
            # by the next write: a pool waits for it that connects there already.
            self._lost()
            raise StoreAway(f"{self.name}: the server is read-only")
        return rows

    @contextmanager
    def _rolled_back(self) -> Iterator[None]:
        """End a transaction, which is begun here, if it has not come to its commit."""
        try:
            yield
        except BaseException:
            with suppress(SQLAlchemyError, StoreAway, LedgerError):
                self._run("ROLLBACK")
            raise

    @property
    def _driver(self) -> Any:
        if self._connection is None:
            raise StoreAway("the ledger is not open")
        return self._connection.connection.driver_connection

    def _run(self, *statements: str, **values: object) -> list[Any]:
        """Execute statements in one round trip; return the rows of the last one."""
        texts = {name: literal(value) for name, value in values.items()}
        with self._translated():
            return execute(self._driver, "; ".join(statements).format_map(texts))

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        with self._translated(), closing(self._driver.cursor()) as cursor:
            yield cursor

    def look(self) -> watch.Present:
        """Return the sessions of the server in which the ledger is."""
        with self._cursor() as cursor:
            return watch.look(cursor)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise `StoreAway` or `LedgerError` for what the server or the driver says."""
        line, dbapi = self._line, self._engine.dialect.loaded_dbapi
        try:
            with line.answers_within(_ANSWER_WITHIN) if line else nullcontext():
                yield
        except (DBAPIError, dbapi.Error) as error:
            words = first_line(said := getattr(error, "orig", error))
            if line is not None and line.is_cut:
                words = f"no answer within {_ANSWER_WITHIN:g} s"
            # psycopg has the one, psycopg2 the other.
            state = getattr(said, "sqlstate", getattr(said, "pgcode", None))
            is_new = self._connection is None
            is_gone = state in (None, _DEMOTED) or is_new or self._driver.closed
            refused = isinstance(said, dbapi.ProgrammingError)
            if is_gone and not (is_new and refused):  # as a key of the URL is
                self._lost()
            elif state in _MISSING:
                self._miss_tables()
                words = f"the tables were dropped ({words})"
            elif refused:  # not allowed, or a table of another shape
                raise self._tables.unusable(words) from None
            raise StoreAway(f"{self.name}: {words}") from error

    def _lost(self) -> None:
        if self._connection is not None:
            self.signed = False
        self._drop()

    def _miss_tables(self) -> None:
        """The session and its sign of life stand, which covers no slot any more."""
        self._is_open = self.signed = False

    def living(self, members: Collection[str]) -> set[str]:
        signs = {key for keys in self._signs().values() for key in keys}
        return {member for member in members if lock_key(member) in signs}

    def strangers(self, members: Collection[str]) -> int:
        known = {lock_key(member) for member in (*members, self.member)}
        signs = self._signs().values()
        return sum(self._place in keys and known.isdisjoint(keys) for keys in signs)

    def _signs(self) -> dict[int, set[int]]:
        """Return the keys that sessions hold, of members and of places."""
        signs: dict[int, set[int]] = {}
        for pid, key in self._run(watch.SIGNS):
            signs.setdefault(pid, set()).add(key)
        return signs

    def in_place(self) -> bool:
        return self._connection is not None and bool(self._run("SELECT 1"))

    def ring(self, members: Iterable[str]) -> None:
        self._notify(map(channel, members), "")

    def ring_all(self) -> None:
        self._notify([self._everybody], "")

    def ask(self, members: Iterable[str]) -> None:
        self._notify(map(channel, members), _ASK)

    def _notify(self, channels: Iterable[str], what: str) -> None:
        if names := literals([*channels]):
            self._run(_NOTIFY, names=names, what=what)

    def wait(self, seconds: float | None) -> bool:
        assert self._pipe is not None
        connection = self._driver
        if self._heard(connection):
            return True
        if not wait_for([connection.fileno(), self._pipe[0]], seconds):
            return False
        drain(self._pipe[0])
        self._heard(connection)
        return True

    def _heard(self, connection: Any) -> bool:
        """Take in what the server has sent; tell if there was a bell."""
        try:
            heard = notifications(connection, self._inbox)
        except Exception as error:
            self._lost()
            raise StoreAway(f"{self.name}: {first_line(error)}") from error
        self.asked = self.asked or any(what == _ASK for _, what, _ in heard)
        # What we said to all was not for us.
        own = connection.info.backend_pid
        return any((c, pid) != (self._everybody, own) for c, _, pid in heard)

    def publish(self, text: str) -> None:
        self._tables.publish(self.member, text)

    def published(self, members: Collection[str]) -> dict[str, str]:
        return self._tables.published(members)

    def nudge(self) -> None:
        if (pipe := self._pipe) is not None:
            notify(pipe[1], b"n")
