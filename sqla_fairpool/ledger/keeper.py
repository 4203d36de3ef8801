"""The one thread of a process that talks to the ledger's store.

It turns what the pool wants into rows, and what it reads there into two numbers for
the pool: how many connections it may open, and the ceiling of each tag. A checkout
never waits for it while there is a connection, or a slot for one.

Rules of this file:

* What the pool may open is raised after the row, and lowered before it: see
  :mod:`.book`. The row is the truth; what is remembered here is what it was.
* The store is written when something changed that could move a slot, and else left
  alone: how long a line is does not matter while it gets less than it wants. A rise is
  posted at once. A fall is posted when others go short, after it has lasted for a
  moment (`linger`): a slot that is used again and again does not travel in between.
* No exception leaves the thread. While the store is away, what is owned is kept, and
  the pool's shrinking goes on by itself; giving back follows.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from .allocation import Line
from .book import Book, Orders, TagDemand, has_news
from .errors import LedgerError
from .identity import describe_process
from .rows import Terms
from .store import Store, StoreAway
from .watch import Findings, Sessions, View, Watch

__all__ = ["Keeper", "KeeperStatus", "Local", "Pace"]

_log = logging.getLogger(__name__)

#: Tags of one process on the board. Tags may be made from user data; those beyond are
#: summed up under the name of none.
_MAX_TAGS = 256
_REST = ""

#: How many keepers of those that go short watch the others, at each beat, on average.
_WATCHERS = 4

#: How many of those that do not go short look after the dead within `slow`.
_PATROL = 20

#: Rounds of giving back within one step: what it closes itself is closed after one.
_ROUNDS = 3


class Local(Protocol):
    """The pool in this process. Called by the keeper's thread only."""

    def demand(self) -> tuple[int, Mapping[str, TagDemand]]:
        """Return the connections that are open, and what is wanted by tag.

        A connection counts as open from before it is opened until after it is closed,
        detached ones included.
        """
        ...

    def allot(self, slots: int, ceilings: Mapping[str, int], other: int) -> None:
        """Open a connection only while there are less than `slots` from now on.

        Until the first call, that is none.
        Nothing that is checked out is taken away. The ceilings are by tag, `other`
        that of any tag not named.
        """

    def close_surplus(self) -> None:
        """Close idle connections above the allotment."""

    def refuse(self, error: LedgerError) -> None:
        """Raise this in those who wait now."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The keeper's times, in seconds. None of them keeps a promise of safety.

    :param beat: between two looks of one that goes short.
    :param slow: between two looks of one that does not.
    :param turn: how long one keeps its place in a line while others get nothing.
    :param linger: how long a slot is unused before it is given to somebody who waits.
      The time that a loop needs between two checkouts, as a rule; a part of what a
      slot needs from one process to another.
    :param patience: how long one may fail to answer before it is taken to be stopped.
    :param grace: how long slots of the dead are in quarantine at least.
    :param reclaim_after: how long, where the server cannot be asked.
    :param retry: longest time between two tries to reach the store.
    """

    beat: float = 1.0
    slow: float = 10.0
    turn: float = 1.0
    linger: float = 0.01
    patience: float = 3.0
    grace: float = 0.5
    reclaim_after: float = 10.0
    retry: float = 5.0


@dataclass(frozen=True, slots=True)
class KeeperStatus:
    """What a monitor shows of the ledger."""

    kind: str
    name: str
    member: int | None
    owned: int
    target: int
    allotted: int
    free: int
    quarantined: int
    members: int
    #: Seconds, None while it is there.
    away_for: float | None
    #: Why it is away, or why we are refused.
    trouble: str | None
    transactions: int
    control_connections: int


class Keeper:
    """Keeps one pool's slots in a ledger.

    :param store: where the ledger is.
    :param terms: the limits that all members have to share.
    :param local: the pool.
    :param sessions: asks the server for sessions of members that are gone.
    :param clock: seconds on a steadily rising scale.
    :param chance: a random number below 1.
    """

    def __init__(
        self,
        store: Store,
        terms: Terms,
        local: Local,
        sessions: Sessions | None = None,
        *,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        who: Callable[[], Mapping[str, Any]] = describe_process,
    ) -> None:
        self._store = store
        self._terms = terms
        self._local = local
        self._sessions = sessions
        self._pace = pace or Pace()
        self._clock = clock
        self._chance = chance
        self._who = who
        self.transactions = 0
        self._begin()

    def _begin(self) -> None:
        pace = self._pace
        self._thread: threading.Thread | None = None
        # Held by whoever starts the thread.
        self._starting = threading.Lock()
        # Rings while the store cannot: taken by the keeper, released to wake it.
        self._bell = threading.Lock()
        self._bell.acquire()
        self._rung = False
        self._closing = False
        self._opened = False
        #: Others go short: the pool rings when a connection falls idle.
        self.pressed = False
        # Tags of which it is known that more waiting changes nothing.
        self._vain: frozenset[str] = frozenset()
        self._orders: Orders | None = None
        # Our number, kept while the row is lost: see `Book.join`.
        self._number: int | None = None
        # What the pool was told.
        self._allotted = 0
        self._told: tuple[int, Mapping[str, int], int] | None = None
        self._watch = Watch(
            self._store,
            self._sessions,
            beat=pace.beat,
            patience=pace.patience,
            grace=pace.grace,
            reclaim_after=pace.reclaim_after,
        )
        # Times: of the next look; of the next one without need; of the last watch.
        self._look_at = 0.0
        self._slow_at = 0.0
        self._watched_at = float("-inf")
        # Since when: less is wanted than claimed; nobody waits any more of those who
        # are posted; each tag has had its slot.
        self._slack_since: float | None = None
        self._gone_since: float | None = None
        self._had_since: dict[str, float] = {}
        self._peak = 0
        # We have put slots into quarantine and look until they are out.
        self._guards = False
        self._away_since: float | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._returning = False
        self.trouble: str | None = None

    # -- called by the pool -------------------------------------------------------

    def ring(self, tag: str | None = None) -> None:
        """Have the keeper look at the pool: somebody waits, or something was closed.

        Never blocks; cheap when it is rung already, or when more waiting under `tag`
        would change nothing. Starts the thread on first use.

        :param tag: who waits; None if that is not the reason.
        """
        if self._rung or tag in self._vain:
            return
        self._rung = True
        if self._thread is None:
            self._start()
        if self._opened:
            self._store.nudge()
        else:
            self._wake()

    def _wake(self) -> None:
        try:
            self._bell.release()
        except RuntimeError:
            pass  # it was ringing already

    def _start(self) -> None:
        if not self._starting.acquire(blocking=False):
            return  # somebody else starts it
        try:
            if self._thread is None and not self._closing:
                thread = threading.Thread(
                    target=self._run, name="sqla_fairpool-keeper", daemon=True
                )
                thread.start()
                self._thread = thread
        except RuntimeError:
            self._rung = False  # at the interpreter's end
        finally:
            self._starting.release()

    def after_fork(self) -> None:
        """In the child: be a new process that owns nothing."""
        self._store.after_fork()
        self._begin()
        self._tell_pool(0, {}, 0)

    def close(self) -> None:
        """Give everything back that is closed, and leave. Waits for the thread."""
        self._closing = True
        thread = self._thread
        if thread is None:
            self._leave()
            return
        if self._opened:
            self._store.nudge()
        self._wake()
        if thread is not threading.current_thread():
            thread.join(self._pace.retry)

    def status(self) -> KeeperStatus:
        """Return what a monitor shows."""
        orders, away = self._orders, self._away_since
        return KeeperStatus(
            kind=self._store.kind,
            name=self._store.name,
            member=self._number,
            owned=orders.owned if orders else 0,
            target=orders.target if orders else 0,
            allotted=self._allotted,
            free=orders.free if orders else 0,
            quarantined=sum(g.slots for g in orders.gone.values()) if orders else 0,
            members=orders.members if orders else 0,
            away_for=None if away is None else self._clock() - away,
            trouble=self.trouble,
            transactions=self.transactions,
            control_connections=self._store.control_connections,
        )

    # -- the thread -----------------------------------------------------------------

    def _run(self) -> None:
        rung = False
        while not self._closing:
            wake_at = self.step(self._clock(), rung)
            rung = False
            if not self._rung and not self._closing:
                woken = self._sleep(max(wake_at - self._clock(), 0.0))
                # By the pool, or from outside? Where it matters, from both.
                rung = woken and (self._is_uneasy() or not self._is_rung())
        self._leave()

    def _sleep(self, seconds: float) -> bool:
        """Return if somebody rang."""
        if self._opened:
            try:
                return self._store.wait(seconds)
            except Exception as error:
                self._lost(error, self._clock())
                return False
        return self._bell.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def step(self, now: float, rung: bool = False) -> float:
        """Do one round; return when to do the next at the latest.

        :param rung: the bell may have been rung by another process.
        """
        self._rung = False
        try:
            self._round(now, rung)
        except LedgerError as error:
            self._refused(error, now)
        except Exception as error:
            self._lost(error, now)
        return self._next_step(now)

    def _round(self, now: float, rung: bool) -> None:
        open_, demand = self._demand()
        self._peak = max(self._peak, open_)
        if now < self._retry_at:
            self._local.close_surplus()
            return
        if self._orders is None:
            wanted = open_ or any(want.wants for want in demand.values())
            if wanted or self._number is not None:
                self._join(now, open_, demand)
            else:
                self._look_at = self._slow_at = now + self._pace.slow
            return
        matters = self._matters(now, open_, demand)
        if matters or rung or self._returning or now >= self._look_at:
            self._look(now, open_, demand, matters)

    # -- is there anything to be said? ----------------------------------------------

    def _demand(self) -> tuple[int, Mapping[str, TagDemand]]:
        open_, demand = self._local.demand()
        if len(demand) <= _MAX_TAGS:
            return open_, demand
        by_wants = sorted(demand, key=lambda tag: (-demand[tag].wants, tag))
        named = {tag: demand[tag] for tag in by_wants[:_MAX_TAGS]}
        rest = [demand[tag] for tag in by_wants[_MAX_TAGS:]]
        named[_REST] = TagDemand(
            sum(want.in_use for want in rest),
            sum(want.waiting for want in rest),
            any(want.active for want in rest),
        )
        return open_, named

    def _matters(self, now: float, open_: int, demand: Mapping[str, TagDemand]) -> bool:
        """Tell if the store has to hear of what is wanted here."""
        orders = self._orders
        assert orders is not None
        active = {tag for tag, want in demand.items() if want.active}
        return (
            orders.owned > max(self._allotted, open_)
            or active != {tag for tag, line in orders.lines.items() if line.active}
            or any(self._rises(orders, tag, want) for tag, want in demand.items())
            or any(tag in orders.asked for tag in self._ready(now))
            or self._falls(orders, now, demand)
        )

    @staticmethod
    def _rises(orders: Orders, tag: str, want: TagDemand) -> bool:
        """Tell if more is wanted than posted, and what was posted is the limit."""
        if not want.waiting:
            return False
        line, claim = orders.lines.get(tag, Line()), orders.claims.get(tag, 0)
        if claim:
            return want.wants > line.wants and claim >= line.wants
        return not line.waiting

    def _falls(
        self, orders: Orders, now: float, demand: Mapping[str, TagDemand]
    ) -> bool:
        """Tell if less has been wanted for a while than others could use."""
        if not (orders.pressed and self._slack(orders, demand)):
            self._slack_since = None
        elif self._slack_since is None:
            self._slack_since = now
        none = TagDemand(0, 0, False)
        if any(
            line.waiting and orders.claims[tag] < line.wants and not want.waiting
            for tag, line in orders.lines.items()
            for want in (demand.get(tag, none),)
        ):
            if self._gone_since is None:
                self._gone_since = now
        else:
            self._gone_since = None
        pace = self._pace
        return _over(self._slack_since, pace.linger, now) or _over(
            self._gone_since, pace.beat, now
        )

    @staticmethod
    def _slack(orders: Orders, demand: Mapping[str, TagDemand]) -> int:
        """Return slots that are claimed here and not wanted."""
        return sum(
            max(claim - (demand[tag].wants if tag in demand else 0), 0)
            for tag, claim in orders.claims.items()
        )

    def _ready(self, now: float) -> list[str]:
        """Return the tags whose turn is over."""
        return [t for t, s in self._had_since.items() if _over(s, self._pace.turn, now)]

    def _is_rung(self) -> bool:
        return self._rung

    def _is_uneasy(self) -> bool:
        """Tell if there is something to be expected from others."""
        orders = self._orders
        return orders is not None and (
            orders.owned != orders.target
            or bool(orders.asked)
            or bool(self._vain)
            or self._guards
        )

    # -- transactions ---------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[MutableMapping[str, str]]:
        if not self._opened:
            if not getattr(self._store, "signed", True):
                # Meanwhile our slots may have been taken for those of a dead member.
                # Until we have seen our row, nothing is opened; a new sign of life
                # must not cover what the lost one did.
                self._tell_pool(0, {}, 0)
            self._store.open()
            self._opened = True
        self.transactions += 1
        with self._store.transaction() as rows:
            yield rows
        self._away_since = self.trouble = None
        self._failures = 0

    def _join(self, now: float, open_: int, demand: Mapping[str, TagDemand]) -> None:
        """Become a member, and get what there is, in one transaction as a rule."""
        dead: Mapping[str, str] = {}
        for looked in (False, True):
            with self._transaction() as rows:
                book = Book(rows)
                book.reap(dead)
                if looked or book.accepts(self._terms):
                    orders = self._enter(book, open_, demand)
                    break
                texts = dict(book.texts)
            living = self._store.living(list(texts))
            dead = {key: text for key, text in texts.items() if key not in living}
        self._slow_at = now + self._pace.slow
        self._obey(orders, now)
        self._give_back(now)
        self._watch_others(now)

    def _enter(self, book: Book, open_: int, demand: Mapping[str, TagDemand]) -> Orders:
        key = self._store.member
        self._number = book.join(key, self._who(), self._terms, self._number)
        floor = max(self._allotted, open_)
        return book.settle(key, demand, open_, floor, sign=True)

    def _look(
        self, now: float, open_: int, demand: Mapping[str, TagDemand], matters: bool
    ) -> None:
        """Read the board, say what there is to say, do what is asked."""
        slow = now >= self._slow_at
        if slow:
            matters |= self._let_go(now, open_, demand)
        elif matters and self._slack_since is not None:
            self._give_up_slack(demand)
        open_, demand = self._demand()
        if not self._settle(now, open_, demand, matters or self._returning):
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
        open_: int,
        demand: Mapping[str, TagDemand],
        matters: bool,
        findings: Findings | None = None,
    ) -> bool:
        """Bring our row up to date, if need be; return if we are a member."""
        orders, key = self._orders, self._store.member
        assert orders is not None
        told = None
        with self._transaction() as rows:
            if findings is not None or matters or has_news(rows, key, orders.text):
                book = Book(rows)
                if findings is not None:
                    findings.apply(book)
                if key in book.members:
                    told = book.settle(
                        key,
                        demand,
                        open_,
                        max(self._allotted, open_),
                        ready=self._ready(now),
                        keep=max(self._allotted, open_),
                        # It answers, though it may have nothing to give yet.
                        sign=self._returning or key in book.due,
                    )
                else:
                    self._orders = None
        if self._orders is None:
            # Taken for dead, or the ledger was reset: as a newcomer, with the number
            # we had and the connections that are open.
            self._join(now, open_, demand)
            return False
        self._returning = False
        if told is not None:
            self._obey(told, now)
        else:
            self._plan_looks(now)
        return True

    def _obey(self, orders: Orders, now: float) -> None:
        """Do what the board says, and ring who is to hear of ours."""
        before, self._orders = self._orders, orders
        self._slack_since = self._gone_since = None
        self._tell_pool(min(orders.owned, orders.target), orders.ceilings, orders.other)
        if orders.bells:
            self._store.ring(orders.bells)
        self.pressed = orders.pressed
        self._vain = frozenset(
            tag
            for tag, line in orders.lines.items()
            if line.waiting and orders.claims[tag] < line.wants
        )
        places = (
            {tag: line.place for tag, line in before.lines.items()} if before else {}
        )
        self._had_since = {
            tag: self._had_since.get(tag, now)
            if places.get(tag) == orders.lines[tag].place
            else now
            for tag, claim in orders.claims.items()
            if claim and orders.owned
        }
        self._plan_looks(now)

    def _plan_looks(self, now: float) -> None:
        pace = self._pace
        if now >= self._slow_at:
            self._slow_at = now + pace.slow
        self._look_at = now + pace.beat if self._is_uneasy() else self._slow_at

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

    # -- giving back ----------------------------------------------------------------

    def _give_back(self, now: float) -> None:
        """While slots are to go and their connections are closed: give them back."""
        for _ in range(_ROUNDS):
            orders = self._orders
            if orders is None or orders.owned <= orders.target:
                return
            self._local.close_surplus()
            open_, demand = self._demand()
            if max(self._allotted, open_) >= orders.owned:
                return
            if not self._settle(now, open_, demand, True):
                return

    def _give_up_slack(self, demand: Mapping[str, TagDemand]) -> None:
        """Others go short: close what is not used, as far as they need it."""
        orders = self._orders
        assert orders is not None
        wanted = sum(want.wants for want in demand.values())
        spare = min(orders.unmet, self._slack(orders, demand), orders.owned - wanted)
        if spare > 0:
            self._shrink_pool(orders.owned - spare)

    def _let_go(self, now: float, open_: int, demand: Mapping[str, TagDemand]) -> bool:
        """Give up slots for which there was no connection since the last slow look."""
        orders, peak = self._orders, self._peak
        assert orders is not None
        self._peak = open_
        if any(want.waiting for want in demand.values()) or peak >= orders.owned:
            return False
        self._shrink_pool(peak)
        return True

    def _leave(self) -> None:
        """Give up everything that is closed, and the sign of life."""
        try:
            self._shrink_pool(0)
            if self._number is not None and self._opened:
                open_, _ = self._demand()
                with self._transaction() as rows:
                    book = Book(rows)
                    book.leave(self._store.member, open_)
                    bells = book.tell(book.allocation())
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
        if orders is None or now - self._watched_at < pace.beat * 0.9:
            return
        short = bool(self._vain) or orders.owned < orders.target
        lucky = self._chance() * max(orders.hungry, 1) < _WATCHERS
        if not (patrol or self._guards or (lucky and (short or orders.gone))):
            return
        self._watched_at = now
        with self._transaction() as rows:
            view = View.of(Book(rows))
        findings = self._watch.look(view, self._store.member, now)
        if findings.any:
            open_, demand = self._demand()
            if not self._settle(now, open_, demand, True, findings):
                return
            self._guards = self._guards or bool(findings.dead)
            self._give_back(now)
        if self._orders is not None:
            self._guards = self._guards and bool(self._orders.gone)
        if findings.bells:
            self._store.ring(findings.bells)
        self._plan_looks(now)

    # -- trouble ----------------------------------------------------------------------

    def _lost(self, error: Exception, now: float) -> None:
        """The store is away, or something broke: keep what is owned, try again."""
        if not isinstance(error, StoreAway):
            _log.error("the ledger %s: %r", self._store.name, error, exc_info=error)
        if self._away_since is None:
            self._away_since = now
            _log.warning("the ledger %s is away: %s", self._store.name, error)
        self.trouble = str(error)
        self._opened = False
        self._returning = True
        delay = min(self._pace.beat * 0.1 * 2**self._failures, self._pace.retry)
        self._failures = min(self._failures + 1, 16)
        self._retry_at = now + delay * (0.5 + 0.5 * self._chance())

    def _refused(self, error: LedgerError, now: float) -> None:
        """The operator has to mend something: tell those who wait, grow no more."""
        self.trouble = str(error)
        self._retry_at = now + self._pace.beat
        self._local.refuse(error)
        if self._orders is None:
            self._shrink_pool(0)  # no member: what is open is to be closed
            self._opened = False
            self._store.close()

    def _next_step(self, now: float) -> float:
        """Return when to look again, if nobody rings."""
        pace, orders = self._pace, self._orders
        if now < self._retry_at:
            return self._retry_at
        times = [self._look_at]
        if orders is not None:
            if any(orders.lines.values()):
                times.append(now + pace.beat)
            if self._slack_since is not None:
                times.append(self._slack_since + pace.linger)
            times += [self._had_since.get(tag, now) + pace.turn for tag in orders.asked]
        return max(min(times), now + _LEAST)


#: A step is not followed by another one at once.
_LEAST = 0.001


def _over(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since >= seconds
