"""The PostgreSQL that the benchmarks run on: an embedded one, or one that is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, Engine, create_engine, exc, make_url, text
from sqlalchemy.pool import NullPool, Pool

from sqla_fairpool.demo import EmbeddedServer, Signals

APPLICATION_NAME = "sqla-fairpool benchmarks"

_SERVER = """
    SELECT current_setting('server_version') AS version,
        current_setting('max_connections')::int AS max_connections,
        (SELECT sum(numbackends) FROM pg_stat_database) AS used
"""


class BenchError(Exception):
    """A benchmark cannot run; the text says why."""


@dataclass(frozen=True)
class Database:
    """A database that the benchmarks may use."""

    url: URL
    about: dict[str, Any] | None = None

    def engine(self, poolclass: type[Pool], **options: Any) -> Engine:
        arguments = {"application_name": APPLICATION_NAME}
        return create_engine(
            self.url, connect_args=arguments, poolclass=poolclass, **options
        )

    @property
    def dsn(self) -> str:
        """The URL as libpq and asyncpg read it, with the password."""
        plain = self.url.set(drivername="postgresql")
        return plain.render_as_string(hide_password=False)


@contextmanager
def open_database(url: str | None = None, sessions: int = 0) -> Iterator[Database]:
    """Yield the database at `url`; without one, an embedded server's."""
    with ExitStack() as stack:
        where = _parse(_embedded(stack) if url is None else url)
        hidden = where.difference_update_query(["password", "sslpassword"])
        shown = "embedded" if url is None else hidden.render_as_string()
        try:
            with Database(where).engine(NullPool).connect() as connection:
                server = connection.execute(text(_SERVER)).one()
        except exc.SQLAlchemyError as error:
            raise BenchError(f"no connection to {shown}: {reason(error)}") from None
        room = server.max_connections - server.used
        if room < sessions:
            raise BenchError(
                f"{sessions} connections are needed and the server has room for only "
                f"{room} (max_connections={server.max_connections})"
            )
        most = {"version": server.version, "max_connections": server.max_connections}
        yield Database(where, {"url": shown, "embedded": url is None, **most})


def reason(error: Exception) -> str:
    """Return the server's or the driver's own words, without SQL and parameters."""
    original = getattr(error, "orig", None) or error
    diagnosis = getattr(original, "diag", None)
    return getattr(diagnosis, "message_primary", None) or str(original)


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        # Their messages may quote the URL, with its password.
        example = "postgresql://user@host/database"
        raise BenchError(f"--url is not a database URL, like {example}") from None
    if not parsed.drivername.startswith("postgres"):
        name = parsed.drivername
        raise BenchError(f"--url: the benchmarks need PostgreSQL, not {name!r}")
    return parsed.set(drivername="postgresql+psycopg2")


def _embedded(stack: ExitStack) -> str:
    with _uninterrupted():  # a start that was left half-way is hard to undo
        server = EmbeddedServer()
        stack.callback(_uninterrupted()(server.stop))
        try:
            server.start()
        except Exception as error:
            raise BenchError(str(error)) from error
    return server.url


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let the block end before ``KeyboardInterrupt`` is raised."""
    with Signals() as signals:
        try:
            yield
        finally:
            signals.check()
