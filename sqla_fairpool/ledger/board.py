"""The ledger's rows as objects, what follows from them, and who is told of a change.

Who may change which slot, and when, is the subject of :mod:`.book`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from functools import cached_property

from ..scheduling import policy
from .allocation import Allocation, allocate
from .errors import LedgerError
from .rows import (
    DUE,
    META,
    STALLED,
    TAGS,
    TURN,
    Gone,
    Member,
    Meta,
    Session,
    Terms,
    counts,
    dump,
    gone_in,
    member_key,
    members_in,
    parse_member,
    read,
    words,
)

__all__ = ["Board"]


class Board:
    """The rows of one transaction, understood. Changes are written at once.

    Rows are read when they are needed; :attr:`texts` is there for those that cannot be
    read as well.

    :param rows: what the store gave.
    :raises LedgerError: on use, if a later version has written them, or no member has.
    """

    def __init__(self, rows: MutableMapping[str, str]) -> None:
        self._rows = rows
        self.texts = dict(members_in(rows))

    @cached_property
    def meta(self) -> Meta | None:
        text = self._rows.get(META)
        return None if text is None else read(META, text, Meta.parse)

    @cached_property
    def members(self) -> dict[str, Member]:
        return {key: parse_member(key, text) for key, text in self.texts.items()}

    @cached_property
    def gone(self) -> dict[int, Gone]:
        return dict(gone_in(self._rows))

    @cached_property
    def places(self) -> dict[str, int]:
        return read(TAGS, self._rows.get(TAGS), counts)

    @cached_property
    def due(self) -> dict[str, str]:
        """Who is expected to look, and why."""
        return read(DUE, self._rows.get(DUE), words)

    # -- figures ----------------------------------------------------------------

    @property
    def terms(self) -> Terms:
        """The terms in force."""
        return self._known_meta.terms

    @property
    def _known_meta(self) -> Meta:
        if self.meta is None:
            raise LedgerError("the ledger is empty: nobody has joined it yet")
        return self.meta

    @property
    def owned(self) -> int:
        return sum(member.owned for member in self.members.values())

    @property
    def quarantined(self) -> int:
        return sum(gone.slots for gone in self.gone.values())

    @property
    def left(self) -> int:
        """Slots that are neither owned nor in quarantine.

        Not negative, even where the terms were lowered over a quarantine.
        """
        return max(self.terms.capacity - self.owned - self.quarantined, 0)

    @property
    def is_fresh(self) -> bool:
        """Tell if there may be members of other rows, that were here before these."""
        return self._known_meta.fresh

    @property
    def free(self) -> int:
        """Slots that may be handed out."""
        return 0 if self.is_fresh else self.left

    @property
    def accounted(self) -> frozenset[Session]:
        """The sessions that are in any row."""
        posted = (member.sessions for member in self.members.values())
        return self.in_quarantine.union(*posted)

    @property
    def in_quarantine(self) -> frozenset[Session]:
        """The sessions for which a slot is in quarantine."""
        return frozenset().union(*(gone.sessions for gone in self.gone.values()))

    def allocation(self) -> Allocation:
        """Return who is to have what."""
        limits = self.terms.limits(self.quarantined)
        return allocate(self.members, self.places, limits)

    # -- what settling is made of --------------------------------------------------

    def next_place(self) -> int:
        """Return a number that nobody has had."""
        meta = self._known_meta
        self.meta = replace(meta, next_place=meta.next_place + 1)
        return meta.next_place

    def grants(self, plan: Allocation) -> dict[str, int]:
        """Divide the free slots among those who are below their targets."""
        free = self.free
        if not free:
            return {}
        short = [
            key
            for key, member in self.members.items()
            if member.owned < plan.targets[key]
        ]
        owned = [self.members[key].owned for key in short]
        wanted = [plan.targets[key] for key in short]
        shares = policy.fair_shares(wanted, free + sum(owned), floors=owned)
        return {
            key: share - had
            for key, share, had in zip(short, shares, owned, strict=True)
            if share > had
        }

    def write(self, key: str, member: Member) -> None:
        """Write a member's row, if it is another one now."""
        self.members[key] = member
        text = member.text
        if text != self.texts.get(key):
            self.texts[key] = text
            self._rows[member_key(key)] = text

    # -- who is told ------------------------------------------------------------------

    def tell(self, plan: Allocation) -> list[str]:
        """Write down who is expected to look; return those who are to be rung.

        The last thing in every transaction that changes the board.
        """
        due = self._due(plan)
        bells = [
            key
            for key, why in due.items()
            if why != self.due.get(key) and why != STALLED
        ]
        if due != self.due:
            self._rows[DUE] = dump(due)
            self.due = due
        places = {tag: self.places[tag] for tag in plan.shares if tag in self.places}
        if dump(places) != self._rows.get(TAGS):
            self._rows[TAGS] = dump(places)
        meta = self._known_meta
        if meta.text != self._rows.get(META):
            self._rows[META] = meta.text
        return bells

    def _due(self, plan: Allocation) -> dict[str, str]:
        grants = self.grants(plan)
        asked = {key for _, key in plan.asked}
        due = {}
        for key, member in self.members.items():
            target = plan.targets[key]
            if member.stalled:
                due[key] = STALLED
            elif member.owned > target:
                due[key] = f"give {target}"
            elif key in grants:
                due[key] = f"take {grants[key]}"
            elif not member.owned:
                continue
            elif self._is_bound_anew(key, member, plan):
                due[key] = "limit"
            elif key in asked:
                due[key] = TURN
            elif not member.pressed and plan.presses(key, member.lines):
                due[key] = "press"
        return due

    @staticmethod
    def _is_bound_anew(key: str, member: Member, plan: Allocation) -> bool:
        """Tell if a ceiling that it does not know yet makes a difference."""
        return any(
            min(line.wants, line.limit) != min(line.wants, plan.limits[tag, key])
            for tag, line in member.lines.items()
        )
