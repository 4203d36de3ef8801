"""Who does not answer any more: the dead, their slots, the stopped.

A keeper watches while it goes short, or has put slots into quarantine. What it finds
is only a finding: the book compares it with the rows as they are when it is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from .book import Book
from .needs import Pace, turn_length
from .rows import STALLED, TURN, Gone
from .store import Store

__all__ = ["Findings", "Sessions", "View", "Watch"]

#: Given the numbers of members that are gone, return those that have server sessions
#: still; or None, where the server cannot be asked.
Sessions = Callable[[set[int]], Collection[int] | None]


class View(NamedTuple):
    """The board at one moment."""

    texts: Mapping[str, str]
    due: Mapping[str, str]
    gone: Mapping[int, Gone]

    @classmethod
    def of(cls, book: Book) -> View:
        return cls(dict(book.texts), dict(book.due), dict(book.gone))


class Findings(NamedTuple):
    """What is to be written down, and who is to be rung once more."""

    dead: Mapping[str, str]
    released: Mapping[int, Gone]
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
        self._gone: dict[int, tuple[Gone, float]] = {}

    def look(self, view: View, me: str, now: float) -> Findings:
        """Look after the others. Asks the store and the server, in no transaction."""
        others = {key: text for key, text in view.texts.items() if key != me}
        living = self._store.living(list(others)) if others else set()
        dead = {key: text for key, text in others.items() if key not in living}
        late = self._late(view, living, now)
        pace = self._pace
        return Findings(
            dead=dead,
            released=self._released(view.gone, now),
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
        turn = turn_length(self._pace, list(view.due.values()).count(TURN))
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
            if number in seen and seen[number][0] == row
            else (row, now)
            for number, row in gone.items()
        }

    def _released(self, gone: Mapping[int, Gone], now: float) -> dict[int, Gone]:
        """Return the quarantines that are over."""
        self.note(gone, now)
        age = {number: now - since for number, (_, since) in self._gone.items()}
        ripe = {number for number in gone if age[number] >= self._pace.grace}
        if not ripe:
            return {}
        left = self._sessions(ripe) if self._sessions is not None else None
        if left is None:
            over = {
                number for number in ripe if age[number] >= self._pace.reclaim_after
            }
        else:
            over = ripe - set(left)
        return {number: gone[number] for number in over}
