"""Which engines of an unchanged script get the pool, and with what.

For scripts that the launcher has started; called in front of ``create_engine``.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import URL, Dialect, make_url

from ..ledger.addresses import database_place, default_path, with_threads_driver
from ..ledger.drivers import has_private_memory
from ..pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool
from .environment import RUN, Run, Settings

__all__ = ["Adoption", "adopt", "say", "show_place"]

#: What a script says of its own pool's size, which is not a matter of one script.
_SIZES = ("pool_size", "max_overflow")

#: How the engines for this package's own questions to a server name themselves.
_OURS = "sqla_fairpool"


def say(text: str) -> None:
    """Tell something to whoever has started the script."""
    if sys.stderr is not None:
        print(f"sqla-fairpool run: {text}", file=sys.stderr)


def show_place(place: tuple[str, ...]) -> str:
    """Return a database's place as a URL, without user and password."""
    backend, host, port, name = place
    if host.startswith(("/", "@")):  # a socket's directory, or its name
        return f"{backend}:///{name}?host={host}&port={port}"
    return f"{backend}://{host}{port and ':'}{port}/{name}"


def adopt(run: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for ``create_engine`` in the place of `kwargs`.

    :param run: what the launcher was told, as it stands in the environment.
    :param args: the positional arguments.
    :raises sqlalchemy.exc.ArgumentError: for a bad setting, naming its variable.
    """
    url = args[0] if args else kwargs.get("url")
    adoption = _adoption(run)
    if url is None or adoption is None:
        return kwargs
    return adoption.arguments(url, kwargs)


@functools.cache
def _adoption(run: str) -> Adoption | None:
    """Read the settings, once: what a script changes later is not meant for this."""
    try:
        settings = Settings.read({**os.environ, RUN: run})
    except (KeyError, TypeError, ValueError):
        return None  # of another version of this package, in a parent
    assert settings.run is not None
    return Adoption(settings.run, settings.with_arguments({}))


class Adoption:
    """Decides for each engine of a process.

    :param run: what the launcher was told.
    :param options: of the pools, checked.
    """

    def __init__(self, run: Run, options: Mapping[str, Any]) -> None:
        self._run = run
        self._options = options

    def arguments(self, url: str | URL, given: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for an engine's ``create_engine``.

        :param given: the script's.
        """
        try:
            url = make_url(url)
            dialect = url.get_dialect(bool(given.get("_is_async")))
        except Exception:
            return given  # create_engine will say what is wrong
        place = database_place(url)
        reason = self._reason(url, place, dialect, given)
        if reason is not None:
            if not _is_ours(given):
                self._say(f"engine for {show_place(place)} left alone: {reason}")
            return given
        options = {**self._options, "default_tag": self._run.scraper}
        self._say(f"engine for {show_place(place)}: {_summary(options, given)}")
        # Without it, nobody tells the pool which database it is.
        if not given.get("_initialize", True):
            options["ledger"] = _ledger_of(options["ledger"], url)
        return {
            **{name: value for name, value in given.items() if name not in _SIZES},
            "poolclass": (
                AsyncAdaptedFairQueuePool if dialect.is_async else FairQueuePool
            ),
            **options,
        }

    def _reason(
        self,
        url: URL,
        place: tuple[str, ...],
        dialect: type[Dialect],
        given: Mapping[str, Any],
    ) -> str | None:
        """Return why an engine does not get the pool, None if it does."""
        poolclass = given.get("poolclass")
        if poolclass is not None:
            name = getattr(poolclass, "__name__", poolclass)
            return f"it has a pool class of its own, {name}"
        if given.get("pool") is not None:
            return "it has a pool of its own"
        if self._run.database not in (None, place):
            assert self._run.database is not None
            return f"its database is not {show_place(self._run.database)}"
        named = given.get("plugins") or ()
        plugins = (*url.normalized_query.get("plugin", ()), *named)
        if "fairpool" in plugins:
            return "its plugin fairpool sees to it"
        if "strategy" in given:
            return "it is a mock"
        if has_private_memory(dialect, url):
            return "other connections would have other databases in memory"
        return None

    def _say(self, text: str) -> None:
        if self._run.verbose:
            say(text)


def _is_ours(given: Mapping[str, Any]) -> bool:
    """Tell if an engine is one of this package's own, a ledger's say."""
    arguments = given.get("connect_args") or {}
    return str(arguments.get("application_name", "")).startswith(_OURS)


def _summary(options: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    ledger = options["ledger"]
    where = "no ledger" if ledger is None else f"ledger {_without_secret(ledger)}"
    text = f"fair pool, tag {options['default_tag']!r}, {where}"
    replaced = [f"{name}={given[name]!r}" for name in _SIZES if name in given]
    if not replaced:
        return text
    size = options.get("pool_size", 20)
    return f"{text}; pool_size={size} in place of the script's {', '.join(replaced)}"


def _without_secret(ledger: str) -> str:
    if "://" not in ledger:
        return ledger
    try:
        return show_place(database_place(make_url(ledger)))
    except (exc.ArgumentError, ValueError):
        return f"{ledger.partition('://')[0]}://..."  # the pool says what is wrong


def _ledger_of(ledger: str | None, database: URL) -> str | None:
    """Return the ledger by a name that needs no database's URL."""
    if ledger == "host":
        return str(default_path(database))
    if ledger == "database" and database.get_backend_name() == "postgresql":
        url = with_threads_driver(database)
        return url.render_as_string(hide_password=False)
    return ledger
