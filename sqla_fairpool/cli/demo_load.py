"""The scrapers of the demo: threads that check out, work and commit, in a loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, exc, text

from .common import CommandError
from .demo_report import LoadFigures
from .demo_server import why

__all__ = ["Group", "Work", "batch_work", "stop_groups", "warm_up"]

#: What a scraper does with a connection.
Work = Callable[[Connection], None]

#: Rows that a scraper takes at a time.
_BATCH = 3

# The comment is how the server's view is told apart, see `demo_server`.
_FETCH = """/* {scraper} */
    SELECT id, payload FROM {table} WHERE scraper = '{scraper}'
    ORDER BY updated_at LIMIT :batch FOR UPDATE SKIP LOCKED"""

_SERVICE = "/* {scraper} */ SELECT pg_sleep(:seconds)"

_WRITE_BACK = """/* {scraper} */
    UPDATE {table} SET state = 'done', runs = runs + 1, payload = md5(payload),
        updated_at = clock_timestamp()
    WHERE id = ANY(:ids)"""


def batch_work(table: str, scraper: str, seconds: float) -> Work:
    """Return work: take a batch of rows, spend `seconds` on it, write it back."""
    fetch, service, write_back = (
        text(statement.format(table=table, scraper=scraper))
        for statement in (_FETCH, _SERVICE, _WRITE_BACK)
    )

    def work(connection: Connection) -> None:
        rows = connection.execute(fetch, {"batch": _BATCH}).all()
        if seconds:
            connection.execute(service, {"seconds": seconds})
        connection.execute(write_back, {"ids": [row.id for row in rows]})
        connection.commit()

    return work


class _Worker(threading.Thread):
    """One thread of a scraper, and what it has met."""

    def __init__(self, group: Group) -> None:
        # A daemon: if a server never answers, the program can end all the same.
        super().__init__(name=f"{group.scraper} worker", daemon=True)
        self._group = group
        #: Seconds of each wait that has ended with a connection.
        self.waits: list[float] = []
        #: Seconds of each wait that ended with a time-out.
        self.given_up: list[float] = []
        self.waiting_since: float | None = None

    def run(self) -> None:
        group = self._group
        try:
            while not group.stopping.is_set():
                self._cycle()
                if group.pause:
                    group.stopping.wait(group.pause)
        except Exception as error:
            group.failure = error

    def _cycle(self) -> None:
        since = self.waiting_since = time.monotonic()
        try:
            with self._group.engine.connect() as connection:
                self.waits.append(time.monotonic() - since)
                self.waiting_since = None
                if not self._group.stopping.is_set():
                    self._group.work(connection)
        except exc.TimeoutError:
            self.given_up.append(time.monotonic() - since)
            self.waiting_since = None


@dataclass(frozen=True)
class _Mark:
    """Where a worker's records stood when the measurement began."""

    waits: int
    given_up: int


class Group:
    """The threads of one scraper.

    :param engine: an engine that carries the scraper's tag.
    :param pause: seconds between two checkouts of a thread.
    """

    def __init__(
        self,
        engine: Engine,
        scraper: str,
        threads: int,
        work: Work,
        pause: float = 0.0,
    ) -> None:
        self.engine = engine
        self.scraper = scraper
        self.threads = threads
        self.work = work
        self.pause = pause
        self.stopping = threading.Event()
        self.failure: Exception | None = None
        self._workers: list[_Worker] = []
        self._marks: list[_Mark] = []
        self._since = 0.0

    def start(self) -> None:
        """Start the threads."""
        for _ in range(self.threads):
            worker = _Worker(self)
            self._workers.append(worker)
            worker.start()

    def check(self) -> None:
        """Raise :class:`CommandError` if a thread has failed."""
        if self.failure is not None:
            raise CommandError(f"scraper {self.scraper} failed: {why(self.failure)}")

    def join(self, deadline: float) -> None:
        """Wait for the threads' end, until `deadline` at most."""
        for worker in self._workers:
            # One that an interrupt kept from starting has nothing to wait for.
            if worker.ident is not None:
                worker.join(max(deadline - time.monotonic(), 0.0))

    def measure_from_here(self) -> None:
        """Begin to measure: what has been until now does not count."""
        self._since = time.monotonic()
        self._marks = [_Mark(len(w.waits), len(w.given_up)) for w in self._workers]

    def figures(self) -> LoadFigures:
        """Return what has been since :meth:`measure_from_here`."""
        now = time.monotonic()
        waits: list[float] = []
        open_waits: list[float] = []
        served = never_served = timeouts = 0
        for worker, mark in zip(self._workers, self._marks, strict=True):
            since = worker.waiting_since
            ended, given_up = worker.waits[mark.waits :], worker.given_up
            waits += ended
            waits += given_up[mark.given_up :]
            if since is not None:
                open_waits.append(now - since)
            served += len(ended)
            timeouts += len(given_up) - mark.given_up
            never_served += not ended
        # Waits that have not ended count with what they have lasted until now;
        # without them the worst would be left out.
        waits = sorted(waits + open_waits) or [0.0]
        p99 = waits[min(int(len(waits) * 0.99), len(waits) - 1)]
        return LoadFigures(
            scraper=self.scraper,
            threads=self.threads,
            checkouts=served,
            checkouts_per_second=served / (now - self._since),
            wait_p99=p99,
            wait_longest=waits[-1],
            p99_still_waiting=p99 in open_waits,
            longest_still_waiting=waits[-1] in open_waits,
            timeouts=timeouts,
            never_served=never_served,
        )


def stop_groups(groups: Sequence[Group], patience: float = 10.0) -> None:
    """End the threads of `groups`: what they do is finished, nothing begun.

    :param patience: seconds, after which they are left behind.
    """
    for group in groups:
        group.stopping.set()
    deadline = time.monotonic() + patience
    for group in groups:
        group.join(deadline)


def warm_up(engines: Sequence[Engine], connections: int) -> None:
    """Open `connections` in the pool, evenly under the tags of `engines`."""
    opened = []
    try:
        for number in range(connections):
            opened.append(engines[number % len(engines)].connect())
    except exc.SQLAlchemyError as error:
        raise CommandError(f"no connection: {why(error)}") from None
    finally:
        for connection in opened:
            connection.close()
