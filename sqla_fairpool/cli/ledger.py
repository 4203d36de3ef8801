"""``sqla-fairpool ledger``: what an operator does with one."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import exc, text

from ..checks import hide_passwords
from ..launch import DATABASE, LEDGER
from ..ledger.book import Book
from ..ledger.inspector import LedgerReport, read
from ..ledger.keeper import describe_process
from ..ledger.overview_text import describe, printable
from ..ledger.rows import Terms
from ..options import TERMS, PoolOptions
from . import (
    EXIT_NOT_AS_EXPECTED,
    EXIT_OK,
    AnyStore,
    CommandError,
    add_places,
    contents,
    find_store,
    opened,
)
from .ledger_pause import asking, pause, reap, resume
from .server import ask_room, connected, given_url, need

#: What `set` changes.
_LIMITS = ("pool_size", *TERMS[1:])

_WHO = "{program} ({host}:{pid}, since {since})"

#: Monitors and commands, launchers included, for which `limit` leaves room.
_TOOLS = 2

_EPILOG = """\
examples:
  sqla-fairpool ledger show                                  the one in use
  sqla-fairpool ledger show --url postgresql://app@db/app    its default ledger
  sqla-fairpool ledger reap --ledger database --url postgresql://app@db/app
  sqla-fairpool ledger reset --ledger /run/scrapers/app.ledger
  sqla-fairpool ledger set pool_size=30 soft_limit=15
  sqla-fairpool ledger pause --wait 30                       0: nothing is out
  sqla-fairpool ledger resume
  sqla-fairpool ledger limit --url postgresql://app@db/app --processes 8

The environment's FAIRPOOL_LEDGER and DATABASE_URL stand in for --ledger and --url.
Without any of them, and with one ledger in use on this host, that one is meant.
"""


def add_command(commands: Any) -> None:
    """Add ``ledger`` and what it can do."""
    parser = commands.add_parser(
        "ledger",
        help="show and mend the budget that processes share",
        description="Show and mend the budget that processes share.",
        epilog=_EPILOG,
    )
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)
    for run, what in _ACTIONS.items():
        name = run.__name__.strip("_")
        examples = [line for line in _EPILOG.splitlines() if f"ledger {name} " in line]
        more = {"help": what, "epilog": "\n".join(["examples:", *examples])}
        action = actions.add_parser(name, description=what.capitalize(), **more)
        action.set_defaults(run=run)
        add_places(action)
        if run is _set:
            action.add_argument("changes", nargs="+", metavar="LIMIT=VALUE")
        for flag, dest, kind, meaning in _FLAGS.get(name, ()):
            how = {"type": kind} if kind else {"action": "store_true"}
            action.add_argument(flag, dest=dest, help=meaning, **how)


# -- show, set, reset ------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> int:
    meant, database = find_store(arguments)
    with opened(meant) as store:
        report = read(store)
        if report.left() and report.book.server is not None:
            with suppress(CommandError), asking(database, store) as ask:
                report = replace(report, present=ask())
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print("\n".join(_lines(report)))
    return EXIT_OK


def _lines(report: LedgerReport) -> Iterator[str]:
    book, terms = report.book, report.book.terms
    left = report.left()
    kept = sum(row.slots for row in left if not row.is_free)
    owned = sum(row.owned for key, row in report.members if key in report.living)
    free = 0 if book.is_fresh else max(terms.capacity - owned - kept, 0)
    yield f"ledger {report.name}"
    yield (
        f"{terms.capacity} slots: {owned} owned by {len(report.living)} "
        f"members, {kept} in quarantine, {free} free; "
        f"at most {terms.soft_limit} for each tag of several, {terms.max_limit} alone"
    )
    if (set_by := book.set_by) is not None:
        yield f"limits set by {describe(set_by, _WHO)}"
    for tag, since in sorted(book.pauses.items()):
        yield f"PAUSED{f', tag {tag!r}' if tag else ''}, since {since}"
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
        if key not in report.living:
            continue
        state = " STOPPED" if member.stalled else ""
        who = f"#{member.number} {describe(member.who, _WHO)}"
        yield f"  {who}{state}: {member.owned} slots"
        if asked := member.who.get("asked"):
            yield f"    asked for {printable(str(asked))}: the ledger has other limits"
        for tag, line in sorted(member.tags.items()):
            idle = "" if line.active else ", idle"
            yield (
                f"    {tag!r} at most {line.limit}{idle}; last posted: "
                f"{line.in_use} in use, {line.waiting} waiting"
            )
    yield from (f"  #{row.number} {printable(str(row))}" for row in left)


def _set(arguments: argparse.Namespace) -> int:
    changes = dict(change.partition("=")[::2] for change in arguments.changes)
    for name, value in changes.items():
        changes[name] = contents(value, name)
        if name not in _LIMITS:
            raise CommandError(
                f"{name} is none of a ledger's limits: {', '.join(_LIMITS)}"
            )
    with opened(find_store(arguments)[0]) as store:
        with store.transaction() as rows:
            book = Book(rows)
            before = book.terms
            try:
                options = PoolOptions.of_terms(asdict(before))
                options = options.changed(changes)
            except exc.ArgumentError as error:
                raise CommandError(str(error)) from None
            terms = Terms(**options.terms)
            book.change(terms=terms, set_by=describe_process())
            book.tell()
        store.ring_all()
    said = "the limits are as they were"
    if terms != before:
        said = f"{before.differences(terms)} -> {terms.differences(before)}"
    print(said)
    return EXIT_OK


def _reset(arguments: argparse.Namespace) -> int:
    """Forget all members. The rows may be broken: only their keys are looked at."""
    with opened(find_store(arguments)[0]) as store:
        with store.transaction() as rows:
            members = list(Book(rows).texts)
            number = len(rows)
        _require_no_member(store, members)
        what = f"{len(members)} members, and all {number} rows of {store.name}"
        if not arguments.yes and not _agreed(f"forget {what}? [y/N] "):
            print("nothing done")
            return EXIT_NOT_AS_EXPECTED
        with store.transaction() as rows:
            book = Book(rows)
            _require_no_member(store, list(book.texts))
            book.reset()
    print("done")
    return EXIT_OK


def _agreed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # there is nobody to answer
        print()
        return False


def _require_no_member(store: AnyStore, members: Collection[str]) -> None:
    """Refuse while a member lives, in a row or without one."""
    alive = len(store.living(members)) + store.strangers(members)
    if alive:
        raise CommandError(
            f"{alive} members live: stop them before; `sqla-fairpool ledger show` "
            "names those that have a row"
        )


# -- limit -----------------------------------------------------------------------------


def _limit(arguments: argparse.Namespace) -> int:
    url = given_url(arguments.url or os.environ.get(DATABASE) or "")
    wanted, processes = _wanted(arguments)
    ledger = arguments.ledger or os.environ.get(LEDGER) or "host"
    if ledger.lower() != "none":
        find_store(arguments)  # it may be wrong
    needed = need(wanted, processes, url, ledger, _TOOLS)
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


def _wanted(arguments: argparse.Namespace) -> tuple[int, int]:
    """Return connections and processes, by the arguments or else by the ledger."""
    for name in ("connections", "processes"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise CommandError(f"--{name}: {given} is not a number of at least 1")
    wanted, processes = arguments.connections, arguments.processes
    if wanted is None:
        with opened(find_store(arguments)[0]) as store:
            report = read(store)
        wanted = report.book.terms.capacity
        if processes is None:
            processes = len(report.living)
    if not processes:
        processes = wanted
        print(f"assuming {wanted} processes, as many as connections: see --processes")
    return wanted, processes


_ACTIONS = {
    _show: "who owns what, and what is in quarantine",
    pause: "serve no new checkout in any process, for a migration or a failover",
    resume: "serve checkouts again",
    reap: "free what lost members have left; by the pools' --url, with their role",
    _set: "change limits, for all members at once: pool_size=30 soft_limit=15",
    _reset: "forget all members; refused while one lives",
    _limit: "check the budget against the server, and hold it there",
}

#: By action: the flag, where its value goes, the value's type, and what it means.
_FLAGS: dict[str, list[tuple[str, str, Any, str]]] = {
    "pause": [
        ("--tag", "tag", str, "only those of this tag"),
        ("--wait", "wait", float, "seconds to wait until nothing is out, or exit 1"),
    ],
    "resume": [("--tag", "tag", str, "those of a tag that was paused alone")],
    "show": [("--json", "json", None, "for programs")],
    "reset": [("--yes", "yes", None, "do not ask")],
    "limit": [
        (
            "--connections",
            "connections",
            int,
            "those of the pools in all processes; default: the ledger's capacity",
        ),
        (
            "--processes",
            "processes",
            int,
            "most processes at one time, each of which needs connections beside "
            "those; default: the members that live, or else as many as connections",
        ),
        ("--run", "execute", None, "set it"),
    ],
}
