"""What the ledger asks of a store, what it raises, what stores ask of the system."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from sqlalchemy import exc

from ..checks import Documented
from ..threads import make_lock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # not used there


class LedgerError(Documented, exc.InvalidRequestError):
    """The ledger cannot be used as it is configured; trying again does not help."""

    page = "ledgererror"


class ServerDiffers(LedgerError):  # noqa: N818  (says what is so)
    """The connections of other members go to another database server."""

    page = "serverdiffers"


class RowBroken(LedgerError):  # noqa: N818  (says what is so)
    """The ledger holds something that no member has written."""

    page = "rowbroken"


class StoreAway(Exception):  # noqa: N818  (a state, not an error)
    """The store cannot be reached, or does not answer, now; try again later."""


class Store(Protocol):
    """Rows of text under one lock over all processes, signs of life, bells, figures."""

    #: "host" or "postgresql"; and for people, never a secret.
    kind: str
    name: str
    #: This process, unique for ever; another one after a fork.
    member: str
    #: False once it is known that the sign of life was lost, until :meth:`open` makes
    #: another one.
    signed: bool
    #: The sign of life depends on a connection, so it can be lost.
    can_lose_sign: bool
    #: What is at the ledger's place can become another one while it is open, so that
    #: :meth:`in_place` is to be asked in each round.
    watches_place: bool
    #: Another process has called :meth:`ask` on this one, which has not answered yet.
    asked: bool

    @property
    def control_connections(self) -> int:
        """Server connections that the store holds now."""
        ...

    def open(self) -> None:
        """Create the schema if need be, check it, give a sign of life. Idempotent.

        After :meth:`in_place` has said no, or a transaction has failed because of that:
        open what is at the ledger's place now. A sign of life that stands there already
        stands all the time: others must not take this process for dead in between.

        :raises StoreAway: if it cannot be reached, or is locked for too long.
        :raises LedgerError: if it cannot be used as it is.
        """

    def in_place(self) -> bool:
        """Tell if what is open stands at the ledger's place. Cheap, takes no lock.

        :raises StoreAway: if it does not answer.
        """
        ...

    def transaction(
        self, bells: Collection[str] = (), *, durable: bool = True
    ) -> AbstractContextManager[MutableMapping[str, str]]:
        """The rows, for this process alone; kept on leaving, undone by an exception.

        :param bells: members to be rung with the commit, as they are on leaving.
        :param durable: if not, a crash of a server may undo the last ones, where it
          ends all sessions that this process has as well.
        :raises StoreAway: also if they are not those at the ledger's place any more;
          then with :attr:`signed` set to False.
        """
        ...

    def read(self) -> Mapping[str, str]:
        """Return the rows that there are, of one moment, without the lock if possible.

        :raises StoreAway: as :meth:`transaction`.
        """
        with self.transaction() as rows:
            return rows

    def swap(self, key: str, before: str, after: str) -> bool:
        """Write a row if it stands there as it was `before`; return if it did.

        As a transaction that is not durable.

        :raises StoreAway: as :meth:`transaction`.
        """
        with self.transaction() as rows:
            stands = rows.get(key) == before
            if stands:
                rows[key] = after
        return stands

    def living(self, members: Collection[str]) -> set[str]:
        """Return those whose sign of life stands, by kernel or server, not by time.

        :raises StoreAway: if it cannot be told.
        """
        ...

    def strangers(self, members: Collection[str]) -> int:
        """Return how many signs of life stand here of others than these and this one.

        They had a row in a ledger that was here before. One that looks on has none.
        """
        ...

    def ring(self, members: Iterable[str]) -> None:
        """Wake them from their :meth:`wait`. Best effort."""

    def ring_all(self) -> None:
        """Wake all that have a sign of life at the ledger's place, members or not."""

    def wait(self, seconds: float | None) -> bool:
        """Sleep until rung or nudged; return False when the time was up."""
        ...

    def nudge(self) -> None:
        """End this process's wait. From any thread, never blocks."""

    def ask(self, members: Iterable[str]) -> None:
        """Wake them like :meth:`ring`, and have them publish. Best effort."""

    def publish(self, text: str) -> None:
        """Let others read what this process says of itself. In no transaction."""

    def published(self, members: Collection[str]) -> dict[str, str]:
        """Return what each of `members`, which are all, has published last."""
        ...

    def close(self) -> None:
        """Give up the sign of life and all handles. Idempotent."""

    def after_fork(self) -> None:
        """In the child: become a closed store with a member id of its own."""


def wait_for(handles: Collection[int], seconds: float | None) -> bool:
    """Wait until there is something to read; return False when the time was up."""
    if seconds is not None:
        seconds = max(seconds, 0.0)
    if not hasattr(select, "poll"):  # eventlet's monkey-patching removes it
        return bool(select.select(handles, (), (), seconds)[0])
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


# Not by os.read and os.write: eventlet's monkey-patching makes these wait, also where
# the handle does not block.


def drain(handle: int) -> bytes:
    """Read all that there is, without waiting for more."""
    found, more = b"", bytearray(4096)
    with suppress(BlockingIOError):
        while number := os.readv(handle, [more]):
            found += more[:number]
    return found


def notify(handle: int, what: bytes) -> None:
    """Write into a pipe; not if that is full or closed, for then it rings already."""
    with suppress(OSError):
        os.writev(handle, [what])


def changes(
    before: Mapping[str, str], rows: Mapping[str, str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the keys of rows that are gone, and the rows that are new or others."""
    return (
        [key for key in before if key not in rows],
        [(key, text) for key, text in rows.items() if before.get(key) != text],
    )


# -- files of several processes --------------------------------------------------------

#: Held by a thread that must not see its process forked.
no_fork = make_lock()


def _end_of_fork() -> None:
    with suppress(RuntimeError):  # forked by something that did not tell us before
        no_fork.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=no_fork.acquire,
        after_in_parent=_end_of_fork,
        after_in_child=_end_of_fork,
    )


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
