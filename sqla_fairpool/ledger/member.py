"""A process as a member of the ledger: what it reads and writes there, and obeys.

Rules of this file:

* What the pool may open is raised after the row, and lowered before it: see the
  protocol in the package's docstring. The row is the truth; what is remembered here is
  what it was.
* Nothing is called in a transaction but the book. Asking for signs of life, asking the
  server, ringing, closing connections: all that is before or after.
* The store is opened again before the pool is looked at: that may stop the pool from
  opening connections, and what is open is to be counted after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import InitVar, dataclass, replace
from typing import Any

from ..scheduling.counters import BOUNDS
from ..stats import LedgerStats, Summary
from .book import Book
from .demand import Allotment, Demand, Local, PoolSide, State
from .rows import Terms, in_order, limits_of_tags
from .store import Store, StoreAway
from .transaction import Rows, has_news, renew, settle
from .watch import Findings, Pace, Sessions, Watch

_log = logging.getLogger(__name__)

#: How many of those that do not go short look for dead members within `slow`.
_PATROL = 20
#: Rounds of giving back within one step: what it closes itself is closed after one.
_ROUNDS = 3


@dataclass(eq=False)
class Membership:
    """One member, from before it joins until it has left. For one thread."""

    store: Store
    terms: Terms
    local: InitVar[Local]
    sessions: InitVar[Sessions | None]
    pace: Pace
    chance: Callable[[], float]
    who: Callable[[], Mapping[str, Any]]
    #: Its terms are to be in force when it joins, whatever those of the others are.
    leads: bool = False

    def __post_init__(self, local: Local, sessions: Sessions | None) -> None:
        self._pool = PoolSide(local)
        self._pool.named = limits_of_tags(self.terms.tags).given
        self._demand = Demand(self.pace)
        self.handovers, self.rung = self._demand.handovers, self._demand.rung
        self.watch = Watch(self.store, sessions, self.pace)
        self.is_open = False
        self.rows = Rows(self.store)
        #: Members and slots by state, as they were seen last while we are one of them.
        self.seen: tuple[int, Mapping[str, int]] | None = None
        #: Others go short: the pool rings when a connection falls idle.
        self.pressed = False
        #: Tags of which it is known that callers wait in vain, and that they go short.
        self.vain: frozenset[str] = frozenset()
        self.short: frozenset[str] = frozenset()
        #: Our number, kept while the row is lost: see `Book.join`.
        self.number: int | None = None
        # Times: of the next look; of the next one without need. And the most
        # connections that were open since the last one of these.
        self._look_at, self._slow_at, self._peak = 0.0, 0.0, 0
        # Of the next question whether the store is there; and how many were found that
        # live at the ledger's place and are in no row.
        self._check_at, self._strangers = 0.0, 0
        # We have put slots into quarantine and look until they are out.
        self._guards = False
        # There was a look at the rows; others are to be looked after in any case.
        self._patrols: bool | None = None
        # The server that was last posted as that of our sessions.
        self._server: str | None = None
        # Our sign of life may have been lost; write something: others are to see.
        self._returning = False

    @property
    def allotment(self) -> Allotment | None:
        """What the last transaction has said; None if we are no member."""
        return self._demand.allotment

    def stats(self, away: float) -> LedgerStats:
        """Return what was seen and counted. From any thread."""
        (members, slots), times = self.seen or (None, {}), self.handovers
        handovers = Summary.of(BOUNDS, times.counts[:], times.total, times.max)
        return LedgerStats(slots, members, self.rows.transactions, handovers, away)

    def _see(self, book: Book) -> None:
        if (row := book.members.get(self.store.member)) is not None:
            slots = {"owned": row.owned, "others": book.owned - row.owned}
            slots |= {"free": book.left, "quarantined": book.quarantined}
            self.seen = len(book.members), slots

    @property
    def is_uneasy(self) -> bool:
        """Tell if there is something to be expected from others."""
        has = self.allotment
        return has is not None and (
            has.row.owned != has.target
            or bool(has.asked or self.vain or self._guards or (has.pauses and has.gone))
        )

    def times(self, now: float) -> Iterator[float]:
        """Yield the times at which there may be something to do, without a bell."""
        yield self._look_at
        if self.is_open:
            yield max(self._check_at, now)
        yield from self._demand.times(now)

    def round(self, now: float, rung: bool, asked: bool = False) -> None:
        """See what is wanted here, and act on that; post the row if `asked`."""
        self._pool.forget_peaks()
        if not self.is_open and self.number is not None:
            self._open()
        elif self.is_open and (now >= self._check_at or self.store.watches_place):
            near = self.store.watches_place
            self._check_at = now + (self.pace.beat if near else self.pace.far)
            if not self.store.in_place():
                self._pool.freeze()
                raise StoreAway("what was opened is not what stands at its place now")
        if not (rung or asked) and now < min(self._look_at, self._demand.rests_until):
            return
        state = self._pool.look()
        self._peak = max(self._peak, state.open)
        if (has := self.allotment) is None:
            if asked or state.wants or self.number is not None:
                self._join(now, state)
            else:
                self._look_at = self._slow_at = now + self.pace.slow
            return
        post = (
            (asked and not (has.covered and state.open <= has.row.owned))
            or bool(state.lost)
            or has.row.owned > max(self._pool.allowed, state.open)
            or self._returning
            or state.server != self._server
            or self._demand.is_news(state.tags, now)
        )
        if not state.sessions.issubset(has.row.sessions):
            noted = not post and self._note_sessions(state, has)
            post, asked = post or not noted, asked and not noted
        if post or asked or rung or now >= self._look_at:
            self._look(now, state, post)

    def _note_sessions(self, state: State, has: Allotment) -> bool:
        """Have new sessions in our row if nothing else is news, without a reading."""
        row = replace(has.row, sessions=in_order(state.sessions), beat=has.row.beat + 1)
        if is_there := self.rows.swap(has.row.text, row):
            self._demand.allotment = replace(has, row=row)
        return is_there

    def away(self) -> None:
        """The store is away: what is owned is kept if the sign of life stands.

        What is lost may be in quarantine now, and its slot out of it before this is
        heard: until then it is not known how many slots are left for other connections.
        """
        if not self.store.signed or self._pool.local.lost():
            self._pool.freeze()
        self.is_open, self._returning, self._look_at = False, True, 0.0

    def exclude(self) -> None:
        """We are no member, and must not be one: close what is open."""
        if self.number is not None:
            self._pool.close()
        self.is_open = False
        self.store.close()

    def leave(self) -> None:
        """Give up everything that is closed, and the sign of life."""
        try:
            if self.number is not None:
                self._pool.close()
            if self.number is not None and self.is_open:
                state = self._pool.look()
                sessions = state.sessions.union(filter(None, state.lost))
                with self.rows.transaction() as book:
                    book.leave(self.store.member, state.open, sessions)
                    book.tell()
        except Exception as error:
            # Others find us dead, and our slots with us.
            _log.warning("could not leave the ledger %s: %s", self.store.name, error)
        finally:
            self._demand.allotment = self.number = self.seen = None
            self.exclude()

    def _open(self) -> None:
        if self.is_open:
            return
        if not self.store.signed:
            # Meanwhile our slots may have been taken for those of a dead member. Until
            # we have seen our row, nothing is opened; a new sign of life must not
            # cover what the lost one did.
            self._pool.freeze()
        self.store.open()
        self.is_open, self._check_at = True, 0.0

    def _join(self, now: float, state: State) -> None:
        """Become a member, in one transaction as a rule."""
        key, dead = self.store.member, dict[str, str]()
        self._open()
        for looked in (False, True):
            with self.rows.transaction() as book:
                book.reap(dead)
                if looked or book.accepts(key, self.terms, state.server):
                    who, number, allowed = self.who(), self.number, self._pool.allowed
                    leads, self.leads = self.leads, False
                    book.join(key, who, self.terms, number, state.server, leads=leads)
                    has = settle(book, key, state, state.tags, allowed, sign=True)
                    self._see(book)
                    break
                texts = dict(book.texts)
            living = self.store.living(list(texts))
            dead = {key: text for key, text in texts.items() if key not in living}
        _log.info("joined the ledger %s, member #%d", self.store.name, has.row.number)
        self._slow_at = now + self.pace.slow
        self._obey(has, now)
        if has.fresh is not None and not self._settle(now, self._pool.look(), True):
            return  # it was another one that is a member now
        self._give_back(now)
        self._patrols = False

    def _look(self, now: float, state: State, post: bool) -> None:
        """Read the rows, say what there is to say, do what is asked."""
        has = self._demand.known
        is_slow = now >= self._slow_at
        if is_slow:
            # Give up slots for which there was no connection since the last slow look.
            peak, self._peak = self._peak, state.open
            waits = any(want.waiting for want in state.tags.values())
            if not waits and peak < has.row.owned:
                self._pool.shrink(peak)
                post = True
        elif post and (spare := self._demand.spare(state.tags, now)):
            self._pool.shrink(has.row.owned - spare)
        if not self._settle(now, self._pool.look(), post):
            return  # no member any more
        self._give_back(now)
        members = self.allotment.members if self.allotment else 1
        self._patrols = is_slow and self.chance() * members < _PATROL

    def _settle(
        self, now: float, state: State, post: bool, findings: Findings | None = None
    ) -> bool:
        """Bring our row up to date, if need be; return if we are a member."""
        has, key = self._demand.known, self.store.member
        confirmed = self._are_all_there(has)
        is_due = post or findings or has.fresh is not None
        # What is given back is written into others' rows: in a transaction.
        gives = post and max(self._pool.allowed, state.open) < has.row.owned
        # As a rule there is no news.
        if not (gives or has_news(self.rows.read(), key, has) or is_due):
            self._plan_looks(now)
            return True

        def change(book: Book) -> Allotment | None:
            tags, allowed = self._demand.steady(state.tags, now), self._pool.allowed
            told = renew(
                *(book, key, state, tags, allowed, confirmed, findings),
                ready=self._demand.ready(now),
                # It answers, though it may have nothing to give yet.
                sign=self._returning or key in book.due,
                unasked=self.watch.unasked,
            )
            self._see(book)
            return told

        told = None if gives else change(Book(rows := dict(self.rows.known)))
        if told is not None and not self.rows.swap_alone(rows, told.row):
            # What is closed before is given back in the same transaction.
            self._pool.shrink(told.target)
            state, told = self._pool.look(), None
        if told is None:
            with self.rows.transaction() as book:
                told = change(book)
        if told is None:
            # Taken for dead, or the ledger was reset: as a newcomer, with the number
            # we had and the connections that are open.
            self._demand.allotment = None
            self._join(now, state)
            return False
        self._returning, self._server = False, state.server
        self._obey(told, now)
        return True

    def _are_all_there(self, has: Allotment) -> frozenset[str] | None:
        """Return the members of fresh rows, if no other process lives at this place."""
        if has.fresh is None:
            return None
        before, self._strangers = self._strangers, self.store.strangers(has.fresh)
        if self._strangers not in (0, before):
            self.store.ring_all()  # so that they find out
        return None if self._strangers else has.fresh

    def _obey(self, allotment: Allotment, now: float) -> None:
        """Do what the rows say."""
        self._demand.note(allotment, now)
        if allotment.terms != self.terms:
            self._adopt(allotment.terms)
        self.number = allotment.row.number
        self._pool.pause(allotment.pauses)
        if allotment.buried:
            self._pool.bury(allotment.buried)
            self._guards = True
        self._pool.tell(min(allotment.row.owned, allotment.target), allotment.bounds)
        if allotment.row.pressed != self.pressed:
            self.pressed = allotment.row.pressed
            self._pool.local.press(self.pressed)
        self.vain, self.short = allotment.vain, allotment.short
        self._plan_looks(now)

    def _adopt(self, terms: Terms) -> None:
        log = _log.info if self.number else _log.warning  # or it is a newcomer
        log(
            "the ledger %s has %s, this process had %s: the ledger's limits are in "
            "force",
            *(self.store.name, terms.differences(self.terms)),
            self.terms.differences(terms),
        )
        self.terms = terms
        self._pool.named = limits_of_tags(terms.tags).given
        self._pool.local.adopt(terms)

    def set_terms(self, terms: Terms) -> None:
        """Have other terms in force, for all members."""
        if self.allotment is None:
            self.terms, self.leads = terms, True
            return
        self._open()
        with self.rows.transaction(durable=True) as book:
            book.change(terms=terms, set_by=self.who())
        self.store.ring_all()

    def _plan_looks(self, now: float) -> None:
        pace = self.pace
        if now >= self._slow_at:
            self._slow_at = now + pace.slow
        self._look_at = now + pace.beat if self.is_uneasy else self._slow_at
        if self._guards:
            self._look_at = now + min(pace.grace, pace.beat)

    def _give_back(self, now: float) -> None:
        """While slots are to go and their connections are closed: give them back."""
        for _ in range(_ROUNDS):
            if (has := self.allotment) is None or has.row.owned <= has.target:
                return
            self._pool.local.close_surplus()
            state = self._pool.look()
            is_open = max(self._pool.allowed, state.open) >= has.row.owned
            if is_open or not self._settle(now, state, True):
                return

    def watch_others(self, now: float) -> None:
        """After a look: look for dead and stopped members, if we are to do that."""
        patrols, self._patrols = self._patrols, None
        if patrols is None or (has := self.allotment) is None:
            return
        suspects = bool(self.vain) or has.row.owned < has.target or bool(has.gone)
        # Who has paused waits for the end of those sessions, too.
        short = has.members if has.pauses else has.starved
        starved = short if suspects else None
        if not self.watch.is_due(now, starved, self.chance, patrols, self._guards):
            return
        book = Book(dict(self.rows.known))  # of this round
        self._see(book)
        findings = self.watch.look(book, self.store.member, now)
        if findings.any or self.watch.unasked != has.row.unasked:
            if not self._settle(now, self._pool.look(), True, findings):
                return
            self._guards = self._guards or bool(findings.dead)
            if self.allotment is not None:
                self.watch.note(self.allotment.gone, now)
            self._give_back(now)
        if self.allotment is not None:
            self._guards = self._guards and bool(self.allotment.gone)
        self.store.ring(findings.bells)
        self._plan_looks(now)
