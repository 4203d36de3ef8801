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
from .book import Book
from .errors import LedgerError
from .overview import (
    Limits,
    Overview,
    Part,
    ProcessRow,
    compile_overview,
    decode,
    utc_now,
)
from .rows import Member, Session, limits_of_tags
from .store import Store

#: Seconds that members have for an answer. They take a millisecond or two; a process
#: that computes in many threads lets its keeper wait for its turn.
_PATIENCE = 1.0
#: Seconds between two looks for answers: the first, and the longest.
_FIRST, _LONGEST = 0.001, 0.02


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """A ledger at one moment: its book, and the members whose sign of life stands."""

    name: str
    kind: str
    #: Connections of the members' keepers to the ledger, beside the slots.
    control_connections: int
    book: Book
    targets: Mapping[str, int]
    living: Collection[str]

    @property
    def members(self) -> list[tuple[str, Member]]:
        """The members by id, in the order of their numbers."""
        return sorted(self.book.members.items(), key=lambda pair: pair[1].number)

    @property
    def unasked(self) -> str | None:
        """Why a member cannot ask the server what is to be freed of the quarantines."""
        return next((m.unasked for _, m in self.members if m.unasked), None)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        book, terms = self.book, asdict(self.book.terms)
        members = [
            {
                "number": member.number,
                "key": key,
                "who": member.who,
                "alive": key in self.living,
                "stalled": member.stalled,
                "owned": member.owned,
                "target": self.targets[key],
                "tags": [
                    {"tag": tag, **line._asdict()}
                    for tag, line in sorted(member.tags.items())
                ],
            }
            for key, member in self.members
        ]
        gone = [
            {
                "number": number,
                "slots": gone.slots,
                "sessions": len(gone.sessions),
                "why": gone.why,
                "who": gone.who,
            }
            for number, gone in sorted(book.gone.items())
        ]
        return {
            "name": self.name,
            "kind": self.kind,
            **{name: terms[name] for name in ("capacity", "soft_limit", "max_limit")},
            "owned": book.owned,
            "quarantined": book.quarantined,
            "free": book.free,
            "control_connections": self.control_connections,
            "server": book.server,
            "fresh": book.is_fresh,
            "unasked": self.unasked,
            "members": members,
            "gone": gone,
        }


def read(store: Store) -> LedgerReport:
    """Return what an open store holds; a LedgerError if no member has ever joined."""
    with store.transaction() as rows:
        book = Book(dict(rows))
    if book.meta is None:
        raise LedgerError(f"the ledger {store.name} is empty: no process has joined")
    living = store.living(list(book.members))
    return LedgerReport(
        name=store.name,
        kind=store.kind,
        control_connections=store.control_connections * len(living),
        book=book,
        targets=book.allocation().targets,
        living=living,
    )


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
        self._store, self._patience = store, patience
        self._clock, self._sleep = clock, sleep
        #: The server sessions that were in a row at the last look, and the number of
        #: the member, or the quarantine, whose row that was.
        self.sessions: Mapping[Session, int] = {}
        # Who did not answer, and what they had said before.
        self._silent: dict[str, str | None] = {}

    @property
    def name(self) -> str:
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
        report = read(self._store)
        book = report.book
        posted = [(gone.sessions, number) for number, gone in book.gone.items()]
        posted += [(row.sessions, row.number) for row in book.members.values()]
        self.sessions = {one: number for several, number in posted for one in several}
        dead = [row.owned for key, row in report.members if key not in report.living]
        sizes = [figures["size"] for figures in said.values() if "size" in figures]
        return compile_overview(
            [
                self._part(key, row, key in report.living, said.get(key))
                for key, row in report.members
            ],
            Limits(
                size=max(sizes, default=book.terms.capacity),
                capacity=book.terms.capacity,
                soft_limit=book.terms.soft_limit,
                max_limit=book.terms.max_limit,
                tags=limits_of_tags(book.terms.tags),
                # The slots of the dead are to be in quarantine in a moment.
                quarantined=book.quarantined + sum(dead),
            ),
            ledger=report.name,
            registered=registered,
            warnings=_quarantines(book),
            taken_at=utc_now(),
        )

    def close(self) -> None:
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

    def _part(
        self, key: str, member: Member, alive: bool, said: Mapping[str, Any] | None
    ) -> Part:
        """Return what is known of a member: what it said, or else what it posted."""
        if said is not None:
            figures = decode(said.get("tags", ()))
        else:
            # The dead use nothing, whatever their sessions still do.
            figures = _posted(member) if alive else []
        # Who has joined since we asked has had no time to be silent.
        is_silent = said is None and (key in self._silent or member.stalled)
        process = ProcessRow(
            host=str(member.who.get("host", "?")),
            pid=member.who.get("pid"),
            program=str(member.who.get("program", "?")),
            state="dead" if not alive else "silent" if is_silent else "answers",
            tags=tuple(row.name for row in figures),
            slots=member.owned,
            open=None if said is None else said.get("open"),
            number=member.number,
            asked=str(member.who.get("asked", "")),
        )
        return Part(process, figures)


def _posted(member: Member) -> list[TagStats]:
    """Return what a member is taken to hold that has posted what it wants."""
    # What it posted is what it was promised then. It may have got more since.
    wanted = [line.wants for line in member.tags.values()]
    held = policy.fair_shares(wanted, member.owned)
    return [
        TagStats(tag, line.active, connections=in_use, waiting=line.wants - in_use)
        for (tag, line), in_use in zip(member.tags.items(), held, strict=True)
    ]


def _quarantines(book: Book) -> Iterable[str]:
    for _, gone in sorted(book.gone.items()):
        host, pid, program = (gone.who.get(n, "?") for n in ("host", "pid", "program"))
        yield f"{gone.slots} slots in quarantine: {program} ({host}:{pid}) {gone.why}"
