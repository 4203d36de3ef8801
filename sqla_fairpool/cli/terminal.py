"""Keys of a terminal, one by one, and its modes: the only file that knows termios."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from typing_extensions import Self

try:
    import termios
    import tty
except ImportError:  # Windows
    termios = tty = None  # type: ignore[assignment]

__all__ = ["END", "SUSPEND", "Keys", "Terminal", "is_terminal"]

#: What :meth:`Terminal.read` says after Ctrl-Z, and when the terminal is gone, or after
#: Ctrl-D.
SUSPEND, END = "\x1a", "\x04"

#: What a terminal sends for the arrows and the like: none of our keys.
_SEQUENCE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)


def is_terminal(stream: TextIO) -> bool:
    """Tell if a stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Keys:
    """No keys at all, only the time."""

    def read(self, seconds: float) -> str:
        """Return the keys that come within some seconds, as soon as there are any."""
        time.sleep(seconds)
        return ""

    def suspend(self) -> None:
        """Stop this process, as Ctrl-Z does, until the shell lets it go on."""


class Terminal(Keys):
    """Context manager: the keys of standard input, as they are typed, not shown.

    Restores the terminal's modes when it is left, also by an error or a signal that is
    raised. Without a terminal, or on Windows, there are no keys.
    """

    def __init__(self) -> None:
        self._handle: int | None = None
        self._before: list[Any] = []
        self._outer: Any = None
        self._is_stopping = False

    def __enter__(self) -> Self:
        # Without the module the streams are not asked: sys.stdin may be None.
        if termios is not None and sys.stdin is not None and sys.stdin.isatty():
            self._handle = sys.stdin.fileno()
            self._before = termios.tcgetattr(self._handle)
            try:
                self._listen()
            except BaseException:
                self._restore()
                raise
        return self

    def __exit__(self, *details: object) -> None:
        self._restore()
        self._handle = None

    def _listen(self) -> None:
        assert self._handle is not None
        tty.setcbreak(self._handle, termios.TCSANOW)
        # Who ignores Ctrl-Z, as a shell without jobs, goes on ignoring it.
        self._outer = signal.getsignal(signal.SIGTSTP)
        if self._outer == signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._stop)

    def _restore(self) -> None:
        if self._handle is None:
            return
        if self._outer == signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        # The terminal may be gone already, after SIGHUP.
        with suppress(termios.error), _in_background():
            termios.tcsetattr(self._handle, termios.TCSANOW, self._before)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._is_stopping = True

    def read(self, seconds: float) -> str:
        """See :class:`Keys`. :data:`SUSPEND` stands for Ctrl-Z."""
        if self._is_stopping:
            self._is_stopping = False
            return SUSPEND
        if self._handle is None:
            return super().read(seconds)
        if not select.select([self._handle], [], [], seconds)[0]:
            return ""
        try:
            data = os.read(self._handle, 1024)
        except OSError:
            data = b""
        if not data:
            return END
        return _SEQUENCE.sub("", data.decode(errors="ignore"))

    def suspend(self) -> None:
        """See :class:`Keys`. The screen is the caller's to leave and to draw again."""
        if self._handle is None:
            return
        self._restore()
        os.kill(os.getpid(), signal.SIGTSTP)
        self._listen()


@contextmanager
def _in_background() -> Iterator[None]:
    """Let the block set a terminal's modes from the background, and not be stopped."""
    outer = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTTOU, outer)
