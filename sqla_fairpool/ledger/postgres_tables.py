"""The tables of the PostgreSQL store, and how it uses its drivers.

    fairpool_ledger(name, version, number)      the ledgers in this database
    fairpool_ledger_row(ledger, key, value)     their rows
    fairpool_figures(ledger, member, value)     what members say of themselves, if asked

All processes find the same tables, whatever their role and ``search_path``: those of
the oldest ``fairpool_ledger`` in the database. Only where there is none, tables are
created; so a role that may read and write them needs no right to create anything.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from .errors import LedgerError
from .store import StoreAway, changes

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
_USE = "SELECT set_config('search_path', quote_ident(:schema), false)"
_EXISTING = """
    SELECT relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE nspname = :schema
"""
_LEDGER = "SELECT version, number FROM fairpool_ledger WHERE name = :ledger"
_CREATE = "INSERT INTO fairpool_ledger VALUES (:ledger, :version, :number)"

_READ = """
    SELECT number, key, value FROM fairpool_ledger
    LEFT JOIN fairpool_ledger_row ON ledger = name WHERE name = :ledger
"""
_DELETE = "DELETE FROM fairpool_ledger_row WHERE ledger = :ledger AND key = :key"
_WRITE = """
    INSERT INTO fairpool_ledger_row VALUES (:ledger, :key, :value)
    ON CONFLICT (ledger, key) DO UPDATE SET value = excluded.value
"""
_PUBLISH = """
    INSERT INTO fairpool_figures VALUES (:ledger, :member, :value)
    ON CONFLICT (ledger, member) DO UPDATE SET value = excluded.value
"""
_PUBLISHED = "SELECT member, value FROM fairpool_figures WHERE ledger = :ledger"
_UNPUBLISH = "DELETE FROM fairpool_figures WHERE ledger = :ledger AND member = :member"


class Tables:
    """The tables as one ledger sees them. The caller sees to transactions."""

    def __init__(self, ledger: str, name: str, run: Callable[..., Any]) -> None:
        self._name = name
        self._ledger = {"ledger": ledger}
        self._run = run
        #: The ledger's own number, another one if it was made anew; 0 until opened.
        self.number = 0

    def unusable(self, why: object) -> LedgerError:
        """Return what is raised where the operator has to do something."""
        return LedgerError(f"the ledger {self._name} cannot be used: {why}")

    def open(self) -> None:
        """Find the tables or create them; have the session use them."""
        self._run("RESET search_path")
        schema = {"schema": self._find()}
        self._run(_USE, schema)
        existing = set(self._run(_EXISTING, schema).scalars())
        if "fairpool_ledger" in existing and "fairpool_ledger_row" not in existing:
            # The ledgers have lost their rows: each becomes another one.
            self._run("DELETE FROM fairpool_ledger")
        for name, statement in _TABLES.items():
            if name not in existing:
                self._run(statement)
        found = self._run(_LEDGER, self._ledger).first()
        if found is None:
            found = SCHEMA, uuid.uuid4().int & 0x7FFFFFFF
            row = {"version": SCHEMA, "number": found[1]}
            self._run(_CREATE, self._ledger | row)
        version, self.number = found
        if version > SCHEMA:
            raise self.unusable(
                f"it has schema version {version}, and this process knows {SCHEMA}: "
                "it runs an older sqla_fairpool"
            )

    def _find(self) -> str:
        found = self._run(_FIND).first()
        if found is not None:
            schema, is_usable, role = found
            if not is_usable:
                raise self.unusable(
                    f"its tables are in the schema {schema!r}, which the role {role!r} "
                    "may not use: grant it USAGE on the schema, and SELECT, INSERT, "
                    f"UPDATE and DELETE on {', '.join(_TABLES)}"
                )
            return str(schema)
        schema = self._run(_CHOOSE).scalar()
        if schema is None:
            raise self.unusable(
                "there are no tables yet, and the role may not create any: let a role "
                "that may, with CREATE on the schema public, join first"
            )
        return str(schema)

    def read(self) -> dict[str, str] | None:
        """Return the rows; None if they are not those of the ledger that was opened."""
        found = self._run(_READ, self._ledger).all()
        # One statement for both: a look before would be no look at these rows.
        if not found or found[0][0] != self.number:
            return None
        return {key: value for _, key, value in found if key is not None}

    def write(self, before: Mapping[str, str], rows: Mapping[str, str]) -> None:
        gone, changed = changes(before, rows)
        for key in gone:
            self._run(_DELETE, self._ledger | {"key": key})
        if changed:
            values = [self._ledger | {"key": k, "value": v} for k, v in changed]
            self._run(_WRITE, values)

    def publish(self, member: str, figures: str) -> None:
        """Write what a member says of itself."""
        self._run(_PUBLISH, self._ledger | {"member": member, "value": figures})

    def published(self, members: Collection[str]) -> dict[str, str]:
        """Return what members have published last; remove that of all others."""
        said = dict(map(tuple, self._run(_PUBLISHED, self._ledger)))
        for member in said.keys() - set(members):
            self._run(_UNPUBLISH, self._ledger | {"member": member})
        return {member: text for member, text in said.items() if member in members}


#: For libpq, unless the URL has others: a network that is cut is noticed within 10
#: seconds, by probes or by what is sent and not acknowledged (milliseconds).
_KEEPALIVES = {
    "keepalives": 1,
    "keepalives_idle": 4,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
#: Seconds.
_CONNECT_TIMEOUT = 5


def make_engine(url: URL) -> Engine:
    keepalives = {k: v for k, v in _KEEPALIVES.items() if k not in url.query}
    return create_engine(
        url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={
            **keepalives,
            "connect_timeout": _CONNECT_TIMEOUT,
            "application_name": "sqla_fairpool ledger",
        },
    )


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


def first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
