"""What PostgreSQL is told of a tag: its name, its time limits.

``server_tag`` is the tag as ``application_name``, so that ``pg_stat_activity`` tells
the scrapers apart. The server is told only if the session has another name. Which one
it has is not remembered here, because a statement of the application may change it, or
``RESET ALL`` and ``DISCARD ALL``. PostgreSQL reports each change, and the drivers keep
the last report: to read it takes no round trip. Of time limits (:class:`.TagLimits`)
nothing is reported. They are told when a connection goes to a tag that has others, and
with the name, in one statement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import event, exc
from sqlalchemy.pool import Pool

__all__ = ["TIMES_TOLD", "TOLD", "parameter", "tell", "tell_on_checkout"]

#: Where the last tag is noted, in a record's ``info``, which a new connection empties:
#: the record that is preferred for the tag. Not what the server knows now.
TOLD = "sqla_fairpool_tag_told"

#: Where the time limits are noted that the server was told, in the same way.
TIMES_TOLD = "sqla_fairpool_times_told"

#: PostgreSQL's names of the time limits.
_SETTINGS = {
    "statement_timeout": "statement_timeout",
    "idle_in_transaction_timeout": "idle_in_transaction_session_timeout",
    "lock_timeout": "lock_timeout",
}

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
    checkout = record.fair.checkout
    tag, times = checkout.tag_state.tag, checkout.tag_state.limits.times
    told = record.info.get(TIMES_TOLD, {})
    name = _as_name(tag) if checkout.core.options.server_tag else None
    driver_connection = dialect.get_driver_connection(dbapi_connection)
    if name is None or parameter(driver_connection, "application_name") == name:
        name = None
    # Where the name was lost, by RESET ALL say, so may be the rest.
    if name is not None or times != told:
        try:
            _say(dbapi_connection, name, *_changes(told, times))
        except dialect.loaded_dbapi.Error as error:
            if not dialect.is_disconnect(error, dbapi_connection, None):
                raise
            raise exc.DisconnectionError("found dead when told its tag") from error
    if told or times:
        record.info[TIMES_TOLD] = times
    record.info[TOLD] = tag


def _changes(told: Mapping[str, float], times: Mapping[str, float]) -> Iterator[str]:
    """Yield what sets the time limits, and sets those back that are over."""
    for name, setting in _SETTINGS.items():
        if name in times:
            milliseconds = max(round(times[name] * 1000), 1)
            yield f"set_config('{setting}', '{milliseconds}', false)"
        elif name in told:
            # As RESET does, which cannot stand in a statement with others.
            was = f"SELECT reset_val FROM pg_settings WHERE name = '{setting}'"
            yield f"set_config('{setting}', ({was}), false)"


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


def _say(dbapi_connection: Any, name: str | None, *settings: str) -> None:
    if name is not None:
        # Doubled quotes and backslashes: as PostgreSQL writes any string.
        literal = name.replace("\\", "\\\\").replace("'", "''")
        setting = f"set_config('application_name', E'{literal}', false)"
        settings = setting, *settings
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(f"SELECT {', '.join(settings)}")
        # Or the rollback at the checkin takes it back.
        dbapi_connection.commit()
    finally:
        cursor.close()
