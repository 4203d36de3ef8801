"""Which driver a database URL stands for: one for threads, or one for asyncio.

Scripts share one ``DATABASE_URL``, and some of them use asyncio.
"""

from __future__ import annotations

from importlib.util import find_spec

from sqlalchemy import exc
from sqlalchemy.engine import URL

__all__ = ["for_asyncio", "for_threads"]

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
