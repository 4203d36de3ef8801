"""A DBAPI without a database: counts what is open, and fails when told to."""

from __future__ import annotations

import itertools
import threading

from sqlalchemy import create_engine

from sqla_fairpool import FairQueuePool


class StubError(Exception):
    """What the stub raises."""


class StubCursor:
    description = (("x", None, None, None, None, None, None),)
    rowcount = -1
    lastrowid = None
    arraysize = 1

    def __init__(self, connection):
        self.connection = connection
        self._rows = []

    def execute(self, statement, parameters=()):
        self.connection.statements.append(statement)
        self._rows = [(0,)]

    executemany = execute

    def fetchone(self):
        return self._rows.pop() if self._rows else None

    def fetchall(self):
        rows, self._rows = self._rows, []
        return rows

    def close(self):
        pass


class StubConnection:
    """Counts as open from the stub's ``connect`` until ``close``."""

    def __init__(self, server, number):
        self.server = server
        self.number = number
        self.statements = []
        self.closed = False
        self.rollbacks = 0
        #: Which caller has it; written by stress tests.
        self.owner = None

    def cursor(self):
        return StubCursor(self)

    def commit(self):
        pass

    def rollback(self):
        self.rollbacks += 1
        self.server.called("rollback")

    def close(self):
        if not self.closed:
            self.closed = True
            self.server.called("close")
            self.server.closing()

    def __del__(self):
        StubConnection.close(self)  # as a driver's does; no test's replacement

    def create_function(self, *args, **kw):
        pass  # the sqlite dialect wants one

    def __repr__(self):
        return f"<stub {self.number}>"


class StubServer:
    """Opens connections, knows how many are open and how many ever were at once.

    :attr:`before` maps ``connect``, ``rollback`` or ``close`` to a function that is
    called there: it may block on an event, or raise.
    """

    def __init__(self):
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self.before = {}
        self.opened = 0
        self.open = 0
        self.most = 0

    def called(self, name):
        hook = self.before.get(name)
        if hook is not None:
            hook()

    def connect(self):
        with self._lock:
            # Counted from the attempt, as a server counts a backend.
            self.open += 1
            self.most = max(self.most, self.open)
        try:
            self.called("connect")
        except BaseException:
            with self._lock:
                self.open -= 1
            raise
        self.opened += 1
        return StubConnection(self, next(self._numbers))

    def closing(self):
        with self._lock:
            self.open -= 1

    def pool(self, pool_class=FairQueuePool, **options):
        """Return a pool on this server, without an engine."""
        return pool_class(self.connect, **options)

    def engine(self, **options):
        """Return an engine on this server."""
        options.setdefault("poolclass", FairQueuePool)
        return create_engine("sqlite://", creator=self.connect, **options)


def all_for_one(size, max_overflow=0):
    """The options of a pool in which one tag may have all connections."""
    capacity = size + max_overflow
    return {
        "pool_size": size,
        "max_overflow": max_overflow,
        "soft_limit": capacity,
        "max_limit": capacity,
    }


def sized(size, options):
    """Add the options of `all_for_one` to others, unless the size is None."""
    if size is None:
        return options
    return options | all_for_one(size, options.get("max_overflow", 0))
