"""What the monitor's live view shows, and what the keys do to it: no terminal here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..ledger.overview import Overview, ScraperRow
from ..ledger.overview_text import seconds_text
from .watching import Picture

__all__ = ["KEYS", "SORTS", "Board", "History"]

#: Samples that are kept of each scraper: five minutes at the default interval.
_SAMPLES = 60

#: Seconds of the keys + and -.
_STEPS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

#: Seconds without an answer of the ledger that the screen speaks of.
_SLOW = 2.0

#: The orders of the rows, by the names that the footer shows. Ties by name.
SORTS: dict[str, Callable[[ScraperRow], tuple[Any, ...]]] = {
    "name": lambda row: (),
    "connections": lambda row: (-row.connections,),
    "waiting": lambda row: (-row.waiting, -(row.longest_wait or 0.0)),
    "idle": lambda row: (-_or(row.idle_seconds, -1.0),),
}

#: The keys, as the footer explains them.
KEYS = (("q", "quit"), ("p", "pause"), ("s", "sort"), ("+/-", "interval"))


def _or(number: float | None, other: float) -> float:
    return other if number is None else number


class History:
    """The connections of each scraper at the last looks."""

    def __init__(self) -> None:
        self._looks = 0
        # Of each scraper the look that began it, and its samples since.
        self._samples: dict[str, deque[tuple[int, int]]] = {}

    def add(self, overview: Overview) -> None:
        """Keep what was seen; forget what is too old."""
        self._looks += 1
        for row in overview.scrapers:
            samples = self._samples.setdefault(row.scraper, deque(maxlen=_SAMPLES))
            samples.append((self._looks, row.connections))
        oldest = self._looks - _SAMPLES
        for name in [n for n, s in self._samples.items() if s[-1][0] <= oldest]:
            del self._samples[name]

    def of(self, scraper: str, length: int) -> list[int | None]:
        """Return what there was in the time that is kept, None where there was nothing.

        :param length: most numbers that may be returned. Where there were more looks,
          each stands for as many of them as all others, for the most that was seen.
        """
        step = max(-(-min(self._looks, _SAMPLES) // length), 1)
        groups: dict[int, int] = {}
        # Counted from the first look of all, so that a group keeps its looks.
        for look, connections in self._samples.get(scraper, ()):
            group = look // step
            groups[group] = max(groups.get(group, 0), connections)
        last = self._looks // step
        first = max(last - length + 1, 1 // step)
        return [groups.get(group) for group in range(first, last + 1)]

    def __len__(self) -> int:
        return len(self._samples)


class Board:
    """The state of the live view.

    :param interval: seconds from one look to the next.
    :param name: the ledger's, for as long as nothing has been seen of it.
    """

    def __init__(self, interval: float, name: str) -> None:
        self.interval = interval
        self.name = name
        self.is_paused = False
        self.sort = "name"
        self.picture = Picture()
        self.history = History()
        #: When the look began that has not ended yet, on the clock.
        self.asked_at: float | None = None

    def see(self, picture: Picture) -> None:
        """Take a new picture."""
        self.picture = picture
        if picture.overview is not None and picture.trouble is None:
            self.history.add(picture.overview)

    def press(self, key: str) -> None:
        """Do what a key says; an unknown one does nothing."""
        if key in ("p", " "):
            self.is_paused = not self.is_paused
        elif key == "s":
            names = list(SORTS)
            self.sort = names[(names.index(self.sort) + 1) % len(names)]
        elif key in ("+", "="):  # one key on many keyboards
            self.interval = next(
                (step for step in _STEPS if step > self.interval), self.interval
            )
        elif key in ("-", "_"):
            self.interval = next(
                (step for step in reversed(_STEPS) if step < self.interval),
                self.interval,
            )

    def rows(self) -> Sequence[ScraperRow]:
        """Return the scrapers in the order that was chosen."""
        if self.picture.overview is None:
            return ()
        order = SORTS[self.sort]
        rows = self.picture.overview.scrapers
        return sorted(rows, key=lambda row: (*order(row), row.scraper))

    def troubles(self, now: float) -> list[str]:
        """Return what is wrong, worst first: with the looks, and what they found."""
        found = [self.picture.trouble_at(now), self._slowness(now)]
        troubles = [text for text in found if text is not None]
        if self.picture.server is not None:
            troubles += self.picture.server.warnings
        if self.picture.overview is not None:
            troubles += self.picture.overview.warnings
        return troubles

    def _slowness(self, now: float) -> str | None:
        if self.asked_at is None or now - self.asked_at < _SLOW:
            return None
        return f"no answer for {seconds_text(int(now - self.asked_at))}"
