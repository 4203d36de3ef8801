"""What PostgreSQL is asked, over connections beside the budget.

Whether a budget of connections fits what the server and the role allow, and, for the
monitor, which sessions the processes have that share a ledger. Counting is apart from
asking: :func:`count` needs no server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import create_engine, exc, text
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.pool import NullPool

from ..checks import hide_passwords
from ..launch import parse_url
from ..ledger.addresses import database_place, with_threads_driver
from ..ledger.overview import Overview
from ..ledger.overview_text import printable, seconds_text
from ..ledger.rows import Session
from ..ledger.watch import SERVER
from . import CommandError, missing_driver, one_line

#: How the names of our sessions begin that are no pool's: those of ledgers, of
#: commands, and of the monitor.
_OURS = "sqla_fairpool"

#: Seconds in a transaction without a statement that are worth a warning.
LONG_IDLE = 60.0

#: Bytes that PostgreSQL keeps of an application_name.
_NAME_BYTES = 63

# Reserved slots, some from PostgreSQL 16 on, are not for the role; neither are those
# that other roles have now. Of those it may see whose they are and in which database.
_ROOM = text(f"""
    SELECT current_setting('max_connections')::int AS max_connections,
        coalesce(current_setting('reserved_connections', true)::int, 0)
        + current_setting('superuser_reserved_connections')::int AS reserved,
        (SELECT count(*) FROM pg_stat_activity
         WHERE usename <> current_user AND datid IS NOT NULL
         AND coalesce(backend_type, 'client backend') = 'client backend') AS others,
        rolname AS role, rolsuper AS is_superuser, nullif(rolconnlimit, -1) AS limit,
        {SERVER} AS server
    FROM pg_roles WHERE rolname = current_user
""")

# Of the sessions of other roles, state, times and the backend's type may be hidden;
# they are NULL then.
_SESSIONS = text("""
    SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint AS began,
        datname = current_database() AS is_here, application_name, state,
        extract(epoch FROM clock_timestamp() - xact_start)::float AS transaction_age,
        extract(epoch FROM clock_timestamp() - state_change)::float AS state_age
    FROM pg_stat_activity
    WHERE usesysid IS NOT NULL
    AND coalesce(backend_type, 'client backend') = 'client backend'
""")


# -- connections -----------------------------------------------------------------------


def given_url(given: str) -> URL:
    """Return the PostgreSQL database that ``--url`` names; show no password."""
    try:
        url = parse_url(given, "--url")
    except exc.ArgumentError as error:
        raise CommandError(str(error)) from None
    name = url.get_backend_name()
    if name != "postgresql":
        raise CommandError(f"--url of a PostgreSQL database is needed, not of {name}")
    return url


@contextmanager
def connected(url: URL, name: str = _OURS) -> Iterator[Connection]:
    """Connect to a PostgreSQL, outside of every pool, in autocommit.

    :raises CommandError: with the server's words, without a password.
    """
    if "@" in (url.host or ""):
        # The rest of a password that was cut at its first "@": do not show it.
        raise CommandError("write @ in the URL's password as %40, / as %2F")
    try:
        engine = create_engine(
            with_threads_driver(url),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"application_name": name, "connect_timeout": 5},
        )
    except ImportError as error:
        raise missing_driver(error) from None
    try:
        with engine.connect() as connection:
            yield connection
    except exc.SQLAlchemyError as error:
        raise CommandError(_words(error)) from None
    finally:
        engine.dispose()


def _words(error: Exception) -> str:
    return hide_passwords(one_line(getattr(error, "orig", None) or error))


# -- the budget ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Need:
    """The connections that a budget needs at a server."""

    #: What they are for, and how many for each.
    parts: dict[str, int]
    #: How many of them are of the pools' role.
    of_role: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = [f"{number} {what}" for what, number in self.parts.items() if number]
        return f"{self.total} connections are needed: {', '.join(parts)}"


def need(
    budget: int, processes: int, url: URL, ledger: str | None, tools: int = 0
) -> Need:
    """Return what the pools of so many processes and so many tools need at a server."""
    place = url
    if ledger is not None and "://" in ledger:
        place = make_url(ledger)
    is_there = (ledger == "database" or place is not url) and (
        database_place(place)[:3] == database_place(url)[:3]
    )
    of_ledger = processes * is_there
    control, of_others = "control connections, one for each process", 0
    if place.username != url.username:
        control += " and of another role"
        of_others = of_ledger + tools * is_there
    parts = {
        "of the pools": budget,
        control: of_ledger,
        "to ask for sessions of lost members, one for each process": processes,
        # Each looks at the server, and into the ledger.
        "for a monitor and a command": tools * (1 + is_there),
    }
    return Need(parts, sum(parts.values()) - of_others)


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
    server: str | None = None

    def problems(self, wanted: int, of_role: int) -> Iterator[str]:
        """Yield, a line each, what stands against so many connections.

        :param of_role: those of the role among them.
        """
        left = self.max_connections - self.reserved - self.others
        if wanted > left:
            yield (
                f"{wanted} connections do not fit: max_connections is "
                f"{self.max_connections}, {self.reserved} are reserved, other roles "
                f"have {self.others}, which leaves {max(left, 0)}"
            )
        # No limit binds a superuser.
        if self.limit is not None and self.limit < of_role and not self.is_superuser:
            yield (
                f"the role {self.role!r} may have {self.limit} connections only, and "
                f"{of_role} are needed"
            )


def ask_room(connection: Connection) -> Room:
    """Ask the server how many connections it has for the connection's role."""
    return Room(**connection.execute(_ROOM).mappings().one())


# -- the sessions ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sessions:
    """Figures of the sessions of one member, of one scraper, or of all members."""

    sessions: int = 0
    active: int = 0
    idle_in_transaction: int = 0
    #: Sessions whose state the monitor's role may not see.
    hidden: int = 0
    #: Seconds since the oldest transaction began.
    oldest_transaction: float | None = None
    #: Seconds since the last statement of the session that has been idle in its
    #: transaction for longest.
    longest_idle_in_transaction: float | None = None

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Sessions:
        idle = [r for r in rows if (r.state or "").startswith("idle in transaction")]
        ages = [r.transaction_age for r in rows if r.transaction_age is not None]
        idle_ages = [r.state_age for r in idle if r.state_age is not None]
        return cls(
            sessions=len(rows),
            active=sum(row.state == "active" for row in rows),
            hidden=sum(row.state is None for row in rows),
            idle_in_transaction=len(idle),
            oldest_transaction=max(ages, default=None),
            longest_idle_in_transaction=max(idle_ages, default=None),
        )


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """What the server says at one moment."""

    #: Of all members, of each by its number, and of each scraper, where that is known.
    total: Sessions = Sessions()
    members: Mapping[int, Sessions] = field(default_factory=dict)
    scrapers: Mapping[str, Sessions] = field(default_factory=dict)
    #: Other client sessions of the database: ours, and all others.
    control: int = 0
    others: int = 0
    max_connections: int = 0
    name: str | None = None
    #: Members use connections, and none of those is on this server.
    is_elsewhere: bool = False
    warnings: tuple[str, ...] = ()
    #: Why there are no figures, None if there are.
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        if self.error is not None:
            return {"error": self.error}
        figures = asdict(self)
        del figures["error"]
        return {**figures.pop("total"), **figures}

    def __str__(self) -> str:
        if self.error is not None:
            return f"server: {printable(self.error)}"
        total = self.total
        text = (
            f"server: {total.sessions} sessions of members, {total.active} active, "
            f"{total.idle_in_transaction} idle in transaction; "
        )
        if self.is_elsewhere:
            text = "server: no sessions of the ledger's members here; "
        if total.hidden:
            text += f"{total.hidden} of another role, whose state is hidden; "
        return f"{text}{self.others} others; max_connections {self.max_connections}"


class ServerView:
    """Asks the server of a ledger's members, over one connection that stays open.

    Members' sessions are seen in all its databases, others in the URL's own only.
    """

    def __init__(self, url: URL) -> None:
        self._url = url
        self._stack = ExitStack()
        self._connection: Connection | None = None

    def look(
        self, overview: Overview, sessions: Mapping[Session, int]
    ) -> ServerFigures:
        """Return the figures of this moment, or in them what went wrong."""
        backend = self._url.get_backend_name()
        if backend != "postgresql":
            error = f"that of {backend} cannot be asked, this needs PostgreSQL"
            return ServerFigures(error=error)
        try:
            if self._connection is None:
                opening = connected(self._url, f"{_OURS} monitor")
                self._connection = self._stack.enter_context(opening)
                # A busy server must not hold up the monitor for long.
                self._connection.execute(text("SET statement_timeout = '5s'"))
            found = self._connection.execute(_SESSIONS).all()
            room = ask_room(self._connection)
        except (exc.SQLAlchemyError, CommandError) as error:
            self.close()
            return ServerFigures(error=f"cannot be asked: {_words(error)}")
        return count(found, sessions, overview, room)

    def close(self) -> None:
        """Close the connection. The next look opens another one."""
        self._connection = None
        with suppress(exc.SQLAlchemyError, CommandError):  # it may be broken
            self._stack.close()


def count(
    rows: Iterable[Any], sessions: Mapping[Session, int], overview: Overview, room: Room
) -> ServerFigures:
    """Count the server's sessions by member and by scraper.

    :param rows: as the server returns them.
    :param sessions: those that members have posted, and the members' numbers.
    """
    posted = {session.pid: (session.began, n) for session, n in sessions.items()}
    tags = {process.number: process.tags for process in overview.processes}
    members: dict[int, list[Any]] = {}
    scrapers: dict[str, list[Any]] = {}
    control = others = 0
    for row in rows:
        name = row.application_name or ""
        began, member = posted.get(row.pid, (None, None))
        if None not in (began, row.began) and began != row.began:
            member = None  # another process has the same pid now
        if member is not None:
            members.setdefault(member, []).append(row)
            tag = _tag_of(name, tags.get(member, ()))
            if tag is not None:
                scrapers.setdefault(tag, []).append(row)
        elif row.is_here:
            control += name.startswith(_OURS)
            others += not name.startswith(_OURS)
    total = Sessions.of([row for found in members.values() for row in found])
    by_scraper = {tag: Sessions.of(scrapers[tag]) for tag in sorted(scrapers)}
    capacity = overview.limits.capacity
    return ServerFigures(
        total=total,
        members={number: Sessions.of(members[number]) for number in sorted(members)},
        scrapers=by_scraper,
        control=control,
        others=others,
        max_connections=room.max_connections,
        name=room.server,
        is_elsewhere=overview.checked_out > 0 and not members,
        warnings=(
            *room.problems(capacity + control, capacity),
            *_warnings(total, by_scraper, capacity),
        ),
    )


def _tag_of(name: str, tags: Sequence[str]) -> str | None:
    """Return the tag of a member's session, None if that cannot be told.

    With the option ``server_tag`` the session's name is the tag. Characters that are
    not ASCII are ``\\xc3`` there from PostgreSQL 16 on, and ``?`` before.
    """
    for tag in tags:
        for form in ("\\x{:02x}", "?"):
            known = "".join(
                chr(byte) if 32 <= byte < 127 else form.format(byte)
                for byte in tag.encode()
            )
            if name and name == known[:_NAME_BYTES]:
                return tag
    return tags[0] if len(tags) == 1 else None


def _warnings(
    total: Sessions, scrapers: Mapping[str, Sessions], capacity: int
) -> Iterator[str]:
    # A slot is taken before a connection is opened, and given back after it is closed.
    if total.sessions > capacity:
        yield (
            f"members have {total.sessions} sessions on the server, and there are "
            f"{capacity} slots: that is a bug, please report it"
        )
    ages = {
        tag: one.longest_idle_in_transaction or 0.0 for tag, one in scrapers.items()
    }
    idle = {tag: age for tag, age in ages.items() if age >= LONG_IDLE}
    longest = total.longest_idle_in_transaction or 0.0
    if not idle and longest >= LONG_IDLE:
        idle = {"a session of a member": longest}
    for who, age in idle.items():
        yield f"{who} has been idle in a transaction for {seconds_text(age)}"
