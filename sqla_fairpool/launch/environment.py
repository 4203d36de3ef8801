"""The settings of scripts, from the environment.

The manager, the launcher and the command line read them. The pool does not: an
``IDLE_TIMEOUT`` in the environment may be meant for another program.
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

from ..checks import BadOption, naming
from ..ledger.addresses import default_ledger
from ..options import OPTIONS, PoolOptions

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
