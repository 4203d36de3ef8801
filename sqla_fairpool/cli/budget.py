"""Does a budget of connections fit what the server and the role allow?

One connection beside the budget asks the server, for a moment.
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
from ..options import hide_passwords
from . import CommandError

__all__ = ["Need", "Room", "ask_room", "connected", "given_url", "need"]

#: Seconds for a server that does not answer.
_CONNECT_TIMEOUT = 5

# Superusers' and others' reserved slots are not for the role; neither are those that
# other roles have now. The first comes with PostgreSQL 16. Of others' sessions a role
# may see whose they are and in which database, and not what they are.
_ROOM = """
    SELECT current_setting('max_connections')::int AS max_connections,
        coalesce(current_setting('reserved_connections', true)::int, 0)
        + current_setting('superuser_reserved_connections')::int AS reserved,
        (SELECT count(*) FROM pg_stat_activity
         WHERE usename <> current_user AND datid IS NOT NULL
         AND coalesce(backend_type, 'client backend') = 'client backend') AS others,
        rolname AS role, rolsuper AS is_superuser, nullif(rolconnlimit, -1) AS limit
    FROM pg_roles WHERE rolname = current_user
"""


def given_url(given: str, postgresql: bool = True) -> URL:
    """Return the database that ``--url`` names.

    :param postgresql: it has to be a PostgreSQL.
    :raises CommandError: if it is none. Shows no password.
    """
    try:
        url = parse_url(given, "--url")
    except exc.ArgumentError as error:
        raise CommandError(str(error)) from None
    if postgresql and url.get_backend_name() != "postgresql":
        name = url.get_backend_name()
        raise CommandError(f"--url of a PostgreSQL database is needed, not of {name}")
    return url


@contextmanager
def connected(url: URL, name: str = "sqla_fairpool") -> Iterator[Connection]:
    """Connect to a PostgreSQL, outside of every pool, in autocommit.

    :param url: of any driver; psycopg2 or psycopg is used.
    :param name: the session's ``application_name``.
    :raises CommandError: with the server's words, without a password.
    """
    if "@" in (url.host or ""):
        # The rest of a password that was cut at its first "@": do not show it.
        raise CommandError("write @ in the URL's password as %40, / as %2F")
    arguments = {"application_name": name, "connect_timeout": _CONNECT_TIMEOUT}
    try:
        engine = create_engine(
            with_threads_driver(url),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args=arguments,
        )
    except ImportError as error:
        raise missing_driver(error) from None
    try:
        with engine.connect() as connection:
            yield connection
    except exc.SQLAlchemyError as error:
        words = str(getattr(error, "orig", None) or error)
        raise CommandError(hide_passwords(" ".join(words.split()))) from None
    finally:
        engine.dispose()


def missing_driver(error: ImportError) -> CommandError:
    """Return what to say where a driver of PostgreSQL is not installed."""
    return CommandError(
        f"{error.name} is not installed: pip install 'sqla-fairpool[postgresql]'"
    )


@dataclass(frozen=True, slots=True)
class Need:
    """The connections that a budget needs at a server."""

    #: What they are for, and how many for each.
    parts: dict[str, int]
    #: How many of them are of the pools' role.
    of_role: int

    @property
    def total(self) -> int:
        """How many the server has to have."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = [f"{number} {what}" for what, number in self.parts.items() if number]
        return f"{self.total} connections are needed: {', '.join(parts)}"


def need(
    budget: int, processes: int, url: URL, ledger: str | None, tools: int = 0
) -> Need:
    """Return what a budget needs at a server.

    :param budget: connections of the pools, in all processes together.
    :param url: the pools' database.
    :param ledger: where the ledger is, as a pool is told; checked already.
    :param tools: monitors and commands at one time.
    """
    place = None
    if ledger == "database":
        place = url
    elif ledger is not None and "://" in ledger:
        place = make_url(ledger)
    is_there = (
        place is not None and database_place(place)[:3] == database_place(url)[:3]
    )
    of_ledger = processes * is_there
    of_tools = tools * (1 + is_there)  # each looks at the server, and into the ledger
    control, elsewhere = "control connections, one for each process", 0
    if place is not None and place.username != url.username:
        control += " and of another role"
        elsewhere = of_ledger + tools * is_there
    parts = {
        "of the pools": budget,
        control: of_ledger,
        "to ask for sessions of lost members, one for each process": processes,
        "for a monitor and a command": of_tools,
    }
    return Need(parts, sum(parts.values()) - elsewhere)


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
    return Room(**connection.execute(text(_ROOM)).mappings().one())
