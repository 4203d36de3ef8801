"""The tables in a PostgreSQL database: in which schema, and what is read and written.

    fairpool_ledger(name, version, number)      the ledgers in this database
    fairpool_ledger_row(ledger, key, value)     their rows
    fairpool_figures(ledger, member, value)     what members say of themselves, if asked

All processes find the same tables, whatever their role and ``search_path``: those of
the oldest ``fairpool_ledger`` in the database. Only where there is none, tables are
created; so a role that may read and write them needs no right to create anything.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping

from sqlalchemy import Connection, text

from .errors import LedgerError

__all__ = ["Tables", "TablesGone"]

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
# rises: tables that somebody creates later, elsewhere, change nothing.
_FIND = text(
    "SELECT nspname, has_schema_privilege(nspname, 'USAGE'), current_user "
    "FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE relname = 'fairpool_ledger' AND relkind = 'r' AND relpersistence <> 't' "
    "ORDER BY pg_class.oid LIMIT 1"
)
# The schema for new tables: public, or else the first of the search_path.
_CHOOSE = text(
    "SELECT nspname FROM pg_namespace LEFT JOIN "
    "unnest(current_schemas(false)) WITH ORDINALITY AS path (name, place) "
    "ON name = nspname WHERE (nspname = 'public' OR place IS NOT NULL) "
    "AND nspname !~ '^pg_' AND has_schema_privilege(nspname, 'CREATE') "
    "AND has_schema_privilege(nspname, 'USAGE') "
    "ORDER BY nspname <> 'public', place LIMIT 1"
)
_USE = text("SELECT set_config('search_path', quote_ident(:schema), false)")
_EXISTING = text(
    "SELECT relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
    "WHERE nspname = :schema"
)
_LEDGER = text("SELECT version, number FROM fairpool_ledger WHERE name = :ledger")
_CREATE = text("INSERT INTO fairpool_ledger VALUES (:ledger, :version, :number)")

_READ = text(
    "SELECT number, key, value FROM fairpool_ledger "
    "LEFT JOIN fairpool_ledger_row ON ledger = name WHERE name = :ledger"
)
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


class TablesGone(Exception):  # noqa: N818  (a state, not an error)
    """The tables that were opened do not exist any more, or are others now."""


class Tables:
    """The tables as one ledger sees them. The caller sees to transactions.

    :param ledger: its name.
    """

    def __init__(self, ledger: str) -> None:
        self._ledger = ledger
        #: The ledger's own number, another one if it was made anew; 0 until opened.
        self.number = 0

    def open(self, connection: Connection) -> None:
        """Find the tables or create them; have the session use them.

        In a transaction, in which no other process does the same.

        :raises LedgerError: if they cannot be used as they are.
        """
        connection.execute(text("RESET search_path"))
        schema = self._find(connection)
        connection.execute(_USE, {"schema": schema})
        existing = set(connection.execute(_EXISTING, {"schema": schema}).scalars())
        if "fairpool_ledger" in existing and "fairpool_ledger_row" not in existing:
            # The ledgers have lost their rows: each becomes another one.
            connection.execute(text("DELETE FROM fairpool_ledger"))
        for name, statement in _TABLES.items():
            if name not in existing:
                connection.execute(text(statement))
        version, self.number = self._register(connection)
        if version > SCHEMA:
            raise LedgerError(
                f"it has schema version {version}, and this process knows {SCHEMA}: "
                "it runs an older sqla_fairpool"
            )

    def _register(self, connection: Connection) -> tuple[int, int]:
        """Return the ledger's version and number, new ones if it is a new ledger."""
        found = connection.execute(_LEDGER, {"ledger": self._ledger}).first()
        if found is not None:
            return found[0], found[1]
        number = uuid.uuid4().int & 0x7FFFFFFF
        row = {"ledger": self._ledger, "version": SCHEMA, "number": number}
        connection.execute(_CREATE, row)
        return SCHEMA, number

    def _find(self, connection: Connection) -> str:
        found = connection.execute(_FIND).first()
        if found is not None:
            schema, is_usable, role = found
            if not is_usable:
                raise LedgerError(
                    f"its tables are in the schema {schema!r}, which the role {role!r} "
                    "may not use: grant it USAGE on the schema, and SELECT, INSERT, "
                    f"UPDATE and DELETE on {', '.join(_TABLES)}"
                )
            return str(schema)
        schema = connection.execute(_CHOOSE).scalar()
        if schema is None:
            raise LedgerError(
                "there are no tables yet, and the role may not create any: let a role "
                "that may, with CREATE on the schema public, join first"
            )
        return str(schema)

    def read(self, connection: Connection) -> dict[str, str]:
        """Return the rows.

        :raises TablesGone: if they are not those of the ledger that was opened.
        """
        found = connection.execute(_READ, {"ledger": self._ledger}).all()
        # One statement for both: a look before would be no look at these rows.
        if not found or found[0][0] != self.number:
            raise TablesGone("the ledger was deleted from its tables, or made anew")
        return {key: value for _, key, value in found if key is not None}

    def write(
        self, connection: Connection, before: Mapping[str, str], rows: Mapping[str, str]
    ) -> None:
        """Write what differs from `before`."""
        ledger = self._ledger
        for key in before:
            if key not in rows:
                connection.execute(_DELETE, {"ledger": ledger, "key": key})
        changed = [
            {"ledger": ledger, "key": key, "value": value}
            for key, value in rows.items()
            if before.get(key) != value
        ]
        if changed:
            connection.execute(_WRITE, changed)

    def publish(self, connection: Connection, member: str, figures: str) -> None:
        """Write what a member says of itself."""
        row = {"ledger": self._ledger, "member": member, "value": figures}
        connection.execute(_PUBLISH, row)

    def published(
        self, connection: Connection, members: Collection[str]
    ) -> dict[str, str]:
        """Return what members have published last; remove that of all others."""
        rows = connection.execute(_PUBLISHED, {"ledger": self._ledger}).all()
        left = [row.member for row in rows if row.member not in members]
        for member in left:
            connection.execute(_UNPUBLISH, {"ledger": self._ledger, "member": member})
        return {row.member: row.value for row in rows if row.member in members}
