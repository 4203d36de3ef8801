"""What PostgreSQL itself says of those who share a ledger.

Asked over one connection beside the budget, which is kept from one look to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import exc, text
from sqlalchemy.engine import URL, Connection

from ..ledger.overview import Overview
from ..ledger.overview_text import printable, seconds_text
from ..ledger.rows import Session
from .budget import Room, ask_room, connected
from .common import CommandError, hide_passwords

__all__ = ["ServerFigures", "ServerView", "Sessions", "count", "server_text"]

#: The monitor's session. Ours all begin like the second: ledgers' control connections,
#: and those of other commands.
_NAME, _OURS = "sqla_fairpool monitor", "sqla_fairpool"

#: Seconds in a transaction without a statement that are worth a warning.
LONG_IDLE = 60.0

#: Bytes that PostgreSQL keeps of an application_name.
_NAME_BYTES = 63

# A server that is busy must not keep the monitor for long.
_PATIENCE = text("SET statement_timeout = '5s'")

# What a role may not see of others' sessions is NULL: state, times and the backend's
# type.
_SESSIONS = text("""
    SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint AS began,
        datname = current_database() AS is_here, application_name, state,
        extract(epoch FROM clock_timestamp() - xact_start)::float AS transaction_age,
        extract(epoch FROM clock_timestamp() - state_change)::float AS state_age
    FROM pg_stat_activity
    WHERE usesysid IS NOT NULL
    AND coalesce(backend_type, 'client backend') = 'client backend'
""")


class _Row(NamedTuple):
    """A session, as the server sees it, and whose it is."""

    application_name: str | None
    state: str | None
    transaction_age: float | None
    state_age: float | None
    #: None for nobody's.
    member: int | None


@dataclass(frozen=True, slots=True)
class Sessions:
    """Sessions of one kind, as the server sees them."""

    sessions: int = 0
    active: int = 0
    idle_in_transaction: int = 0
    #: Of another role, whose state the monitor's may not see.
    hidden: int = 0
    #: Seconds since the oldest open transaction of them began.
    oldest_transaction: float | None = None
    #: Seconds since the last statement of the one that idles longest in a transaction.
    longest_idle: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return {
            "sessions": self.sessions,
            "active": self.active,
            "idle_in_transaction": self.idle_in_transaction,
            "hidden": self.hidden,
            "oldest_transaction": self.oldest_transaction,
            "longest_idle_in_transaction": self.longest_idle,
        }


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """What the server says at one moment."""

    #: Of all members, of each by its number, and of each scraper, where that is known.
    total: Sessions = Sessions()
    members: Mapping[int, Sessions] = field(default_factory=dict)
    scrapers: Mapping[str, Sessions] = field(default_factory=dict)
    #: Client sessions of the database that are no member's: ours, and all others.
    control: int = 0
    others: int = 0
    #: The server's, None if it could not be asked.
    max_connections: int | None = None
    #: There are members with connections, and none of them is seen here.
    is_elsewhere: bool = False
    warnings: tuple[str, ...] = ()
    #: Why there are no figures, None if there are.
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        if self.error is not None:
            return {"error": self.error}
        return {
            **self.total.as_dict(),
            "members": {str(k): v.as_dict() for k, v in self.members.items()},
            "scrapers": {k: v.as_dict() for k, v in self.scrapers.items()},
            "control": self.control,
            "others": self.others,
            "max_connections": self.max_connections,
            "warnings": list(self.warnings),
        }


def server_text(figures: ServerFigures) -> str:
    """Return what the server says, on one line."""
    if figures.error is not None:
        return f"server: {printable(figures.error)}"
    parts = []
    if figures.is_elsewhere:
        parts.append("no sessions of the ledger's members here")
    else:
        total = figures.total
        parts.append(
            f"{total.sessions} sessions of members, {total.active} active, "
            f"{total.idle_in_transaction} idle in transaction"
        )
        if total.hidden:
            parts.append(f"{total.hidden} of another role, whose state is hidden")
    parts.append(f"{figures.others} others")
    if figures.max_connections is not None:
        parts.append(f"max_connections {figures.max_connections}")
    return f"server: {'; '.join(parts)}"


class ServerView:
    """Asks a server about the members of a ledger.

    :param url: the pools' database. Members' sessions are seen in each of the server,
      those of others in this one.
    """

    def __init__(self, url: URL) -> None:
        self._url = url
        self._stack = ExitStack()
        self._connection: Connection | None = None

    def look(
        self, overview: Overview, sessions: Mapping[Session, int]
    ) -> ServerFigures:
        """Return the figures of this moment. What goes wrong is in them.

        :param sessions: those that members have posted, and the members' numbers.
        """
        if self._url.get_backend_name() != "postgresql":
            return ServerFigures(
                error=f"that of {self._url.get_backend_name()} cannot be asked, this "
                "needs PostgreSQL"
            )
        try:
            connection = self._connect()
            found = connection.execute(_SESSIONS).all()
            room = ask_room(connection)
        except (exc.SQLAlchemyError, CommandError) as error:
            self.close()
            return ServerFigures(error=f"cannot be asked: {_words(error)}")
        return count(_by_member(found, sessions), overview, room)

    def _connect(self) -> Connection:
        if self._connection is None:
            connection = self._stack.enter_context(connected(self._url, _NAME))
            connection.execute(_PATIENCE)
            self._connection = connection
        return self._connection

    def close(self) -> None:
        """Close the connection. The next look opens another one."""
        self._connection = None
        try:
            self._stack.close()
        except (exc.SQLAlchemyError, CommandError):
            pass  # it was broken


def _words(error: Exception) -> str:
    words = str(getattr(error, "orig", None) or error)
    return hide_passwords(" ".join(words.split()))


# -- counting --------------------------------------------------------------------------


def _by_member(found: Iterable[Any], sessions: Mapping[Session, int]) -> list[_Row]:
    """Return the sessions with whose they are; of nobody's those in this database."""
    posted = {session.pid: (session.began, n) for session, n in sessions.items()}
    rows = []
    for one in found:
        began, number = posted.get(one.pid, (None, None))
        if None not in (began, one.began) and began != one.began:
            number = None  # the process's number was given again
        if number is not None or one.is_here:
            name, age = one.application_name, one.transaction_age
            rows.append(_Row(name, one.state, age, one.state_age, number))
    return rows


def count(rows: Iterable[Any], overview: Overview, room: Room) -> ServerFigures:
    """Count the server's rows, by member and by scraper.

    :param rows: each as a :class:`_Row`.
    """
    tags = {p.number: p.tags for p in overview.processes if p.number is not None}
    members: dict[int, list[Any]] = {}
    scrapers: dict[str, list[Any]] = {}
    control = others = 0
    for row in rows:
        if row.member is None:
            name = row.application_name or ""
            control += name.startswith(_OURS)
            others += not name.startswith(_OURS)
            continue
        members.setdefault(row.member, []).append(row)
        tag = _whose(row.application_name or "", tags.get(row.member, ()))
        if tag is not None:
            scrapers.setdefault(tag, []).append(row)
    total = _sum([row for found in members.values() for row in found])
    by_scraper = {tag: _sum(scrapers[tag]) for tag in sorted(scrapers)}
    # The sessions of the dead may well be gone.
    living = [process for process in overview.processes if process.state != "dead"]
    is_open = any(p.slots if p.open is None else p.open for p in living)
    return ServerFigures(
        total=total,
        members={number: _sum(members[number]) for number in sorted(members)},
        scrapers=by_scraper,
        control=control,
        others=others,
        max_connections=room.max_connections,
        is_elsewhere=is_open and not members,
        warnings=tuple(
            _warnings(total, by_scraper, overview.limits.capacity, control, room)
        ),
    )


def _whose(name: str, tags: Sequence[str]) -> str | None:
    """Return whose a member's session is, None if that cannot be told.

    With the option ``server_tag`` its name is the tag.
    """
    for tag in tags:
        if name and name in _as_names(tag):
            return tag
    return tags[0] if len(tags) == 1 else None


def _as_names(tag: str) -> Iterator[str]:
    """Yield a tag as the server has it as application_name, from version 16, before."""
    for form in ("\\x{:02x}", "?"):
        name = "".join(
            chr(byte) if 32 <= byte < 127 else form.format(byte)
            for byte in tag.encode()
        )
        yield name[:_NAME_BYTES]


def _sum(rows: Sequence[Any]) -> Sessions:
    idle = [row for row in rows if (row.state or "").startswith("idle in transaction")]
    began = [row.transaction_age for row in rows if row.transaction_age is not None]
    idles = [row.state_age for row in idle if row.state_age is not None]
    return Sessions(
        sessions=len(rows),
        active=sum(row.state == "active" for row in rows),
        hidden=sum(row.state is None for row in rows),
        idle_in_transaction=len(idle),
        oldest_transaction=max(began, default=None),
        longest_idle=max(idles, default=None),
    )


def _warnings(
    total: Sessions,
    scrapers: Mapping[str, Sessions],
    capacity: int,
    control: int,
    room: Room,
) -> Iterator[str]:
    # Control connections are there as well, of whichever role.
    yield from room.problems(capacity + control, capacity)
    # Never more than slots, at any moment: a slot is taken before, and given after.
    if total.sessions > capacity:
        yield (
            f"members have {total.sessions} sessions on the server, and there are "
            f"{capacity} slots: that is a bug, please report it"
        )
    named = False
    for scraper, sessions in scrapers.items():
        if (sessions.longest_idle or 0) >= LONG_IDLE:
            named = True
            yield (
                f"{scraper} has been idle in a transaction for "
                f"{seconds_text(sessions.longest_idle)}"
            )
    if not named and (total.longest_idle or 0) >= LONG_IDLE:
        yield (
            "a session of a member has been idle in a transaction for "
            f"{seconds_text(total.longest_idle)}"
        )
