"""Server sessions of members, as PostgreSQL itself tells them.

A session is known by its server process and by when that began. Nothing that an
application does in the session changes these (``DISCARD ALL`` drops advisory locks and
settings), and every session of the server shows them to every other one, whichever
database it is in.

Plain DBAPI cursors, so it works behind each driver of SQLAlchemy's.
"""

from __future__ import annotations

from typing import Any

from .errors import LedgerError
from .rows import Session
from .watch import Present

__all__ = [
    "identify",
    "look",
    "other_ledgers",
    "sign_stands",
]

#: First key of the advisory lock by which a pool shows which ledger it uses; the second
#: is the ledger's number. For a warning only. Any number would do; this one is "pool".
_USES = 0x706F6F6C

_BEGAN = "(extract(epoch from backend_start) * 1000000)::bigint"


# What tells a server from all others. A standby has its primary's number, and keeps it
# when it is promoted.
_SERVER = "(SELECT 'postgresql ' || system_identifier FROM pg_control_system())"


def identify(cursor: Any, backend_pid: int | None) -> tuple[str, Session]:
    """Return the server, and the session that a cursor is of.

    :param backend_pid: the server process as the driver knows it, None if it does not.
    :raises LedgerError: if a pooler is in between.
    """
    cursor.execute(
        f"SELECT {_SERVER}, pid, {_BEGAN} FROM pg_stat_activity "
        "WHERE pid = pg_backend_pid()"
    )
    server, pid, began = cursor.fetchone()
    if backend_pid is not None and pid != backend_pid:
        raise LedgerError(
            f"the driver believes to be connected to process {backend_pid} of the "
            f"server, and is served by {pid}: a pooler like PgBouncer is in between, "
            "where sessions, by which a ledger counts, mean nothing; connect directly"
        )
    return server, Session(pid, began)


def look(cursor: Any) -> Present:
    """Return the sessions that a server has now."""
    # Processes of the server's own, of replication say, have a superuser's name. What
    # another role's processes are may be hidden.
    cursor.execute(
        f"SELECT pid, {_BEGAN}, usename = current_user AND pid <> pg_backend_pid() "
        f"AND application_name <> 'sqla_fairpool ledger', {_SERVER} "
        "FROM pg_stat_activity "
        "WHERE coalesce(backend_type, 'client backend') = 'client backend'"
    )
    rows = cursor.fetchall()
    return Present(
        rows[0][3],
        frozenset(Session(pid, began) for pid, began, *_ in rows),
        frozenset(Session(pid, began) for pid, began, is_peer, _ in rows if is_peer),
    )


def sign_stands(cursor: Any, sign: int) -> bool:
    """Tell if a member's sign of life stands, asked on the server that holds it."""
    cursor.execute(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 "
        f"AND granted AND (classid::bigint << 32) | objid::bigint = {sign}"
    )
    return bool(cursor.fetchone()[0])


def other_ledgers(cursor: Any, key: int) -> set[int]:
    """Show which ledger a session's database is used with; return others in use there.

    :param key: the ledger's own number, a positive int4.
    """
    cursor.execute(f"SELECT pg_advisory_lock_shared({_USES}, {key})")
    cursor.execute(
        "SELECT DISTINCT objid::bigint FROM pg_locks WHERE locktype = 'advisory' "
        f"AND classid::bigint = {_USES} AND objsubid = 2 AND granted AND database = "
        "(SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return {int(row[0]) for row in cursor.fetchall()} - {key}
