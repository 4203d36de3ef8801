"""Reads a ledger from outside, by no member of it: what it says, what its members say.

:func:`read` returns what the rows of a ledger say. They are written when that can move
a slot, not for onlookers, so the figures in them are old.

:class:`Inspector` asks the members for theirs, and waits a moment for the answers:
nothing is done for onlookers while there are none, and what they see is of now. The
figures of each process are of one moment; those of two are some milliseconds apart, so
a connection that changes hands meanwhile may be seen with both, or with none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..scheduling import policy
from ..stats import TagStats
from .allocation import Line
from .book import Book
from .errors import LedgerError
from .overview import (
    Limits,
    Overview,
    Part,
    ProcessRow,
    compile_overview,
    decode,
)
from .rows import Session, limits_of_tags
from .store import Store

__all__ = ["GoneReport", "Inspector", "LedgerReport", "MemberReport", "read"]

#: Seconds that members have for an answer. They take a millisecond or two; a process
#: that computes in many threads lets its keeper wait for its turn.
_PATIENCE = 1.0

#: Seconds between two looks for answers: the first, and the longest.
_FIRST, _LONGEST = 0.001, 0.02


@dataclass(frozen=True, slots=True)
class MemberReport:
    """A process that takes part."""

    number: int
    #: What the store calls it.
    key: str
    #: Host, pid, program, since when; for people.
    who: Mapping[str, Any]
    #: Its sign of life stands.
    alive: bool
    #: It was asked for something and does not answer: it is stopped.
    stalled: bool
    #: Slots it owns, and how many it is to have.
    owned: int
    target: int
    #: What it has, and wants, under each tag, as it was last posted.
    tags: Mapping[str, Line]


@dataclass(frozen=True, slots=True)
class GoneReport:
    """Slots in quarantine, because their owner may have sessions on the server yet."""

    number: int
    slots: int
    #: Of how many of them a server session is known.
    sessions: int
    why: str
    who: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """A ledger at one moment."""

    name: str
    kind: str
    capacity: int
    soft_limit: int
    max_limit: int
    owned: int
    quarantined: int
    free: int
    #: Connections of the members' keepers to the ledger, beside the slots.
    control_connections: int
    #: Identity of the server in which the members' sessions are, once it is known.
    server: str | None
    #: Nothing is handed out yet: a member of the rows before these may live.
    fresh: bool
    #: Why a member cannot ask the server what is to be freed of the quarantines.
    unasked: str | None
    members: tuple[MemberReport, ...]
    gone: tuple[GoneReport, ...]
    #: The limits of tags that have their own, as the terms have them.
    tags: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        plain = asdict(self)
        for row, member in zip(plain["members"], self.members, strict=True):
            row["tags"] = [
                {"tag": tag, **line._asdict()} for tag, line in member.tags.items()
            ]
        return plain


def read(store: Store) -> LedgerReport:
    """Return what an open store holds.

    :raises LedgerError: if no member has ever joined.
    """
    return _read(store)[0]


def _read(store: Store) -> tuple[LedgerReport, Book]:
    with store.transaction() as rows:
        book = Book(rows)
    if book.meta is None:
        raise LedgerError(f"the ledger {store.name} is empty: no process has joined")
    living = store.living(list(book.members))
    plan = book.allocation()
    members = [
        MemberReport(
            number=member.number,
            key=key,
            who=dict(member.who),
            alive=key in living,
            stalled=member.stalled,
            owned=member.owned,
            target=plan.targets[key],
            tags=dict(sorted(member.tags.items())),
        )
        for key, member in book.members.items()
    ]
    report = LedgerReport(
        name=store.name,
        kind=store.kind,
        capacity=book.terms.capacity,
        soft_limit=book.terms.soft_limit,
        max_limit=book.terms.max_limit,
        owned=book.owned,
        quarantined=book.quarantined,
        free=book.free,
        control_connections=store.control_connections * len(living),
        server=book.meta.server,
        fresh=book.meta.fresh,
        unasked=next((m.unasked for m in book.members.values() if m.unasked), None),
        members=tuple(sorted(members, key=lambda member: member.number)),
        gone=tuple(
            GoneReport(number, gone.slots, len(gone.sessions), gone.why, dict(gone.who))
            for number, gone in sorted(book.gone.items())
        ),
        tags=book.terms.tags,
    )
    return report, book


class Inspector:
    """Looks at a ledger. It is no member of it.

    :param store: where the ledger is; the inspector opens and closes it. A store in a
      database costs one connection beside the budget until :meth:`close`.
    :param patience: seconds that the members have for an answer.
    """

    def __init__(
        self,
        store: Store,
        *,
        patience: float = _PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._patience = patience
        self._clock = clock
        self._sleep = sleep
        #: The server sessions that were in a row at the last look, and the number of
        #: the member, or the quarantine, whose row that was.
        self.sessions: Mapping[Session, int] = {}
        # Who did not answer, and what they had said before.
        self._silent: dict[str, str | None] = {}

    @property
    def name(self) -> str:
        """The ledger's name, for people."""
        return self._store.name

    def look(self, *, registered: Iterable[str] = ()) -> Overview:
        """Return the picture of this moment. See :func:`.compile_overview`.

        :raises StoreAway: if the ledger cannot be reached now.
        :raises LedgerError: if it cannot be used, or has no member yet.
        """
        self._store.open()
        with self._store.transaction() as rows:
            there = Book(rows).members
        said = self._ask(self._store.living(list(there)))
        # After the answers: sessions that they tell of are posted by then.
        report, book = _read(self._store)
        self.sessions = _posted_sessions(book)
        return compile_overview(
            [self._part(member, said.get(member.key)) for member in report.members],
            _limits(report, said),
            ledger=report.name,
            registered=registered,
            warnings=_quarantines(report),
            taken_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _ask(self, members: Collection[str]) -> dict[str, Mapping[str, Any]]:
        """Return what the members say, those that answer in time."""
        before = self._store.published(members)
        self._store.ask(members)
        # One that has said nothing since it was silent is not waited for again.
        awaited = {
            member
            for member in members
            if member not in self._silent or self._silent[member] != before.get(member)
        }
        deadline = self._clock() + self._patience
        pause = _FIRST
        while True:
            now = self._store.published(members)
            fresh = {m for m, text in now.items() if text != before.get(m)}
            if awaited <= fresh or self._clock() >= deadline:
                break
            self._sleep(pause)
            pause = min(pause * 2, _LONGEST)
        self._silent = {m: before.get(m) for m in members if m not in fresh}
        return {member: json.loads(now[member]) for member in fresh}

    def _part(self, member: MemberReport, said: Mapping[str, Any] | None) -> Part:
        """Return what is known of a member: what it said, or else what it posted."""
        if said is not None:
            figures = decode(said.get("tags", ()))
        else:
            # The dead use nothing, whatever their sessions still do.
            figures = _posted(member) if member.alive else []
        # Who has joined since we asked has had no time to be silent.
        is_silent = member.key in self._silent or member.stalled
        state = "silent" if said is None and is_silent else "answers"
        process = ProcessRow(
            host=str(member.who.get("host", "?")),
            pid=member.who.get("pid"),
            program=str(member.who.get("program", "?")),
            state=state if member.alive else "dead",
            tags=tuple(row.name for row in figures),
            slots=member.owned,
            open=None if said is None else said.get("open"),
            number=member.number,
        )
        return Part(process, figures)


def _posted_sessions(book: Book) -> Mapping[Session, int]:
    rows = [(gone.sessions, number) for number, gone in book.gone.items()]
    rows += [(member.sessions, member.number) for member in book.members.values()]
    return {session: number for sessions, number in rows for session in sessions}


def _posted(member: MemberReport) -> list[TagStats]:
    """Return what a member is taken to hold that has posted what it wants."""
    # What it posted is what it was promised then. It may have got more since.
    wanted = [line.wants for line in member.tags.values()]
    held = policy.fair_shares(wanted, member.owned)
    return [
        TagStats(tag, line.active, connections=in_use, waiting=line.wants - in_use)
        for (tag, line), in_use in zip(member.tags.items(), held, strict=True)
    ]


def _limits(report: LedgerReport, said: Mapping[str, Mapping[str, Any]]) -> Limits:
    sizes = [figures["size"] for figures in said.values() if "size" in figures]
    return Limits(
        size=max(sizes, default=report.capacity),
        capacity=report.capacity,
        soft_limit=report.soft_limit,
        max_limit=report.max_limit,
        tags=limits_of_tags(report.tags),
        # Those of the dead are to be there in a moment.
        quarantined=report.quarantined
        + sum(member.owned for member in report.members if not member.alive),
    )


def _quarantines(report: LedgerReport) -> Iterable[str]:
    for gone in report.gone:
        host, pid, program = (gone.who.get(n, "?") for n in ("host", "pid", "program"))
        yield f"{gone.slots} slots in quarantine: {program} ({host}:{pid}) {gone.why}"
