"""The sessions of an application, as the server sees them."""

from __future__ import annotations

import threading

from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool


class Sessions:
    """Counts an application's sessions at the server, all the time."""

    def __init__(self, url, name):
        self._engine = create_engine(url, poolclass=NullPool).execution_options(
            isolation_level="AUTOCOMMIT"
        )
        query = "select pid from pg_stat_activity where application_name = :name"
        self._query = text(query).bindparams(name=name)
        #: Process ids of sessions that do not count.
        self.apart = set()
        self._seen = {(frozenset(), frozenset())}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    @property
    def now(self):
        """How many there are at this moment."""
        with self._engine.connect() as connection:
            return len(connection.scalars(self._query).all())

    @property
    def most(self):
        """Most of them in two looks one after the other.

        The view is read backend by backend, so a single look may see one that goes and
        one that comes instead.
        """
        return max(min(len(a - self.apart), len(b - self.apart)) for a, b in self._seen)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._over.set()
        self._thread.join()

    def _sample(self):
        with self._engine.connect() as connection:
            before = frozenset()
            while not self._over.is_set():
                now = frozenset(connection.scalars(self._query))
                self._seen.add((before, now))
                before = now
