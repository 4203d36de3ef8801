"""Server sessions, and members that do not answer: dead and stopped ones.

A session is known by its server process and by when that began. Nothing that an
application does in it changes these (``DISCARD ALL`` drops advisory locks and
settings), and every session of the server shows them to every other one, whichever
database it is in. The functions here take a plain DBAPI cursor, so that they work
behind each driver of SQLAlchemy's.

A keeper watches while it goes short, or has put slots into quarantine. The book
compares what it finds with the rows as they are when that is applied.

**A quarantine** ends session by session. The server is asked which sessions there are.
A slot is kept for each session of the row that is there; and for each unposted slot
while there is a *suspect*: a session of our role that was there at the first look, is
there still, and was never in any row. That may be one that was opened just before its
member died; it may also be a stranger's, so it counts for `reclaim_after` at most. As
long count the sessions in the row where the server cannot be asked. A member that died
may have opened another session in the place of one in its row that had ended: for the
slot of that one, the suspects count that are younger than all in the row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .allocation import STALLED, TURN
from .book import Book
from .rows import LOST, Gone, Left, Session, among
from .store import LedgerError, Store

_log = logging.getLogger(__name__)

#: How many keepers of those that go short watch the others, at each beat, on average.
_WATCHERS = 4

#: Most characters of a reason that are written down.
_REASON = 200
#: First key of the advisory lock by which a pool shows which ledger it uses; the second
#: is the ledger's number. For a warning only. Any number would do; this one is "pool".
_USES = 0x706F6F6C

_BEGAN = "(extract(epoch from backend_start) * 1000000)::bigint"
#: What tells a server from all others. A standby has its primary's number, and keeps it
#: when it is promoted.
SERVER = "(SELECT 'postgresql ' || system_identifier FROM pg_control_system())"

#: The sessions' advisory locks, by key.
SIGNS = """
    SELECT pid, (classid::bigint << 32) | objid::bigint FROM pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND database =
    (SELECT oid FROM pg_database WHERE datname = current_database())
"""
#: Of another role's session that would be an error.
END_HOLDERS = (
    "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid) "
    "WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND database = datid "
    "AND datname = current_database() AND usename = current_user "
    "AND (classid::bigint << 32) | objid::bigint = {sign} AND pid <> pg_backend_pid()"
)


@dataclass(frozen=True, slots=True)
class Pace:
    """The keeper's times, in seconds. None of them keeps a promise of safety.

    :param beat: between two looks of one that goes short, or is in use.
    :param slow: between two looks of one that does not.
    :param far: between two questions whether a store of other hosts is there.
    :param turn: how long one keeps its place while others get nothing.
    :param linger: how long at most a slot is unused that others go short of.
    :param patience: how long one may fail to answer before it is taken to be stopped.
    :param grace: how long slots of dead members are in quarantine at least.
    :param reclaim_after: how long, where the server cannot be asked.
    :param retry: longest time between two tries to reach the store.
    """

    beat: float = 1.0
    slow: float = 10.0
    far: float = 4.0
    turn: float = 1.0
    linger: float = 0.003
    patience: float = 3.0
    grace: float = 0.5
    reclaim_after: float = 10.0
    retry: float = 3.0

    def turn_length(self, asked: int) -> float:
        """Return how long a turn is when so many are asked to yield."""
        # At most 50 slots change hands per second: each costs three transactions.
        return max(self.turn, asked / 50)


class Present(NamedTuple):
    """The sessions at a database server, at one moment."""

    #: Identity of the server.
    server: str
    #: Those of all clients.
    sessions: frozenset[Session]
    #: Those of the role that asks, without its own. Keepers' connections to the ledger
    #: are none.
    peers: frozenset[Session]


#: Asks the server, given which one it is, None if that is not known; returns None where
#: it cannot be asked.
Sessions = Callable[[str | None], Present | None]


def identify(
    cursor: Any, backend_pid: int | None, sign: int = 0
) -> tuple[str, Session, bool]:
    """Return the server, the session that a cursor is of, and if a sign stands there.

    :param backend_pid: the server process as the driver knows it, None if it does not.
    :param sign: a member's sign of life, see :class:`.PostgresStore`.
    """
    # By the functions below the views: a new session has no plan of a view yet, and a
    # caller waits for it.
    sign_stands = (
        "EXISTS (SELECT FROM pg_lock_status() "
        "WHERE locktype = 'advisory' AND objsubid = 1 AND granted "
        f"AND (classid::bigint << 32) | objid::bigint = {sign})"
    )
    cursor.execute(
        f"SELECT {SERVER}, pid, {_BEGAN}, {sign_stands if sign else 'false'} "
        "FROM pg_stat_get_activity(pg_backend_pid())"
    )
    server, pid, began, stands = cursor.fetchone()
    if backend_pid is not None and pid != backend_pid:
        raise LedgerError(
            f"the driver believes to be connected to process {backend_pid} of the "
            f"server, and is served by {pid}: a pooler like PgBouncer is in between, "
            "where sessions, by which a ledger counts, mean nothing; connect directly"
        )
    return server, Session(pid, began), stands


def look(cursor: Any) -> Present:
    """Return the sessions that a server has now."""
    # Processes of the server's own, of replication say, have a superuser's name. What
    # another role's processes are may be hidden.
    cursor.execute(
        f"SELECT pid, {_BEGAN}, usename = current_user AND pid <> pg_backend_pid() "
        f"AND application_name <> 'sqla_fairpool ledger', {SERVER} "
        "FROM pg_stat_activity "
        "WHERE coalesce(backend_type, 'client backend') = 'client backend'"
    )
    rows = cursor.fetchall()
    return Present(
        rows[0][3],
        frozenset(Session(pid, began) for pid, began, *_ in rows),
        frozenset(Session(pid, began) for pid, began, is_peer, _ in rows if is_peer),
    )


def other_ledgers(cursor: Any, key: int) -> set[int]:
    """Show which ledger a database is used with; return others there, by number."""
    cursor.execute(f"SELECT pg_advisory_lock_shared({_USES}, {key})")
    cursor.execute(
        "SELECT DISTINCT objid::bigint FROM pg_lock_status() "
        f"WHERE locktype = 'advisory' AND classid::bigint = {_USES} "
        "AND objsubid = 2 AND granted AND database = "
        "(SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    return {int(row[0]) for row in cursor.fetchall()} - {key}


def unaccounted(
    sessions: Collection[Session], accounted: Collection[Session]
) -> frozenset[Session]:
    """Return the sessions that are in no row."""
    return frozenset(sessions).difference(among(sessions, accounted))


def still_there(gone: Gone, present: Present, suspects: Collection[Session]) -> Left:
    """Return what is left of a quarantine; `suspects` may have its unposted slots."""
    alive = tuple(among(gone.sessions, present.sessions))
    unposted = gone.unposted
    if gone.why != LOST:
        newest = max((session.began or 0 for session in gone.sessions), default=0)
        young = sum((session.began or 0) > newest for session in suspects)
        unposted += min(len(gone.sessions) - len(alive), young)
    slots = len(alive) + min(unposted, len(suspects))
    # Where it had more open than slots were left for it, there are fewer slots.
    return Left(gone, alive, min(slots, gone.slots))


@dataclass(slots=True)
class _Quarantine:
    """What a keeper has seen of one, from when it saw it first."""

    stamp: int
    since: float
    #: When the server said last that a session of its row is there.
    seen_at: float = float("-inf")
    suspects: frozenset[Session] | None = None

    def left(
        self, gone: Gone, present: Present | None, book: Book, now: float, limit: float
    ) -> Left:
        """Return what is left of it; after `limit`, where the server cannot tell."""
        is_over = now - self.since >= limit
        if present is None:
            over = is_over and now - self.seen_at >= limit
            sessions = () if over else gone.sessions
            slots = len(sessions) + (0 if is_over else gone.unposted)
            return Left(gone, sessions, min(slots, gone.slots))
        there = present.peers
        if self.suspects is not None:
            there = frozenset(among(self.suspects, there))
        self.suspects = unaccounted(there, book.accounted)
        left = still_there(gone, present, () if is_over else self.suspects)
        if left.sessions:
            self.seen_at = now
        return left


class Findings(NamedTuple):
    """What is to be written down, and which members are to be rung once more."""

    dead: Mapping[str, str]
    released: Mapping[int, Left]
    stalled: Mapping[str, str]
    bells: Collection[str]

    @property
    def any(self) -> bool:
        return bool(self.dead or self.released or self.stalled)

    def apply(self, book: Book) -> None:
        """Write it down, as far as it is still so."""
        book.reap(self.dead)
        book.release(self.released)
        book.stall(self.stalled)


class Watch:
    """What one keeper has seen of the others, and since when.

    Its clock decides nothing that safety rests on, but for `reclaim_after`.
    """

    def __init__(self, store: Store, sessions: Sessions | None, pace: Pace) -> None:
        self._store, self._sessions, self._pace = store, sessions, pace
        # Since when each has been expected to look, with the same row.
        self._expected: dict[str, tuple[tuple[str, str], float]] = {}
        self._gone: dict[int, _Quarantine] = {}
        #: Why the server could not be asked the last time, one line.
        self.unasked: str | None = None
        self._looked_at = -math.inf

    def is_due(
        self,
        now: float,
        starved: int | None,
        chance: Callable[[], float],
        patrols: bool,
        guards: bool,
    ) -> bool:
        """Tell if it is for this keeper to look at the others now.

        :param starved: how many go short, if there is a reason to look; else None.
        :param patrols: it looks without one.
        :param guards: it looks until what it put into quarantine is out.
        """
        pause = self._pace.grace if guards else self._pace.beat * 0.9
        if now - self._looked_at < pause:
            return False
        is_lucky = chance() * max(starved or 0, 1) < _WATCHERS
        if not (patrols or guards or (is_lucky and starved is not None)):
            return False
        self._looked_at = now
        return True

    def look(self, book: Book, me: str, now: float) -> Findings:
        """Look after the others, in no transaction: `book` is a copy of the rows."""
        others = {key: text for key, text in book.texts.items() if key != me}
        living = self._store.living(list(others)) if others else set()
        late, pace = self._late(book, living, now), self._pace
        return Findings(
            dead={key: text for key, text in others.items() if key not in living},
            released=self._released(book, now),
            stalled={
                key: others[key]
                for key, seconds in late.items()
                if seconds >= pace.patience and book.due.get(key) != STALLED
            },
            bells=[key for key, seconds in late.items() if seconds >= pace.beat],
        )

    def _late(
        self, book: Book, living: Collection[str], now: float
    ) -> dict[str, float]:
        """Return for how long those that are expected to look have not done so."""
        turn = self._pace.turn_length(list(book.due.values()).count(TURN))
        late, expected = {}, {}
        granted = {key: "take" for key, m in book.members.items() if m.granted}
        for key, why in (granted | book.due).items():
            if key in living:
                state = book.texts[key], why
                seen, since = self._expected.get(key, (None, now))
                expected[key] = state, since if seen == state else now
                # One whose turn it is does not answer before it is over.
                late[key] = now - expected[key][1] - (turn if why == TURN else 0.0)
        self._expected = expected
        return late

    def note(self, gone: Mapping[int, Gone], now: float) -> None:
        """See which quarantines there are: their time begins."""
        seen = self._gone
        self._gone = {
            number: seen[number]
            # What is left of one is the same one.
            if number in seen and seen[number].stamp == row.stamp
            else _Quarantine(row.stamp, now)
            for number, row in gone.items()
        }

    def _released(self, book: Book, now: float) -> dict[int, Left]:
        """Return the quarantines of which less is left than their rows say."""
        self.note(book.gone, now)
        pace = self._pace
        ripe = [n for n, seen in self._gone.items() if now - seen.since >= pace.grace]
        if not ripe:
            return {}
        present = self._ask(book.server)
        found = {
            n: self._gone[n].left(book.gone[n], present, book, now, pace.reclaim_after)
            for n in ripe
        }
        return {number: left for number, left in found.items() if left.is_less}

    def _ask(self, server: str | None) -> Present | None:
        trouble = present = None
        try:
            if self._sessions is not None:
                present = self._sessions(server)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            trouble = reason.splitlines()[0][:_REASON]
        if present is not None and present.server != server:
            trouble = f"asked server {present.server}, the sessions are on {server}"
            present = None
        if trouble is not None and self.unasked is None:
            _log.warning(
                "the server cannot be asked for the sessions of members that are gone, "
                "so their slots are in quarantine for %g s: %s",
                self._pace.reclaim_after,
                trouble,
            )
        self.unasked = trouble
        return present
