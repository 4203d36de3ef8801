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
        query = "select count(*) from pg_stat_activity where application_name = :name"
        self._count = text(query).bindparams(name=name)
        #: Most of them in two looks one after the other: the view is read backend by
        #: backend, so a single look may see one that goes and one that comes instead.
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    @property
    def now(self):
        """How many there are at this moment."""
        with self._engine.connect() as connection:
            return connection.scalar(self._count)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._over.set()
        self._thread.join()

    def _sample(self):
        with self._engine.connect() as connection:
            before = 0
            while not self._over.is_set():
                count = connection.scalar(self._count)
                self.most, before = max(self.most, min(before, count)), count
