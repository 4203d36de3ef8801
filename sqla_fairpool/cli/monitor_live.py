"""The live view's loop: looks at the interval, keys and sizes at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from .monitor_board import Board
from .terminal import END, SUSPEND, Keys
from .watching import Picture

__all__ = ["Live"]

#: Seconds until a new size of the terminal is noticed, and an answer.
_TICK, _SHORT_TICK = 0.2, 0.05


class _Looker(Protocol):
    """An :class:`.errand.Errand` that brings pictures."""

    def ask(self) -> None: ...

    def poll(self) -> Picture | None: ...


class _Screen(Protocol):
    @property
    def size(self) -> tuple[int, int]: ...

    def draw(self, board: Board, now: float) -> None: ...

    def left(self) -> AbstractContextManager[None]: ...


class Live:
    """Shows a board, until somebody quits.

    :param clock: seconds; goes on while `keys` are read.
    """

    def __init__(
        self,
        board: Board,
        looker: _Looker,
        keys: Keys,
        screen: _Screen,
        clock: Callable[[], float],
    ) -> None:
        self._board = board
        self._looker = looker
        self._keys = keys
        self._screen = screen
        self._clock = clock
        #: When the next look is due.
        self._due = clock()
        self._last = self._due

    def run(self) -> None:
        """Return when the user quits."""
        drawn: object = None
        while True:
            self._look()
            board, now = self._board, self._clock()
            # What the picture depends on: a new one is drawn when that changes.
            seen = (
                self._screen.size,
                board.picture,
                board.is_paused,
                board.sort,
                board.interval,
                board.troubles(now),
            )
            if seen != drawn:
                self._screen.draw(board, now)
                drawn = seen
            tick = _TICK if board.asked_at is None else _SHORT_TICK
            for key in self._keys.read(tick):
                if key in ("q", "Q", END):
                    return
                if key == SUSPEND:
                    with self._screen.left():
                        self._keys.suspend()
                    drawn = None
                else:
                    self._press(key)

    def _look(self) -> None:
        """Take an answer, ask if it is time to."""
        board, now = self._board, self._clock()
        if board.asked_at is None and not board.is_paused and now >= self._due:
            self._looker.ask()
            board.asked_at = self._last = now
            self._due = now + board.interval
        if board.asked_at is not None:
            picture = self._looker.poll()
            if picture is not None:
                board.asked_at = None
                board.see(picture)

    def _press(self, key: str) -> None:
        board = self._board
        was_paused = board.is_paused
        board.press(key)
        # Who goes on wants to see how it is now.
        goes_on = was_paused and not board.is_paused
        self._due = self._clock() if goes_on else self._last + board.interval
