"""Does a budget of connections fit what the server and the role allow?

Asked by one connection beside the budget, for a moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import create_engine, exc, text
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.pool import NullPool

from ..launch.environment import parse_url
from ..ledger.addresses import database_place, with_threads_driver
from .common import CommandError, hide_passwords

__all__ = ["Need", "Room", "ask_room", "connected", "limit_statement", "need"]

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


def postgresql_url(given: str, where: str) -> URL:
    """Return the URL of a PostgreSQL, for a driver of threads.

    :param where: where it stands, for an error.
    :raises CommandError: if it is none. Shows no password.
    """
    try:
        url = parse_url(given, where)
    except exc.ArgumentError as error:
        raise CommandError(str(error)) from None
    if "@" in (url.host or ""):
        # The rest of a password that was cut at its first "@".
        raise CommandError(f"{where}: write @ in the password as %40, / as %2F")
    name = url.get_backend_name()
    if name != "postgresql":
        raise CommandError(f"{where}: a PostgreSQL database is needed, not {name!r}")
    return with_threads_driver(url)


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
class Need:
    """The connections that a budget needs at a server, part by part."""

    #: The pools' own, in all processes together.
    budget: int
    processes: int
    #: The ledger is in that server: each process has a control connection to it.
    has_ledger: bool
    #: It is the pools' role that connects to the ledger.
    shares_role: bool
    #: Monitors and commands at one time.
    tools: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """What they are for, and how many for each."""
        control = "control connections, one for each process"
        if not self.shares_role:
            control += " and of another role"
        parts = {
            "of the pools": self.budget,
            control: self.processes if self.has_ledger else 0,
            "to ask for sessions of lost members, one for each process": self.processes,
            # Each looks at the server, and into the ledger.
            "for a monitor and a command": self.tools * (1 + self.has_ledger),
        }
        return {what: number for what, number in parts.items() if number}

    @property
    def total(self) -> int:
        """How many the server has to have."""
        return sum(self.parts.values())

    @property
    def of_role(self) -> int:
        """How many the pools' role has to be allowed."""
        others = self.processes + self.tools if self.has_ledger else 0
        return self.total - (0 if self.shares_role else others)

    def __str__(self) -> str:
        parts = [f"{number} {what}" for what, number in self.parts.items()]
        return f"{self.total} connections are needed: {', '.join(parts)}"


def need(
    budget: int, processes: int, url: URL, ledger: str | None, tools: int = 0
) -> Need:
    """Return what a budget needs at a server.

    :param url: the pools' database.
    :param ledger: where the ledger is, as a pool is told; checked already.
    """
    its_url = None
    if ledger == "database":
        its_url = url
    elif ledger is not None and "://" in ledger:
        its_url = make_url(ledger)
    is_there = its_url is not None and _server(its_url) == _server(url)
    shares_role = its_url is None or its_url.username == url.username
    return Need(budget, processes, is_there, shares_role, tools)


def _server(url: URL) -> tuple[str, ...]:
    return database_place(url)[:3]


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

    def problems(self, wanted: int, of_role: int | None = None) -> Iterator[str]:
        """Yield, a line each, what stands against so many connections.

        :param of_role: those of the role among them. Default: all.
        """
        of_role = wanted if of_role is None else of_role
        if wanted > self.left:
            yield (
                f"{wanted} connections do not fit: max_connections is "
                f"{self.max_connections}, {self.reserved} are reserved, other roles "
                f"have {self.others}, which leaves {max(self.left, 0)}"
            )
        # No limit binds a superuser.
        if self.limit is not None and self.limit < of_role and not self.is_superuser:
            yield (
                f"the role {self.role!r} may have {self.limit} connections only, and "
                f"{of_role} are needed"
            )


def ask_room(connection: Connection) -> Room:
    """Ask the server how many connections it has for the connection's role."""
    row = connection.execute(text(_ROOM)).one()
    limit = None if row.rolconnlimit < 0 else row.rolconnlimit
    most, reserved, others = row.most, row.reserved, row.others
    return Room(row.rolname, most, reserved, others, row.rolsuper, limit)
