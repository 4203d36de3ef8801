"""The settings of scripts, from the environment.

Read by the manager, the launcher and the command line, never by the pool, which must
not be surprised by an ``IDLE_TIMEOUT`` that somebody else has set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url

from ..ledger.addresses import default_ledger
from ..options import BadOption, PoolOptions, naming

__all__ = ["DATABASE", "LEDGER", "RUN", "VARIABLES", "Run", "Settings", "parse_url"]

#: The variables with the URL of the database and with the ledger.
DATABASE, LEDGER = "DATABASE_URL", "FAIRPOOL_LEDGER"

#: The variable by which the launcher tells the script's process, and that one's
#: children, what it was told.
RUN = "FAIRPOOL_RUN"

#: The pool's option that each of the other variables stands for.
VARIABLES = {
    "DYNAMIC_POOL_SIZE": "pool_size",
    "SCRAPER_SOFT_LIMIT": "soft_limit",
    "SCRAPER_MAX_LIMIT": "max_limit",
    "IDLE_TIMEOUT": "idle_timeout",
    "REALLOCATION_INTERVAL": "reallocation_interval",
    LEDGER: "ledger",
}


@dataclass(frozen=True, slots=True)
class Run:
    """What the launcher was told."""

    #: The tag of checkouts that have none.
    scraper: str
    #: The database whose engines are meant, as :func:`.places.database_place` has it;
    #: None for every one.
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
        text = environment.get(RUN)
        if not text:
            return None
        row = json.loads(text)
        place = row["database"]
        row["database"] = None if place is None else tuple(place)
        return cls(**row)


@dataclass(frozen=True, slots=True)
class Settings:
    """What scripts are told by the environment."""

    url: str | None
    #: Options of the pool, as texts.
    options: Mapping[str, Any]
    #: The options' names in front of people: those of the variables.
    names: Mapping[str, str]
    #: The launcher's, None without one.
    run: Run | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the environment; what is empty counts as not set.

        What the launcher was told wins over what it found there.

        :param environment: default: the process's.
        """
        if environment is None:
            environment = os.environ
        found = {
            option: (variable, environment[variable])
            for variable, option in VARIABLES.items()
            if environment.get(variable)
        }
        run = Run.of(environment)
        options: dict[str, Any] = {option: text for option, (_, text) in found.items()}
        if str(options.get("ledger", "")).lower() == "none":
            options["ledger"] = None
        names = {option: variable for option, (variable, _) in found.items()}
        if run is not None:
            options |= run.options
            names = {name: names[name] for name in names if name not in run.options}
        return cls(environment.get(DATABASE) or None, options, names, run)

    def with_arguments(
        self,
        arguments: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the options, checked: of the arguments, or of the environment, or else
        the defaults.

        Without any, the ledger is :func:`.places.default_ledger`.

        :raises sqlalchemy.exc.ArgumentError: for a bad value, naming its variable.
        """
        ledger = {"ledger": default_ledger()}
        options = {**ledger, **(defaults or {}), **self.options, **arguments}
        known = PoolOptions.names()
        with self.naming(arguments):
            PoolOptions.parse(**{k: v for k, v in options.items() if k in known})
        return options

    def naming(self, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Have errors name a variable, where it is not an argument that is bad."""
        names = self.names.items()
        return naming({name: var for name, var in names if name not in arguments})

    def database(self, url: str | URL | None, where: str = "the URL") -> URL | None:
        """Return the database that is meant, None if nobody has named one.

        :param url: an argument, which wins.
        :param where: what to call the argument in an error.
        :raises sqlalchemy.exc.ArgumentError: if it is not a URL. Shows nothing of it.
        """
        if url is not None:
            return parse_url(url, where)
        return None if self.url is None else parse_url(self.url, DATABASE)


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
