"""Who does not answer any more: the dead, their slots, the stopped.

A keeper watches while it goes short, or has put slots into quarantine. What it finds
is only a finding: the book compares it with the rows as they are when it is applied.

**A quarantine** ends session by session. The server is asked which sessions there are.
A slot is kept for each session of the row that is there; and for each unposted slot
while there is a *suspect*: a session of our role that was there at the first look, is
there still, and was never in any row. That may be one that was opened just before its
member died; it may also be a stranger's, so it counts for `reclaim_after` at most. As
long count the sessions in the row where the server cannot be asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .allocation import STALLED, TURN
from .book import Book
from .demand import Pace
from .rows import Gone, Left, Session, among
from .store import Store

__all__ = [
    "Findings",
    "Present",
    "Sessions",
    "View",
    "Watch",
    "still_there",
    "unaccounted",
]

_log = logging.getLogger(__name__)

#: Most characters of a reason that are written down.
_REASON = 200


class Present(NamedTuple):
    """The sessions at a database server, at one moment."""

    #: Identity of the server.
    server: str
    #: Those of all clients.
    sessions: frozenset[Session]
    #: Those that have the role of who asks, without its own. Keepers' connections to
    #: the ledger are none.
    peers: frozenset[Session]


#: Asks the server; returns None where it cannot be asked.
Sessions = Callable[[], Present | None]


class View(NamedTuple):
    """The board at one moment."""

    texts: Mapping[str, str]
    due: Mapping[str, str]
    gone: Mapping[int, Gone]
    #: Where the members' sessions are, and which are in any row.
    server: str | None = None
    accounted: frozenset[Session] = frozenset()

    @classmethod
    def of(cls, book: Book) -> View:
        server = book.meta.server if book.meta is not None else None
        return cls(
            dict(book.texts), dict(book.due), dict(book.gone), server, book.accounted
        )


def unaccounted(
    sessions: Collection[Session], accounted: Collection[Session]
) -> frozenset[Session]:
    """Return the sessions that are in no row."""
    return frozenset(sessions).difference(among(sessions, accounted))


def still_there(gone: Gone, present: Present, suspects: int) -> Left:
    """Return what is left of a quarantine, by what the server says.

    :param suspects: sessions that may have its unposted slots.
    """
    alive = tuple(among(gone.sessions, present.sessions))
    slots = len(alive) + min(gone.unposted, suspects)
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
        self, gone: Gone, present: Present | None, view: View, now: float, limit: float
    ) -> Left:
        """Return what is left of it.

        :param limit: seconds until it is over, where the server cannot tell.
        """
        is_over = now - self.since >= limit
        if present is None:
            over = is_over and now - self.seen_at >= limit
            sessions = () if over else gone.sessions
            slots = len(sessions) + (0 if is_over else gone.unposted)
            return Left(gone, sessions, min(slots, gone.slots))
        there = present.peers
        if self.suspects is not None:
            there = frozenset(among(self.suspects, there))
        self.suspects = unaccounted(there, view.accounted)
        left = still_there(gone, present, 0 if is_over else len(self.suspects))
        if left.sessions:
            self.seen_at = now
        return left


class Findings(NamedTuple):
    """What is to be written down, and who is to be rung once more."""

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

    Its clock decides nothing that safety rests on, with one stated exception:
    quarantines end by `reclaim_after` where the server cannot be asked.
    """

    def __init__(
        self,
        store: Store,
        sessions: Sessions | None,
        pace: Pace,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._pace = pace
        # Since when each has been expected to look, with the same row.
        self._expected: dict[str, tuple[tuple[str, str], float]] = {}
        self._gone: dict[int, _Quarantine] = {}
        #: Why the server could not be asked the last time, one line.
        self.unasked: str | None = None

    def look(self, view: View, me: str, now: float) -> Findings:
        """Look after the others. Asks the store and the server, in no transaction."""
        others = {key: text for key, text in view.texts.items() if key != me}
        living = self._store.living(list(others)) if others else set()
        dead = {key: text for key, text in others.items() if key not in living}
        late = self._late(view, living, now)
        pace = self._pace
        return Findings(
            dead=dead,
            released=self._released(view, now),
            stalled={
                key: others[key]
                for key, seconds in late.items()
                if seconds >= pace.patience and view.due[key] != STALLED
            },
            bells=[key for key, seconds in late.items() if seconds >= pace.beat],
        )

    def _late(
        self, view: View, living: Collection[str], now: float
    ) -> dict[str, float]:
        """Return for how long we have seen those who are expected to look, in vain."""
        turn = self._pace.turn_length(list(view.due.values()).count(TURN))
        late, expected = {}, {}
        for key, why in view.due.items():
            if key in living and key in view.texts:
                state = view.texts[key], why
                seen = self._expected.get(key)
                since = seen[1] if seen is not None and seen[0] == state else now
                expected[key] = state, since
                # Whose turn it is does not answer before it is over.
                late[key] = now - since - (turn if why == TURN else 0.0)
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

    def _released(self, view: View, now: float) -> dict[int, Left]:
        """Return the quarantines of which less is left than their rows say."""
        self.note(view.gone, now)
        pace = self._pace
        ripe = {
            number: row
            for number, row in view.gone.items()
            if now - self._gone[number].since >= pace.grace
        }
        if not ripe:
            return {}
        present = self._ask(view.server)
        found = {
            number: self._gone[number].left(row, present, view, now, pace.reclaim_after)
            for number, row in ripe.items()
        }
        return {number: left for number, left in found.items() if left.is_less}

    def _ask(self, server: str | None) -> Present | None:
        """Return what the server says, None if the members' server cannot be asked."""
        trouble = present = None
        try:
            present = self._sessions() if self._sessions is not None else None
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
