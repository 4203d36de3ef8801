"""The store for the processes of one host: an SQLite file, and what lies beside it.

    app.ledger                 the rows, see :mod:`.host_file`
    app.ledger-journal         SQLite's
    app.ledger-count           of commits, see :mod:`.host_file`
    app.ledger.members/        of each process that has the ledger open:
        <id>.sign              a file that it has locked as long as it lives
        <id>.bell              a FIFO that others write into to wake it
        <id>.figures           what it says of itself, when it is asked

Containers that share the directory share the ledger: nothing in it depends on a
process id. It has to be on a local file system, as file locks ask.

Rules of this file:

* A sign of life is a ``flock``, which the kernel releases when the last process that
  has the file open is gone: also after SIGKILL, not while it is stopped. A forked
  child closes its copies at once. A sign appears locked: it is locked under another
  name first. It is not empty once its process has a row.
* Signs are given under the lock of the rows, so that a process that has that lock may
  remove what has no sign.
* Whatever is here may be removed or replaced at any time. A process finds that out
  when it looks, keeps its sign of life as long as that stands, and opens what is there.
"""

from __future__ import annotations

import os
import stat
import uuid
import weakref
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..threads import make_lock
from .book import Book
from .host_file import LedgerFile, Replaced
from .rows import member_key
from .store import (
    LedgerError,
    Store,
    StoreAway,
    close_copy,
    drain,
    is_at,
    no_fork,
    notify,
    share,
    unlock_and_close,
    wait_for,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # not used there

# Under the last two names, a sign and figures are made.
_KINDS = _BELL, _FIGURES, _SIGN, _NEW_SIGN, _NEW_FIGURES = (
    ".bell",
    ".figures",
    ".sign",
    ".new",
    ".said",
)
# How often what is at the ledger's place may vanish while it is being opened.
_ATTEMPTS = 50
# What is written into a bell: another process rings, it is its own, another asks.
_RING, _NUDGE, _ASK = b"r", b"n", b"a"


class HostStore(Store):
    """See the head of this file, and :class:`.store.Store` for the methods.

    :param makes_directory: of a default place; another one is there, or mistyped.
    """

    kind = "host"
    #: The kernel loses no sign, but the file may go away.
    can_lose_sign = False
    watches_place = True
    control_connections = 0

    def __init__(
        self, path: str | os.PathLike[str], makes_directory: bool = False
    ) -> None:
        self._path = Path(path).absolute()
        self.name = str(self._path)
        self._file = LedgerFile(self._path, makes_directory)
        self._members = Path(f"{self._path}.members")
        self._begin()
        _stores.add(self)

    def _begin(self) -> None:
        self.member = uuid.uuid4().hex
        self.signed = True
        self._sign: int | None = None
        self._bell: int | None = None
        # This process has, or had, a row.
        self._has_joined = False
        self.asked = False
        # One transaction at a time, also among the threads of this process.
        self._lock = make_lock()
        self._process = os.getpid()

    @property
    def key(self) -> int:
        """The ledger's own number; 0 until it is opened."""
        return self._file.key

    def open(self) -> None:
        self._check_process()
        if fcntl is None:
            raise LedgerError(
                "the host ledger needs flock and FIFOs, which this system has not: "
                "use the URL of a PostgreSQL database as the ledger"
            )
        with self._lock:
            if self._file.database is not None:
                return
            try:
                for left in reversed(range(_ATTEMPTS)):
                    try:
                        self._open_what_is_there()
                        break
                    except (FileNotFoundError, Replaced):
                        # Removed or replaced between two steps.
                        if not left:
                            raise
            except OSError as error:
                why = f"the ledger {self.name} cannot be used: {error}"
                raise LedgerError(why) from None
            self.signed = True

    def _open_what_is_there(self) -> None:
        with self._file.opening() as there:
            was_used = self._use_directory(there)
            living = self._remove_dead() | {self.member}
            try:
                self._file.connect(
                    lambda rows: Book(rows).restore(living),
                    repair=was_used and len(living) == 1,
                )
            except LedgerError:
                if not was_used:  # nor is it the next time
                    self._members.rmdir()
                raise
            self._give_sign(there)

    def _use_directory(self, there: os.stat_result) -> bool:
        """Make the directory of signs; return False if there was none."""
        self._members = Path(f"{self._file.real}.members")
        if self._members.is_dir():
            return True
        self._members.mkdir(mode=0o700)
        mode = there.st_mode & 0o777
        # Who may write the file may make signs and bells beside it.
        share(self._members, mode | (mode & 0o444) >> 2, there)
        return False

    def _give_sign(self, there: os.stat_result) -> None:
        """Make the sign of life and the bell, unless they are in place."""
        self._mode, self._there = there.st_mode & 0o777, there
        bell, sign = self._beside(self.member, _BELL), self._beside(self.member, _SIGN)
        if not is_at(self._bell, bell):
            old, self._bell = self._bell, None
            unlock_and_close(old)
            bell.unlink(missing_ok=True)
            os.mkfifo(bell, self._mode)
            share(bell, self._mode, there)
            with no_fork:
                # Both ends are ours: it is never at its end, and no write fails.
                self._bell = os.open(bell, os.O_RDWR | os.O_NONBLOCK)
        if not is_at(self._sign, sign):
            old, self._sign = self._sign, None
            unlock_and_close(old)
            new = self._beside(self.member, _NEW_SIGN)
            with no_fork:
                self._sign = os.open(new, os.O_RDWR | os.O_CREAT, self._mode)
            fcntl.flock(self._sign, fcntl.LOCK_EX)
            share(new, self._mode, there)
            if self._has_joined:
                self._note_joining()
            new.rename(sign)

    def _note_joining(self) -> None:
        assert self._sign is not None
        with self._translated():
            os.pwrite(self._sign, b"member\n", 0)
        self._has_joined = True

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreAway(f"{self.name}: {error}") from error

    def close(self) -> None:
        with self._lock:
            if self._bell is not None or self._sign is not None:
                self._unlink(self.member)
            unlock_and_close(self._bell)
            unlock_and_close(self._sign)
            self._file.close()
            self._begin()

    def after_fork(self) -> None:
        # Runs in every child that Python forks, before its own code.
        close_copy(self._bell)
        close_copy(self._sign)
        self._file.forget()
        self._begin()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            self.after_fork()  # forked by something that does not tell Python

    def in_place(self) -> bool:
        return self._file.in_place() and self._has_sign()

    def _has_sign(self) -> bool:
        return is_at(self._sign, self._beside(self.member, _SIGN)) and is_at(
            self._bell, self._beside(self.member, _BELL)
        )

    @contextmanager
    def transaction(
        self, bells: Collection[str] = (), *, durable: bool = True
    ) -> Iterator[MutableMapping[str, str]]:
        self._check_process()
        with self._lock:
            try:
                with self._file.transaction() as rows:
                    if not self._has_sign():
                        self._file.close()
                        raise Replaced(
                            f"the sign of life of this process was removed from "
                            f"{self._members}; it is given again"
                        )
                    yield rows
                    if not self._has_joined and member_key(self.member) in rows:
                        self._note_joining()
            except Replaced:
                self.signed = False
                raise
        self.ring(bells)

    def living(self, members: Collection[str]) -> set[str]:
        with self._translated():
            living = {member for member in members if self._lives(member)}
        if len(living) < len(members) and not self._has_sign():
            # With this process's sign theirs may have been removed.
            raise StoreAway(f"the signs of life in {self._members} were removed")
        return living

    def strangers(self, members: Collection[str]) -> int:
        signs = self._found(_SIGN) - {self.member, *members}
        return len(self.living({member for member in signs if self._had_row(member)}))

    def _had_row(self, member: str) -> bool:
        with suppress(OSError):
            return self._beside(member, _SIGN).stat().st_size > 0
        return False

    def _lives(self, member: str) -> bool:
        if member == self.member:
            return self._sign is not None
        path = self._beside(member, _SIGN)
        try:
            sign = _open_regular(path)
        except PermissionError:
            return True  # for all that can be told
        except (FileNotFoundError, NotADirectoryError):
            return False
        if sign is not None:
            try:
                # Shared: others may be looking at the same moment.
                fcntl.flock(sign, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(sign)
        self._unlink(member)
        return False

    def _remove_dead(self) -> set[str]:
        """Remove what the dead have left; return the living. The rows are locked."""
        living = {member for member in self._found(_SIGN) if self._lives(member)}
        for kind in _KINDS:
            for member in self._found(kind) - living:
                self._unlink(member)
        return living

    def _found(self, kind: str) -> set[str]:
        try:
            names = os.listdir(self._members)
        except OSError:
            return set()
        return {name.removesuffix(kind) for name in names if name.endswith(kind)}

    def _beside(self, member: str, kind: str) -> Path:
        return self._members / f"{member}{kind}"

    def _unlink(self, member: str) -> None:
        for kind in _KINDS:
            with suppress(OSError):
                self._beside(member, kind).unlink()

    def ring(self, members: Iterable[str]) -> None:
        self._write_into_bells(members, _RING)

    def ring_all(self) -> None:
        self._write_into_bells(self._found(_BELL), _RING)

    def ask(self, members: Iterable[str]) -> None:
        self._write_into_bells(members, _ASK)

    def _write_into_bells(self, members: Iterable[str], what: bytes) -> None:
        for member in members:
            with suppress(OSError):  # gone, or going; or full: it rings already
                bell = os.open(self._beside(member, _BELL), os.O_WRONLY | os.O_NONBLOCK)
                try:
                    notify(bell, what)
                finally:
                    os.close(bell)

    def wait(self, seconds: float | None) -> bool:
        if (bell := self._bell) is None:
            raise StoreAway("the ledger is not open")
        if not wait_for([bell], seconds):
            return False
        with self._translated():  # closed meanwhile
            self.asked = _ASK in drain(bell) or self.asked
        return True

    def nudge(self) -> None:
        if (bell := self._bell) is not None:
            notify(bell, _NUDGE)

    def publish(self, text: str) -> None:
        new = self._beside(self.member, _NEW_FIGURES)
        with self._translated():
            new.write_text(text, encoding="utf-8")
            share(new, self._mode, self._there)
            new.rename(self._beside(self.member, _FIGURES))  # whole, or not at all

    def published(self, members: Collection[str]) -> dict[str, str]:
        found = {}
        for member in members:
            with suppress(OSError, ValueError):
                figures = _open_regular(self._beside(member, _FIGURES))
                if figures is not None:
                    with open(figures, encoding="utf-8") as file:
                        found[member] = file.read()
        return found


def _open_regular(path: Path) -> int | None:
    """Open a file for reading; return None if it is something else, a FIFO say."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)  # replaced between the two looks
    return None


# All stores of this process, for its forked children.
_stores: weakref.WeakSet[HostStore] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
