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

A copy that is put back does not know what its members have taken since. Beside the file
stands which ledger it is, and SQLite's count of its commits; while one is under way,
also what the count is to be after it. What else is found is a copy.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sqlite3
import stat
import struct
import time
import uuid
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

from .store import (
    LedgerError,
    StoreAway,
    changes,
    close_copy,
    is_at,
    no_fork,
    share,
    unlock_and_close,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # not used there

_log = logging.getLogger(__name__)

#: How long a transaction waits for another one, which takes some 40 microseconds; a
#: stopped process may be in the middle of one.
_PATIENCE = 2.0
#: Seconds between two attempts to get the lock: the first, and the longest. The first
#: is about what a transaction takes, and the least that a system sleeps.
_FIRST, _LONGEST = 50e-6, 2e-3
#: Version of the file. Version 1 was in WAL mode, under SQLite's own locks.
SCHEMA = 2
#: A ledger's commits and its number: as noted, and as they stand in SQLite's file.
_COUNT, _FOUND, _FOUND_AT = struct.Struct(">III"), struct.Struct(">I40xI"), 24

_DELETE = "delete from row where key = ?"
_WRITE = "insert or replace into row values (?, ?)"


class Replaced(StoreAway):
    """What is open is not what is at the ledger's path any more."""


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
        # What the lock is on, and the count beside it.
        self._handle: int | None = None
        self._count: int | None = None

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

    def connect(
        self, recover: Callable[[MutableMapping[str, str]], bool], *, repair: bool
    ) -> None:
        """Let SQLite open the file; make the tables, or check or `repair` them.

        :param recover: is to change the rows of a copy that was put back; False if they
          are those of another version, which does not note the count.
        """
        try:
            self._connect()
        except sqlite3.Error as error:
            self._check_place()
            self._disconnect()
            if not repair or type(error) is not sqlite3.DatabaseError:
                raise self._translated(error) from None
            self._make_anew(error)
            self._connect()
        if self._is_copy(self._found()):
            assert self.database is not None
            with self._rows(self.database, None) as rows:
                if recover(rows):
                    # Who has the file open is to find out; and this copy ends here.
                    self._new_key(self.database)
            self.key = self._found()[1]
        commits, key = self._found()
        self._note_count(commits, commits, key)

    def _connect(self) -> None:
        assert self._handle is not None
        if os.pread(self._handle, 2, 18) == b"\2\2":  # in WAL mode, as version 1
            raise self._older()
        beside = [Path(f"{self.real}-{name}") for name in ("journal", "count")]
        for file in beside:
            if file.exists() and not file.is_file():
                raise LedgerError(f"{file} is not a file: remove it")
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
            self._make_tables(database, beside)

    def _make_tables(self, database: sqlite3.Connection, beside: list[Path]) -> None:
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
        for file in beside:
            if not file.exists():
                # Here, for SQLite knows the ledger's mode, but not its group.
                file.touch(0o600)
                there = os.stat(self.real)
                share(file, there.st_mode & 0o777, there)
        if self._count is None:
            self._count = os.open(beside[-1], os.O_RDWR | os.O_NOFOLLOW)
        if not tables:
            database.execute(
                "create table row (key text primary key, value text not null) "
                "without rowid"
            )
            self._new_key(database)
            database.execute(f"pragma user_version = {SCHEMA}")
        (self.key,) = database.execute("pragma application_id").fetchone()
        database.execute("commit")

    @staticmethod
    def _new_key(database: sqlite3.Connection) -> int:
        """Give a number that tells ledgers apart: the path may differ in containers."""
        key = uuid.uuid4().int & 0x7FFFFFFF
        database.execute(f"pragma application_id = {key}")
        return key

    def _found(self) -> tuple[int, int]:
        """Return the ledger's commits and its number, as they stand in the file."""
        assert self._handle is not None
        head = os.pread(self._handle, _FOUND.size, _FOUND_AT)
        return _FOUND.unpack(head.ljust(_FOUND.size, b"\0"))

    def _is_copy(self, found: tuple[int, int]) -> bool:
        """Tell if there were commits that the file does not know."""
        assert self._count is not None
        noted = os.pread(self._count, _COUNT.size, 0)
        if len(noted) < _COUNT.size:  # it is new, or was removed
            return False
        before, after, key = _COUNT.unpack(noted)
        return found not in ((before, key), (after, key))

    def _note_count(self, before: int, after: int, key: int) -> None:
        assert self._count is not None
        os.pwrite(self._count, _COUNT.pack(before, after, key), 0)

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
        count, self._count = self._count, None
        handle, self._handle = self._handle, None
        unlock_and_close(count)
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
        for handle in (self._handle, self._count):
            close_copy(handle)
        self._handle = self._count = None
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
            found = self._found()
            if found[1] != self.key or self._is_copy(found):
                self._replaced()
            with self._rows(database, found[0]) as rows:
                yield rows

    @contextmanager
    def _rows(
        self, database: sqlite3.Connection, commits: int | None
    ) -> Iterator[MutableMapping[str, str]]:
        """A transaction after so many `commits`, which is noted; the file is locked."""
        try:
            with no_fork:
                database.execute("begin")
                rows = dict(database.execute("select key, value from row"))
            before = dict(rows)
            yield rows
            if self.database is not database:
                raise StoreAway("the ledger was closed in a transaction")
            with no_fork:
                gone, changed = changes(before, rows)
                if commits is not None and (gone or changed):
                    self._note_count(commits, commits + 1, self.key)
                database.executemany(_DELETE, [(key,) for key in gone])
                database.executemany(_WRITE, changed)
                database.execute("commit")
                if commits is not None and (gone or changed):
                    self._note_count(commits + 1, commits + 1, self.key)
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
