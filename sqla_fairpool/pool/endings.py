"""When is the session of a closed connection over at the server?

A driver's ``close()`` says goodbye and does not wait: the server may work on the last
statement for minutes, and its session counts for as long as that. A copy of the
connection's socket tells when the server has closed its side, which it does when the
session has ended.

Rules of this file:

* Only the end of the stream counts as the end of a session. A connection that was
  reset, gets no answer or has no socket leaves it open.
* The copy is read only after the driver has closed its own, and changes nothing that
  the driver sees: no flag of the socket is set. So the class of the interpreter is
  used, ``_socket.socket``: the one by which eventlet's monkey-patching replaces
  ``socket.socket`` sets a flag, and takes each socket for one of IPv4.
* :class:`EndWatcher` has the one thread that waits for those that take long. It may be
  called by a finaliser, at any moment, so it takes no lock.
"""

from __future__ import annotations

import _socket
import asyncio
import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy.util import await_only

from ..ledger.store import wait_for
from ..threads import start_thread
from .sqlalchemy_private import in_greenlet

#: What a socket tells of the server's session.
ENDED, OPEN, UNKNOWN = "ended", "open", "unknown"

#: The state of a TCP connection that was reset. One that the server has closed is in
#: CLOSE_WAIT until this side is closed as well.
_TCP_CLOSE = 7

#: libpq's PQTRANS_ACTIVE: a statement is being executed.
_ACTIVE = 1

#: Seconds that a server may take to confirm that a statement is to be cancelled.
_CANCEL_TIMEOUT = 1.0


def _file_of(driver_connection: Any) -> int | None:
    """Return the file descriptor of a driver's socket, None if it has none."""
    transport = getattr(driver_connection, "_transport", None)  # asyncpg
    if transport is not None:
        driver_connection = transport.get_extra_info("socket")
    elif not hasattr(driver_connection, "fileno"):
        driver_connection = getattr(driver_connection, "_sock", None)  # PyMySQL
    try:
        return int(driver_connection.fileno())
    except Exception:
        return None  # closed, or not a connection over a socket


#: Seconds between two looks of a task, which waits for a millisecond as a rule.
_PAUSE = 0.001


class SocketCopy:
    """A second descriptor of a connection's socket, which it owns."""

    __slots__ = ("_file", "_is_reset")

    def __init__(self, file: int) -> None:
        self._file: int | None = file
        # It was reset before this side hung up.
        self._is_reset = False

    @classmethod
    def of(cls, driver_connection: Any) -> SocketCopy | None:
        """Return a copy of the socket of a driver's connection, None if it has none."""
        file = _file_of(driver_connection)
        if file is None or file < 0:
            return None
        try:
            return cls(os.dup(file))
        except OSError:
            return None  # too many open files: the end of this session is unknown

    def fileno(self) -> int:
        return -1 if self._file is None else self._file

    def hang_up(self) -> None:
        """Tell the server that nothing more will be sent. Needs no driver, no loop."""
        if self._file is None:
            return
        self._is_reset = self.was_reset()
        with contextlib.suppress(OSError), self._as_socket() as line:
            line.shutdown(socket.SHUT_WR)

    @contextlib.contextmanager
    def _as_socket(self) -> Iterator[_socket.socket]:
        line = _socket.socket(fileno=self._file)
        try:
            yield line
        finally:
            line.detach()

    def was_reset(self) -> bool:
        """Tell if the client's side was reset; only before :meth:`hang_up`.

        A reset is told once, to the driver; after that, the end of the stream is read.
        """
        if self._file is None or not hasattr(socket, "TCP_INFO"):
            return False
        try:
            with self._as_socket() as line:
                if line.family not in (socket.AF_INET, socket.AF_INET6):
                    return False
                info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
                return info[0] == _TCP_CLOSE
        except OSError:
            return True

    def look(self, seconds: float = 0.0) -> str:
        """Return what is known of the server's session after at most `seconds`."""
        if self._is_reset:
            return UNKNOWN
        deadline = time.monotonic() + seconds
        try:
            while True:
                if not wait_for([self.fileno()], deadline - time.monotonic()):
                    return OPEN
                if not os.readv(self.fileno(), [bytearray(65536)]):
                    return ENDED
        except BlockingIOError:
            return OPEN
        except (OSError, ValueError):
            return UNKNOWN  # reset, or closed

    async def look_in_loop(self, seconds: float) -> str:
        """:meth:`look` for a task."""
        deadline = time.monotonic() + seconds
        while (state := self.look()) is OPEN and time.monotonic() < deadline:
            await asyncio.sleep(_PAUSE)
        return state

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                os.close(file)

    def __del__(self) -> None:
        self.close()


def stop_statement(driver_connection: Any) -> None:
    """Cancel a statement that an exception has interrupted, before the connection is
    closed: the server would finish it before it looks at the goodbye.
    """
    status = getattr(getattr(driver_connection, "info", None), "transaction_status", 0)
    if status != _ACTIVE:
        return
    try:
        safely = getattr(driver_connection, "cancel_safe", None)  # psycopg
        if safely is None:
            driver_connection.cancel()
            return
        cancelling = safely(timeout=_CANCEL_TIMEOUT)
        if cancelling is None:
            return
        if in_greenlet():
            await_only(cancelling)
        else:
            cancelling.close()  # no loop: the session ends when the statement does
    except Exception:
        pass  # the connection is broken already


def silence(driver_connection: Any) -> None:
    """In a forked child: let go of the parent's socket, which would keep the session.

    The descriptor stays valid, because the driver's object still has its number.
    """
    file = _file_of(driver_connection)
    if file is None or file < 0:
        return
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, file, inheritable=False)
        os.close(nothing)


#: A socket, until when to look at it, and what to do then.
_Watched = tuple[SocketCopy | None, float, Callable[[str], None]]


class EndWatcher:
    """Waits for sessions to end, in a thread that lives while there are any."""

    #: Longest time between two looks, in seconds: new ones come without a signal.
    _TICK = 0.02

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, in the child of a fork."""
        self._new: deque[_Watched] = deque()
        # The thread, while there is one: the first that is entered is it. An interrupt
        # in the middle of starting one leaves no entry, and no lock locked.
        self._runner: dict[str, threading.Thread] = {}

    def watch(
        self, line: SocketCopy | None, seconds: float, done: Callable[[str], None]
    ) -> None:
        """Call `done` in the watcher's thread with ENDED, UNKNOWN, or OPEN when late.

        :param line: the copy of its socket, None if there is only the time.
        """
        self._new.append((line, time.monotonic() + seconds, done))
        if not self._runner:
            start_thread(self._run, "sqla_fairpool-endings")

    def _is_runner(self) -> bool:
        this = threading.current_thread()
        return self._runner.setdefault("runner", this) is this

    def _run(self) -> None:
        waiting: list[_Watched] = []
        while self._is_runner():
            while self._new:
                waiting.append(self._new.popleft())
            waiting = [one for one in waiting if not self._finish(one)]
            if waiting or self._new:
                lines = [line.fileno() for line, _, _ in waiting if line is not None]
                wait_for(lines, self._TICK)
                continue
            self._runner.clear()
            if not self._new:  # else something came in between
                return

    @staticmethod
    def _finish(one: _Watched) -> bool:
        line, deadline, done = one
        state = OPEN if line is None else line.look()
        if state is OPEN and time.monotonic() < deadline:
            return False
        done(state)
        return True


#: That of this process.
watcher = EndWatcher()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=watcher.forget)
