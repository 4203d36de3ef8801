"""What the parts of the demo share: its view, its time, and what must be undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine
from sqlalchemy.pool import Pool

from .demo_load import Group, stop_groups
from .demo_server import Database

if TYPE_CHECKING:
    from .demo_view import View

__all__ = ["CAPACITY", "Stage"]

#: Connections of each pool; what the scenarios expect is of these.
CAPACITY = 20

#: Seconds between two looks.
_LOOK_EVERY = 0.03


class Stage:
    """One run of the demo. What is started on it, :meth:`close` stops.

    :param seconds: how long each step is observed.
    """

    def __init__(self, view: View, seconds: float) -> None:
        self.view = view
        self.seconds = seconds
        self._stack = ExitStack()

    def at_end(self, function: Callable[[], object]) -> None:
        """Call `function` at the end; the last one registered goes first.

        Register it before what it undoes: a signal may come in between.
        """
        self._stack.callback(function)

    def close(self) -> None:
        """Undo everything, also if some of it fails."""
        try:
            self.view.close()
        finally:
            self._stack.close()

    def open_engine(
        self, database: Database, pool: type[Pool], options: dict[str, Any]
    ) -> Engine:
        """Return an engine on a pool of `CAPACITY` connections."""
        engine = database.engine(pool, pool_size=CAPACITY, max_overflow=0, **options)
        self.at_end(engine.dispose)
        return engine

    def close_engine(self, database: Database, engine: Engine) -> None:
        """Close an engine's connections before the next one opens as many."""
        engine.dispose()
        database.wait_for_no_sessions()

    def start(self, group: Group) -> None:
        """Start the threads of a scraper."""
        self.at_end(lambda: stop_groups([group]))
        group.start()

    def watch(
        self,
        groups: Sequence[Group],
        seconds: float,
        look: Callable[[], object],
        enough: Callable[[], bool] = lambda: False,
    ) -> float:
        """Look every now and then, for `seconds` or until it is `enough`.

        :return: how many seconds that was.
        :raises CommandError: if a thread of `groups` failed.
        """
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds and not enough():
            for group in groups:
                group.check()
            look()
            time.sleep(_LOOK_EVERY)
        return elapsed
