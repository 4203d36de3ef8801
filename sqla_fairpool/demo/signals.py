"""Signals that end the demo, raised only where it can put things in order.

A plain ``KeyboardInterrupt`` may come between starting something and noting that it
must be stopped, or in the middle of stopping it.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Signals"]


class Signals:
    """Context manager: notes SIGINT, SIGTERM and SIGHUP until `check` raises them."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._outer: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # nohup and shells' background jobs ignore one: leave that.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._outer[number] = signal.signal(
                    number, lambda signum, frame: self._received.append(signum)
                )
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._outer.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise ``KeyboardInterrupt``, with the signal's number, if one has come."""
        if self._received:
            raise KeyboardInterrupt(self._received[0])

    def ignore(self) -> None:
        """Ignore the signals from now on, and have child processes ignore them.

        A terminal sends Ctrl-C to all of them: a second one would end the program
        that stops the server.
        """
        for number in self._outer:
            signal.signal(number, signal.SIG_IGN)
