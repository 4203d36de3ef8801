"""``?plugin=fairpool`` in a database URL: the pool without a line of code.

SQLAlchemy finds the plugin by its entry point, ``fairpool`` in the group
``sqlalchemy.plugins``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import URL, CreateEnginePlugin, Dialect
from sqlalchemy.pool import Pool

from .checks import (
    BadArgument,
    hide_passwords,
    naming,
    read_switch,
    refuse_timeout,
    validate_tag,
    whole,
)
from .diagnosis import users_level
from .ledger.drivers import has_private_memory, warn_of_memory
from .options import OPTIONS, PoolOptions
from .pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool

__all__ = ["FairPoolPlugin"]

#: What each key of ours in a URL begins with.
PREFIX = "fairpool_"

#: The size of a pool, of which both go together.
SIZES = ("pool_size", "max_overflow")

#: What `create_engine` calls the arguments of a pool.
_ARGUMENTS = {
    name: f"pool_{name}" for name in ("timeout", "use_lifo", "recycle", "pre_ping")
}

#: Keys beside those of the options: arguments of the pool that it does not check.
_OTHERS = {
    "use_lifo": read_switch,
    "recycle": whole(-1, " seconds, -1 for never"),
    "pre_ping": read_switch,
}


class FairPoolPlugin(CreateEnginePlugin):
    """Gives an engine the fair pool and its options, from its URL.

    ::

        create_engine(
            "postgresql+psycopg2://app@localhost/app"
            "?plugin=fairpool&fairpool_soft_limit=8&fairpool_scraper=layer3"
        )

    The keys are the options of :class:`.FairQueuePool` with ``fairpool_`` before
    them, and ``fairpool_scraper`` for the engine's tag. They are taken out of the
    URL before the driver sees it. They win over keyword arguments of
    ``create_engine``, with one warning that shows both: an application's ``pool_size``
    was written for another pool. A size in the URL replaces the application's overflow
    as well. But an engine that is given a ``poolclass`` keeps it, as Alembic's
    ``env.py`` gives its engine a ``NullPool``. An asyncio dialect gets
    :class:`.AsyncAdaptedFairQueuePool`. An engine for a database in memory keeps
    SQLAlchemy's pool, with a warning: each connection would have its own database.

    :raises sqlalchemy.exc.ArgumentError: for a key that is not known or a value
      that is not allowed, naming the key.
    """

    def __init__(self, url: URL, kwargs: dict[str, Any]) -> None:
        self._url, self._kwargs = url, kwargs
        found = {key: url.query[key] for key in url.query if key.startswith(PREFIX)}
        self._keys = list(found)
        self._options = _read(found)
        refuse_timeout(kwargs)
        # The ledger is the one option that an engine takes from the environment: named
        # there, it is meant for all engines of a program.
        ledger = OPTIONS["ledger"]
        text = os.environ.get(ledger.variable)
        self._defaults = {"ledger": ledger.from_text(text)} if text else {}
        # What of the application is replaced, by our keys.
        self._replaced: dict[str, str] = {}
        scraper = self._options.pop("scraper", None)
        if scraper is not None:
            option = {**kwargs, **self._options}.get("tag_option") or "scraper"
            given = kwargs.get("execution_options") or {}
            kwargs["execution_options"] = {**given, option: scraper}
            if given.get(option, scraper) != scraper:
                self._replaced[f"{option}={given[option]!r}"] = f"scraper={scraper!r}"

    def update_url(self, url: URL) -> URL:
        """Take our keys out of the URL."""
        return url.difference_update_query(self._keys)

    def handle_dialect_kwargs(
        self, dialect_cls: type[Dialect], dialect_args: dict[str, Any]
    ) -> None:
        """Choose the pool's class, now that the dialect is known."""
        if any(self._kwargs.get(name) is not None for name in ("poolclass", "pool")):
            return
        by_url = not self._kwargs.get("creator")  # which opens what it likes
        if by_url and has_private_memory(dialect_cls, self._url):
            warn_of_memory("plugin=fairpool leaves SQLAlchemy's pool to this engine")
            return
        pool = AsyncAdaptedFairQueuePool if dialect_cls.is_async else FairQueuePool
        self._kwargs["poolclass"] = pool

    def handle_pool_kwargs(
        self, pool_cls: type[Pool], pool_args: dict[str, Any]
    ) -> None:
        """Give the pool its options, unless it is not ours."""
        if not issubclass(pool_cls, FairQueuePool):
            return
        ours = dict(self._options)
        if any(PREFIX + name in self._keys for name in SIZES):
            # A size is told as a whole: the application's overflow is not added to it.
            ours = {name: OPTIONS[name].default for name in SIZES} | ours
        for name, value in ours.items():
            given = pool_args.get(name, value)
            if str(given) != str(value):  # numbers may come as texts
                shown = f"{_ARGUMENTS.get(name, name)}={given!r}"
                self._replaced[shown] = f"{name}={value}"
        self._warn()
        pool_args.update(ours)
        for name, value in self._defaults.items():
            pool_args.setdefault(name, value)
        names = {"timeout": "pool_timeout"}
        with naming({**names, **{name: PREFIX + name for name in self._options}}):
            PoolOptions.among(pool_args)

    def _warn(self) -> None:
        """Warn once of what of the application is replaced."""
        if self._replaced:
            ours = ", ".join(PREFIX + text for text in self._replaced.values())
            text = f"{ours} in place of the application's {', '.join(self._replaced)}"
            warnings.warn(
                hide_passwords(f"the database URL sets {text}"),
                exc.SAWarning,
                stacklevel=users_level(),
            )


def _read(found: Mapping[str, str | tuple[str, ...]]) -> dict[str, Any]:
    """Return the options that stand in a URL, by their names in the pool."""
    options: dict[str, Any] = {}
    for key, value in found.items():
        name = key.removeprefix(PREFIX)
        if not isinstance(value, str):
            raise BadArgument(f"key {key!r} stands twice in the database URL")
        if name in OPTIONS:
            options[name] = OPTIONS[name].from_text(value)
        elif name in _OTHERS:
            options[name] = _OTHERS[name](key, value, {})
        elif name == "scraper":
            options[name] = validate_tag(value, key)
        else:
            known = ", ".join(PREFIX + name for name in ("scraper", *OPTIONS, *_OTHERS))
            raise BadArgument(
                f"unknown key {key!r} in the database URL; the known ones are {known}"
            )
    return options
