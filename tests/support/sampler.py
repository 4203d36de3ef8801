"""The sessions at a real PostgreSQL, looked at all the time."""

from __future__ import annotations

import threading
import time

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from .threads import PATIENCE

CAPACITY = 20
ROLE = (
    "do $$ begin create role scraper login; "
    "exception when duplicate_object then end $$",
    f"alter role scraper connection limit {CAPACITY}",
)


class Server:
    """A server that holds the role ``scraper`` to the capacity, and a look at it.

    Looks at ``pg_stat_activity`` all the time.
    """

    def __init__(self, url):
        self.url = make_url(url).set(username="scraper")
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._connection = engine.connect()
        for statement in ROLE:
            self._connection.execute(text(statement))
        self._query = text(
            "select application_name, count(*), "
            "count(*) filter (where state = 'active') from pg_stat_activity "
            "where application_name like 'scraper %' group by 1"
        )
        self._over = threading.Event()
        #: Connections at work, and all, by scraper.
        self.now, self.open = {}, {}
        #: Most connections ever seen in two looks one after the other. The view is read
        #: backend by backend, so one look may see a session and its successor.
        self.most = 0
        self.looks = 0
        #: Connections that there may be beside the capacity, for a moment.
        self.beside = 0
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self):
        while not self._over.is_set():
            rows = self._connection.execute(self._query).all()
            self.now = {r[0].removeprefix("scraper "): r[2] for r in rows if r[2]}
            before = sum(self.open.values())
            self.open = {row[0].removeprefix("scraper "): row[1] for row in rows}
            self.most = max(self.most, min(before, sum(self.open.values())))
            self.looks += 1

    def close(self):
        self._over.set()
        self._thread.join()
        self._connection.close()

    def until(self, **expected):
        """Return how long it took until just these had so many at work."""
        began = time.monotonic()
        while self.now != expected:
            assert time.monotonic() - began < PATIENCE, f"{self.now}, not {expected}"
            time.sleep(0.002)
        return time.monotonic() - began

    def settles(self, **expected):
        """Return once just these have so many at work, and it stays so."""
        self.until(**expected)
        self.stays(0.5, **expected)

    def stays(self, seconds, **expected):
        """Assert that it stays so, but for connections that change hands."""
        looks, others = self.looks, 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # A session between two statements is open, and not at work at that moment;
            # on a busy machine that is so in most of the looks.
            more = any(n > expected.get(name, 0) for name, n in self.now.items())
            less = any(self.open.get(name, 0) < n for name, n in expected.items())
            others += more or less
            time.sleep(0.01)
        assert self.looks > looks
        assert others <= seconds * 100 / 2, f"{others} times not {expected}"
        self.until(**expected)
