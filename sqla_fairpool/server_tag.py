"""``server_tag``: the tag as PostgreSQL's ``application_name``.

So that ``pg_stat_activity`` tells the scrapers apart. It is said when a connection goes
from one tag to another, and only then.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.pool import ConnectionPoolEntry, Pool

__all__ = ["TOLD", "tell", "tell_on_checkout"]

#: Where it is noted, in a record's ``info``, which a new connection empties.
TOLD = "sqla_fairpool_tag_told"


def tell_on_checkout(pool: Pool) -> None:
    """Tell the server the tag of each connection that is checked out."""

    @event.listens_for(pool, "checkout")
    def checked_out(dbapi_connection: Any, record: Any, proxied: Any) -> None:
        tell(proxied.dbapi_connection, record, pool._dialect)


def tell(dbapi_connection: Any, record: ConnectionPoolEntry, dialect: Any) -> None:
    """Tell the server whose connection this is, unless it knows.

    :raises sqlalchemy.exc.DisconnectionError: if the connection turns out to be
      dead; the pool opens another one then.
    """
    tag = getattr(record, "seat").account.tag  # noqa: B009
    if record.info.get(TOLD) == tag:
        return
    # Doubled quotes and backslashes: as PostgreSQL writes any string.
    literal = tag.replace("\\", "\\\\").replace("'", "''")
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(f"SET application_name = E'{literal}'")
        # Or the rollback at the checkin takes it back.
        dbapi_connection.commit()
    except dialect.loaded_dbapi.Error as error:
        if not dialect.is_disconnect(error, dbapi_connection, cursor):
            raise
        raise exc.DisconnectionError("found dead when told its tag") from error
    finally:
        cursor.close()
    record.info[TOLD] = tag
