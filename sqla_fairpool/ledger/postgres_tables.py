"""The tables of the PostgreSQL store, and how it uses its drivers.

    fairpool_ledger(name, version, number)      the ledgers in this database
    fairpool_ledger_row(ledger, key, value)     their rows
    fairpool_figures(ledger, member, value)     what members say of themselves, if asked

All processes find the same tables, whatever their role and ``search_path``: those of
the oldest ``fairpool_ledger`` in the database. Only where there is none, tables are
created; so a role that may read and write them needs no right to create anything.
"""

from __future__ import annotations

import _socket
import hashlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from ..threads import start_thread
from .store import LedgerError, StoreAway, changes

#: Version of the tables.
SCHEMA = 1

_TABLES = {
    "fairpool_ledger": "CREATE TABLE fairpool_ledger "
    "(name text PRIMARY KEY, version int NOT NULL, number int NOT NULL)",
    "fairpool_ledger_row": "CREATE TABLE fairpool_ledger_row (ledger text NOT NULL, "
    "key text NOT NULL, value text NOT NULL, PRIMARY KEY (ledger, key))",
    # Nothing that has to outlive the server.
    "fairpool_figures": "CREATE UNLOGGED TABLE fairpool_figures (ledger text NOT NULL, "
    "member text NOT NULL, value text NOT NULL, PRIMARY KEY (ledger, member))",
}
# Not by the rights of the role, of which another process may have others. By oid, which
# rises: tables that are created later, elsewhere, change nothing.
_FIND = """
    SELECT nspname, has_schema_privilege(nspname, 'USAGE'), current_user
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relname = 'fairpool_ledger' AND relkind = 'r' AND relpersistence <> 't'
    ORDER BY pg_class.oid LIMIT 1
"""
# The schema for new tables: public, or else the first of the search_path.
_CHOOSE = """
    SELECT nspname FROM pg_namespace
    LEFT JOIN unnest(current_schemas(false)) WITH ORDINALITY AS path (name, place)
    ON name = nspname WHERE (nspname = 'public' OR place IS NOT NULL)
    AND nspname !~ '^pg_' AND has_schema_privilege(nspname, 'CREATE')
    AND has_schema_privilege(nspname, 'USAGE')
    ORDER BY nspname <> 'public', place LIMIT 1
"""
_USE = "SELECT set_config('search_path', quote_ident({schema}), false)"
_EXISTING = """
    SELECT relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = {schema}
"""
_LEDGER = "SELECT version, number FROM fairpool_ledger WHERE name = {ledger}"
_CREATE = "INSERT INTO fairpool_ledger VALUES ({ledger}, {version}, {number})"

_READ = """
    SELECT number, key, value, current_setting('transaction_read_only')
    FROM fairpool_ledger
    LEFT JOIN fairpool_ledger_row ON ledger = name WHERE name = {ledger}
"""
_SWAP = """
    UPDATE fairpool_ledger_row SET value = {after}
    WHERE ledger = {ledger} AND key = {key} AND value = {before} AND EXISTS
    (SELECT FROM fairpool_ledger WHERE name = {ledger} AND number = {number})
    RETURNING key
"""
_DELETE = "DELETE FROM fairpool_ledger_row WHERE ledger = {ledger} AND key IN ({keys})"
_WRITE = """
    INSERT INTO fairpool_ledger_row VALUES {rows}
    ON CONFLICT (ledger, key) DO UPDATE SET value = excluded.value
"""
_PUBLISH = """
    INSERT INTO fairpool_figures VALUES ({ledger}, {member}, {value})
    ON CONFLICT (ledger, member) DO UPDATE SET value = excluded.value
"""
_PUBLISHED = "SELECT member, value FROM fairpool_figures WHERE ledger = {ledger}"
_UNPUBLISH = (
    "DELETE FROM fairpool_figures WHERE ledger = {ledger} AND member IN ({members})"
)


class Text(str):
    """A part of a statement; anything else is a value."""

    __slots__ = ()


def literal(value: object) -> str:
    """Return a text or a number as it stands in a statement.

    Values stand in the statements: several of them with parameters would need several
    round trips.
    """
    if isinstance(value, (Text, int)):
        return str(value)
    doubled = str(value).replace("\\", "\\\\").replace("'", "''")
    return f"E'{doubled}'"


def literals(values: Collection[object]) -> Text:
    return Text(", ".join(map(literal, values)))


def execute(connection: Any, message: str) -> list[Any]:
    """Execute statements in one round trip; return the rows of the last one."""
    with closing(connection.cursor()) as cursor:
        cursor.execute(message)
        if not hasattr(connection, "poll"):  # psycopg begins with the first one's
            while cursor.nextset():
                pass
        return cursor.fetchall() if cursor.description else []


class Tables:
    """The tables as one ledger sees them. The caller sees to transactions."""

    def __init__(self, ledger: str, name: str, run: Callable[..., list[Any]]) -> None:
        self._name = name
        self._ledger = ledger
        self._ask = run
        #: The ledger's own number, another one if it was made anew; 0 until opened.
        self.number = 0
        #: The server let transactions write when the rows were read last.
        self.writable = True

    def unusable(self, why: object) -> LedgerError:
        """Return what is raised where the operator has to do something."""
        return LedgerError(f"the ledger {self._name} cannot be used: {why}")

    def _run(self, *statements: str, **values: object) -> list[Any]:
        return self._ask(*statements, ledger=self._ledger, **values)

    def find(self) -> bool:
        """Have the session use the tables, if all are there, and this ledger in them.

        Takes no lock. If not: :meth:`open`, under one.
        """
        found = self._run("RESET search_path", _FIND)
        if not found:
            return False
        schema = self._usable(found[0])
        existing = {name for (name,) in self._run(_USE, _EXISTING, schema=schema)}
        return existing.issuperset(_TABLES) and self._is_there()

    def open(self) -> None:
        """Find the tables or create them; have the session use them."""
        found = self._run("RESET search_path", _FIND)
        schema = self._usable(found[0]) if found else self._choose()
        existing = {name for (name,) in self._run(_USE, _EXISTING, schema=schema)}
        if "fairpool_ledger" in existing and "fairpool_ledger_row" not in existing:
            # The ledgers have lost their rows: each becomes another one.
            self._run("DELETE FROM fairpool_ledger")
        if missing := [made for name, made in _TABLES.items() if name not in existing]:
            self._run(*missing)
        if not self._is_there():
            self.number = uuid.uuid4().int & 0x7FFFFFFF
            self._run(_CREATE, version=SCHEMA, number=self.number)

    def _is_there(self) -> bool:
        found = self._run(_LEDGER)
        if not found:
            return False
        version, self.number = found[0]
        if version > SCHEMA:
            raise self.unusable(
                f"it has schema version {version}, and this process knows {SCHEMA}: "
                "it runs an older sqla_fairpool"
            )
        return True

    def _usable(self, found: tuple[str, bool, str]) -> str:
        schema, is_usable, role = found
        if not is_usable:
            raise self.unusable(
                f"its tables are in the schema {schema!r}, which the role {role!r} "
                "may not use: grant it USAGE on the schema, and SELECT, INSERT, "
                f"UPDATE and DELETE on {', '.join(_TABLES)}"
            )
        return schema

    def _choose(self) -> str:
        found = self._run(_CHOOSE)
        if not found:
            raise self.unusable(
                "there are no tables yet, and the role may not create any: let a role "
                "that may, with CREATE on the schema public, join first"
            )
        return str(found[0][0])

    def read(self, *before: str, **values: object) -> dict[str, str] | None:
        """Return the rows; None if they are not those of the ledger that was opened.

        :param before: statements that are executed first, in the same round trip.
        """
        found = self._run(*before, _READ, **values)
        # One statement for both: a look before would be no look at these rows.
        if not found or found[0][0] != self.number:
            return None
        self.writable = found[0][3] != "on"
        return {key: value for _, key, value, _ in found if key is not None}

    def write(
        self,
        before: Mapping[str, str],
        rows: Mapping[str, str],
        *after: str,
        **values: object,
    ) -> None:
        """Write what has changed.

        :param after: statements that are executed then, in the same round trip.
        """
        gone, changed = changes(before, rows)
        statements = [_DELETE] * bool(gone) + [_WRITE] * bool(changed)
        new = [f"({literals((self._ledger, *row))})" for row in changed]
        values |= {"keys": literals(gone), "rows": Text(", ".join(new))}
        self._run(*statements, *after, **values)

    def swap(self, lock: str, key: str, before: str, after: str) -> bool:
        """Write a row if it is there as it was before; return if it was."""
        # The statements of one message are one transaction.
        row = {"key": key, "before": before, "after": after, "number": self.number}
        return bool(self._run(lock, _SWAP, **row))

    def publish(self, member: str, figures: str) -> None:
        """Write what a member says of itself."""
        self._run(_PUBLISH, member=member, value=figures)

    def published(self, members: Collection[str]) -> dict[str, str]:
        """Return what members have published last; remove that of all others."""
        said = dict(self._run(_PUBLISHED))
        if left := said.keys() - set(members):
            self._run(_UNPUBLISH, members=literals(sorted(left)))
        return {member: text for member, text in said.items() if member in members}


#: For libpq, unless the URL has others: a network that is cut is noticed within 8
#: seconds, by probes or by what is sent and not acknowledged (milliseconds).
_KEEPALIVES = {
    "keepalives": 1,
    "keepalives_idle": 4,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "tcp_user_timeout": 8_000,
}
#: Seconds.
_CONNECT_TIMEOUT = 5


def make_engine(url: URL, connected: Callable[[Any], None]) -> Engine:
    """Make what opens the control connection.

    :param connected: called with the driver's connection, before it is used.
    """
    keepalives = {k: v for k, v in _KEEPALIVES.items() if k not in url.query}
    engine = create_engine(
        url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        use_native_hstore=False,  # which takes round trips
        connect_args={
            **keepalives,
            "connect_timeout": _CONNECT_TIMEOUT,
            "application_name": "sqla_fairpool ledger",
        },
    )

    # What the dialect asks a server about itself is for SQL that is not used here.
    engine.dialect.initialize = lambda connection: None  # type: ignore[method-assign]  # of this engine only

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, cargs: Any, cparams: Any) -> Any:
        connection = dialect.connect(*cargs, **cparams)
        connected(connection)
        return connection

    return engine


class Line:
    """The socket of a connection, hung up on if no answer comes in time.

    What the kernel does for a network that is cut it does not do for a proxy, or a
    server, that takes everything and says nothing, and libpq waits for ever. A thread
    waits instead: it sleeps while nothing is due, and a second one only after that.
    """

    def __init__(self, file: int) -> None:
        # Of our own: nobody else closes it, so that its number is never another file's.
        self._file = os.dup(file)
        self._due: float | None = None
        self._bell = threading.Event()
        self._sleeps = self._closed = False
        #: It was hung up.
        self.is_cut = False
        start_thread(self._run, "sqla_fairpool-line")

    @contextmanager
    def answers_within(self, seconds: float) -> Iterator[None]:
        """Hang up if this block is not over by then."""
        self.expect(seconds)
        try:
            yield
        finally:
            self._due = None

    def expect(self, seconds: float) -> None:
        """Hang up then, unless there is a block that is over before."""
        self._due = time.monotonic() + seconds
        if self._sleeps:
            self._bell.set()

    def _run(self) -> None:
        while not self._closed:
            due = self._due
            if due is None:
                self._sleeps = True
                if self._due is None:
                    self._bell.wait()
                self._sleeps = False
            elif (left := due - time.monotonic()) > 0:
                self._bell.wait(left)
            elif due == self._due:
                self.is_cut = True
                self._shut()
                break
            self._bell.clear()
        os.close(self._file)

    def _shut(self) -> None:
        # Not `socket.socket`, which eventlet replaces: see `pool.endings`.
        line = _socket.socket(fileno=self._file)
        with suppress(OSError):
            line.shutdown(_socket.SHUT_RDWR)
        line.detach()

    def close(self) -> None:
        self._closed = True
        self._bell.set()

    def after_fork(self) -> None:
        """In the child, where there is no thread: close the copy."""
        with suppress(OSError):
            os.close(self._file)


#: A notification: channel, payload, and process of the sender.
Heard = tuple[str, str, int]


def notifications(connection: Any, inbox: list[Heard]) -> list[Heard]:
    """Return the notifications that have come; raise if the connection is lost."""
    heard = list(inbox)
    inbox.clear()
    if hasattr(connection, "poll"):  # psycopg2
        connection.poll()
        if connection.closed:
            raise StoreAway("the server has closed the connection")
        heard += [(n.channel, n.payload, n.pid) for n in connection.notifies]
        connection.notifies.clear()
        return heard
    connection.pgconn.consume_input()
    while (n := connection.pgconn.notifies()) is not None:
        heard.append((n.relname.decode(), n.extra.decode(), n.be_pid))
    return heard


def lock_key(name: str) -> int:
    """Return the key of a lock for a name, a member's say, as a positive int8."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:15], 16)


def channel(name: str) -> str:
    """Return the channel of a member, or of a place."""
    return f"fairpool_{name}"


def first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
