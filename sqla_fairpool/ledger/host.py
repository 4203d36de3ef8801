"""The store for the processes of one host: an SQLite file, and what lies beside it.

    app.ledger                 the rows, in WAL mode
    app.ledger.members/        of each member:
        <id>.sign              a file that it has locked as long as it lives
        <id>.bell              a FIFO that others write into to wake it
        <id>.figures           what it says of itself, for who asks

Containers that share the directory share the ledger: nothing in it depends on a
process id. It has to be on a local file system, as SQLite's WAL mode asks.

Rules of this file:

* A sign of life is a ``flock``, which the kernel releases when the last process that
  has the file open is gone: also after SIGKILL, not while it is stopped. A forked
  child has it open as well until :meth:`HostStore.after_fork`, which runs in every
  child that Python has forked.
* A sign appears locked: it is locked under another name first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import sqlite3
import threading
import uuid
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from .errors import LedgerError
from .store import StoreAway

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["HostStore"]

#: How long a transaction waits for another one, which takes some 20 microseconds; a
#: stopped process may be in the middle of one.
_PATIENCE = 2.0

#: Version of the tables.
SCHEMA = 1

_SIGN, _BELL, _FIGURES = ".sign", ".bell", ".figures"

# What is written into a bell: somebody else rings, it is its own, somebody asks.
_RING, _NUDGE, _ASK = b"r", b"n", b"a"


class HostStore:
    """See the head of this file.

    :param path: the SQLite file; it is created, its directory too.
    """

    kind = "host"
    control_connections = 0
    signed = True  # the kernel loses none

    def __init__(self, path: str | os.PathLike[str]) -> None:
        #: The ledger's own number; 0 until it is opened.
        self.key = 0
        self._path = Path(path).absolute()
        self.name = str(self._path)
        self._members = Path(f"{self._path}.members")
        self._begin()

    def _begin(self) -> None:
        self.member = uuid.uuid4().hex
        self._database: sqlite3.Connection | None = None
        self._sign: int | None = None
        self._bell: int | None = None
        self.asked = False
        # One transaction at a time, also among the threads of this process.
        self._lock = threading.RLock()

    # -- opening and closing --------------------------------------------------------

    def open(self) -> None:
        """Create the file if need be, check it, give a sign of life. Idempotent.

        :raises StoreAway: if it is locked for too long.
        :raises LedgerError: if it cannot be used as it is.
        """
        if self._sign is not None:
            return
        if fcntl is None:
            raise LedgerError(
                "the host ledger needs flock and FIFOs, which this system has not: "
                "use the URL of a PostgreSQL database as the ledger"
            )
        try:
            self._create_files()
            self._connect()
            self._remove_the_dead()
            self._give_sign()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise LedgerError(
                    f"the ledger {self.name} cannot be used: {error}"
                ) from None
            raise

    def _create_files(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Readable by nobody else, unless the operator has created it otherwise.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        mode = self._path.stat().st_mode & 0o777
        # Who may write the file may make signs and bells beside it.
        allowed = mode | (mode & 0o444) >> 2
        if not self._members.is_dir():
            self._members.mkdir(mode=0o700, exist_ok=True)
            self._members.chmod(allowed)
        self._mode = mode

    def _connect(self) -> None:
        with self._translated():
            database = sqlite3.connect(
                self._path,
                timeout=_PATIENCE,
                isolation_level=None,
                check_same_thread=False,
            )
            self._database = database
            database.execute("pragma journal_mode = wal")
            # A lost last commit after a power cut does no harm: then all are dead.
            database.execute("pragma synchronous = normal")
            database.execute("begin immediate")
            (version,) = database.execute("pragma user_version").fetchone()
            if version > SCHEMA:
                raise LedgerError(
                    f"the ledger {self.name} has schema version {version}, and this "
                    f"process knows {SCHEMA}: it runs an older sqla_fairpool"
                )
            if version < SCHEMA:
                database.execute(
                    "create table row (key text primary key, value text not null) "
                    "without rowid"
                )
                # What tells ledgers apart at the server: the file may have another
                # path in each container.
                key = uuid.uuid4().int & 0x7FFFFFFF
                database.execute(f"pragma application_id = {key}")
                database.execute(f"pragma user_version = {SCHEMA}")
            (self.key,) = database.execute("pragma application_id").fetchone()
            database.execute("commit")

    def _give_sign(self) -> None:
        bell = self._file(self.member, _BELL)
        os.mkfifo(bell, self._mode)
        bell.chmod(self._mode)
        # Both ends are ours: so it is never at its end, and a write never fails.
        self._bell = os.open(bell, os.O_RDWR | os.O_NONBLOCK)
        new = self._file(self.member, ".new")
        sign = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, self._mode)
        fcntl.flock(sign, fcntl.LOCK_EX)
        new.chmod(self._mode)
        new.rename(self._file(self.member, _SIGN))
        self._sign = sign

    def close(self) -> None:
        """Give up the sign of life and all handles. Idempotent."""
        with self._lock:
            if self._bell is not None or self._sign is not None:
                self._unlink(self.member)
            self._close_handles()
            if self._database is not None:
                self._database.close()
            self._begin()

    def _close_handles(self) -> None:
        for handle in (self._bell, self._sign):
            if handle is not None:
                with contextlib.suppress(OSError):
                    os.close(handle)
        self._bell = self._sign = None

    def after_fork(self) -> None:
        """In the child: become a closed store with a member id of its own."""
        # Closing does not unlock: the parent has the files open as well.
        self._close_handles()
        if self._database is not None:
            # SQLite must neither use nor close a connection across a fork.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._database))
        self._begin()

    # -- rows --------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[MutableMapping[str, str]]:
        """The rows, for this process alone; kept on leaving, undone by an exception."""
        with self._lock:
            database = self._database
            if database is None:
                raise StoreAway("the ledger is not open")
            with self._translated():
                database.execute("begin immediate")
            try:
                with self._translated():
                    rows = dict(database.execute("select key, value from row"))
                before = dict(rows)
                yield rows
                with self._translated():
                    self._write(database, before, rows)
                    database.execute("commit")
            except BaseException:
                if database.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        database.execute("rollback")
                raise

    @staticmethod
    def _write(
        database: sqlite3.Connection, before: dict[str, str], rows: dict[str, str]
    ) -> None:
        gone = [(key,) for key in before if key not in rows]
        changed = [(k, v) for k, v in rows.items() if before.get(k) != v]
        if gone:
            database.executemany("delete from row where key = ?", gone)
        if changed:
            database.executemany(
                "insert into row values (?, ?) "
                "on conflict (key) do update set value = excluded.value",
                changed,
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            name = getattr(error, "sqlite_errorname", "")  # from Python 3.11 on
            if name in ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM"):
                raise LedgerError(
                    f"the ledger {self.name} cannot be used: {error}"
                ) from None
            raise StoreAway(f"{self.name}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"the ledger {self.name} is no ledger, or damaged ({error}); if no "
                f"member lives, remove it"
            ) from None

    # -- signs of life ----------------------------------------------------------------

    def living(self, members: Collection[str]) -> set[str]:
        """Return those whose sign of life stands. Removes those of the others."""
        return {member for member in members if self._lives(member)}

    def _lives(self, member: str) -> bool:
        if member == self.member:
            return self._sign is not None
        try:
            sign = os.open(self._file(member, _SIGN), os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            # Shared: others may be looking at the same moment.
            fcntl.flock(sign, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(sign)
        self._unlink(member)
        return False

    def _remove_the_dead(self) -> None:
        """Remove what members have left that were killed before they had a row."""
        for path in self._members.glob(f"*{_SIGN}"):
            self._lives(path.name.removesuffix(_SIGN))

    def _file(self, member: str, kind: str) -> Path:
        return self._members / f"{member}{kind}"

    def _unlink(self, member: str) -> None:
        for kind in (_BELL, _FIGURES, _SIGN):
            with contextlib.suppress(OSError):
                self._file(member, kind).unlink()

    # -- bells ------------------------------------------------------------------------

    def ring(self, members: Iterable[str]) -> None:
        """Wake them from their :meth:`wait`. Best effort."""
        self._write_into_bells(members, _RING)

    def ask(self, members: Iterable[str]) -> None:
        """Wake them, and have them publish. Best effort."""
        self._write_into_bells(members, _ASK)

    def _write_into_bells(self, members: Iterable[str], what: bytes) -> None:
        for member in members:
            try:
                bell = os.open(self._file(member, _BELL), os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                continue  # gone, or going
            try:
                os.write(bell, what)
            except OSError:
                pass  # full: it rings already
            finally:
                os.close(bell)

    def wait(self, seconds: float | None) -> bool:
        """Sleep until rung or nudged; return False when the time was up."""
        bell = self._bell
        if bell is None:
            raise StoreAway("the ledger is not open")
        poll = select.poll()
        poll.register(bell, select.POLLIN)
        if not poll.poll(None if seconds is None else max(seconds, 0.0) * 1000):
            return False
        with contextlib.suppress(BlockingIOError):
            while heard := os.read(bell, 4096):
                self.asked = self.asked or _ASK in heard
        return True

    def nudge(self) -> None:
        """End this process's wait. From any thread, never blocks."""
        bell = self._bell
        if bell is not None:
            with contextlib.suppress(OSError):  # full, or closed meanwhile
                os.write(bell, _NUDGE)

    # -- figures ----------------------------------------------------------------------

    def publish(self, text: str) -> None:
        """Let others read what this process says of itself."""
        new = self._file(self.member, ".said")
        try:
            new.write_text(text)
            new.chmod(self._mode)
            new.rename(self._file(self.member, _FIGURES))  # whole, or not at all
        except OSError as error:
            raise StoreAway(f"{self.name}: {error}") from error

    def published(self, members: Collection[str]) -> dict[str, str]:
        """Return what each of `members` has published last, if anything."""
        found = {}
        for member in members:
            with contextlib.suppress(OSError):
                found[member] = self._file(member, _FIGURES).read_text()
        return found
