"""The ledger's book: what may be done to its rows. The protocol is in the package's
docstring.

Pure: rows in, rows out, in one transaction of a store, which is exclusive over all
members. No clock, no I/O, no thread. What a member does for itself in a transaction is
:func:`.transaction.settle`; the rest is here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.util import memoized_property

from .allocation import STALLED, Allocation, allocate
from .overview_text import describe
from .rows import (
    DUE,
    GONE,
    LOST,
    MEMBER,
    META,
    PROTOCOL,
    TAGS,
    Gone,
    Left,
    Member,
    Meta,
    Session,
    Terms,
    dump,
    in_order,
    member_key,
    parse_member,
    read,
)
from .store import LedgerError, RowBroken, ServerDiffers


class Book:
    """The rows of one transaction, understood, and all that may be done to them.

    Changes are written to the rows at once. They are read when they are needed; those
    that cannot be read are in :attr:`texts`, and can be :meth:`reset`.
    """

    # Not functools.cached_property: up to Python 3.11 it has a lock for all objects of
    # a class, which a child that is forked meanwhile would wait for without end.

    def __init__(self, rows: MutableMapping[str, str]) -> None:
        self._rows = rows
        #: The members' rows, sorted: nothing may depend on the store.
        self.texts = dict(self._texts(MEMBER))
        #: To be rung when this is committed: that were given something, or are to look.
        self.bells: list[str] = []

    def _texts(self, kind: str) -> Iterator[tuple[str, str]]:
        for key in sorted(self._rows):
            if key.startswith(kind):
                yield key.removeprefix(kind), self._rows[key]

    @memoized_property
    def meta(self) -> Meta | None:
        text = self._rows.get(META)
        return None if text is None else read(META, text, Meta)

    @memoized_property
    def members(self) -> dict[str, Member]:
        return {key: parse_member(key, text) for key, text in self.texts.items()}

    @memoized_property
    def gone(self) -> dict[int, Gone]:
        """What is in quarantine, by number."""
        return {
            read(GONE + number, number, int): read(GONE + number, text, Gone)
            for number, text in self._texts(GONE)
        }

    @memoized_property
    def places(self) -> dict[str, int]:
        """The tags' places in the line of tags."""
        return read(TAGS, self._rows.get(TAGS), dict[str, int])

    @memoized_property
    def due(self) -> dict[str, str]:
        """The members that are expected to look, and why."""
        return read(DUE, self._rows.get(DUE), dict[str, str])

    @property
    def _known_meta(self) -> Meta:
        if self.meta is None:
            raise LedgerError("the ledger is empty: no process has joined")
        return self.meta

    @property
    def terms(self) -> Terms:
        return self._known_meta.terms

    @property
    def set_by(self) -> Mapping[str, Any] | None:
        """Who has set the terms, and since when; None if that is not known."""
        return self.meta.set_by or None if self.meta is not None else None

    @property
    def pauses(self) -> dict[str, str]:
        """The paused tags, `ALL` for all: since when, and by whom."""
        pauses = {} if self.meta is None else self.meta.pauses
        return {tag: describe(who) for tag, who in pauses.items()}

    @property
    def server(self) -> str | None:
        """Where the members' sessions are, once it is known."""
        return self.meta.server if self.meta is not None else None

    @property
    def owned(self) -> int:
        return sum(member.owned for member in self.members.values())

    @property
    def quarantined(self) -> int:
        return sum(gone.slots for gone in self.gone.values())

    @property
    def left(self) -> int:
        """Slots neither owned nor in quarantine."""
        # The terms may have been lowered over a quarantine.
        return max(self.terms.capacity - self.owned - self.quarantined, 0)

    @property
    def is_fresh(self) -> bool:
        """There may be members of other rows, that were here before these."""
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
        """Return what each member is to have."""
        return allocate(self.members, self.places, self.terms.limits(self.quarantined))

    def next_place(self, least: int = 0) -> int:
        return self._next("next_place", least)

    def _next(self, counter: str, least: int = 0) -> int:
        meta = self._known_meta
        number: int = max(getattr(meta, counter), least)
        self.meta = replace(meta, **{counter: number + 1})  # type: ignore[arg-type]  # a counter
        return number

    def write(self, key: str, member: Member) -> None:
        """Write a member's row, if it is another one now."""
        self.members[key] = member
        text = member.text
        if text != self.texts.get(key):
            self.texts[key] = self._rows[member_key(key)] = text

    def _write_gone(self, number: int, gone: Gone | None) -> None:
        if gone is None:
            del self.gone[number], self._rows[f"{GONE}{number}"]
        else:
            self.gone[number] = gone
            self._rows[f"{GONE}{number}"] = gone.text

    def accepts(self, key: str, terms: Terms, server: str | None = None) -> bool:
        """Tell if `key` may join with these terms whether the others live or not."""
        is_like = self._is_alone(key) or self.terms == terms
        return is_like and self._may_join(key, server)

    def _may_join(self, key: str, server: str | None) -> bool:
        return self._is_alone(key) or (
            self._known_meta.protocol == PROTOCOL and self._is_at(server)
        )

    def _is_alone(self, key: str) -> bool:
        return not self.members.keys() - {key}

    def _is_at(self, server: str | None) -> bool:
        return server is None or self._known_meta.server in (None, server)

    def join(
        self,
        key: str,
        who: Mapping[str, Any],
        terms: Terms,
        number: int | None = None,
        server: str | None = None,
        *,
        leads: bool = False,
    ) -> int:
        """Add a member, unless it is one; return its number.

        With the number that it had, if it was a member before, it takes back what is in
        quarantine for it.

        :param terms: in force from now on if there is no other member.
        :param leads: in force in any case.
        :raises LedgerError: if a member has connections elsewhere.
        """
        if not self._may_join(key, server):
            raise self._difference(server)
        is_first = self._is_alone(key)
        self.meta = replace(self.meta or Meta(terms, fresh=True), protocol=PROTOCOL)
        if (leads or is_first) and (terms != self.terms or not self.meta.set_by):
            self.change(terms=terms, set_by=who)
        self.note_server(key, server)
        if key not in self.members:
            owned = 0
            if number is None or self._is_anothers(number, key):
                number = self.meta.next_number
            elif number in self.gone:
                owned = self.gone[number].slots
                self._write_gone(number, None)
            next_number = max(number + 1, self.meta.next_number)
            self.meta = replace(self.meta, next_number=next_number)
            if terms != self.terms:
                who = {**who, "asked": terms.differences(self.terms)}
            # A row unlike any that this member may have had before, see `reap`.
            self.write(key, Member(number, who, owned, beat=self.next_place()))
        self._rows[META] = self._known_meta.text
        return self.members[key].number

    def pause(self, tag: str, who: Mapping[str, Any] | None) -> bool:
        """Have no checkout of a tag served, or with None again; tell if that is new."""
        pauses = self._known_meta.pauses
        is_new = (tag in pauses) == (who is None)
        if is_new:
            self.change(pauses={t: w for t, w in {**pauses, tag: who}.items() if w})
        return is_new

    def change(self, **fields: Any) -> None:
        """Change what all members are to hear of, or nothing; each is to look."""
        meta = self._known_meta
        if self.members and meta.protocol != PROTOCOL:
            raise self._difference(None)
        self.meta = replace(meta, protocol=PROTOCOL, **fields)
        for key, member in list(self.members.items()):
            self.write(key, replace(member, beat=member.beat + 1))
        self._rows[META] = self.meta.text

    def note_server(self, key: str, server: str | None) -> bool:
        """Note where a member's connections go to; tell if they may go there."""
        meta = self._known_meta
        if server is not None and (meta.server is None or self._is_alone(key)):
            self.meta = replace(meta, server=server)
        return self._is_at(server)

    def confirm(self, members: Collection[str]) -> None:
        """Let slots be handed out: all signs of life were those of `members`."""
        if self.members.keys() >= set(members):  # else these may be other rows
            self.meta = replace(self._known_meta, fresh=False)

    def _is_anothers(self, number: int, key: str) -> bool:
        gone = self.gone.get(number)
        return any(member.number == number for member in self.members.values()) or (
            gone is not None and gone.member != key
        )

    def _difference(self, server: str | None) -> LedgerError:
        whos = [member.who for member in self.members.values()]
        shown = ", ".join(f"{w.get('host', '?')}:{w.get('pid', '?')}" for w in whos[:4])
        more = f" and {len(whos) - 4} more" if len(whos) > 4 else ""
        meta, members = self._known_meta, f"(members: {shown}{more})"
        if meta.protocol != PROTOCOL:
            return LedgerError(
                "an older version of sqla_fairpool uses the ledger (protocol version "
                f"{meta.protocol}, here {PROTOCOL}): use the same version everywhere "
                f"{members}"
            )
        return ServerDiffers(
            f"the members of this ledger use server {meta.server}, and this pool's "
            f"connections go to server {server}: name another ledger for it {members}"
        )

    def leave(self, key: str, open_: int, sessions: Collection[Session] = ()) -> None:
        """Remove a member; slots of what it leaves open go into quarantine."""
        if (member := self.members.get(key)) is not None:
            known = self.in_quarantine.intersection(sessions)
            slots = min(open_ - len(known), member.owned)
            self._bury(key, "left connections open", slots, set(sessions) - known)

    def reap(self, texts: Mapping[str, str]) -> list[int]:
        """Put the slots of dead members into quarantine; return the numbers.

        :param texts: their rows as they were before the signs of life were looked at. A
          member whose row has changed since is not dead.
        """
        dead = [key for key, text in texts.items() if self.texts.get(key) == text]
        members = [self.members[key] for key in dead]
        for key, member in zip(dead, members, strict=True):
            self._bury(key, "died", member.owned - member.granted, member.sessions)
        return [member.number for member in members]

    def _bury(
        self, key: str, why: str, slots: int, sessions: Collection[Session]
    ) -> None:
        if slots:
            self._keep(self.members[key].number, key, why, slots, sessions)
        del self.members[key], self._rows[member_key(key)], self.texts[key]

    def quarantine(
        self, key: str, lost: Sequence[Session | None], open_: int = 0
    ) -> list[Session | None]:
        """Put slots of a living member into quarantine, under a number of its own.

        Return those of `lost` for which a slot is there now: the first ones, where it
        owns too few for all of them and for what it has `open_` beside them. The others
        follow when it owns slots again.
        """
        known, member = self.in_quarantine, self.members[key]
        most = max(member.owned - open_, 0)
        while len(new := [one for one in lost if one not in known]) > most:
            lost = lost[:-1]
        if new:
            sessions = [session for session in new if session is not None]
            self._keep(self._next("next_number"), key, LOST, len(new), sessions)
            self.members[key] = replace(member, owned=member.owned - len(new))
        return list(lost)

    def _keep(
        self, number: int, key: str, why: str, slots: int, sessions: Collection[Session]
    ) -> None:
        who, stamp = self.members[key].who, self.next_place()
        gone = Gone(slots, why, who, key, stamp, in_order(sessions))
        self._write_gone(number, gone)

    def release(self, found: Mapping[int, Left]) -> None:
        """Set slots of these quarantines free: their server sessions are gone."""
        for number, (gone, sessions, slots) in found.items():
            if self.gone.get(number) == gone:
                # With the stamp that it had: a keeper that watches it goes on.
                left = replace(gone, slots=slots, sessions=sessions) if slots else None
                self._write_gone(number, left)

    def stall(self, texts: Mapping[str, str]) -> None:
        """Note that members do not answer, if their rows are still as they were."""
        for key, text in texts.items():
            if self.texts.get(key) == text:
                member = self.members[key]
                self.write(key, replace(member.given(-member.granted), stalled=True))

    def restore(self, living: Collection[str]) -> bool:
        """Of a copy that was put back, keep what is still so: the terms and the dead.

        The living are members again when they have said what they have. Left alone are
        rows of another version.
        """
        try:
            if self.meta is not None and self.meta.protocol != PROTOCOL:
                return False
            self.reap({k: text for k, text in self.texts.items() if k not in living})
            gone = {f"{GONE}{number}": row.text for number, row in self.gone.items()}
        except RowBroken:
            gone = {}
        self.reset()
        self._rows.update(gone)
        return True

    def reset(self) -> None:
        """Forget all, also what cannot be read. Numbers are not given again."""
        try:
            # Who lives all the same is to be heard before slots are handed out.
            self.meta = self.meta and replace(self.meta, fresh=True)
        except RowBroken:
            self.meta = None
        self._rows.clear()
        if self.meta is not None:
            self._rows[META] = self.meta.text
        self.texts, self.members, self.gone = {}, {}, {}
        self.places, self.due = {}, {}

    def tell(self, plan: Allocation | None = None) -> None:
        """Give what is free, note who is to look and who to be rung; last of all."""
        if self.meta is None:
            return
        plan = plan or self.allocation()
        grants = plan.grants(self.members, self.free)
        for key, more in grants.items():
            self.write(key, self.members[key].given(more))
        due = plan.due(self.members)
        new = {k for k, w in due.items() if w not in (self.due.get(k), STALLED)}
        self.bells = sorted(new.union(grants))
        if due != self.due:
            self._rows[DUE], self.due = dump(due), due
        places = {tag: self.places[tag] for tag in plan.shares if tag in self.places}
        self._rows.update({TAGS: dump(places), META: self._known_meta.text})
