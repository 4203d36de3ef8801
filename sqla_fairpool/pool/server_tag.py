"""``server_tag``: the tag as PostgreSQL's ``application_name``.

So that ``pg_stat_activity`` tells the scrapers apart. The server is told only if the
session has another name. Which one it has is not remembered here, because a statement
of the application may change it, or ``RESET ALL`` and ``DISCARD ALL``. PostgreSQL
reports each change, and the drivers keep the last report: to read it takes no round
trip.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.pool import Pool

__all__ = ["TOLD", "parameter", "tell", "tell_on_checkout"]

#: Where the last tag is noted, in a record's ``info``, which a new connection empties:
#: the record that is preferred for the tag. Not what the server knows now.
TOLD = "sqla_fairpool_tag_told"

#: The longest name that PostgreSQL keeps: NAMEDATALEN - 1.
_LONGEST = 63


def tell_on_checkout(pool: Pool) -> None:
    """Tell the server the tag of each connection that is checked out."""

    @event.listens_for(pool, "checkout")
    def checked_out(dbapi_connection: Any, record: Any, proxied: Any) -> None:
        tell(proxied.dbapi_connection, record, pool._dialect)


def tell(dbapi_connection: Any, record: Any, dialect: Any) -> None:
    """Tell the server whose connection this is, unless it knows.

    :raises sqlalchemy.exc.DisconnectionError: if the connection turns out to be
      dead; the pool opens another one then.
    """
    tag = record.fair.checkout.tag_state.tag
    name = _as_name(tag)
    driver_connection = dialect.get_driver_connection(dbapi_connection)
    if parameter(driver_connection, "application_name") != name:
        try:
            _say(dbapi_connection, name)
        except dialect.loaded_dbapi.Error as error:
            if not dialect.is_disconnect(error, dbapi_connection, None):
                raise
            raise exc.DisconnectionError("found dead when told its tag") from error
    record.info[TOLD] = tag


def _as_name(tag: str) -> str:
    """Return a tag as PostgreSQL 16 and later would write it.

    That is ASCII, so that it can be said in every encoding, and is not changed by
    any server: the answer can be compared with what was said.
    """
    return tag.encode().decode("ascii", "backslashreplace")[:_LONGEST]


def parameter(driver_connection: Any, name: str) -> str | None:
    """Return what PostgreSQL last reported of a session's setting, None if unknown."""
    try:
        if hasattr(driver_connection, "get_settings"):  # asyncpg
            value = getattr(driver_connection.get_settings(), name)
        else:  # psycopg and psycopg2
            value = driver_connection.info.parameter_status(name)
    except Exception:
        return None  # another driver, or a connection that is closed, or not reported
    return value if isinstance(value, str) else None


def _say(dbapi_connection: Any, name: str) -> None:
    # Doubled quotes and backslashes: as PostgreSQL writes any string.
    literal = name.replace("\\", "\\\\").replace("'", "''")
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(f"SET application_name = E'{literal}'")
        # Or the rollback at the checkin takes it back.
        dbapi_connection.commit()
    finally:
        cursor.close()
