"""Does a budget of connections fit what the server and the role allow?

Asked by one connection beside the budget, for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import create_engine, exc, text
from sqlalchemy.engine import URL, Connection
from sqlalchemy.pool import NullPool

from ..ledger.places import with_threads_driver
from .common import CommandError, hide_passwords

__all__ = ["Room", "ask_room", "connected", "limit_statement"]

#: Seconds for a server that does not answer.
_CONNECT_TIMEOUT = 5

# Superusers' and others' reserved slots are not for the role; neither are those that
# other roles have now. The first comes with PostgreSQL 16. Of others' sessions a role
# may see whose they are and in which database, and not what they are.
_ROOM = """
    SELECT current_setting('max_connections')::int AS most,
        coalesce(current_setting('reserved_connections', true)::int, 0)
        + current_setting('superuser_reserved_connections')::int AS reserved,
        (SELECT count(*) FROM pg_stat_activity
         WHERE usename <> current_user AND datid IS NOT NULL
         AND coalesce(backend_type, 'client backend') = 'client backend') AS others,
        rolname, rolsuper, rolconnlimit
    FROM pg_roles WHERE rolname = current_user
"""


@contextmanager
def connected(url: URL, name: str = "sqla_fairpool") -> Iterator[Connection]:
    """Connect to a PostgreSQL, outside of every pool, in autocommit.

    :param url: of any driver; psycopg2 or psycopg is used.
    :param name: the session's ``application_name``.
    :raises CommandError: with the server's words, without a password.
    """
    arguments = {"application_name": name, "connect_timeout": _CONNECT_TIMEOUT}
    try:
        engine = create_engine(
            with_threads_driver(url),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args=arguments,
        )
    except ImportError as error:
        raise CommandError(
            f"{error.name} is not installed: pip install 'sqla-fairpool[postgresql]'"
        ) from None
    try:
        with engine.connect() as connection:
            yield connection
    except exc.SQLAlchemyError as error:
        words = str(getattr(error, "orig", None) or error)
        raise CommandError(hide_passwords(" ".join(words.split()))) from None
    finally:
        engine.dispose()


def limit_statement(connection: Connection, role: str, wanted: int) -> str:
    """Return what has the server itself hold a role to so many connections."""
    quoted = connection.dialect.identifier_preparer.quote(role)
    return f"ALTER ROLE {quoted} CONNECTION LIMIT {wanted}"


@dataclass(frozen=True, slots=True)
class Room:
    """How many connections a server has for a role."""

    role: str
    max_connections: int
    #: For superusers and the like.
    reserved: int
    #: That other roles have now.
    others: int
    is_superuser: bool
    #: The role's own limit, None without one.
    limit: int | None

    @property
    def left(self) -> int:
        """What the server has for the role."""
        return self.max_connections - self.reserved - self.others

    def problems(self, wanted: int) -> Iterator[str]:
        """Yield, a line each, what stands against so many connections."""
        if wanted > self.left:
            yield (
                f"{wanted} connections do not fit: max_connections is "
                f"{self.max_connections}, {self.reserved} are reserved, other roles "
                f"have {self.others}, which leaves {max(self.left, 0)}"
            )
        # No limit binds a superuser.
        if self.limit is not None and self.limit < wanted and not self.is_superuser:
            yield f"the role {self.role!r} may have {self.limit} connections only"


def ask_room(connection: Connection) -> Room:
    """Ask the server how many connections it has for the connection's role."""
    row = connection.execute(text(_ROOM)).one()
    limit = None if row.rolconnlimit < 0 else row.rolconnlimit
    most, reserved, others = row.most, row.reserved, row.others
    return Room(row.rolname, most, reserved, others, row.rolsuper, limit)
