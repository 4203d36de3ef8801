"""Looking again and again, whatever becomes of the ledger and of its server.

A server that does not answer can hold a driver for minutes, inside C code, where no
signal is handled. So everything that asks one runs in a daemon thread, see
:func:`in_background`; the main thread waits only as long as it wants to. Thread pools
are of no use: their threads are joined when the program ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.engine import URL

from ..checks import hide_passwords
from ..ledger.inspector import Inspector
from ..ledger.overview import Overview
from ..ledger.overview_text import printable, seconds_text
from ..ledger.store import LedgerError, StoreAway
from . import AnyStore, one_line, require_file
from .server import ServerFigures, ServerView

_T = TypeVar("_T")

#: Seconds for the server's answer, and for closing connections; both take milliseconds.
_PATIENCE = 1.0


def in_background(function: Callable[..., _T], *arguments: Any) -> Future[_T]:
    """Run a function in a new daemon thread, which is left behind if it hangs."""
    future: Future[_T] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)  # for the thread that asks for the result

    threading.Thread(target=work, daemon=True).start()
    return future


@dataclass(frozen=True, slots=True)
class Picture:
    """What was seen last, and what is wrong now."""

    #: None if nothing was ever seen.
    overview: Overview | None = None
    server: ServerFigures | None = None
    #: When the overview was taken, on the clock.
    seen_at: float = 0.0
    #: Why the last look failed, None if it did not.
    trouble: str | None = None

    def trouble_at(self, now: float) -> str | None:
        """Return the trouble, and how old the overview is by now."""
        if self.trouble is None or self.overview is None:
            return self.trouble
        age = seconds_text(max(int(now - self.seen_at), 0))
        return f"{self.trouble}, last seen {age} ago"


class Poller:
    """Looks again and again, also after the ledger or its server was away.

    :param server: the URL of the server that is asked as well, if one is.
    """

    def __init__(
        self,
        store: AnyStore,
        server: URL | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._inspector = Inspector(store)
        self._view = None if server is None else ServerView(server)
        self._clock = clock
        self._last = Picture()
        self._looking: Future[Picture] | None = None
        #: The last question to the server, and when it was asked.
        self._asking: Future[ServerFigures] | None = None
        self._asked_at = 0.0

    def start(self) -> Future[Picture]:
        """Begin a look, in the background. The one before must have ended."""
        self._looking = in_background(self.look)
        return self._looking

    def look(self) -> Picture:
        """Return the picture of this moment, or the last one and what is wrong."""
        last = self._last
        try:
            require_file(self._store)
            overview = self._inspector.look()
        except (StoreAway, LedgerError) as error:
            self._inspector.close()  # the next look opens it again
            text = printable(hide_passwords(one_line(error.args[0])))
            if isinstance(error, StoreAway):
                text = f"the ledger is away: {text}"
            self._last = Picture(last.overview, last.server, last.seen_at, text)
        else:
            now, server = self._clock(), self._ask_server(overview)
            if server is not None and None is not server.name == self._inspector.server:
                overview = overview.with_sessions(server.members)
            self._last = Picture(overview, server, now)
        return self._last

    def _ask_server(self, overview: Overview) -> ServerFigures | None:
        """Return what the server says, soon: it must not hold up the ledger's figures.

        While it does not answer, it is not asked again; a late answer is dropped.
        """
        if self._view is None:
            return None
        if self._asking is None or self._asking.done():
            self._asked_at = self._clock()
            sessions = self._inspector.sessions
            self._asking = in_background(self._view.look, overview, sessions)
        wait([self._asking], _PATIENCE)
        if not self._asking.done():
            silent = seconds_text(int(self._clock() - self._asked_at))
            return ServerFigures(error=f"does not answer, for {silent}")
        return self._asking.result()

    def close(self) -> None:
        """Close all connections, but for those that do not answer."""
        if self._looking is None or self._looking.done():
            wait([in_background(self._inspector.close)], _PATIENCE)
        if self._view is not None and (self._asking is None or self._asking.done()):
            wait([in_background(self._view.close)], _PATIENCE)
