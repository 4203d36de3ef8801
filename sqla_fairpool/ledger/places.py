"""Where a ledger is: from what the user writes to a store."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url

from ..drivers import with_libpq_keys
from ..options import BadOption
from .errors import LedgerError
from .host import HostStore
from .postgres import PostgresStore

__all__ = [
    "database_place",
    "default_ledger",
    "default_path",
    "known_ledgers",
    "make_store",
    "needs_database",
    "with_threads_driver",
]

_ALLOWED = (
    "'host' (a file at a default place, for the processes of this host), the path of "
    "a file, with a / in it, 'database' (the pool's own, for any number of hosts), or "
    "the URL of a PostgreSQL database"
)

#: Drivers that a ledger can use.
_DRIVERS = ("psycopg2", "psycopg")

#: Where a server listens if the URL says nothing.
_PORTS = {"postgresql": "5432", "mysql": "3306", "mssql": "1433", "oracle": "1521"}

#: Hosts that are this one.
_HERE = frozenset({"", "localhost", "127.0.0.1", "::1"})

#: Other names of backends.
_SAME = {"mariadb": "mysql", "postgres": "postgresql"}

_SUFFIX = ".ledger"


def default_ledger() -> str | None:
    """Return the ledger of scripts that name none: ``host``, None on Windows."""
    return "host" if hasattr(os, "mkfifo") else None


def needs_database(ledger: str) -> bool:
    """Tell if the database's URL is needed to find the ledger."""
    return ledger in ("host", "database")


def make_store(ledger: str, database: URL | None) -> HostStore | PostgresStore:
    """Return the store that `ledger` names.

    :param ledger: ``host``, ``database``, a path, or a PostgreSQL URL, in which the key
      ``ledger`` tells several in one database apart.
    :param database: the URL of the pool's database, for the first two.
    :raises sqlalchemy.exc.ArgumentError: for anything else.
    :raises LedgerError: if the default place is not safe.
    """
    if ledger == "host":
        if database is None:
            raise BadOption(
                "ledger", ledger, "a path, where no URL says which database"
            )
        return HostStore(default_path(database))
    if ledger == "database":
        if database is None:
            raise BadOption("ledger", ledger, "a URL, where the pool has none")
        return _in_database(ledger, database)
    if "://" in ledger:
        try:
            url = make_url(ledger)
        except exc.ArgumentError:
            url = None
        if url is not None:
            return _in_database(ledger, url)
    if "/" in ledger and "://" not in ledger:
        return HostStore(os.path.expanduser(ledger))
    shown = ledger.partition("://")[0] + "://..." if "://" in ledger else ledger
    raise BadOption("ledger", shown, _ALLOWED)


def _in_database(ledger: str, url: URL) -> PostgresStore:
    if url.get_backend_name() != "postgresql":
        shown = f"{url.get_backend_name()}://..." if "://" in ledger else ledger
        raise BadOption("ledger", shown, "a PostgreSQL database, or " + _ALLOWED)
    name = url.query.get("ledger", "default")
    return PostgresStore(with_threads_driver(url), str(name))


def with_threads_driver(url: URL) -> URL:
    """Return the URL of a PostgreSQL for psycopg2 or psycopg, without keys of ours.

    Also for the database of an asyncio pool: what is not one of its tasks cannot use
    its driver.
    """
    url = with_libpq_keys(url)
    keys = [key for key in url.query if key in ("ledger", "plugin")]
    keys += [key for key in url.query if key.startswith("fairpool_")]
    driver = url.get_driver_name()
    if driver not in (*_DRIVERS, "asyncpg"):
        # Its keys mean nothing to libpq, which refuses what it does not know.
        keys = [key for key in url.query if key not in ("host", "port")]
    if driver not in _DRIVERS or find_spec(driver) is None:
        driver = "psycopg" if find_spec("psycopg") else "psycopg2"
    return url.difference_update_query(keys).set(drivername=f"postgresql+{driver}")


def default_path(database: URL) -> Path:
    """Return the default ledger's file for a database, by its host, port and name.

    Never by user or password. The directory is this user's alone, which is checked: in
    a directory that is open to everybody, somebody else could have made it.
    """
    parts = database_place(database)
    told = "-".join(filter(None, (re.sub(r"[^\w.]+", "_", part) for part in parts)))
    # What is told may be the same for two databases, so this is the name's substance.
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return _directory() / f"{told[:80]}-{digest}{_SUFFIX}"


def known_ledgers() -> list[Path]:
    """Return the ledgers that this user's processes have made at default places."""
    return sorted(_directory().glob(f"*{_SUFFIX}"))


def database_place(url: URL) -> tuple[str, str, str, str]:
    """Return backend, host, port and name of a database, the same for the same one.

    As far as a URL tells: the ways to write this host and the default port count as
    one, other aliases of a host do not.
    """
    backend = url.get_backend_name()
    backend = _SAME.get(backend, backend)
    host = url.host or url.query.get("host") or ""
    if not isinstance(host, str):
        host = ",".join(host)
    name = url.database or ""
    if backend == "sqlite":
        if name not in ("", ":memory:"):
            name = os.path.abspath(name)  # it may be named from here
        return backend, host, "", name
    if backend == "postgresql":
        name = name or url.username or ""  # as libpq has it
    port = url.port or url.query.get("port") or _PORTS.get(backend, "")
    return backend, "localhost" if host in _HERE else host, str(port), name


def _directory() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        path = Path(runtime) / "sqla-fairpool"
    else:
        path = Path(tempfile.gettempdir()) / f"sqla-fairpool-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.getuid()
        or found.st_mode & 0o077
    ):
        raise LedgerError(
            f"the directory {path} for ledgers is not a directory of this user alone "
            "(mode 700): mend that, or name another path as the ledger"
        )
    return path
