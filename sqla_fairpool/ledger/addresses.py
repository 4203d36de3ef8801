"""Where a ledger is: from what the user writes to a store."""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import os
import re
import socket
import stat
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url

from ..checks import BadOption
from .drivers import with_libpq_keys
from .host import HostStore
from .postgres import PostgresStore
from .store import LedgerError

_ALLOWED = (
    "'host' (a file at a default place, for the processes of this host), the path of "
    "a file, with a / in it, 'database' (the pool's own, for any number of hosts), or "
    "the URL of a PostgreSQL database"
)
#: Drivers that a ledger can use.
_DRIVERS = ("psycopg2", "psycopg")
#: Where a server listens if the URL says nothing.
_PORTS = {"postgresql": "5432", "mysql": "3306", "mssql": "1433", "oracle": "1521"}
#: What stands for this host.
_HERE = "localhost"
#: Where a PostgreSQL server has its socket unless it was told otherwise.
_SOCKETS = ("/run/postgresql", "/var/run/postgresql", "/tmp")
#: Where directories for default ledgers are. Not what TMPDIR or XDG_RUNTIME_DIR say:
#: they differ between cron, services and shells of one user.
_TEMP = Path("/tmp")
#: What gives names to addresses, before any server is asked.
_HOSTS_FILE = Path("/etc/hosts")
#: Other names of backends.
_SAME = {"mariadb": "mysql", "postgres": "postgresql"}

_SUFFIX = ".ledger"


def default_ledger() -> str | None:
    """Return the ledger of scripts that name none: ``host``, None on Windows."""
    return "host" if hasattr(os, "mkfifo") else None


def needs_database(ledger: str) -> bool:
    """Tell if the database's URL is needed to find the ledger."""
    return ledger in ("host", "database")


def make_store(
    ledger: str, database: URL | None, *, observes: bool = False
) -> HostStore | PostgresStore:
    """Return the store that `ledger` names.

    :param ledger: ``host``, ``database``, a path, or a PostgreSQL URL, in which the key
      ``ledger`` tells several in one database apart.
    :param database: the URL of the pool's database, for the first two.
    :param observes: the store is for looking on, by a process that is no member.
    :raises sqlalchemy.exc.ArgumentError: for anything else.
    :raises LedgerError: if the default place is not safe.
    """
    if needs_database(ledger):
        if database is None:
            needed = "a path, where no URL says which database"
            raise BadOption("ledger", ledger, needed)
        if ledger == "host":
            return HostStore(default_path(database), makes_directory=True)
        return _in_database(ledger, database, observes)
    if "://" in ledger:
        try:
            url = make_url(ledger)
        except (exc.ArgumentError, ValueError):  # the latter for a port
            url = None
        if url is not None:
            return _in_database(ledger, url, observes)
    # A URL without its beginning is no path: it would be shown, with its password.
    is_cut_url = re.match(r"[^/]*:.*@", ledger) is not None
    if "/" in ledger and "://" not in ledger and not is_cut_url:
        return HostStore(os.path.expanduser(ledger))
    if "://" in ledger:
        ledger = ledger.partition("://")[0] + "://..."
    raise BadOption("ledger", "..." if is_cut_url else ledger, _ALLOWED)


def _in_database(ledger: str, url: URL, observes: bool) -> PostgresStore:
    backend = url.get_backend_name()
    if backend != "postgresql":
        shown = f"{backend}://..." if "://" in ledger else ledger
        raise BadOption("ledger", shown, "a PostgreSQL database, or " + _ALLOWED)
    name = url.query.get("ledger", "default")
    return PostgresStore(with_threads_driver(url), str(name), observes=observes)


def with_threads_driver(url: URL) -> URL:
    """Return the URL of a PostgreSQL for psycopg2 or psycopg, without keys of ours."""
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

    Never by user or password. The same for all processes of a user on this host.
    """
    parts = database_place(database)
    told = "-".join(filter(None, (re.sub(r"[^\w.]+", "_", part) for part in parts)))
    # What is told may be the same for two databases; this is not.
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return _directory() / f"{told[:80]}-{digest}{_SUFFIX}"


def known_ledgers() -> list[Path]:
    """Return the ledgers that this user's processes have made at default places."""
    return sorted(_directory().glob(f"*{_SUFFIX}"))


def database_place(url: URL) -> tuple[str, str, str, str]:
    """Return backend, host, port and name of a database, the same for the same one.

    As far as it is known without asking any server. Where the URL of a PostgreSQL says
    nothing, the environment counts (``PGHOST``, ``PGPORT``, ``PGDATABASE``). One host
    are all ways to write a name or an address; ``localhost``, every loopback address,
    this host's name, the names that ``/etc/hosts`` gives to these, and the sockets in
    the usual directories. Several hosts stay in their order. Other names of a host, and
    the addresses of this one in a network, are not known.
    """
    backend = url.get_backend_name()
    backend = _SAME.get(backend, backend)
    name = url.database or ""
    if backend == "sqlite":
        if name not in ("", ":memory:"):
            name = os.path.realpath(name)  # it may be named from here
        return backend, url.host or "", "", name
    if backend == "postgresql":
        # As libpq has it.
        given = name or os.environ.get("PGDATABASE") or url.username
        name = _last(url, "dbname") or given or os.environ.get("PGUSER", "")
    # Two names of one address are one.
    addresses = dict.fromkeys(
        (_one_host(host), port or _PORTS.get(backend, ""))
        for host, port in _addresses(url, backend)
    )
    hosts, ports = zip(*addresses, strict=True)
    return backend, ",".join(hosts), ",".join(ports), name


def _last(url: URL, key: str) -> str:
    """Return the value of a key in the URL's query, which wins over its other parts."""
    return ",".join(url.normalized_query.get(key, ()))


def _addresses(url: URL, backend: str) -> list[tuple[str, str]]:
    """Return hosts and ports as they are given, in each of SQLAlchemy's forms."""
    is_postgresql = backend == "postgresql"
    host = _last(url, "hostaddr") or _last(url, "host") or url.host or ""
    port = _last(url, "port") or str(url.port or "")
    if is_postgresql:
        host = host or os.environ.get("PGHOST", "")
        port = port or os.environ.get("PGPORT", "")
    hosts, ports = host.split(","), port.split(",")
    if len(ports) < len(hosts):
        ports = ports[:1] * len(hosts)
    found = []
    for one, its_port in zip(hosts, ports, strict=False):
        if one.count(":") == 1 and not one.startswith(("/", "@")):
            one, _, its_port = one.partition(":")  # host=a:1&host=b:2
        found.append((one, its_port.lstrip("0")))
    return found


def _one_host(host: str) -> str:
    """Return the name for a host, the same for all its names that are known."""
    if host.startswith("@"):  # a socket without a file
        return host
    if host.startswith("/"):
        path = os.path.realpath(host)
        return _HERE if path in map(os.path.realpath, _SOCKETS) else path
    host = host.strip("[]").rstrip(".").lower()
    address = _parse_address(host)
    if address is not None:
        host = str(address)
        if address.is_loopback or address.is_unspecified:
            return _HERE
    return _HERE if host in _names_of_this_host() else host


def _parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))  # 127.1
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


@functools.cache
def _names_of_this_host() -> frozenset[str]:
    """Return names and addresses that mean this host, asking no server."""
    name = socket.gethostname().lower()
    names = {"", _HERE, "localhost.localdomain", name, name.partition(".")[0]}
    try:
        lines = _HOSTS_FILE.read_text(errors="replace").lower().splitlines()
    except OSError:
        lines = []
    for line in lines:
        address, *others = line.partition("#")[0].split() or [""]
        parsed = _parse_address(address)
        if (parsed is not None and parsed.is_loopback) or name in others:
            names.update(others, [address])
    return frozenset(names)


def _directory() -> Path:
    path = _TEMP / f"sqla-fairpool-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise LedgerError(
            f"the directory {path} for ledgers cannot be made ({error.strerror}): name "
            "another path as the ledger"
        ) from None
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or found.st_mode & 0o077:
        raise LedgerError(
            f"the directory {path} for ledgers is not a directory of this user alone "
            "(mode 700): mend that, or name another path as the ledger"
        )
    return path
