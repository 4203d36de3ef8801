"""The ledger's book: who owns which slots, and who may change that, how.

Pure: rows in, rows out, in one transaction of a store, which is exclusive over all
members. No clock, no I/O, no thread. A transaction either happens or does not. What a
member does for itself in one is :func:`.settling.settle`; the rest is here.

**A slot** is the right to have one connection open. Of the N slots each is

=============  =======================================================================
free           counted in no row: N less all the others
owned          counted in the row of one member, `owned`
quarantined    counted in a row ``gone/<number>``: no member answers for it, but a
               server session may still be open
=============  =======================================================================

**A session** is what a connection is at the server: a process there and when it began.
A member writes each into its row before the connection is used, and takes it out after
the session has ended. So a slot of a member that is gone is held by a session that is
known, or *unposted*: by one that was opened a moment before, or by none.

============================  ==========================================================
transition                    who may do it, and when
============================  ==========================================================
free -> owned                 `settle`: a member, for itself, up to its target, before
                              it opens a connection
owned -> free                 `settle`, `leave`: the owner, for itself, after the
                              connection is closed and its pool told not to open another
owned -> quarantined          `reap`: anybody, when the kernel or the server says that
                              the owner's sign of life is gone and its row has not
                              changed since before that was asked;
                              `leave`: the owner, for connections that stay open;
                              `quarantine`: the owner, for a single connection of which
                              it cannot know if its session has ended
quarantined -> free           `release`: anybody, session by session, when the server
                              says that it is gone (or, where it cannot be asked, after
                              a stated time); an unposted slot when there is no session
                              that could have it, see :mod:`.watch`
quarantined -> owned          `join`: the owner itself, that was taken for dead
anything -> free              `reset`: an operator, while no member lives
============================  ==========================================================

So a member never has more connections open than slots are kept for it, whenever it
stops: the number that its pool may open is raised *after* the row, and lowered
*before* it. What happens if a member is gone for good

* before its transaction is committed: nothing of it has happened;
* after it took slots, before its pool knows: they are reaped with the others;
* after its pool was told to shrink, before it gave back: the same;
* after it gave back, before it rang who waits for that: the waiting one looks on its
  beat, finds itself in the row ``due``, and takes;
* in the transaction: the store undoes it;
* between `reap` and `release`: the quarantine is in the rows, anybody goes on;
* after `quarantine`, before its pool knows: the other slots are reaped, that one stays;
* after a connection was opened, before its session was posted: its slot is unposted;
* in `leave`: before it, as killed; after it, it was no member any more.

A member that only *stops* (SIGSTOP, a debugger, a suspended machine) keeps its sign of
life, so its slots; it goes on from where it stood. Others may write into its row that
it is `stalled`, which takes its demand off the board and nothing else. A forked child
is another process with an id of its own, and owns nothing. Commits of which the answer
was lost do no harm either: what counts is the row, which is read at the next look.

A sign of life can be *lost* while its process lives, where it depends on a connection.
Then the slots of a living member go into quarantine, and are free once the server knows
no session of it. So a pool uses a new connection only after its keeper has said that
the session is in the row, and that the row covers all that is open. And a keeper lets
its pool open nothing from before it makes a new sign until it has seen its row: it
takes its quarantine back, or takes free slots for what is open, before anything else.

The rows can be *lost* while members live: the file is deleted, the tables are dropped.
Rows that are made anew are `fresh`: they hand out no slot while there is a sign of life
that belongs to no member. That is one of the rows before, whose connections are open;
it finds out, joins, and takes slots for what it has open.

The rows can be *older* than what a member knows, if somebody has restored a copy. Then
it takes free slots for what it has open, and opens nothing while it has fewer.

**Who is told** (:mod:`.board`). Each transaction computes the allocation for the whole
board (:mod:`.allocation`) and writes down, in the row ``due``, who is expected to look
and why: ``give``, its target is below what it owns; ``take``, there are free slots for
it; ``limit``, a ceiling that binds it has changed; ``turn``, it is asked to yield its
place in a line; ``press``, somebody goes short, so what it does not use has to be given
up at once. Those whose entry is new are rung. A bell may be lost: the row is not.

**Terms.** All members have the same numbers, and their connections go to one server. A
newcomer with other terms, or another server, is refused unless nobody else lives; then
its own are in force. So are members of a later version by those of an earlier one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .board import Board
from .errors import LedgerError, RowBroken, ServerDiffers, TermsDiffer
from .rows import (
    META,
    PROTOCOL,
    Gone,
    Left,
    Member,
    Meta,
    Session,
    Terms,
    gone_key,
    in_order,
    member_key,
)

__all__ = ["Book"]


class Book(Board):
    """The rows of one transaction, and all that may be done to them.

    :meth:`reset` works on rows that cannot be read as well.
    """

    # -- coming and going -------------------------------------------------------

    def accepts(self, key: str, terms: Terms, server: str | None = None) -> bool:
        """Tell if `key` may join with these terms as things stand."""
        return not self.members.keys() - {key} or (
            self._known_meta.protocol == PROTOCOL
            and self.terms == terms
            and self._is_at(server)
        )

    def _is_at(self, server: str | None) -> bool:
        return server is None or self._known_meta.server in (None, server)

    def join(
        self,
        key: str,
        who: Mapping[str, Any],
        terms: Terms,
        number: int | None = None,
        server: str | None = None,
    ) -> int:
        """Add a member, unless it is one; return its number.

        :param number: the one it had, if it was a member before. It takes back what is
          in quarantine for it.
        :param server: where its connections go to, if that is known.
        :raises TermsDiffer: if a member has other terms.
        :raises ServerDiffers: if a member's connections go elsewhere.
        """
        if not self.accepts(key, terms, server):
            raise self._difference(terms, server)
        meta = self.meta or Meta(terms, fresh=True)
        self.meta = replace(meta, terms=terms, protocol=PROTOCOL)
        self.note_server(key, server)
        if key not in self.members:
            owned = 0
            if number is None or self._is_anothers(number, key):
                number = self.meta.next_number
            elif number in self.gone:
                owned = self.gone.pop(number).slots
                del self._rows[gone_key(number)]
            next_number = max(number + 1, self.meta.next_number)
            self.meta = replace(self.meta, next_number=next_number)
            # A row unlike any that this member may have had before, see `reap`.
            self.write(key, Member(number, who, owned, beat=self.next_place()))
        self._rows[META] = self._known_meta.text
        return self.members[key].number

    def note_server(self, key: str, server: str | None) -> bool:
        """Note where a member's connections go to; tell if they may go there."""
        meta = self._known_meta
        if server is not None and (
            meta.server is None or not self.members.keys() - {key}
        ):
            self.meta = replace(meta, server=server)
        return self._is_at(server)

    def confirm(self, members: Collection[str]) -> None:
        """Let slots be handed out: no sign of life stood but those of `members`.

        :param members: those that there were when the signs were looked at.
        """
        if self.members.keys() >= set(members):  # else these may be other rows
            self.meta = replace(self._known_meta, fresh=False)

    def _is_anothers(self, number: int, key: str) -> bool:
        """Tell if a ledger that was made anew has given the number to another."""
        gone = self.gone.get(number)
        return any(member.number == number for member in self.members.values()) or (
            gone is not None and gone.member != key
        )

    def _difference(self, terms: Terms, server: str | None) -> LedgerError:
        members = [
            f"{m.who.get('host', '?')}:{m.who.get('pid', '?')}"
            for m in self.members.values()
        ]
        shown = ", ".join(members[:4])
        if len(members) > 4:
            shown += f" and {len(members) - 4} more"
        meta = self._known_meta
        if meta.protocol != PROTOCOL:
            return LedgerError(
                f"an older version of sqla_fairpool uses the ledger (protocol version "
                f"{meta.protocol}, here {PROTOCOL}): use the same version everywhere "
                f"(members: {shown})"
            )
        if meta.terms == terms:
            return ServerDiffers(
                f"the members of this ledger use server {meta.server}, and this pool's "
                f"connections go to server {server}: name another ledger for it "
                f"(members: {shown})"
            )
        return TermsDiffer(
            f"the members of a ledger have to agree on its limits: here "
            f"{terms.differences(meta.terms)}, there {meta.terms.differences(terms)} "
            f"(members: {shown})"
        )

    def leave(self, key: str, open_: int, sessions: Collection[Session] = ()) -> None:
        """Take a member off the board, and give back what it has closed.

        As after `reap` and `release`, :meth:`tell` comes next.

        :param open_: connections it leaves open; their slots go into quarantine.
        :param sessions: those of them that are known.
        """
        member = self.members.get(key)
        if member is not None:
            known = self.in_quarantine.intersection(sessions)
            slots = min(open_ - len(known), member.owned)
            sessions = set(sessions) - known
            self._bury(key, "left connections open", slots, sessions)

    def reap(self, texts: Mapping[str, str]) -> list[int]:
        """Put the slots of dead members into quarantine; return the numbers.

        :param texts: their rows as they were before the signs of life were looked
          at. Whose row has changed since is not dead.
        """
        reaped = []
        for key, text in texts.items():
            if self.texts.get(key) == text:
                member = self.members[key]
                self._bury(key, "died", member.owned, member.sessions)
                reaped.append(member.number)
        return reaped

    def _bury(
        self, key: str, why: str, slots: int, sessions: Collection[Session]
    ) -> None:
        member = self.members.pop(key)
        del self._rows[member_key(key)], self.texts[key]
        self._keep(member.number, key, member, why, slots, sessions)

    def quarantine(
        self, key: str, lost: Sequence[Session | None], why: str = "lost connections"
    ) -> list[Session | None]:
        """Put slots of a living member into quarantine, under a number of its own.

        :param lost: what may be open and is not in the member's hands: sessions, None
          where it is not known which.
        :return: those for which a slot is in quarantine now.
        """
        known = self.in_quarantine
        buried = [session for session in lost if session in known]
        member = self.members[key]
        new = [session for session in lost if session not in known][: member.owned]
        if new:
            meta = self._known_meta
            self.meta = replace(meta, next_number=meta.next_number + 1)
            sessions = [session for session in new if session is not None]
            self._keep(meta.next_number, key, member, why, len(new), sessions)
            self.members[key] = replace(member, owned=member.owned - len(new))
        return buried + new

    def _keep(
        self,
        number: int,
        key: str,
        member: Member,
        why: str,
        slots: int,
        sessions: Collection[Session],
    ) -> None:
        if slots:
            gone = Gone(
                slots, why, member.who, key, self.next_place(), in_order(sessions)
            )
            self.gone[number] = gone
            self._rows[gone_key(number)] = gone.text

    def release(self, found: Mapping[int, Left]) -> None:
        """Set slots free: the server sessions that had them are gone.

        :param found: for each number, what is left of its quarantine.
        """
        for number, left in found.items():
            if self.gone.get(number) != left.gone:
                continue
            if not left.slots:
                del self.gone[number], self._rows[gone_key(number)]
                continue
            # With the stamp that it had: who watches it has watched this one.
            gone = replace(left.gone, slots=left.slots, sessions=left.sessions)
            self.gone[number] = gone
            self._rows[gone_key(number)] = gone.text

    def stall(self, texts: Mapping[str, str]) -> None:
        """Note that members do not answer, if their rows are still as they were."""
        for key, text in texts.items():
            if self.texts.get(key) == text:
                self.write(key, replace(self.members[key], stalled=True))

    def reset(self) -> None:
        """Forget all members and quarantines. Numbers are not given again.

        Rows that cannot be read are forgotten like the others.
        """
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
