"""What a database URL stands for: a driver for threads or one for asyncio, a file or
a database in memory.

Scripts share one ``DATABASE_URL``, and some of them use asyncio.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import URL
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from .callers import users_level

__all__ = ["for_asyncio", "for_threads", "has_private_memory", "warn_of_memory"]

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

    A URL that names no driver gets one that is installed: what SQLAlchemy takes then
    depends on its version.

    :raises sqlalchemy.exc.ArgumentError: if it names one of asyncio and no other is
      known or installed.
    """
    dialect = url.get_dialect()
    module = _THREADS.get(url.get_backend_name(), {}).get(dialect.driver)
    is_there = module is None or find_spec(module) is not None
    if not dialect.is_async and ("+" in url.drivername or is_there):
        return url
    return _with_one_of(url, _THREADS, "threads")


def for_asyncio(url: URL) -> URL:
    """Return the URL with a driver for asyncio: its own, if that is one.

    :raises sqlalchemy.exc.ArgumentError: if it names another and none is known or
      installed.
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
    raise exc.ArgumentError(
        f"no driver of {url.drivername} for {what} is installed"
        + (f": install one of {', '.join(known)}" if known else "")
    )


def has_private_memory(dialect: Any, url: URL) -> bool:
    """Tell if each connection would have a database of its own, in memory.

    Such an engine needs one of SQLAlchemy's pools that have a single connection, or one
    for each thread. SQLite's shared-cache databases in memory need none.

    :param dialect: a dialect, or its class.
    """
    if url.get_backend_name() != "sqlite":
        with warnings.catch_warnings():
            # Of whatever the dialect thinks of the URL: create_engine says it again.
            warnings.simplefilter("ignore")
            default = dialect.get_pool_class(url)
        return issubclass(default, (SingletonThreadPool, StaticPool))
    name = url.database or ""
    in_memory = name in ("", ":memory:", "file:", "file::memory:")
    in_memory = in_memory or url.query.get("mode") == "memory"
    return in_memory and not (name and url.query.get("cache") == "shared")


def warn_of_memory(what: str) -> None:
    """Warn whoever makes an engine with private memory.

    :param what: is done about it, or was done wrong.
    """
    warnings.warn(
        f"{what}: each connection would have a database of its own, in memory; several "
        "connections need a file, or a shared cache (sqlite:///file:NAME"
        "?mode=memory&cache=shared&uri=true)",
        exc.SAWarning,
        stacklevel=users_level(),
    )
