"""Looking at a ledger and its server again and again, whatever becomes of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy import exc
from sqlalchemy.engine import URL

from ..launch.environment import DATABASE, LEDGER, Settings
from ..ledger.addresses import known_ledgers, make_store
from ..ledger.book import Book
from ..ledger.errors import LedgerError
from ..ledger.host import HostStore
from ..ledger.inspector import Inspector
from ..ledger.overview import Overview
from ..ledger.overview_text import printable, seconds_text
from ..ledger.postgres import PostgresStore
from ..ledger.rows import Session
from ..ledger.store import StoreAway
from .common import CommandError, hide_passwords
from .errand import Errand
from .server_view import ServerFigures, ServerView

__all__ = [
    "Looks",
    "Picture",
    "Place",
    "Watch",
    "find_place",
    "make_observer",
]

_Store = HostStore | PostgresStore

#: Seconds for the server's answer, which takes milliseconds.
_PATIENCE = 1.0


class Looks(Protocol):
    """What this file needs of an :class:`.Inspector`."""

    @property
    def sessions(self) -> Mapping[Session, int]:
        """The server sessions at the last look, and the members' numbers."""
        ...

    def look(self) -> Overview:
        """Return the picture of this moment."""
        ...

    def close(self) -> None:
        """Close the store."""


def make_observer(store: _Store) -> Looks:
    """Return what looks at a ledger."""
    return Inspector(store)


# -- where -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A ledger and the database that its pools use."""

    #: The ledger's name, for people.
    name: str
    #: The ledger, as :func:`.places.make_store` takes it.
    ledger: str
    database: URL | None
    #: The server to be asked, None if none is.
    server: URL | None

    def make_store(self) -> _Store:
        """Return a store that is not open yet.

        :raises LedgerError: if it is a file that is not there, which is not created.
        """
        store = make_store(self.ledger, self.database, observes=True)
        if isinstance(store, HostStore) and not os.path.exists(store.name):
            raise LedgerError(
                f"there is no ledger at {store.name}: nobody has used it yet"
            )
        return store


def find_place(arguments: argparse.Namespace) -> Place:
    """Return what the arguments and the environment mean.

    :raises CommandError: if that is nothing, naming what is wrong.
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
            name = make_store(ledger, database).name
    except (exc.ArgumentError, LedgerError) as error:
        raise CommandError(str(error)) from None
    except ImportError as error:
        raise CommandError(
            f"{error.name} is not installed: pip install 'sqla-fairpool[postgresql]'"
        ) from None
    is_asked = database is not None and (
        arguments.url is not None or database.get_backend_name() == "postgresql"
    )
    return Place(name, ledger, database, database if is_asked else None)


def _only_ledger() -> str:
    """Return the host ledger that is meant when no URL says which database."""
    paths = known_ledgers()
    if not paths:
        raise CommandError(
            f"nobody has used a ledger here yet, and no {DATABASE} says which one to "
            "wait for: give --url or --ledger PATH"
        )
    # Of those that are left from earlier, nobody wants to hear.
    paths = [path for path in paths if _is_in_use(path)] or paths
    if len(paths) > 1:
        found = ", ".join(str(path) for path in paths)
        raise CommandError(
            f"there are {len(paths)} ledgers, {found}: give --url or --ledger PATH"
        )
    return str(paths[0])


def _is_in_use(path: Path) -> bool:
    """Tell if a member of a host ledger lives. If it cannot be told, one may."""
    store = HostStore(path)
    try:
        store.open()
        with store.transaction() as rows:
            members = Book(rows).members
        return bool(store.living(list(members)))
    except (StoreAway, LedgerError):
        return True
    finally:
        store.close()


# -- looking ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Picture:
    """What was seen last, and what is wrong now."""

    #: None if nothing was ever seen.
    overview: Overview | None = None
    server: ServerFigures | None = None
    #: When the overview was taken, on the clock.
    seen_at: float = 0.0
    #: Why there is no newer overview, None if it is of now.
    trouble: str | None = None

    def trouble_at(self, now: float) -> str | None:
        """Return the trouble, and how old the picture is by now."""
        if self.trouble is None or self.overview is None:
            return self.trouble
        age = seconds_text(max(int(now - self.seen_at), 0))
        return f"{self.trouble}, last seen {age} ago"


class Watch:
    """Looks, and looks again, also after the ledger or its server was away.

    :param place: which ones.
    :param clock: seconds.
    :param observe: from a store to an observer; default: :func:`make_observer`.
    """

    def __init__(
        self,
        place: Place,
        clock: Callable[[], float],
        observe: Callable[[_Store], Looks] | None = None,
    ) -> None:
        self._place = place
        self._clock = clock
        self._observe = observe or make_observer
        self._observer: Looks | None = None
        server = place.server
        self._server = None if server is None else _PatientServer(server, clock)
        self._last = Picture()

    def look(self) -> Picture:
        """Return the picture of this moment, or the last one and what is wrong."""
        try:
            if self._observer is None:
                self._observer = self._observe(self._place.make_store())
            overview = self._observer.look()
            sessions = self._observer.sessions
        except (StoreAway, LedgerError) as error:
            # The next look begins anew: whatever was broken is made again.
            self._close_observer()
            last = self._last
            self._last = Picture(
                last.overview, last.server, last.seen_at, _trouble(error)
            )
            return self._last
        now = self._clock()
        server = None if self._server is None else self._server.look(overview, sessions)
        self._last = Picture(overview, server, now)
        return self._last

    def close(self) -> None:
        """Close all connections."""
        self._close_observer()
        if self._server is not None:
            self._server.close()

    def _close_observer(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.close()


def _trouble(error: Exception) -> str:
    text = printable(hide_passwords(" ".join(str(error).split())))
    return f"the ledger is away: {text}" if isinstance(error, StoreAway) else text


class _PatientServer:
    """Asks a server, and says so if it does not answer.

    When a server hangs, people look at a monitor: the ledger's figures go on.
    """

    def __init__(self, url: URL, clock: Callable[[], float]) -> None:
        view = ServerView(url)
        self._clock = clock
        self._asked_at: float | None = None
        self._question: tuple[Overview, Mapping[Session, int]] | None = None
        self._errand = Errand(lambda: self._look(view), view.close)

    def _look(self, view: ServerView) -> ServerFigures:
        assert self._question is not None
        return view.look(*self._question)

    def look(
        self, overview: Overview, sessions: Mapping[Session, int]
    ) -> ServerFigures:
        """Return what the server says, in a moment."""
        if self._asked_at is not None and self._errand.poll() is not None:
            self._asked_at = None  # that came too late
        if self._asked_at is None:
            self._question = overview, sessions
            self._asked_at = self._clock()
            self._errand.ask()
        figures = self._errand.poll(_PATIENCE)
        if figures is None:
            silent = seconds_text(int(self._clock() - self._asked_at))
            return ServerFigures(error=f"does not answer, for {silent}")
        self._asked_at = None
        return figures

    def close(self) -> None:
        self._errand.close()
