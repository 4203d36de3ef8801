"""Server sessions of members, seen by PostgreSQL itself.

Each connection of a member takes a shared advisory lock with the member's number, once,
when it is opened. The server releases it exactly when the session ends, whatever became
of the client; so who asks ``pg_locks`` learns which members still have sessions.

Plain DBAPI cursors, so it works behind each driver of SQLAlchemy's.
"""

from __future__ import annotations

from typing import Any

from .errors import LedgerError

__all__ = ["mark", "members_with_sessions", "refuse_pooler"]


def mark(cursor: Any, key: int, number: int) -> None:
    """Have the cursor's session counted as one of member `number`.

    :param key: the ledger's own number, a positive int4.
    """
    cursor.execute(f"SELECT pg_advisory_lock_shared({key}, {number})")
    cursor.fetchall()


def members_with_sessions(cursor: Any, key: int) -> set[int]:
    """Return the numbers of members that have a session on the cursor's database."""
    cursor.execute(
        "SELECT DISTINCT objid::int FROM pg_locks WHERE locktype = 'advisory' "
        f"AND classid::int = {key} AND objsubid = 2 AND database = "
        "(SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return {row[0] for row in cursor.fetchall()}


def refuse_pooler(cursor: Any, backend_pid: int | None) -> None:
    """Raise if the session is not the driver's: a transaction pooler is in between.

    :param backend_pid: the server process as the driver knows it.
    """
    if backend_pid is None:
        return
    cursor.execute("SELECT pg_backend_pid()")
    (there,) = cursor.fetchone()
    if there != backend_pid:
        raise LedgerError(
            f"the driver believes to be connected to process {backend_pid} of the "
            f"server, and is served by {there}: a pooler like PgBouncer is in between, "
            "where sessions, by which a ledger counts, mean nothing; connect directly"
        )
