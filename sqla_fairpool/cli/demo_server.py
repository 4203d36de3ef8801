"""The demo's database: its table, its engines, and what the server sees of them.

Two marks tell the server's sessions apart. All of the demo's have an
``application_name`` that no other run has; and each statement of a scraper begins
with a comment that names the scraper, so that a session in a transaction shows
who has checked it out.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, exc, make_url, text
from sqlalchemy.pool import NullPool, Pool

from .common import CommandError

__all__ = ["Database", "why"]

#: Drivers that take the connection arguments used here; the first is the default.
_DRIVERS = ("psycopg2", "psycopg")

#: Seconds; also how long Ctrl-C can go unheard while a host does not answer.
_CONNECT_TIMEOUT = 5

_CREATE = """
    CREATE TABLE {table} (
        id integer PRIMARY KEY,
        scraper text NOT NULL,
        state text NOT NULL,
        payload text NOT NULL,
        runs integer NOT NULL DEFAULT 0,
        updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
"""

_INDEX = "CREATE INDEX ON {table} (scraper, updated_at)"

_FILL = """
    INSERT INTO {table} (id, scraper, state, payload)
    SELECT n, (CAST(:scrapers AS text[]))[1 + n % :count], 'new', md5(n::text)
    FROM generate_series(1, :rows) AS n
"""

# How many more sessions the server, the role and the database allow. Reserved
# slots are open to superusers only, limits of a role do not bind them.
_ROOM = """
    SELECT current_setting('server_version') AS version,
        current_setting('max_connections')::int AS max_connections,
        current_setting('max_connections')::int
        - CASE WHEN current_setting('is_superuser') = 'on' THEN 0 ELSE
            current_setting('superuser_reserved_connections')::int
            + coalesce(current_setting('reserved_connections', true)::int, 0) END
        - (SELECT sum(numbackends) FROM pg_stat_database) AS server_room,
        (SELECT nullif(rolconnlimit, -1)
            - (SELECT count(*) FROM pg_stat_activity WHERE usename = session_user)
            FROM pg_roles WHERE rolname = session_user AND NOT rolsuper) AS role_room,
        (SELECT nullif(datconnlimit, -1)
            - (SELECT count(*) FROM pg_stat_activity
               WHERE datname = current_database())
            FROM pg_database WHERE datname = current_database()
            AND current_setting('is_superuser') <> 'on') AS database_room
"""

# One look: who is in a transaction, by the mark of the last statement, and one
# row for all sessions. The first statement of a transaction is the driver's
# BEGIN, without a mark; it lasts a few microseconds.
_ACTIVITY = """
    SELECT split_part(query, ' ', 2) AS scraper, count(*)
    FROM pg_stat_activity
    WHERE application_name = :name AND starts_with(query, '/* ')
        AND state IN ('active', 'idle in transaction')
    GROUP BY 1
    UNION ALL
    SELECT '', count(*) FROM pg_stat_activity WHERE application_name = :name
"""


class Database:
    """The database in which the demo runs.

    :param url: its URL.
    :param is_embedded: it is the demo's own server.
    :param command: whose database it is.
    :raises CommandError: if the URL will not do.
    """

    def __init__(self, url: str, is_embedded: bool, command: str = "demo") -> None:
        self.url = _parse(url, command)
        self.is_embedded = is_embedded
        self._command = command
        self._run = secrets.token_hex(4)
        #: In a database of somebody else the name must be free, and stay ours.
        self.table = (
            "workflows" if is_embedded else f"sqla_fairpool_demo_workflows_{self._run}"
        )
        self._name = f"sqla-fairpool {command} {self._run}"
        # Outside of the pools that are observed, and not counted with them.
        self._observer = self._engine(f"{self._name} observer", poolclass=NullPool)
        self._connection: Connection | None = None

    def _engine(self, application_name: str, **options: Any) -> Engine:
        arguments: dict[str, Any] = {"application_name": application_name}
        if "connect_timeout" not in self.url.query:
            arguments["connect_timeout"] = _CONNECT_TIMEOUT
        try:
            return create_engine(self.url, connect_args=arguments, **options)
        except ImportError:
            raise CommandError(
                f"the driver {self.url.get_driver_name()} is not installed"
            ) from None

    def engine(self, poolclass: type[Pool], **options: Any) -> Engine:
        """Return an engine whose sessions the demo observes."""
        return self._engine(self._name, poolclass=poolclass, **options)

    def connect(self, sessions: int) -> dict[str, Any]:
        """Open the observer's connection; return what is known of the server.

        :param sessions: how many more are going to be needed.
        :raises CommandError: if it cannot be reached or has no room for them.
        """
        engine = self._observer.execution_options(isolation_level="AUTOCOMMIT")
        try:
            self._connection = engine.connect()
            row = self._connection.execute(text(_ROOM)).one()
        except exc.SQLAlchemyError as error:
            raise CommandError(f"no connection to {self.shown}: {why(error)}") from None
        for room, whose in (
            (row.server_room, f"the server (max_connections={row.max_connections})"),
            (row.role_room, "the role (CONNECTION LIMIT)"),
            (row.database_room, "the database (CONNECTION LIMIT)"),
        ):
            if room is not None and room < sessions:
                raise CommandError(
                    f"the {self._command} needs {sessions} more connections and "
                    f"{whose} has room for only {max(room, 0)}: raise the limit, or "
                    f"end other sessions"
                )
        return {
            "url": self.shown,
            "embedded": self.is_embedded,
            "version": row.version,
            "max_connections": row.max_connections,
            "table": self.table,
        }

    def create_table(self, scrapers: tuple[str, ...], rows: int) -> None:
        """Create the table with `rows` rows, which the scrapers share evenly."""
        values = {"scrapers": list(scrapers), "count": len(scrapers), "rows": rows}
        try:
            for statement in (_CREATE, _INDEX):
                self._execute(statement.format(table=self.table))
            self._execute(_FILL.format(table=self.table), **values)
        except exc.SQLAlchemyError as error:
            raise CommandError(f"no table in {self.shown}: {why(error)}") from None

    def activity(self) -> tuple[dict[str, int], int]:
        """Return each scraper's sessions in a transaction, and the number of all."""
        rows = self._execute(_ACTIVITY, name=self._name).all()
        counts = {str(scraper): int(count) for scraper, count in rows}
        return counts, counts.pop("")

    def wait_for_no_sessions(self, seconds: float = 5.0) -> None:
        """Wait until the server has noticed that the engine's sessions have gone."""
        deadline = time.monotonic() + seconds
        while self.activity()[1] and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self) -> None:
        """Drop the table, unless the server is going to be deleted with it.

        :raises CommandError: if the table could not be dropped.
        """
        try:
            if not self.is_embedded and self._connection is not None:
                self._drop()
        except exc.SQLAlchemyError as error:
            raise CommandError(
                f"the table {self.table} may be left: {why(error)}"
            ) from None
        finally:
            if self._connection is not None:
                with suppress(exc.SQLAlchemyError):
                    self._connection.close()

    def _drop(self) -> None:
        # By a connection of its own: an interrupt may have come in the middle of
        # a statement on the other one.
        with self._observer.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '5s'"))
            connection.execute(text(f"DROP TABLE IF EXISTS {self.table}"))

    def _execute(self, statement: str, **values: Any) -> Any:
        assert self._connection is not None
        return self._connection.execute(text(statement), values)

    @property
    def shown(self) -> str:
        """The URL as it may be shown: without its password."""
        if self.is_embedded:
            return f"postgresql in {self.url.query['host']}"
        hidden = self.url.difference_update_query(["password", "sslpassword"])
        return hidden.render_as_string(hide_password=True)


def _parse(url: str, command: str) -> URL:
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        # Their messages may quote the URL, with its password.
        raise CommandError(
            "--url is not a database URL, like postgresql://user@host/database"
        ) from None
    if "@" in (parsed.host or ""):
        # The rest of a password that was cut at its first "@".
        raise CommandError("--url: write @ in the password as %40, / as %2F")
    name, _, driver = parsed.drivername.partition("+")
    if name not in {"postgresql", "postgres"}:
        raise CommandError(f"--url: the {command} needs PostgreSQL, not {name!r}")
    driver = driver or _DRIVERS[0]
    if driver not in _DRIVERS:
        raise CommandError(
            f"--url: the {command} works with the drivers {' and '.join(_DRIVERS)}, "
            f"not {driver!r}"
        )
    return parsed.set(drivername=f"postgresql+{driver}")


def why(error: Exception) -> str:
    """Return the server's or the driver's own words, without SQL and parameters."""
    original = getattr(error, "orig", None) or error
    diagnosis = getattr(original, "diag", None)
    return getattr(diagnosis, "message_primary", None) or str(original)
