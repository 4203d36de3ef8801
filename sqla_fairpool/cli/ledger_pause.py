"""``sqla-fairpool ledger pause``, ``resume`` and ``reap``: what is out, what was left.

A member that has ended without leaving serves nothing, but its sessions at the server
may go on: who waits until nothing is out waits for their end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeVar

from sqlalchemy import exc
from sqlalchemy.engine import URL

from ..checks import validate_tag, validate_timeout
from ..ledger.book import Book
from ..ledger.inspector import Inspector
from ..ledger.keeper import describe_process
from ..ledger.overview import Overview, counted
from ..ledger.overview_text import printable
from ..ledger.postgres import PostgresStore
from ..ledger.rows import Left
from ..ledger.watch import Present, look, still_there, unaccounted
from ..scheduling.tags import ALL
from . import EXIT_NOT_AS_EXPECTED, EXIT_OK, AnyStore, CommandError, find_store, opened
from .server import connected

_T = TypeVar("_T")

#: Returns the sessions at the server, None where it cannot be asked.
_Ask = Callable[[], Present | None]

#: Seconds between two looks at what is out.
_PAUSE = 0.02


@contextmanager
def asking(database: URL | None, store: AnyStore) -> Iterator[_Ask]:
    """Open what asks the server for its sessions."""
    if database is None or database.get_backend_name() != "postgresql":
        if database is None and isinstance(store, PostgresStore):
            yield store.look
        else:
            yield lambda: None
        return
    with connected(database) as connection:
        cursor = connection.connection.cursor()
        try:
            yield partial(look, cursor)
        except connection.dialect.loaded_dbapi.Error as error:
            raise CommandError(f"the server cannot be asked: {error}") from None
        finally:
            cursor.close()


# -- pause, resume ---------------------------------------------------------------------


def pause(arguments: argparse.Namespace) -> int:
    """Have all members serve no checkout, and wait until nothing is out."""
    tag, seconds = _tag(arguments), arguments.wait
    if seconds is not None:
        seconds = _checked(validate_timeout, seconds, "--wait")
    meant, database = find_store(arguments)
    with opened(meant) as store:
        print(_change(store, tag, "paused"))
        if seconds is None:
            return EXIT_OK
        left = _wait(store, database, tag, seconds)
    print("\n".join(left or ["nothing is out"]))
    return EXIT_NOT_AS_EXPECTED if left else EXIT_OK


def resume(arguments: argparse.Namespace) -> int:
    """Have all members serve checkouts again."""
    tag = _tag(arguments)
    with opened(find_store(arguments)[0]) as store:
        print(_change(store, tag, "resumed"))
    return EXIT_OK


def _tag(arguments: argparse.Namespace) -> str:
    if arguments.tag is None:
        return ALL
    return _checked(validate_tag, arguments.tag, "--tag")


def _checked(validate: Callable[..., _T], value: object, name: str) -> _T:
    try:
        return validate(value, name)
    except exc.ArgumentError as error:
        raise CommandError(str(error)) from None


def _change(store: AnyStore, tag: str, done: str) -> str:
    """Pause a tag or resume it; return what has come of it."""
    who = describe_process() if done == "paused" else None
    with store.transaction() as rows:
        book = Book(rows)
        is_new = book.pause(tag, who)
        book.tell()
        pauses = book.pauses
    store.ring_all()
    said = done if is_new else f"it is {done} already"
    others = [f"tag {t!r}" if t else "all" for t in sorted(pauses) if t != tag]
    if others:
        said += f"; paused beside it: {', '.join(others)}"
    return said


def _wait(store: AnyStore, database: URL | None, tag: str, seconds: float) -> list[str]:
    """Wait until nothing is out; return what is, one line each."""
    deadline = time.monotonic() + seconds
    inspector = Inspector(store)
    while True:
        overview = inspector.look()
        if overview.left:
            _free_what_is_left(store, database)
            overview = inspector.look()
        left = [*_out(overview, tag)]
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(_PAUSE)


def _free_what_is_left(store: AnyStore, database: URL | None) -> None:
    try:
        with asking(database, store) as ask:
            _reap(store, ask)
    except CommandError:
        _reap(store, lambda: None)  # the members ask as well


def _out(overview: Overview, tag: str) -> Iterator[str]:
    """Yield what is out or may be, one line each: of one tag, or of all."""
    for process in overview.processes:
        who = printable(process.who)
        if process.state == "silent" and process.slots:
            yield f"{who} does not answer: it may use its slots"
        if process.state == "answers" and not {ALL, tag} & {*process.paused}:
            yield f"{who} has not heard of it yet"
        if process.detached and tag == ALL:
            yield f"{who} uses {process.detached} outside of its pool"
    for row in overview.scrapers:
        for process, part in row.parts if tag in (ALL, row.name) else ():
            if part.connections and process.state == "answers":
                uses = f"uses {part.connections} under {row.name!r}"
                yield printable(f"{process.who} {uses}")
    yield from (printable(str(row)) for row in overview.left if not row.is_free)


# -- reap ------------------------------------------------------------------------------


class _Reaped(NamedTuple):
    """How many members were dead, which slots were freed and how many were not."""

    dead: int
    freed: int
    kept: int
    #: The server was asked; and it was the one where the members' sessions are.
    was_asked: bool
    can_tell: bool


def reap(arguments: argparse.Namespace) -> int:
    """Do what the next keeper that goes short would do."""
    meant, database = find_store(arguments)
    with opened(meant) as store, asking(database, store) as ask:
        done = _reap(store, ask)
    print(f"{done.dead} dead found, {counted(done.freed, 'slot')} freed")
    if done.kept:
        reason = "no member has said on which server its sessions are"
        if done.can_tell:
            reason = "their sessions live on the server"
        elif not done.was_asked:
            reason = "without --url of a PostgreSQL the server cannot be asked"
        print(f"{counted(done.kept, 'slot')} left in quarantine: {reason}")
        return EXIT_NOT_AS_EXPECTED
    return EXIT_OK


def _reap(store: AnyStore, ask: _Ask) -> _Reaped:
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
        if dead and book.pauses:
            book.change()  # the members look after what is in quarantine, then
        view = Book(dict(rows))
        book.tell()
    # After the dead were found: what they have opened before is seen now.
    present = ask()
    can_tell = present is not None and present.server == server
    found = _less(view, present) if present is not None and can_tell else {}
    with store.transaction() as rows:
        book = Book(rows)
        book.release(found)
        book.tell()
    if dead and book.pauses:
        store.ring_all()
    store.ring(book.bells)
    freed = sum(left.gone.slots - left.slots for left in found.values())
    kept = sum(gone.slots for gone in view.gone.values()) - freed
    return _Reaped(len(dead), freed, kept, present is not None, can_tell)


def _less(view: Book, present: Present) -> dict[int, Left]:
    suspects = unaccounted(present.peers, view.accounted)
    found = {n: still_there(gone, present, suspects) for n, gone in view.gone.items()}
    return {number: left for number, left in found.items() if left.is_less}
