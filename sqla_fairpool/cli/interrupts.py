"""Signals that end a command, raised only where it can put things in order.

A plain ``KeyboardInterrupt`` may come between starting something and noting that
it must be stopped, or in the middle of stopping it. Here a signal is an exception
only inside of :meth:`Interrupts.raising`, once; elsewhere it is noted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Interrupted", "Interrupts"]


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    .. attribute:: signum

       its number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _Mood(Enum):
    NOTING = auto()
    RAISING = auto()
    #: As NOTING, but a second signal raises: the user insists.
    PATIENT = auto()


class Interrupts:
    """Context manager: handlers for SIGINT, SIGTERM and SIGHUP.

    Does nothing outside of the main thread, where Python allows no handlers.
    """

    _NAMES = ("SIGINT", "SIGTERM", "SIGHUP")

    def __init__(self) -> None:
        self._received: list[int] = []
        self._mood = _Mood.NOTING
        self._outer: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in self._NAMES:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                # nohup and shells' background jobs ignore one: leave that.
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self._outer[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._mood = _Mood.NOTING
        for number, handler in self._outer.items():
            signal.signal(number, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received.append(signum)
        if self._mood is _Mood.RAISING or (
            self._mood is _Mood.PATIENT and len(self._received) > 1
        ):
            self._raise()

    def _raise(self) -> None:
        self._mood = _Mood.NOTING
        raise Interrupted(self._received[0])

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise :class:`Interrupted` in the block when a signal comes, or came."""
        try:
            self._mood = _Mood.RAISING
            self.check()
            yield
        finally:
            self._mood = _Mood.NOTING

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within `raising`: let the block finish before a signal is raised."""
        outer = self._mood
        try:
            self._mood = _Mood.PATIENT
            yield
        finally:
            if self._mood is _Mood.PATIENT:
                self._mood = outer
            # Also in place of an error: Ctrl-C reaches child processes as well,
            # and the block fails because they have gone.
            self.check()

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal has been noted."""
        if self._received and self._mood is _Mood.RAISING:
            self._raise()

    def ignore(self) -> None:
        """Ignore the signals from now on, and have child processes ignore them.

        A terminal sends Ctrl-C to all of them: a second one would end the program
        that stops the server.
        """
        for number in self._outer:
            signal.signal(number, signal.SIG_IGN)
