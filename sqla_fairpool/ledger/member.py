"""A process as a member of the ledger: what it reads and writes there, and obeys.

Rules of this file:

* What the pool may open is raised after the row, and lowered before it: see
  :mod:`.book`. The row is the truth; what is remembered here is what it was.
* Nothing is called in a transaction but the book. Asking for signs of life, asking the
  server, ringing, closing connections: all that is before or after.
* The store is opened again before the pool is looked at: that may stop the pool from
  opening connections, and what is open is to be counted after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from .book import Book
from .demand import Needs, Pace
from .local import Local, State, condense
from .rows import Terms
from .store import Store, StoreAway
from .transaction import Orders, has_news, settle
from .watch import Findings, Sessions, View, Watch

__all__ = ["Membership"]

_log = logging.getLogger(__name__)

#: How many keepers of those that go short watch the others, at each beat, on average.
_WATCHERS = 4

#: How many of those that do not go short look after the dead within `slow`.
_PATROL = 20

#: Rounds of giving back within one step: what it closes itself is closed after one.
_ROUNDS = 3


class Membership:
    """One member. All but :attr:`pressed` is its keeper's thread's."""

    def __init__(
        self,
        store: Store,
        terms: Terms,
        local: Local,
        sessions: Sessions | None,
        pace: Pace,
        chance: Callable[[], float],
        who: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._store = store
        self._terms = terms
        self._local = local
        self._sessions = sessions
        self._pace = pace
        self._chance = chance
        self._who = who
        self.transactions = 0
        self._begin()

    def _begin(self) -> None:
        pace = self._pace
        self._opened = False
        #: Others go short: the pool rings when a connection falls idle.
        self.pressed = False
        # Tags of which it is known that more waiting changes nothing.
        self._vain: frozenset[str] = frozenset()
        # What the board said last; None if we are no member.
        self._orders: Orders | None = None
        # Our number, kept while the row is lost: see `Book.join`.
        self._number: int | None = None
        # What the pool was told, and how many connections that allows.
        self._told: tuple[int, Mapping[str, int], int] | None = None
        self._allotted = 0
        self._needs = Needs(pace)
        self._watch = Watch(self._store, self._sessions, pace)
        # Times: of the next look; of the next one without need; of the last watch.
        self._look_at = 0.0
        self._slow_at = 0.0
        self._watched_at = float("-inf")
        # Most connections that were open since the last slow look.
        self._peak = 0
        # How many were found that live at the ledger's place and are in no row.
        self._strangers = 0
        # What was in use since the last round, by tag.
        self._seen: dict[str, int] = {}
        # We have put slots into quarantine and look until they are out.
        self._guards = False
        # Our sign of life may have been lost; write something, so that others see.
        self._returning = False
        # Since when the store does not answer, and why.
        self.away_since: float | None = None
        self.trouble: str | None = None
        self._failures = 0

    def _round(self, now: float, rung: bool, asked: bool = False) -> None:
        """See what is wanted here, and do what is to be done about that.

        :param asked: bring the row up to date in any case.
        """
        self._seen.clear()
        if self._opened or self._number is not None:
            self._return_to_place()
        state = self._state()
        self._peak = max(self._peak, state.open)
        orders = self._orders
        if orders is None:
            if asked or state.wants or self._number is not None:
                self._join(now, state)
            else:
                self._look_at = self._slow_at = now + self._pace.slow
            return
        matters = (
            asked
            or bool(state.lost)
            or not state.sessions <= orders.sessions
            or orders.owned > max(self._allotted, state.open)
            or self._returning
            or self._needs.matter(orders, state.tags, now)
        )
        if matters or rung or now >= self._look_at:
            self._look(now, state, matters)

    def _state(self) -> State:
        state = State.of(self._local)
        seen = self._seen
        for tag, want in state.tags.items():
            seen[tag] = max(seen.get(tag, 0), want.in_use)
        tags = {t: want._replace(in_use=seen[t]) for t, want in state.tags.items()}
        return state._replace(tags=condense(tags))

    @property
    def is_uneasy(self) -> bool:
        """Tell if there is something to be expected from others."""
        orders = self._orders
        return orders is not None and (
            orders.owned != orders.target
            or bool(orders.asked)
            or bool(self._vain)
            or self._guards
        )

    @property
    def unasked(self) -> str | None:
        """Why the server cannot be asked for sessions, if it was asked in vain."""
        return self._watch.unasked

    # -- transactions ---------------------------------------------------------------

    def _return_to_place(self) -> None:
        """Have the store open, and at the ledger's place."""
        store = self._store
        if not self._opened:
            self._open()
        elif store.watches_place and not store.in_place():
            self._freeze()
            raise StoreAway("what was opened is not what stands at its place now")

    def _open(self) -> None:
        if not self._store.signed:
            # Meanwhile our slots may have been taken for those of a dead member. Until
            # we have seen our row, nothing is opened; a new sign of life must not
            # cover what the lost one did.
            self._freeze()
        self._store.open()
        self._opened = True

    def _freeze(self) -> None:
        self._local.freeze()
        self._told, self._allotted = None, 0

    @contextmanager
    def _transaction(self) -> Iterator[MutableMapping[str, str]]:
        if not self._opened:
            self._open()
        self.transactions += 1
        with self._store.transaction() as rows:
            yield rows
        self.away_since = self.trouble = None
        self._failures = 0

    def _join(self, now: float, state: State) -> None:
        """Become a member, and get what there is, in one transaction as a rule."""
        dead: Mapping[str, str] = {}
        for looked in (False, True):
            with self._transaction() as rows:
                book = Book(rows)
                book.reap(dead)
                if looked or self._is_accepted(book, state):
                    orders = self._enter(book, state)
                    break
                texts = dict(book.texts)
            living = self._store.living(list(texts))
            dead = {key: text for key, text in texts.items() if key not in living}
        self._slow_at = now + self._pace.slow
        self._obey(orders, now)
        if orders.fresh is not None and not self._settle(now, self._state(), True):
            return  # it was another one that is a member now
        self._give_back(now)
        self._watch_others(now)

    def _is_accepted(self, book: Book, state: State) -> bool:
        return book.accepts(self._store.member, self._terms, state.server)

    def _enter(self, book: Book, state: State) -> Orders:
        key = self._store.member
        book.join(key, self._who(), self._terms, self._number, state.server)
        return settle(book, key, state, state.tags, self._allotted, sign=True)

    def _look(self, now: float, state: State, matters: bool) -> None:
        """Read the board, say what there is to say, do what is asked."""
        orders = self._orders
        assert orders is not None
        slow = now >= self._slow_at
        if slow:
            matters |= self._let_go(state)
        elif matters and (spare := self._needs.spare(orders, state.tags, now)):
            self._shrink_pool(orders.owned - spare)
        if not self._settle(now, self._state(), matters):
            return  # no member any more
        self._give_back(now)
        if slow and self._chance() * max(self._members, 1) < _PATROL:
            self._watch_others(now, patrol=True)
        else:
            self._watch_others(now)

    @property
    def _members(self) -> int:
        return self._orders.members if self._orders else 0

    def _settle(
        self,
        now: float,
        state: State,
        matters: bool,
        findings: Findings | None = None,
    ) -> bool:
        """Bring our row up to date, if need be; return if we are a member."""
        orders, key = self._orders, self._store.member
        assert orders is not None
        posted = self._needs.steady(orders, state.tags, now)
        matters = matters or findings is not None or orders.fresh is not None
        all_there = self._are_all_there(orders)
        told = None
        with self._transaction() as rows:
            if matters or has_news(rows, key, orders):
                book = Book(rows)
                if findings is not None:
                    findings.apply(book)
                if all_there is not None:
                    book.confirm(all_there)
                if key in book.members and not book.note_server(key, state.server):
                    # As a newcomer, it may be refused. What it had open at the other
                    # server is in its row.
                    there = book.members[key].sessions
                    book.leave(key, len(there), there)
                if key in book.members:
                    told = settle(
                        book,
                        key,
                        state,
                        posted,
                        self._allotted,
                        ready=self._needs.ready(now),
                        keep=True,
                        # It answers, though it may have nothing to give yet.
                        sign=self._returning or key in book.due,
                        unasked=self.unasked,
                    )
                else:
                    self._orders = None
                    if book.meta is not None:  # else the rows were made anew
                        book.tell(book.allocation())
        if self._orders is None:
            # Taken for dead, or the ledger was reset: as a newcomer, with the number
            # we had and the connections that are open.
            self._join(now, state)
            return False
        self._returning = False
        if told is not None:
            self._obey(told, now)
        else:
            self._plan_looks(now)
        return True

    def _are_all_there(self, orders: Orders) -> frozenset[str] | None:
        """Return the members of fresh rows, if nobody else lives at this place."""
        if orders.fresh is None:
            return None
        strangers, before = self._store.strangers(orders.fresh), self._strangers
        self._strangers = strangers
        if strangers and strangers != before:
            self._store.ring_all()  # so that they find out
        return None if strangers else orders.fresh

    def _obey(self, orders: Orders, now: float) -> None:
        """Do what the board says, and ring who is to hear of ours."""
        before, self._orders = self._orders, orders
        self._number = orders.number
        if orders.buried:
            self._local.buried(orders.buried)
            self._allotted = max(self._allotted - len(orders.buried), 0)
            if self._told is not None:
                self._told = (self._allotted, *self._told[1:])
            self._guards = True
        self._needs.told(before, orders, now)
        self._tell_pool(min(orders.owned, orders.target), orders.ceilings, orders.other)
        if orders.bells:
            self._store.ring(orders.bells)
        if orders.pressed != self.pressed:
            self.pressed = orders.pressed
            self._local.press(orders.pressed)
        self._vain = frozenset(
            tag
            for tag, line in orders.lines.items()
            if line.waiting and orders.claims[tag] < line.wants
        )
        self._plan_looks(now)

    def _plan_looks(self, now: float) -> None:
        pace = self._pace
        if now >= self._slow_at:
            self._slow_at = now + pace.slow
        if self._guards:
            self._look_at = now + min(pace.grace, pace.beat)
        else:
            self._look_at = now + pace.beat if self.is_uneasy else self._slow_at

    def _tell_pool(self, slots: int, ceilings: Mapping[str, int], other: int) -> None:
        told = slots, ceilings, other
        if told != self._told:
            self._local.allot(slots, ceilings, other)
            self._told = told
            self._allotted = slots

    def _shrink_pool(self, slots: int) -> None:
        """Tell the pool to have no more than `slots`, before the row says so."""
        if slots < self._allotted and self._told is not None:
            self._tell_pool(slots, *self._told[1:])
            self._local.close_surplus()

    def _close_pool(self) -> None:
        """Tell the pool to have nothing."""
        _, ceilings, other = self._told or (0, {}, 0)
        self._tell_pool(0, ceilings, other)
        self._local.close_surplus()

    # -- giving back ----------------------------------------------------------------

    def _give_back(self, now: float) -> None:
        """While slots are to go and their connections are closed: give them back."""
        for _ in range(_ROUNDS):
            orders = self._orders
            if orders is None or orders.owned <= orders.target:
                return
            self._local.close_surplus()
            state = self._state()
            if max(self._allotted, state.open) >= orders.owned:
                return
            if not self._settle(now, state, True):
                return

    def _let_go(self, state: State) -> bool:
        """Give up slots for which there was no connection since the last slow look."""
        orders, peak = self._orders, self._peak
        assert orders is not None
        self._peak = state.open
        if any(want.waiting for want in state.tags.values()) or peak >= orders.owned:
            return False
        self._shrink_pool(peak)
        return True

    def _leave(self) -> None:
        """Give up everything that is closed, and the sign of life."""
        try:
            if self._number is not None:
                self._close_pool()
            if self._number is not None and self._opened:
                state = self._state()
                sessions = state.sessions.union(filter(None, state.lost))
                with self._transaction() as rows:
                    book = Book(rows)
                    book.leave(self._store.member, state.open, sessions)
                    bells = book.tell(book.allocation()) if book.meta else []
                self._store.ring(bells)
        except Exception as error:
            # Others find us dead, and our slots with us.
            _log.warning("could not leave the ledger %s: %s", self._store.name, error)
        finally:
            self._orders = self._number = None
            self._opened = False
            self._store.close()

    # -- the others -----------------------------------------------------------------

    def _watch_others(self, now: float, patrol: bool = False) -> None:
        """Look after the dead and the stopped, if it is for us to do that."""
        orders, pace = self._orders, self._pace
        pause = pace.grace if self._guards else pace.beat * 0.9
        if orders is None or now - self._watched_at < pause:
            return
        short = bool(self._vain) or orders.owned < orders.target
        lucky = self._chance() * max(orders.hungry, 1) < _WATCHERS
        if not (patrol or self._guards or (lucky and (short or orders.gone))):
            return
        self._watched_at = now
        with self._transaction() as rows:
            view = View.of(Book(rows))
        findings = self._watch.look(view, self._store.member, now)
        if findings.any or self.unasked != orders.unasked:
            if not self._settle(now, self._state(), True, findings):
                return
            self._guards = self._guards or bool(findings.dead)
            if self._orders is not None:
                self._watch.note(self._orders.gone, now)
            self._give_back(now)
        if self._orders is not None:
            self._guards = self._guards and bool(self._orders.gone)
        if findings.bells:
            self._store.ring(findings.bells)
        self._plan_looks(now)
