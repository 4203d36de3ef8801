"""Which engines of an unchanged script get the pool, and with what options.

The launcher's hook in the script's process calls it in front of ``create_engine``.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

from sqlalchemy.engine import URL, Dialect, make_url

from ..checks import hide_passwords
from ..ledger.addresses import database_place, default_path, with_threads_driver
from ..ledger.drivers import has_private_memory
from ..options import PoolOptions
from ..pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool
from .environment import RUN, Run, Settings

#: What a script says of its own pool's size, which is not a matter of one script.
_SIZES = ("pool_size", "max_overflow")

#: How the engines for this package's own questions to a server name themselves.
_OURS = "sqla_fairpool"


def say(text: str) -> None:
    """Tell something to the user who has started the script."""
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
    :raises sqlalchemy.exc.ArgumentError: for a bad setting, naming its variable.
    """
    url = args[0] if args else kwargs.get("url")
    settings = _settings(run)
    if url is None or settings is None:
        return kwargs
    return engine_arguments(*settings, url, kwargs)


@functools.cache
def _settings(run: str) -> tuple[Run, dict[str, Any]] | None:
    """Read the settings, once: what a script changes later is not meant for this."""
    try:
        settings = Settings.read({**os.environ, RUN: run})
    except (KeyError, TypeError, ValueError):
        return None  # of another version of this package, in a parent
    assert settings.run is not None
    return settings.run, settings.with_arguments({})


def engine_arguments(
    run: Run, options: Mapping[str, Any], url: str | URL, given: dict[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments for ``create_engine``; `given` are the script's."""
    try:
        url = make_url(url)
        dialect = url.get_dialect(bool(given.get("_is_async")))
    except Exception:
        return given  # create_engine will say what is wrong
    engine = f"engine for {show_place(database_place(url))}"
    reason = _reason(run, url, dialect, given)
    if reason is not None:
        # Engines of this package, a ledger's say, are left alone in silence.
        arguments = given.get("connect_args") or {}
        is_ours = str(arguments.get("application_name", "")).startswith(_OURS)
        if run.verbose and not is_ours:
            say(f"{engine} left alone: {reason}")
        return given
    options = {**options, "default_tag": run.scraper}
    if run.verbose:
        say(f"{engine}: {_summary(options, given)}")
    # SQLAlchemy tells the pool of such an engine no URL.
    if not given.get("_initialize", True):
        options["ledger"] = _ledger_of(options["ledger"], url)
    pool = AsyncAdaptedFairQueuePool if dialect.is_async else FairQueuePool
    rest = {name: value for name, value in given.items() if name not in _SIZES}
    return {**rest, "poolclass": pool, **options}


def _reason(
    run: Run, url: URL, dialect: type[Dialect], given: Mapping[str, Any]
) -> str | None:
    """Return why an engine does not get the pool, None if it does."""
    poolclass, place = given.get("poolclass"), database_place(url)
    name = getattr(poolclass, "__name__", poolclass)
    meant = run.database or place
    plugins = {*url.normalized_query.get("plugin", ()), *(given.get("plugins") or ())}
    reasons = {
        f"it has a pool class of its own, {name}": poolclass is not None,
        "it has a pool of its own": given.get("pool") is not None,
        f"its database is not {show_place(meant)}": meant != place,
        "its plugin fairpool sees to it": "fairpool" in plugins,
        "other connections would have other databases in memory": (
            has_private_memory(dialect, url)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _summary(options: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    ledger = options["ledger"]
    where = "no ledger" if ledger is None else f"ledger {hide_passwords(ledger)}"
    text = f"fair pool, tag {options['default_tag']!r}, {where}"
    replaced = ", ".join(f"{name}={given[name]!r}" for name in _SIZES if name in given)
    if replaced:
        size = PoolOptions.among(options).pool_size
        text += f"; pool_size={size} in place of the script's {replaced}"
    return text


def _ledger_of(ledger: str | None, database: URL) -> str | None:
    """Return the ledger by a name that needs no database's URL."""
    if ledger == "host":
        return str(default_path(database))
    if ledger == "database" and database.get_backend_name() == "postgresql":
        url = with_threads_driver(database)
        return url.render_as_string(hide_password=False)
    return ledger
