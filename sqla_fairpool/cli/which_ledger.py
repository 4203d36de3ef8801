"""Which ledger a command means: its arguments, the environment, or the only one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from sqlalchemy import exc
from sqlalchemy.engine import URL

from ..launch import DATABASE, LEDGER, Settings
from ..ledger.addresses import known_ledgers, make_store
from ..ledger.host import HostStore
from ..ledger.inspector import read
from ..ledger.postgres import PostgresStore
from ..ledger.store import LedgerError, RowBroken, StoreAway
from ..options import OPTIONS
from . import EXIT_NOT_AS_EXPECTED, CommandError
from .server import missing_driver

__all__ = ["AnyStore", "add_places", "find_store", "opened", "require_file"]

AnyStore: TypeAlias = HostStore | PostgresStore


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which ledger is meant, see :func:`find_store`."""
    parser.add_argument(
        "--ledger",
        help="a path, 'host' (this host's file for the database of --url), 'database' "
        "(in that database), or a PostgreSQL's URL; default: FAIRPOOL_LEDGER of the "
        "environment, or host",
    )
    parser.add_argument(
        "--url",
        help="the database of the pools, whose server is asked for its sessions; "
        "default: DATABASE_URL of the environment",
    )


def find_store(arguments: argparse.Namespace) -> tuple[AnyStore, URL | None]:
    """Return the ledger, closed, and the pools' database if it is known.

    It is what arguments and environment name, or else this user's only one.
    """
    named = {"ledger": arguments.ledger} if arguments.ledger else {}
    given = {name: OPTIONS[name].from_text(text) for name, text in named.items()}
    try:
        settings = Settings.read()
        ledger = settings.with_arguments(given)["ledger"]
        database = settings.database(arguments.url, "--url")
        if ledger == "host" and database is None:
            ledger = _only_ledger()
        if ledger is None:
            raise CommandError(
                f"there is no ledger to look at ({LEDGER} says so, or the system has "
                "no default one): give --ledger"
            )
        with settings.naming(given):
            return make_store(ledger, database, observes=True), database
    except (exc.ArgumentError, LedgerError) as error:
        raise CommandError(str(error)) from None
    except ImportError as error:
        raise missing_driver(error) from None


def _only_ledger() -> str:
    paths = known_ledgers()
    if not paths:
        raise CommandError(
            f"no process has used a ledger here yet, and no {DATABASE} says which "
            "one to wait for: give --url or --ledger PATH"
        )
    # Files that are left from earlier do not count, beside one that is in use.
    paths = [path for path in paths if _is_in_use(path)] or paths
    if len(paths) > 1:
        text = f"there are {len(paths)} ledgers, give --url or --ledger PATH:"
        raise CommandError(text, items=[str(path) for path in paths])
    return str(paths[0])


def _is_in_use(path: Path) -> bool:
    store = HostStore(path)
    try:
        store.open()
        return bool(read(store).living)
    except (StoreAway, RowBroken):
        return True  # it may be
    except LedgerError:  # no member has ever joined
        return False
    finally:
        store.close()


def require_file(store: AnyStore) -> None:
    """Raise `LedgerError` if the ledger's file is not there: it would be created."""
    if isinstance(store, HostStore) and not os.path.exists(store.name):
        raise LedgerError(
            f"there is no ledger at {store.name}: no process has used it yet"
        )


@contextmanager
def opened(store: AnyStore) -> Iterator[AnyStore]:
    try:
        require_file(store)
        store.open()
        yield store
    except RowBroken as error:
        raise CommandError(f"{store.name}: {error}", EXIT_NOT_AS_EXPECTED) from None
    except (StoreAway, LedgerError) as error:
        raise CommandError(str(error)) from None
    finally:
        store.close()
