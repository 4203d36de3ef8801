"""Looking at a ledger and its server again and again, whatever becomes of them.

A server that does not answer can hold a driver for minutes, inside C code, where no
signal is handled. So everything that asks one runs in a daemon thread, see
:func:`in_background`; the main thread waits only as long as it wants to. Thread pools
are of no use: their threads are joined when the program ends.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import exc
from sqlalchemy.engine import URL

from ..launch.environment import DATABASE, LEDGER, Settings
from ..ledger.addresses import known_ledgers, make_store
from ..ledger.errors import LedgerError, RowBroken
from ..ledger.host import HostStore
from ..ledger.inspector import Inspector, read
from ..ledger.overview import Overview
from ..ledger.overview_text import printable, seconds_text
from ..ledger.postgres import PostgresStore
from ..ledger.store import StoreAway
from ..options import hide_passwords
from . import CommandError
from .budget import missing_driver
from .server_view import ServerFigures, ServerView

__all__ = ["Picture", "Poller", "make_poller", "in_background"]

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

    :param store: the ledger.
    :param server: the URL of the server that is asked as well, if one is.
    :param clock: seconds.
    """

    def __init__(
        self,
        store: HostStore | PostgresStore,
        server: URL | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = store.name
        self._is_file = isinstance(store, HostStore)
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
            if self._is_file and not os.path.exists(self.name):  # it would be created
                raise LedgerError(
                    f"there is no ledger at {self.name}: no process has used it yet"
                )
            overview = self._inspector.look()
        except (StoreAway, LedgerError) as error:
            self._inspector.close()  # the next look opens it again
            text = printable(hide_passwords(" ".join(str(error).split())))
            if isinstance(error, StoreAway):
                text = f"the ledger is away: {text}"
            self._last = Picture(last.overview, last.server, last.seen_at, text)
        else:
            now = self._clock()
            self._last = Picture(overview, self._ask_server(overview), now)
        return self._last

    def _ask_server(self, overview: Overview) -> ServerFigures | None:
        """Return what the server says, soon: it must not hold up the ledger's figures.

        While it does not answer, it is not asked again; a late answer is dropped.
        """
        if self._view is None:
            return None
        if self._asking is None or self._asking.done():
            self._asked_at = self._clock()
            self._asking = in_background(
                self._view.look, overview, self._inspector.sessions
            )
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


# -- what is looked at -----------------------------------------------------------------


def make_poller(arguments: argparse.Namespace) -> Poller:
    """Return a poller of what the arguments and the environment name.

    :raises CommandError: if that is nothing, or something is wrong with it.
    """
    given = {} if arguments.ledger is None else {"ledger": arguments.ledger}
    try:
        settings = Settings.read()
        ledger = settings.with_arguments(given)["ledger"]
        database = settings.database(arguments.url, "--url")
        if ledger == "host" and database is None:
            ledger = _only_ledger()
        if ledger is None:
            raise CommandError(
                f"there is no ledger to look at ({LEDGER} says so, or the system has "
                "no default one): give --ledger"
            )
        with settings.naming(given):
            store = make_store(ledger, database, observes=True)
    except (exc.ArgumentError, LedgerError) as error:
        raise CommandError(str(error)) from None
    except ImportError as error:
        raise missing_driver(error) from None
    is_asked = database is not None and (
        arguments.url is not None or database.get_backend_name() == "postgresql"
    )
    return Poller(store, database if is_asked else None)


def _only_ledger() -> str:
    """Return the host ledger that is meant when no URL says which database."""
    paths = known_ledgers()
    if not paths:
        raise CommandError(
            f"no process has used a ledger here yet, and no {DATABASE} says which "
            "one to wait for: give --url or --ledger PATH"
        )
    # Files that are left from earlier do not count, beside one that is in use.
    paths = [path for path in paths if _is_in_use(path)] or paths
    if len(paths) > 1:
        found = ", ".join(str(path) for path in paths)
        raise CommandError(
            f"there are {len(paths)} ledgers, {found}: give --url or --ledger PATH"
        )
    return str(paths[0])


def _is_in_use(path: Path) -> bool:
    """Tell if a member of a host ledger lives, or may live."""
    store = HostStore(path)
    try:
        store.open()
        return bool(read(store).living)
    except (StoreAway, RowBroken):
        return True
    except LedgerError:  # no member has ever joined
        return False
    finally:
        store.close()
