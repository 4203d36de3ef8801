"""What a database URL stands for: a driver, its arguments, a database in memory.

Scripts share one ``DATABASE_URL``, and some of them use asyncio. Hosters write it with
libpq's keys, ``?sslmode=require&connect_timeout=10``. psycopg2 and psycopg pass these
on; asyncpg knows few of them as arguments, and has some of its own.

Rule of this file: a key that says how safe a connection is (encryption, certificates,
authentication) is translated, or refused with an error, and never left out. There is
one exception, which is logged: asyncpg has no channel binding, and some hosters ask for
it in every URL.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any
from urllib.parse import quote, urlencode

from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from ..checks import BadArgument, BadOption
from ..diagnosis import users_level

_log = logging.getLogger(__name__)

# By backend: SQLAlchemy's name of a driver and its module, those preferred first.
_THREADS = {
    "postgresql": {"psycopg2": "psycopg2", "psycopg": "psycopg"},
    "mysql": {"pymysql": "pymysql", "mysqldb": "MySQLdb"},
    "sqlite": {"pysqlite": "sqlite3"},
}
_ASYNCIO = {
    "postgresql": {"asyncpg": "asyncpg", "psycopg": "psycopg"},
    "mysql": {"asyncmy": "asyncmy", "aiomysql": "aiomysql"},
    "sqlite": {"aiosqlite": "aiosqlite"},
}
for _table in (_THREADS, _ASYNCIO):
    _table["mariadb"] = _table["mysql"]


def for_threads(url: URL) -> URL:
    """Return the URL with a driver for threads: its own, if that is one.

    :raises sqlalchemy.exc.ArgumentError: if it names one of asyncio and no other is
      known or installed.
    """
    dialect = url.get_dialect()
    module = _THREADS.get(url.get_backend_name(), {}).get(dialect.driver)
    is_there = module is None or find_spec(module) is not None
    if not dialect.is_async and ("+" in url.drivername or is_there):
        return url
    return _with_one_of(with_libpq_keys(url), _THREADS, "threads")


def for_asyncio(url: URL) -> URL:
    """Return the URL with a driver for asyncio: its own, if that is one.

    :raises sqlalchemy.exc.ArgumentError: if none is known or installed.
    """
    if "+" in url.drivername:
        # psycopg's dialect has a twin.
        dialect = url.get_dialect().get_async_dialect_cls(url)
        if dialect.is_async:
            return url
    return _with_one_of(url, _ASYNCIO, "asyncio")


def _with_one_of(url: URL, drivers: dict[str, dict[str, str]], what: str) -> URL:
    backend = url.get_backend_name()
    known = drivers.get(backend, {})
    for driver, module in known.items():
        if find_spec(module) is not None:
            return url.set(drivername=f"{backend}+{driver}")
    if "+" not in url.drivername and what == "threads":
        return url  # SQLAlchemy's own choice, or its own complaint
    raise BadArgument(
        f"no driver of {url.drivername} for {what} is installed"
        + (f": install one of {', '.join(known)}" if known else "")
    )


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: asyncpg reads them as libpq does, but from a DSN only. What else stands in a DSN is a
#: setting of the server's; so are the last two.
_IN_DSN = _keys(
    "sslmode sslcert sslkey sslrootcert sslcrl sslpassword sslnegotiation "
    "ssl_min_protocol_version ssl_max_protocol_version dbname options "
    "application_name"
)
#: asyncpg has no such settings, and none of them makes a connection safer: with any
#: value, or with one of these. With another one they are refused.
_LEFT_OUT = _keys(
    "keepalives keepalives_idle keepalives_interval keepalives_count "
    "tcp_user_timeout client_encoding fallback_application_name load_balance_hosts "
    "sslcompression sslsni"
)
_LEFT_OUT_WITH = {
    "channel_binding": ("disable", "prefer", "require"),
    "gssencmode": ("disable", "prefer"),
}
#: asyncpg's own arguments that are numbers, which a URL has as texts only.
_NUMBERS: dict[str, Callable[[str], float]] = {
    "timeout": float,
    "command_timeout": float,
    "statement_cache_size": int,
    "max_cached_statement_lifetime": int,
    "max_cacheable_statement_size": int,
    "connect_timeout": float,
}
#: SQLAlchemy's own keys in an asyncpg URL.
_DIALECTS = _keys(
    "prepared_statement_cache_size prepared_statement_name_func async_fallback "
    "async_creator_fn"
)
#: asyncpg's and its dialect's keys that mean nothing to libpq: how statements are kept,
#: and for how long the client waits for one.
_ASYNCPGS = _NUMBERS.keys() - {"timeout", "connect_timeout"} | _DIALECTS


def asyncpg_arguments(query: Mapping[str, str | tuple[str, ...]]) -> dict[str, Any]:
    """Return the arguments of ``asyncpg.connect`` for the keys of a URL that differ.

    :raises sqlalchemy.exc.ArgumentError: for one that cannot be translated.
    """
    import asyncpg  # type: ignore[import-untyped]  # optional

    own = _DIALECTS | inspect.signature(asyncpg.connect).parameters.keys()
    arguments: dict[str, Any] = {}
    in_dsn: dict[str, str] = {}
    for key, values in query.items():
        # Of a key that stands twice the last one counts, as with libpq.
        value = values if isinstance(values, str) else values[-1]
        if key in _NUMBERS:
            try:
                number = _NUMBERS[key](value)
            except ValueError:
                raise BadOption(key, value, "a number, in the database URL") from None
            if key == "connect_timeout":  # where 0 stands for no limit
                arguments["timeout"] = number if number > 0 else None
            else:
                arguments[key] = number
        elif key in _IN_DSN:
            in_dsn[key] = value
        elif key in _LEFT_OUT or value in _LEFT_OUT_WITH.get(key, ()):
            level = logging.WARNING if value == "require" else logging.INFO
            _log.log(level, "asyncpg has no %s: %s=%s is left out", key, key, value)
        elif key not in own:
            raise BadOption(key, "...", "asyncpg has no such setting")
    if in_dsn.get("sslrootcert") == "system":
        # The certificates that the system trusts, for which libpq has verify-full only.
        if in_dsn.pop("sslmode", "verify-full") != "verify-full":
            raise BadOption("sslrootcert", "system", "with sslmode=verify-full only")
        del in_dsn["sslrootcert"]
        arguments["ssl"] = True
    if in_dsn:
        arguments["dsn"] = "postgresql://?" + urlencode(in_dsn, quote_via=quote)
    return arguments


def translate_for_asyncpg(engine: Engine, url: URL) -> None:
    """Have an engine on asyncpg connect with libpq's keys in its URL.

    The URL stays, so that a ledger's own connection is as safe. ``connect_args`` win.
    """
    arguments = asyncpg_arguments(url.query)
    known = _IN_DSN | _LEFT_OUT | _LEFT_OUT_WITH.keys() | _NUMBERS.keys()
    replaced = {key: value for key, value in url.query.items() if key in known}
    if not replaced:
        return

    @event.listens_for(engine, "do_connect")
    def on_connect(dialect: Any, record: Any, cargs: Any, cparams: Any) -> None:
        for key, value in replaced.items():
            if cparams.get(key) == value:
                del cparams[key]
        for key, value in arguments.items():
            cparams.setdefault(key, value)


def with_libpq_keys(url: URL) -> URL:
    """Return an asyncpg URL with libpq's keys instead, any other URL as it is."""
    if url.drivername != "postgresql+asyncpg":
        return url
    query = {key: value for key, value in url.query.items() if key not in _ASYNCPGS}
    if "ssl" in query:
        query["sslmode"] = str(query.pop("ssl")).replace("_", "-")
    if "timeout" in query:
        # libpq takes whole seconds only.
        query["connect_timeout"] = str(math.ceil(float(str(query.pop("timeout")))))
    return url.set(query=query)


def has_private_memory(dialect: Any, url: URL) -> bool:
    """Tell if each connection would have a database of its own, in memory.

    Such an engine needs one of SQLAlchemy's pools that have a single connection, or one
    for each thread. SQLite's shared-cache databases in memory need none.
    """
    if url.get_backend_name() != "sqlite":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # create_engine gives it again
            default = dialect.get_pool_class(url)
        return issubclass(default, (SingletonThreadPool, StaticPool))
    name = url.database or ""
    in_memory = name in ("", ":memory:", "file:", "file::memory:")
    in_memory = in_memory or url.query.get("mode") == "memory"
    return in_memory and not (name and url.query.get("cache") == "shared")


def warn_of_memory(what: str) -> None:
    """Warn the user's line that makes an engine with private memory."""
    warnings.warn(
        f"{what}: each connection would have a database of its own, in memory; several "
        "connections need a file, or a shared cache (sqlite:///file:NAME"
        "?mode=memory&cache=shared&uri=true)",
        exc.SAWarning,
        stacklevel=users_level(),
    )
