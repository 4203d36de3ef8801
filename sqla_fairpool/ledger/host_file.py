"""The rows of the host store: an SQLite file under a lock of its own.

Rules of this file:

* SQLite takes no locks here (``nolock``): the first descriptor of the file that a
  process closes would drop them all, and a forked child is not told.
* The lock is a ``flock`` on the file itself, whatever is deleted, replaced or linked.
  It belongs to an open file description: each :class:`LedgerFile` has one, and a forked
  child opens another. The kernel releases it with the process. It is released by
  ``LOCK_UN``, since a child may not have closed its copy of the descriptor yet.
* Everything is done under the lock, and after a look if the file is still the one at
  its path.
* No thread of this process is inside SQLite while another one forks: SQLite's mutexes
  would be held for ever in the child.

The next process plays the rollback journal back if one was killed in a commit. Nothing
is synced to the disk: that would cost half a millisecond under the lock, and after a
power cut no member lives. Damage is recognised when the file is opened.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sqlite3
import stat
import threading
import time
import uuid
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from .errors import LedgerError
from .store import StoreAway, changes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

#: How long a transaction waits for another one, which takes some 40 microseconds; a
#: stopped process may be in the middle of one.
_PATIENCE = 2.0
#: Seconds between two attempts to get the lock: the first, and the longest. The first
#: is about what a transaction takes, and the least that a system sleeps.
_FIRST, _LONGEST = 50e-6, 2e-3
#: Version of the file. Version 1 was in WAL mode, under SQLite's own locks.
SCHEMA = 2

_DELETE = "delete from row where key = ?"
_WRITE = "insert or replace into row values (?, ?)"

#: Held by a thread that must not see its process forked.
no_fork = threading.RLock()


def _end_of_fork() -> None:
    with suppress(RuntimeError):  # forked by something that did not tell us before
        no_fork.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=no_fork.acquire,
        after_in_parent=_end_of_fork,
        after_in_child=_end_of_fork,
    )


class Replaced(StoreAway):
    """What is open is not what is at the ledger's path any more."""


def is_at(handle: int | None, path: Path) -> bool:
    """Tell if an open file is the one at a path."""
    try:
        return handle is not None and os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def unlock_and_close(handle: int | None) -> None:
    """Close and unlock a file, whatever this process's children have open."""
    if handle is not None:
        with no_fork, suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def close_copy(handle: int | None) -> None:
    """Close a file in a forked child. Its parent, which has it open too, keeps it
    locked."""
    if handle is not None:
        with suppress(OSError):
            os.close(handle)


def share(path: Path, mode: int, like: os.stat_result) -> None:
    """Give what this process has made to the owner, from root, and group of `like`."""
    with suppress(OSError):  # it stays in a group of this user
        os.chown(path, like.st_uid if os.geteuid() == 0 else -1, like.st_gid)
    # Setting the mode would take back that a directory hands down its group.
    path.chmod(mode | path.stat().st_mode & stat.S_ISGID)


class LedgerFile:
    """See the head of this file. Not for several threads at once.

    :param makes_directory: the file's directory is made if it is not there. Else only
      if it has vanished since the file was opened.
    """

    def __init__(self, path: Path, makes_directory: bool = False) -> None:
        self._path = path
        self._makes_directory = makes_directory
        self.name = str(path)
        #: The file without symbolic links; what lies beside it lies beside this.
        self.real = path
        #: The ledger's own number; 0 until it is opened.
        self.key = 0
        self.database: sqlite3.Connection | None = None
        # What the lock is on.
        self._handle: int | None = None

    def in_place(self) -> bool:
        return is_at(self._handle, self._path)

    def _check_place(self) -> None:
        """:raises Replaced: if the file is not the one at its path; it is closed."""
        if not self.in_place():
            self._replaced()

    def _replaced(self) -> NoReturn:
        self.close()
        raise Replaced(
            f"the ledger {self.name} was removed or replaced; what is there now is "
            "joined"
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = self._handle
        assert handle is not None
        try:
            self._lock(handle)
            self._check_place()
            yield
        finally:
            if self._handle == handle:  # neither closed nor forked meanwhile
                fcntl.flock(handle, fcntl.LOCK_UN)

    def _lock(self, handle: int) -> None:
        deadline = time.monotonic() + _PATIENCE
        pause = _FIRST
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StoreAway(
                        f"{self.name}: locked by another process for {_PATIENCE:g}s"
                    ) from None
            except OSError as error:
                raise StoreAway(f"{self.name}: {error}") from None
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST)

    @contextmanager
    def opening(self) -> Iterator[os.stat_result]:
        """Open what is at the path, created if need be; within, it is locked.

        :raises Replaced: if another one was put there meanwhile.
        """
        try:
            self._open()
            with self._locked():
                yield os.fstat(self._handle)  # type: ignore[arg-type]  # it is open
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.real = Path(os.path.realpath(self._path))
        if not (self._makes_directory or self.real.parent.exists()):
            raise LedgerError(
                f"the directory {self.real.parent} does not exist: make it, or mend "
                f"the path of the ledger {self.name}"
            )
        self.real.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with no_fork:
            try:
                # Not with O_CREAT: in a directory like /tmp that is refused for a file
                # of another user, though it may be written.
                self._handle = os.open(self.real, os.O_RDWR | os.O_NONBLOCK)
            except FileNotFoundError:
                # Not readable by others, unless the operator creates it otherwise.
                self._handle = os.open(self.real, os.O_RDWR | os.O_CREAT, 0o600)
        if not stat.S_ISREG(os.fstat(self._handle).st_mode):
            self.close()
            raise LedgerError(f"the ledger {self.name} is not a file")
        self._makes_directory = True

    def connect(self, *, repair: bool) -> None:
        """Let SQLite open the file; make the tables, or check or `repair` them."""
        try:
            self._connect()
        except sqlite3.Error as error:
            self._check_place()
            self._disconnect()
            if not repair or type(error) is not sqlite3.DatabaseError:
                raise self._translated(error) from None
            self._make_anew(error)
            self._connect()

    def _connect(self) -> None:
        assert self._handle is not None
        if os.pread(self._handle, 2, 18) == b"\2\2":  # in WAL mode, as version 1
            raise self._older()
        journal = Path(f"{self.real}-journal")
        if journal.exists() and not journal.is_file():
            raise LedgerError(f"{journal} is not a file: remove it")
        # Never created by SQLite, which does not know of the lock.
        uri = f"file:{quote(os.fsencode(self.real))}?mode=rw&nolock=1"
        with no_fork:
            database = self.database = sqlite3.connect(
                uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False
            )
            self._check_place()  # else SQLite has opened another, without its lock
            database.execute("pragma journal_mode = truncate")
            database.execute("pragma synchronous = off")
            (found,) = database.execute("pragma quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(" ".join(found.split()))
            self._make_tables(database, journal)

    def _make_tables(self, database: sqlite3.Connection, journal: Path) -> None:
        database.execute("begin")
        (version,) = database.execute("pragma user_version").fetchone()
        tables = database.execute("select name from sqlite_master").fetchall()
        if version > SCHEMA:
            raise LedgerError(
                f"the ledger {self.name} has schema version {version}, and this "
                f"process knows {SCHEMA}: it runs an older sqla_fairpool"
            )
        if tables and (version == 0 or ("row",) not in tables):
            raise LedgerError(f"the ledger {self.name} is a database of something else")
        if tables and version < SCHEMA:
            raise self._older()
        if not journal.exists():
            # Here, for SQLite knows the ledger's mode, but not its group.
            journal.touch(0o600)
            there = os.stat(self.real)
            share(journal, there.st_mode & 0o777, there)
        if not tables:
            # The number tells ledgers apart: the path may differ in each container.
            key = uuid.uuid4().int & 0x7FFFFFFF
            for statement in (
                "create table row (key text primary key, value text not null) "
                "without rowid",
                f"pragma application_id = {key}",
                f"pragma user_version = {SCHEMA}",
            ):
                database.execute(statement)
        (self.key,) = database.execute("pragma application_id").fetchone()
        database.execute("commit")

    def _older(self) -> LedgerError:
        return LedgerError(
            f"the ledger {self.name} is of an older sqla_fairpool, which locks it "
            "otherwise: stop the processes that use it, then remove it"
        )

    def _make_anew(self, error: sqlite3.Error) -> None:
        assert self._handle is not None
        kept = f"{self.real}.damaged"
        shutil.copy(self.real, kept)
        for suffix in ("-journal", "-wal", "-shm"):
            Path(f"{self.real}{suffix}").unlink(missing_ok=True)
        os.ftruncate(self._handle, 0)
        _log.warning(
            "the ledger %s was damaged (%s), and no member lives: it is made anew, and "
            "what there was is %s",
            self.name,
            error,
            kept,
        )

    def close(self) -> None:
        self._disconnect()
        handle, self._handle = self._handle, None
        unlock_and_close(handle)

    def _disconnect(self) -> None:
        database, self.database = self.database, None
        if database is not None:
            with no_fork:
                self._roll_back(database)
                database.close()

    @staticmethod
    def _roll_back(database: sqlite3.Connection) -> None:
        if database.in_transaction:
            with suppress(sqlite3.Error):
                database.execute("rollback")

    def forget(self) -> None:
        """In a forked child: become closed, without the lock of the parent."""
        handle, self._handle = self._handle, None
        close_copy(handle)
        database, self.database = self.database, None
        if database is not None:
            # To close it might roll the parent's transaction back: it is never freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(database))

    @contextmanager
    def transaction(self) -> Iterator[MutableMapping[str, str]]:
        """See :meth:`.store.Store.transaction`. A file that was replaced is closed."""
        database = self.database
        if database is None:
            raise StoreAway("the ledger is not open")
        if database.in_transaction:
            raise RuntimeError("a transaction of the ledger in another one")
        with self._locked():
            try:
                with no_fork:
                    # Of the pages that SQLite keeps it does not know that a copy was
                    # written over the file: so it keeps none.
                    database.execute("pragma shrink_memory")
                    database.execute("begin")
                    (key,) = database.execute("pragma application_id").fetchone()
                    if key != self.key:  # written over, in place
                        self._replaced()
                    rows = dict(database.execute("select key, value from row"))
                before = dict(rows)
                yield rows
                if self.database is not database:
                    raise StoreAway("the ledger was closed in a transaction")
                with no_fork:
                    gone, changed = changes(before, rows)
                    database.executemany(_DELETE, [(key,) for key in gone])
                    database.executemany(_WRITE, changed)
                    database.execute("commit")
            except sqlite3.Error as error:
                # When it is opened again, it is looked at what there is.
                self.close()
                raise self._translated(error) from None
            except BaseException:
                if self.database is database:
                    with no_fork:
                        self._roll_back(database)
                raise

    def _translated(self, error: sqlite3.Error) -> Exception:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, sqlite3.OperationalError):
            name = getattr(error, "sqlite_errorname", "")  # from Python 3.11 on
            if name in ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM"):
                return LedgerError(f"the ledger {self.name} cannot be used: {reason}")
            return StoreAway(f"{self.name}: {reason}")
        return LedgerError(
            f"the ledger {self.name} is no ledger, or damaged ({reason}); if no "
            "member lives, remove it"
        )
