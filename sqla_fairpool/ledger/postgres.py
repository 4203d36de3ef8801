"""The store for any number of hosts: tables in a PostgreSQL database.

    fairpool_ledger(name, version, number)      the ledgers in this database
    fairpool_ledger_row(ledger, key, value)     their rows
    fairpool_figures(ledger, member, value)     what members say of themselves, if asked

One session per process, the *control connection*, does everything: it holds the sign of
life, a session advisory lock that the server releases exactly when the session ends; it
listens for the bell, a notification; and it runs the transactions, which are
exclusive by another advisory lock.

Rules of this file:

* Only the keeper's thread uses the control connection. :meth:`PostgresStore.nudge`
  writes into a pipe.
* A session that ends takes the sign of life with it while the process lives on. That
  is known from then on (`signed`), until :meth:`PostgresStore.open` has made a new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import select
import uuid
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, ProgrammingError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from .errors import LedgerError
from .sessions import refuse_pooler
from .store import StoreAway

__all__ = ["PostgresStore"]

#: Version of the tables.
SCHEMA = 1

#: How long a transaction waits for another one, and for the server.
_LOCK_TIMEOUT, _STATEMENT_TIMEOUT, _CONNECT_TIMEOUT = "2s", "5s", 5

#: What a notification says when its receiver is to publish.
_ASK = "ask"

#: First key of the locks on ledgers; the second one is the ledger's number. Any number
#: would do; this one is "fair".
_EXCLUSIVE = 0x66616972

_TABLES = (
    "CREATE TABLE IF NOT EXISTS fairpool_ledger "
    "(name text PRIMARY KEY, version int NOT NULL, number int NOT NULL)",
    "CREATE TABLE IF NOT EXISTS fairpool_ledger_row (ledger text NOT NULL, "
    "key text NOT NULL, value text NOT NULL, PRIMARY KEY (ledger, key))",
    # Nothing that has to outlive the server.
    "CREATE UNLOGGED TABLE IF NOT EXISTS fairpool_figures (ledger text NOT NULL, "
    "member text NOT NULL, value text NOT NULL, PRIMARY KEY (ledger, member))",
)
_READ = text("SELECT key, value FROM fairpool_ledger_row WHERE ledger = :ledger")
_DELETE = text("DELETE FROM fairpool_ledger_row WHERE ledger = :ledger AND key = :key")
_WRITE = text(
    "INSERT INTO fairpool_ledger_row VALUES (:ledger, :key, :value) "
    "ON CONFLICT (ledger, key) DO UPDATE SET value = excluded.value"
)
_PUBLISH = text(
    "INSERT INTO fairpool_figures VALUES (:ledger, :member, :value) "
    "ON CONFLICT (ledger, member) DO UPDATE SET value = excluded.value"
)
_PUBLISHED = text("SELECT member, value FROM fairpool_figures WHERE ledger = :ledger")
_UNPUBLISH = text(
    "DELETE FROM fairpool_figures WHERE ledger = :ledger AND member = :member"
)
_SIGNS = text(
    "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks "
    "WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND database = "
    "(SELECT oid FROM pg_database WHERE datname = current_database())"
)


class PostgresStore:
    """See the head of this file.

    :param url: the database, with psycopg2 or psycopg as the driver.
    :param ledger: which one, if there are several in the database.
    """

    kind = "postgresql"

    def __init__(self, url: URL, ledger: str = "default") -> None:
        self._engine = create_engine(
            url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={
                "connect_timeout": _CONNECT_TIMEOUT,
                "application_name": "sqla_fairpool ledger",
            },
        )
        self._ledger = ledger
        host = url.host or url.query.get("host") or "localhost"
        port = f":{url.port}" if url.port else ""
        self.name = f"postgresql://{host}{port}/{url.database} ledger {ledger!r}"
        #: The ledger's own number; 0 until it is opened.
        self.key = 0
        self._begin()

    def _begin(self) -> None:
        self.member = uuid.uuid4().hex
        self.signed = True
        self._connection: Connection | None = None
        self._pipe: tuple[int, int] | None = None
        self.asked = False

    @property
    def control_connections(self) -> int:
        """Server connections that it holds: one, or none."""
        return int(self._connection is not None)

    # -- opening and closing --------------------------------------------------------

    def open(self) -> None:
        """Create the tables if need be, check them, give a sign of life. Idempotent.

        :raises StoreAway: if the server cannot be reached.
        :raises LedgerError: if it cannot be used as it is.
        """
        if self._connection is not None:
            return
        if self._pipe is None:
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
        try:
            with self._translated():
                self._connection = self._engine.connect()
                self._prepare()
                self._create_tables()
                self._run(f"LISTEN {_channel(self.member)}")
                self._run(f"SELECT pg_advisory_lock({_sign(self.member)})")
            self.signed = True
        except BaseException:
            self._drop()
            raise

    def _prepare(self) -> None:
        self._run(f"SET lock_timeout = '{_LOCK_TIMEOUT}'")
        self._run(f"SET statement_timeout = '{_STATEMENT_TIMEOUT}'")
        # Who is stopped in a transaction must not keep the others from theirs. His
        # session is ended, and with it his sign of life, which he finds out.
        idle = "idle_in_transaction_session_timeout"
        self._run(f"SET {idle} = '{_STATEMENT_TIMEOUT}'")
        cursor = self._driver.cursor()
        try:
            refuse_pooler(cursor, self._driver.info.backend_pid)
        finally:
            cursor.close()

    def _create_tables(self) -> None:
        """Create what is missing, one process at a time."""
        self._run("BEGIN")
        self._run(f"SELECT pg_advisory_xact_lock({_EXCLUSIVE}, 0)")
        for statement in _TABLES:
            self._run(statement)
        found = self._run(
            "SELECT version, number FROM fairpool_ledger WHERE name = :name",
            name=self._ledger,
        ).first()
        if found is None:
            found = SCHEMA, uuid.uuid4().int & 0x7FFFFFFF
            self._run(
                "INSERT INTO fairpool_ledger VALUES (:name, :version, :number)",
                name=self._ledger,
                version=found[0],
                number=found[1],
            )
        if found[0] > SCHEMA:
            raise LedgerError(
                f"the ledger {self.name} has schema version {found[0]}, and this "
                f"process knows {SCHEMA}: it runs an older sqla_fairpool"
            )
        self.key = found[1]
        self._run("COMMIT")

    def close(self) -> None:
        """Give up the sign of life and all handles. Idempotent."""
        self._drop()
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
        self._begin()

    def _drop(self) -> None:
        """Close the control connection, whatever state it is in."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError):
                connection.invalidate()
                connection.close()

    def after_fork(self) -> None:
        """In the child: become a closed store with a member id of its own."""
        if self._connection is not None:
            # Never to be deallocated, which would say goodbye to the parent's server;
            # and without its socket, or the parent would live as long as we do.
            with contextlib.suppress(Exception):
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, self._driver.fileno(), inheritable=False)
                os.close(nothing)
            for one in (self._driver, self._connection):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
        self._begin()

    # -- rows --------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[MutableMapping[str, str]]:
        """The rows, for this process alone; kept on leaving, undone by an exception."""
        try:
            with self._translated():
                self._run("BEGIN")
                self._run(f"SELECT pg_advisory_xact_lock({_EXCLUSIVE}, {self.key})")
                found = self._live.execute(_READ, {"ledger": self._ledger})
                before = {row[0]: row[1] for row in found}
            rows = dict(before)
            yield rows
            with self._translated():
                self._write(before, rows)
                self._run("COMMIT")
        except BaseException:
            with contextlib.suppress(SQLAlchemyError, StoreAway, LedgerError):
                with self._translated():
                    self._run("ROLLBACK")
            raise

    def _write(self, before: dict[str, str], rows: dict[str, str]) -> None:
        ledger = self._ledger
        for key in before:
            if key not in rows:
                self._live.execute(_DELETE, {"ledger": ledger, "key": key})
        changed = [
            {"ledger": ledger, "key": key, "value": value}
            for key, value in rows.items()
            if before.get(key) != value
        ]
        if changed:
            self._live.execute(_WRITE, changed)

    @property
    def _live(self) -> Connection:
        if self._connection is None:
            raise StoreAway("the ledger is not open")
        return self._connection

    @property
    def _driver(self) -> Any:
        return self._live.connection.driver_connection

    def _run(self, statement: str, **values: object) -> Any:
        return self._live.execute(text(statement), values)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except ProgrammingError as error:  # not allowed, or a table of another shape
            self._lost()
            raise LedgerError(
                f"the ledger {self.name} cannot be used: {_first_line(error)}"
            ) from None
        except DBAPIError as error:
            if error.connection_invalidated or self._connection is None:
                self._lost()
            raise StoreAway(f"{self.name}: {_first_line(error)}") from error

    def _lost(self) -> None:
        """The session is over, and with it the sign of life."""
        if self._connection is not None:
            self.signed = False
        self._drop()

    # -- signs of life ----------------------------------------------------------------

    def living(self, members: Collection[str]) -> set[str]:
        """Return those whose sign of life stands."""
        with self._translated():
            signs = set(self._live.execute(_SIGNS).scalars())
        return {member for member in members if _sign(member) in signs}

    # -- bells ------------------------------------------------------------------------

    def ring(self, members: Iterable[str]) -> None:
        """Wake them from their :meth:`wait`. Best effort."""
        self._notify(members, "")

    def ask(self, members: Iterable[str]) -> None:
        """Wake them, and have them publish. Best effort."""
        self._notify(members, _ASK)

    def _notify(self, members: Iterable[str], what: str) -> None:
        channels = [_channel(member) for member in members]
        if channels:
            with self._translated():
                self._live.execute(
                    text("SELECT pg_notify(:channel, :what)"),
                    [{"channel": channel, "what": what} for channel in channels],
                )

    def wait(self, seconds: float | None) -> bool:
        """Sleep until rung or nudged; return False when the time was up."""
        assert self._pipe is not None
        connection = self._driver
        if self._heard(connection):
            return True
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        poll.register(self._pipe[0], select.POLLIN)
        ready = poll.poll(None if seconds is None else max(seconds, 0.0) * 1000)
        if not ready:
            return False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._pipe[0], 4096):
                pass
        self._heard(connection)
        return True

    def _heard(self, connection: Any) -> bool:
        """Take in what the server has sent; tell if there was a bell."""
        try:
            heard = _notifications(connection)
        except Exception as error:
            self._lost()
            raise StoreAway(f"{self.name}: {error}") from error
        self.asked = self.asked or _ASK in heard
        return bool(heard)

    # -- figures ----------------------------------------------------------------------

    def publish(self, text: str) -> None:
        """Let others read what this process says of itself."""
        row = {"ledger": self._ledger, "member": self.member, "value": text}
        with self._translated():
            self._live.execute(_PUBLISH, row)

    def published(self, members: Collection[str]) -> dict[str, str]:
        """Return what each of `members` has published last, if anything."""
        with self._translated():
            rows = self._live.execute(_PUBLISHED, {"ledger": self._ledger}).all()
            left = [row.member for row in rows if row.member not in members]
            for member in left:
                gone = {"ledger": self._ledger, "member": member}
                self._live.execute(_UNPUBLISH, gone)
        return {row.member: row.value for row in rows if row.member in members}

    def nudge(self) -> None:
        """End this process's wait. From any thread, never blocks."""
        pipe = self._pipe
        if pipe is not None:
            with contextlib.suppress(OSError):  # full, or closed meanwhile
                os.write(pipe[1], b"n")


def _notifications(connection: Any) -> list[str]:
    """Return what the notifications say that have come."""
    if hasattr(connection, "poll"):  # psycopg2
        connection.poll()
        if connection.closed:
            raise StoreAway("the server has closed the connection")
        heard = [notification.payload for notification in connection.notifies]
        connection.notifies.clear()
        return heard
    connection.pgconn.consume_input()
    heard = []
    while (notification := connection.pgconn.notifies()) is not None:
        heard.append(notification.extra.decode())
    return heard


def _sign(member: str) -> int:
    """Return the key of a member's sign of life, a positive int8."""
    return int(hashlib.sha256(member.encode()).hexdigest()[:15], 16)


def _channel(member: str) -> str:
    return f"fairpool_{member}"


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]
