"""``sqla-fairpool ledger``: what an operator does with a ledger."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import exc, text
from sqlalchemy.engine import URL

from ..launch.environment import DATABASE, LEDGER
from ..ledger.addresses import make_store
from ..ledger.book import Book
from ..ledger.errors import LedgerError, RowBroken
from ..ledger.host import HostStore
from ..ledger.inspector import LedgerReport, read
from ..ledger.postgres import PostgresStore
from ..ledger.rows import Gone, Left, Member
from ..ledger.store import StoreAway
from ..ledger.watch import Present, look, still_there, unaccounted
from ..options import hide_passwords
from . import EXIT_NOT_AS_EXPECTED, EXIT_OK, CommandError
from .budget import Need, ask_room, connected, given_url, need

__all__ = ["add_command"]

_Store = HostStore | PostgresStore

#: Monitors and commands, launchers included, for which `limit` leaves room.
_TOOLS = 2

_EPILOG = """\
examples:
  sqla-fairpool ledger show --url postgresql://app@db/app      its default ledger
  sqla-fairpool ledger show --ledger /run/scrapers/app.ledger
  sqla-fairpool ledger reap --ledger database --url postgresql://app@db/app
  sqla-fairpool ledger limit --url postgresql://app@db/app --processes 8

The environment's FAIRPOOL_LEDGER and DATABASE_URL stand in for --ledger and --url.
"""


def add_command(commands: Any) -> None:
    """Add ``ledger`` and what it can do."""
    parser = commands.add_parser(
        "ledger",
        help="show and mend the budget that processes share",
        description="Show and mend the budget that processes share.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    places = argparse.ArgumentParser(add_help=False)
    places.add_argument("--ledger", default=os.environ.get(LEDGER, "host"))
    places.add_argument("--url", default=os.environ.get(DATABASE))

    def add(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(
            name, help=text, parents=[places]
        )
        action.set_defaults(run=run)
        return action

    show = add("show", _show, "who owns what, and what is in quarantine")
    show.add_argument("--json", action="store_true", help="for programs")
    add(
        "reap",
        _reap,
        "free what lost members have left; by the pools' --url, with their role",
    )
    reset = add("reset", _reset, "forget all members; refused while one lives")
    reset.add_argument("--yes", action="store_true", help="do not ask")
    limit = add(
        "limit", _limit, "check the budget against the server, and hold it there"
    )
    limit.add_argument(
        "--connections",
        type=int,
        help="those of the pools in all processes; default: the ledger's capacity",
    )
    limit.add_argument(
        "--processes",
        type=int,
        help="most processes at one time, each of which needs connections beside "
        "those; default: the members that live, or else as many as connections",
    )
    limit.add_argument("--run", action="store_true", dest="execute", help="set it")


# -- the ledger ------------------------------------------------------------------------


def _url(arguments: argparse.Namespace) -> URL | None:
    given = arguments.url
    return None if given is None else given_url(given, postgresql=False)


def _store(arguments: argparse.Namespace) -> _Store:
    try:
        return make_store(arguments.ledger, _url(arguments), observes=True)
    except (exc.ArgumentError, LedgerError) as error:
        raise CommandError(str(error)) from None


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[_Store]:
    store = _store(arguments)
    if isinstance(store, HostStore) and not os.path.exists(store.name):
        raise CommandError(
            f"there is no ledger at {store.name}: no process has used it yet"
        )
    try:
        store.open()
        yield store
    except RowBroken as error:
        raise CommandError(f"{store.name}: {error}", EXIT_NOT_AS_EXPECTED) from None
    except (StoreAway, LedgerError) as error:
        raise CommandError(str(error)) from None
    finally:
        store.close()


def _show(arguments: argparse.Namespace) -> int:
    with _opened(arguments) as store:
        report = read(store)
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print("\n".join(_lines(report)))
    return EXIT_OK


def _lines(report: LedgerReport) -> Iterator[str]:
    book, terms = report.book, report.book.terms
    yield f"ledger {report.name}"
    yield (
        f"{terms.capacity} slots: {book.owned} owned by {len(book.members)} "
        f"members, {book.quarantined} in quarantine, {book.free} free; "
        f"at most {terms.soft_limit} for each tag of several, {terms.max_limit} alone"
    )
    if report.control_connections:
        yield f"{report.control_connections} control connections beside them"
    if book.is_fresh:
        yield (
            "nothing is handed out yet: the rows were made anew, and processes that "
            "had others before may live"
        )
    if report.unasked is not None:
        yield (
            "the server cannot be asked for sessions, so that each quarantine takes "
            f"its stated time: {hide_passwords(report.unasked)}"
        )
    for key, member in report.members:
        state = " STOPPED" if member.stalled else ""
        if key not in report.living:
            state = " DEAD"
        yield f"  {_who(member.number, member)}{state}: {member.owned} slots"
        for tag, line in sorted(member.tags.items()):
            idle = "" if line.active else ", idle"
            yield (
                f"    {tag!r} at most {line.limit}{idle}; last posted: "
                f"{line.in_use} in use, {line.waiting} waiting"
            )
    for number, gone in sorted(book.gone.items()):
        several = len(gone.sessions)
        known = f"; {several} sessions are known" if several else ""
        yield f"  {_who(number, gone)}: {gone.slots} in quarantine, {gone.why}{known}"


def _who(number: int, row: Member | Gone) -> str:
    keys = ("program", "host", "pid", "since")
    parts = {key: str(row.who.get(key, "?")) for key in keys}
    text = "{program} ({host}:{pid}, since {since})".format(**parts)
    return f"#{number} {text.encode('unicode_escape').decode()}"


def _reap(arguments: argparse.Namespace) -> int:
    """Do what the next keeper that goes short would do."""
    with _opened(arguments) as store, _asking(arguments, store) as ask:
        with store.transaction() as rows:
            book = Book(rows)
            texts, server = dict(book.texts), book.server
        present = ask()
        if present is not None and server is not None and present.server != server:
            raise CommandError(
                f"--url is of the server {present.server}, and the members' sessions "
                f"are on {server}: give the URL of their database"
            )
        living = store.living(list(texts))
        with store.transaction() as rows:
            book = Book(rows)
            dead = book.reap({k: v for k, v in texts.items() if k not in living})
            view = Book(dict(rows))
            book.tell()
        # After the dead were found: what they have opened before is seen now.
        present = ask()
        can_tell = present is not None and present.server == server
        found = _less(view, present) if present is not None and can_tell else {}
        with store.transaction() as rows:
            book = Book(rows)
            book.release(found)
            wake_ups = book.tell()
        store.ring(wake_ups)
    freed = sum(left.gone.slots - left.slots for left in found.values())
    print(f"{len(dead)} dead found, {freed} slots freed")
    kept = sum(gone.slots for gone in view.gone.values()) - freed
    if kept:
        if present is None:
            reason = "without --url of a PostgreSQL the server cannot be asked"
        elif can_tell:
            reason = "their sessions live on the server"
        else:
            reason = "no member has said on which server its sessions are"
        print(f"{kept} slots stay in quarantine: {reason}")
        return EXIT_NOT_AS_EXPECTED
    return EXIT_OK


def _less(view: Book, present: Present) -> dict[int, Left]:
    """Return the quarantines of which less is left, by what the server says."""
    suspects = len(unaccounted(present.peers, view.accounted))
    found = {n: still_there(gone, present, suspects) for n, gone in view.gone.items()}
    return {number: left for number, left in found.items() if left.is_less}


@contextmanager
def _asking(
    arguments: argparse.Namespace, store: _Store
) -> Iterator[Callable[[], Present | None]]:
    """What asks the server for its sessions, and returns None if it cannot be asked."""
    url = _url(arguments)
    if url is None and isinstance(store, PostgresStore):
        yield store.look
        return
    if url is None or url.get_backend_name() != "postgresql":
        yield lambda: None
        return
    with connected(url) as connection:
        cursor = connection.connection.cursor()
        try:
            yield lambda: look(cursor)
        except connection.dialect.loaded_dbapi.Error as error:
            raise CommandError(f"the server cannot be asked: {error}") from None
        finally:
            cursor.close()


def _reset(arguments: argparse.Namespace) -> int:
    """Forget all members. The rows may be broken: only their keys are looked at."""
    with _opened(arguments) as store:
        with store.transaction() as rows:
            members = list(Book(rows).texts)
            number = len(rows)
        _require_no_member(store, members)
        question = (
            f"forget {len(members)} members, and all {number} rows of {store.name}? "
            "[y/N] "
        )
        if not arguments.yes and input(question).strip().lower() not in ("y", "yes"):
            print("nothing done")
            return EXIT_NOT_AS_EXPECTED
        with store.transaction() as rows:
            book = Book(rows)
            _require_no_member(store, list(book.texts))
            book.reset()
    print("done")
    return EXIT_OK


def _require_no_member(store: _Store, members: Collection[str]) -> None:
    """Refuse while a member lives, in a row or without one."""
    alive = len(store.living(members)) + store.strangers(members)
    if alive:
        raise CommandError(
            f"{alive} members live: stop them before; `sqla-fairpool ledger show` "
            "names those that have a row"
        )


# -- the server ------------------------------------------------------------------------


def _limit(arguments: argparse.Namespace) -> int:
    url = given_url(arguments.url or "")
    needed = _need(arguments, url)
    print(needed)
    with connected(url) as connection:
        room = ask_room(connection)
        problems = list(room.problems(needed.total, needed.of_role))
        if room.is_superuser:
            problems.append(f"the role {room.role!r} is a superuser: no limit binds it")
        print("\n".join(problems or ["they fit"]))
        role = connection.dialect.identifier_preparer.quote(room.role)
        statement = f"ALTER ROLE {role} CONNECTION LIMIT {needed.of_role}"
        if arguments.execute:
            connection.execute(text(statement))
        done = "done" if arguments.execute else "to have the server hold it"
        print(f"{done}: {statement}")
    return EXIT_NOT_AS_EXPECTED if problems else EXIT_OK


def _need(arguments: argparse.Namespace, url: URL) -> Need:
    """Return what is needed, by the arguments or else by the ledger."""
    for name in ("connections", "processes"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise CommandError(f"--{name}: {given} is not a number of at least 1")
    wanted, processes = arguments.connections, arguments.processes
    if wanted is None:
        with _opened(arguments) as store:
            report = read(store)
        wanted = report.book.terms.capacity
        if processes is None:
            processes = len(report.living)
    if not processes:
        processes = wanted
        print(f"assuming {wanted} processes, as many as connections: see --processes")
    ledger = None if arguments.ledger.lower() == "none" else arguments.ledger
    if ledger is not None:
        _store(arguments)
    return need(wanted, processes, url, ledger, _TOOLS)
