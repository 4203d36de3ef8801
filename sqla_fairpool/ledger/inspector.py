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
from operator import itemgetter
from typing import Any

from ..diagnosis.capture import Others
from ..diagnosis.report import Elsewhere
from ..scheduling import policy
from ..stats import TagStats, decode
from .book import Book
from .overview import (
    LeftRow,
    Limits,
    Overview,
    Part,
    ProcessRow,
    compile_overview,
    utc_now,
)
from .overview_text import printable
from .rows import Gone, Member, Session, among, limits_of_tags
from .store import LedgerError, Store
from .watch import Present

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
    #: The sessions at the server, if it was asked.
    present: Present | None = None

    @property
    def members(self) -> list[tuple[str, Member]]:
        """The members by id, in the order of their numbers."""
        return sorted(self.book.members.items(), key=lambda pair: pair[1].number)

    @property
    def unasked(self) -> str | None:
        """Why a member cannot ask the server what is to be freed of the quarantines."""
        return next((m.unasked for _, m in self.members if m.unasked), None)

    def is_free(self, row: Member | Gone) -> bool:
        """Tell if no session can have the slots of a row that nobody answers for."""
        if self.book.server is None:  # nobody can ask it
            return not self.living
        there = self.present
        if there is None or there.server != self.book.server:
            return False
        return not among(row.sessions, there.sessions)

    def left(self) -> list[LeftRow]:
        """Return the slots of dead members, and those in quarantine."""
        return [
            LeftRow(row.number, row.owned, _who(row), is_free=self.is_free(row))
            for key, row in self.members
            if key not in self.living
        ] + [
            LeftRow(number, gone.slots, _who(gone), gone.why, self.is_free(gone))
            for number, gone in sorted(self.book.gone.items())
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        book, terms, members, gone = self.book, self.book.terms, [], []
        for key, row in self.members:
            tags = [{"tag": tag, **line._asdict()} for tag, line in row.tags.items()]
            whose = {"number": row.number, "key": key, "who": row.who}
            state = {"alive": key in self.living, "stalled": row.stalled}
            slots = {"owned": row.owned, "target": self.targets[key]}
            tags.sort(key=itemgetter("tag"))
            members.append({**whose, **state, **slots, "tags": tags})
        for number, left in sorted(book.gone.items()):
            slots = {"slots": left.slots, "sessions": len(left.sessions)}
            gone.append({"number": number, **slots, "why": left.why, "who": left.who})
        return {
            "name": self.name,
            "kind": self.kind,
            "capacity": terms.capacity,
            "soft_limit": terms.soft_limit,
            "max_limit": terms.max_limit,
            "owned": book.owned,
            "quarantined": book.quarantined,
            "free": book.free,
            "control_connections": self.control_connections,
            "server": book.server,
            "fresh": book.is_fresh,
            "unasked": self.unasked,
            "paused": book.pauses,
            "members": members,
            "left": [asdict(row) for row in self.left()],
            "gone": gone,
        }


def read(store: Store) -> LedgerReport:
    """Return what an open store holds; a LedgerError if no member has ever joined."""
    book = Book(dict(store.read()))
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
        #: At which server they are, once it is known.
        self.server: str | None = None
        # Who did not answer, and what they had said before.
        self._silent: dict[str, str | None] = {}

    @property
    def name(self) -> str:
        return self._store.name

    def look(
        self, *, registered: Iterable[str] = (), own: Limits | None = None
    ) -> Overview:
        """Return the picture of this moment. See :func:`.compile_overview`.

        :param own: the limits of the one who asks: while no member lives, those in the
          ledger are of a former run, and who joins first sets others.

        :raises StoreAway: if the ledger cannot be reached now.
        :raises LedgerError: if it cannot be used, or has no member yet.
        """
        self._store.open()
        there = Book(dict(self._store.read())).members
        said = self._ask(self._store.living(list(there)))
        # After the answers: sessions that they tell of are posted by then.
        report = read(self._store)
        book = report.book
        self.server = book.server
        posted = [(gone.sessions, number) for number, gone in book.gone.items()]
        posted += [(row.sessions, row.number) for row in book.members.values()]
        self.sessions = {one: number for several, number in posted for one in several}
        terms = book.terms
        sizes = [figures["size"] for figures in said.values() if "size" in figures]
        parts = [
            self._part(key, row, key in report.living, said.get(key))
            for key, row in report.members
        ]
        if own is None or report.living:
            size, tags = max(sizes, default=terms.capacity), limits_of_tags(terms.tags)
            limits = terms.capacity, terms.soft_limit, terms.max_limit
            own = Limits(size, *limits, tags=tags)
        return compile_overview(
            parts,
            own,
            ledger=report.name,
            registered=registered,
            left=report.left(),
            taken_at=utc_now(),
            paused=book.pauses,
        )

    def close(self) -> None:
        self._store.close()

    def _ask(self, members: Collection[str]) -> dict[str, Mapping[str, Any]]:
        """Return what the members say, those that answer in time."""
        before = self._store.published(members)
        self._store.ask(members)
        # One that has said nothing since it was silent is not waited for again.
        silent = self._silent
        awaited = {m for m in members if m not in silent or silent[m] != before.get(m)}
        deadline, pause = self._clock() + self._patience, _FIRST
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
            paused=tuple((said or {}).get("paused", ())),
            detached=(said or {}).get("detached", 0),
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


def others(rows: Mapping[str, str], me: str) -> Others:
    """Return what the rows of a ledger say of all processes but one, the largest first.

    Nothing of what cannot be read.
    """
    try:
        book = Book(dict(rows))
        members = [row for key, row in book.members.items() if key != me]
        gone = book.gone.values()
    except LedgerError:
        return Others()
    found = []
    for row in members:
        stats = _posted(row)
        found += [_elsewhere(row, s.connections, s.name) for s in stats]
        unused = row.owned - sum(s.connections for s in stats)
        found.append(_elsewhere(row, unused, state="unused"))
    found += [_elsewhere(row, row.slots, state="in quarantine") for row in gone]
    holders = [one for one in found if one.connections > 0]
    holders.sort(key=lambda one: -one.connections)
    active = {tag for row in members for tag, line in row.tags.items() if line.active}
    return Others(tuple(holders), frozenset(active))


def _elsewhere(
    row: Member | Gone, number: int, tag: str | None = None, state: str = "in use"
) -> Elsewhere:
    host, program = (printable(str(row.who.get(n, "?"))) for n in ("host", "program"))
    return Elsewhere(tag, number, program, host, row.who.get("pid"), state)


def _who(row: Member | Gone) -> str:
    parts = {name: row.who.get(name, "?") for name in ("host", "pid", "program")}
    return "{program} ({host}:{pid})".format(**parts)
