"""What the environment tells scripts, and which engines of them get the pool.

The manager, the launcher and the command line read the settings. The pool does not: an
``IDLE_TIMEOUT`` in the environment may be meant for another program. The launcher puts
this folder in front of ``PYTHONPATH``, for ``sitecustomize.py``: the hook in the
process of an unchanged script, which calls :func:`adopt` in front of ``create_engine``.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import URL, Dialect, make_url

from ..checks import BadOption, hide_passwords, naming
from ..ledger.addresses import (
    database_place,
    default_ledger,
    default_path,
    with_threads_driver,
)
from ..ledger.drivers import has_private_memory
from ..options import OPTIONS, PoolOptions
from ..pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool

#: The pool's options by their variables.
VARIABLES = {one.variable: name for name, one in OPTIONS.items() if one.variable}

#: The variables with the URL of the database and with the ledger.
DATABASE, LEDGER = "DATABASE_URL", OPTIONS["ledger"].variable

#: The variable by which the launcher passes what it was told to the script's process,
#: and to the children of that one.
RUN = "FAIRPOOL_RUN"


@dataclass(frozen=True, slots=True)
class Run:
    """What the launcher was told."""

    #: The tag of checkouts that have none.
    scraper: str
    #: The database whose engines are meant, by :func:`.database_place`; None for all.
    database: tuple[str, ...] | None = None
    #: Options of the pool.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Say what is done.
    verbose: bool = False

    @property
    def text(self) -> str:
        """As it stands in the environment."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Run | None:
        """Return what the launcher of this process was told, None without one."""
        if not environment.get(RUN):
            return None
        row = json.loads(environment[RUN])
        place = row.pop("database")
        return cls(database=place and tuple(place), **row)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment tells scripts."""

    url: str | None
    #: Options of the pool, as texts, and the variables that they come from.
    options: Mapping[str, Any]
    names: Mapping[str, str]
    #: What the launcher was told, None without one.
    run: Run | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the environment, by default the process's.

        What is empty counts as not set; what the launcher was told wins.
        """
        environment = os.environ if environment is None else environment
        run = Run.of(environment)
        told = {} if run is None else run.options
        options, names = dict(told), {}
        for variable, name in VARIABLES.items():
            if environment.get(variable) and name not in told:
                options[name] = OPTIONS[name].from_text(environment[variable])
                names[name] = variable
        return cls(environment.get(DATABASE) or None, options, names, run)

    def with_arguments(
        self, arguments: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the options, checked: of the arguments, or of the environment, or else
        the defaults.

        Without any, the ledger is :func:`.default_ledger`.

        :raises sqlalchemy.exc.ArgumentError: for a bad value, naming its variable.
        """
        ledger = {"ledger": default_ledger()}
        options = {**ledger, **(defaults or {}), **self.options, **arguments}
        with self.naming(arguments):
            PoolOptions.among(options)
        return options

    def naming(self, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Have errors name the variable, where the bad value is not an argument's."""
        return naming({n: v for n, v in self.names.items() if n not in arguments})

    def database(self, url: str | URL | None, where: str = "the URL") -> URL | None:
        """Return the database that is meant, None if none is named.

        :param url: an argument, which wins over the environment.
        :param where: what to call the argument in an error.
        :raises sqlalchemy.exc.ArgumentError: if it is not a URL. Shows nothing of it.
        """
        if url is None:
            url, where = self.url, DATABASE
        return None if url is None else parse_url(url, where)


def parse_url(url: str | URL, where: str) -> URL:
    """Return a database URL; ``postgres://`` is one of PostgreSQL.

    :param where: where it stands, for the error, which shows nothing of it.
    :raises sqlalchemy.exc.ArgumentError: if it is none.
    """
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        raise BadOption(
            where, "...", "a database URL, like postgresql://user@host/database"
        ) from None
    name, plus, driver = parsed.drivername.partition("+")
    if name == "postgres":  # as some hosters write it
        parsed = parsed.set(drivername=f"postgresql{plus}{driver}")
    return parsed


# -- the engines of an unchanged script ------------------------------------------------

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
