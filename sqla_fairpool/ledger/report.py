"""What a ledger says, as data: for the command line and a monitor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .book import Book
from .store import Store

__all__ = ["GoneReport", "LedgerReport", "MemberReport", "TagReport", "read"]


@dataclass(frozen=True, slots=True)
class TagReport:
    """What a member has, and wants, under one tag. As it was last posted."""

    tag: str
    in_use: int
    waiting: int
    active: bool
    #: Its ceiling in this process.
    limit: int


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
    tags: tuple[TagReport, ...]


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
    #: Nothing is handed out yet: somebody lives who was a member before these rows.
    fresh: bool
    #: Why a member cannot ask the server what is to be freed of the quarantines.
    unasked: str | None
    members: tuple[MemberReport, ...]
    gone: tuple[GoneReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists and numbers, ready for JSON."""
        return asdict(self)


def read(store: Store) -> LedgerReport | None:
    """Return what an open store holds; None if nobody has ever joined."""
    with store.transaction() as rows:
        book = Book(rows)
    if book.meta is None:
        return None
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
            tags=tuple(
                TagReport(tag, line.in_use, line.waiting, line.active, line.limit)
                for tag, line in sorted(member.tags.items())
            ),
        )
        for key, member in book.members.items()
    ]
    return LedgerReport(
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
    )
