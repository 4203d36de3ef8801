"""What PostgreSQL itself says of the processes that share a ledger.

It is asked over one connection beside the budget, which stays open between two looks.
Counting is apart from asking: :func:`count` needs no server.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import exc, text
from sqlalchemy.engine import URL, Connection

from ..ledger.overview import Overview
from ..ledger.overview_text import printable, seconds_text
from ..ledger.rows import Session
from ..options import hide_passwords
from . import CommandError
from .budget import Room, ask_room, connected

__all__ = ["ServerFigures", "ServerView", "Sessions", "count"]

#: The name of the monitor's own session, and how the names of all our sessions that are
#: no pool's begin: those of ledgers and of commands.
_NAME, _OURS = "sqla_fairpool monitor", "sqla_fairpool"

#: Seconds in a transaction without a statement that are worth a warning.
LONG_IDLE = 60.0

#: Bytes that PostgreSQL keeps of an application_name.
_NAME_BYTES = 63

# A busy server must not hold up the monitor for long.
_STATEMENT_TIMEOUT = text("SET statement_timeout = '5s'")

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
        """Count the server's rows."""
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
    """Asks a server about the members of a ledger.

    :param url: the pools' database. Members' sessions are seen in all databases of the
      server, other sessions in this database only.
    """

    def __init__(self, url: URL) -> None:
        self._url = url
        self._stack = ExitStack()
        self._connection: Connection | None = None

    def look(
        self, overview: Overview, sessions: Mapping[Session, int]
    ) -> ServerFigures:
        """Return the figures of this moment, or in them what went wrong.

        :param sessions: those that members have posted, and the members' numbers.
        """
        backend = self._url.get_backend_name()
        if backend != "postgresql":
            error = f"that of {backend} cannot be asked, this needs PostgreSQL"
            return ServerFigures(error=error)
        try:
            connection = self._connect()
            found = connection.execute(_SESSIONS).all()
            room = ask_room(connection)
        except (exc.SQLAlchemyError, CommandError) as error:
            self.close()
            words = " ".join(str(getattr(error, "orig", None) or error).split())
            return ServerFigures(error=f"cannot be asked: {hide_passwords(words)}")
        return count(found, sessions, overview, room)

    def _connect(self) -> Connection:
        if self._connection is None:
            connection = self._stack.enter_context(connected(self._url, _NAME))
            connection.execute(_STATEMENT_TIMEOUT)
            self._connection = connection
        return self._connection

    def close(self) -> None:
        """Close the connection. The next look opens another one."""
        self._connection = None
        with suppress(exc.SQLAlchemyError, CommandError):  # it may be broken
            self._stack.close()


def count(
    rows: Iterable[Any],
    sessions: Mapping[Session, int],
    overview: Overview,
    room: Room,
) -> ServerFigures:
    """Count the server's sessions by member and by scraper.

    :param rows: as the server returns them.
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
    named = {tag: one.longest_idle_in_transaction for tag, one in scrapers.items()}
    idle = {tag: age for tag, age in named.items() if (age or 0.0) >= LONG_IDLE}
    longest = total.longest_idle_in_transaction
    if not idle and (longest or 0.0) >= LONG_IDLE:
        idle = {"a session of a member": longest}
    for who, age in idle.items():
        yield f"{who} has been idle in a transaction for {seconds_text(age)}"
