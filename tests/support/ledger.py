"""Processes that share a ledger, in one thread: each may stop or die anywhere."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import greenlet

from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.keeper import Pace
from sqla_fairpool.ledger.rows import Terms
from sqla_fairpool.ledger.store import StoreAway

from .ledger_world import (
    Host,
    MemoryStore,
    Server,
    SimKeeper,
    SimPool,
)

TERMS = Terms(20, 10, 15, 60.0, 30.0)


class Store(MemoryStore):
    watches_place = True
    process: Process

    def point(self, name):
        self.process.point(name)

    def _reach(self):
        super()._reach()
        if self.process.store_cut:
            raise StoreAway("no way there")


class Pool(SimPool):
    """Connects only while the sign of life stands, as a real one makes sure of."""

    process: Process

    def connect(self):
        if self.process.store.member not in self.process.world.host.alive:
            self.keeper.ring()
            return None
        return None if self.process.server_cut else super().connect()

    def demand(self):
        self.process.point("demand")
        return super().demand()

    def allot(self, *orders):
        self.process.point("allot")
        super().allot(*orders)
        self.process.point("allotted")

    def buried(self, lost):
        self.process.point("bury")
        super().buried(lost)
        self.process.point("buried")

    def close_surplus(self):
        self.process.point("close")
        super().close_surplus()


def ask(process, tag, times=30):
    for _ in range(times):
        process.pool.request(tag)


def free(process, tag, times=1):
    for _ in range(times):
        process.pool.release(tag)


def close_idle(process, left=0):
    """The connections that nobody uses are closed, as after a while."""
    while process.pool.idle > left:
        process.pool._close_idle()


def used(*processes):
    return [process.pool.in_use.total() for process in processes]


def posted(process, step=None):
    """Post, do a step, and return the answers."""
    answers = []
    process.keeper.post(answers.append)
    (step or process.step)()
    return answers


class World:
    """The host, the server, the time, and everybody there is."""

    def __init__(self, terms=TERMS, pace=None, can_ask=True):
        self.host = Host()
        self.server = Server()
        self.terms = terms
        self.pace = pace or Pace()
        self.can_ask = can_ask
        self.now = 0.0
        self.living = []
        self.dead = []

    def start(self, terms=None, leads=False):
        process = Process(self, terms or self.terms, leads)
        self.living.append(process)
        return process

    def members(self, **wanted):
        """Start a process for each tag, that asks for so many connections under it."""
        processes = [self.start() for _ in wanted]
        for process, (tag, times) in zip(processes, wanted.items(), strict=True):
            ask(process, tag, times)
        self.run(0.1)
        return processes

    def member(self, tag="a", times=3):
        return self.members(**{tag: times})[0]

    def sessions(self, server):
        return self.server.look(server) if self.can_ask else None

    def check(self, is_unknown=lambda process: False, book=None):
        """Assert what is so of each process at any moment, but for those unknown."""
        book = book or self.book
        accounted, kept_for = book.accounted, Counter()
        for gone in book.gone.values():
            kept_for[gone.member] += gone.slots
        there = Counter(self.server.sessions.values())
        dead = {*self.dead}
        for process in self.living + self.dead:
            if is_unknown(process):
                continue
            # For each connection a slot is kept: in the row, or in a quarantine.
            key = process.store.member
            row = book.members.get(key)
            assert there[key] <= (row.owned if row else 0) + kept_for[key]
            if process in dead:
                continue
            # What is used is posted.
            pool = process.pool
            assert accounted.issuperset(set(pool.there) - pool.pending)
            # No pool may open more than its process owns.
            if key in self.host.alive and process.store.signed and not process.left:
                former = book.gone.get(process.keeper.member.number)
                kept = row.owned if row else former.slots if former else 0
                # It may not know yet that these are in quarantine; they are open.
                assert pool.slots <= kept + len(pool.interrupted)

    @property
    def quarantined(self):
        return self.book.quarantined

    @property
    def book(self):
        return Book(dict(self.host.rows))

    def run(self, seconds, busy=lambda: None, tick=0.002):
        """Let time pass, with everybody who runs doing what is to be done."""
        end = self.now + seconds
        while self.now < end:
            busy()
            for process in self.living:
                if not process.stopped and not process.left:
                    process.pool.try_again()
                for _ in range(20):
                    if not process.has_to_step():
                        break
                    process.step()
            self.now += tick

    def pause(self, tag, paused=True):
        """Pause a tag, or resume it, as the command does."""
        rows = dict(self.host.rows)
        book = Book(rows)
        book.pause(tag, {"since": "now", "program": "p"} if paused else None)
        book.tell()
        self.host.commit(rows)
        self.host.rung |= self.host.alive

    def churn(self, seconds, tick=0.002):
        """Let time pass while all connections are returned and asked for again."""
        count = itertools.count(1)

        def busy():
            if next(count) % 10:
                return
            for process in self.living:
                for tag in [] if process.stopped else [*process.pool.in_use.elements()]:
                    process.pool.release(tag)
                    process.pool.request(tag)

        self.run(seconds, busy, tick)


class Process:
    def __init__(self, world, terms, leads=False):
        self.world = world
        self.terms = terms
        self.store = Store(world.host)
        self.store.process = self
        self._new_pool()
        self.keeper = SimKeeper(
            self.store,
            terms,
            self.pool,
            sessions=self._look,
            pace=world.pace,
            clock=self.clock,
            chance=lambda: 0.5,
            who=lambda: {"host": "here", "pid": self.store.member},
            leads=leads,
        )
        self.pool.keeper = self.keeper
        self._begin()

    def _new_pool(self):
        self.pool = Pool(self.world.server, self.store.member)
        self.pool.process = self

    def _begin(self):
        self.wake_at = 0.0
        #: Its clock is ahead by so much.
        self.ahead = 0.0
        self.stopped = False
        self.left = False
        #: It cannot reach the store, or the server; others can.
        self.store_cut = self.server_cut = False
        # The round that is under way, and at how many more points it stops.
        self.round = None
        self.budget = None
        #: Where the store fails next.
        self.fails_at = None
        self.passed = []

    def __repr__(self):
        return f"<{self.store.member}>"

    def clock(self):
        return self.world.now + self.ahead

    def _look(self, server):
        return None if self.server_cut else self.world.sessions(server)

    @property
    def row(self):
        return self.world.book.members.get(self.store.member)

    # -- its keeper ---------------------------------------------------------------

    def has_to_step(self):
        if self.stopped or self.left:
            return False
        return (
            self.round is not None
            or self.keeper._rung
            or self.store.member in self.world.host.rung
            or self.clock() >= self.wake_at
        )

    def step(self, budget=None):
        """Do a round, or a part of one: up to so many points, and go on from there."""
        if self.round is None:
            rung = self.store.member in self.world.host.rung
            self.world.host.rung.discard(self.store.member)
            now = self.clock()
            self._go(lambda: self.keeper.step(now, rung), budget)
        else:
            self._go_on(budget)

    def _go(self, what, budget=None):
        assert self.round is None
        self.round = greenlet.greenlet(what)
        self._go_on(budget)

    def _go_on(self, budget):
        self.budget = budget
        result = self.round.switch()
        if self.round.dead:
            self.round = None
            if result is not None:
                self.wake_at = result

    def point(self, name):
        if self.round is None or greenlet.getcurrent() is not self.round:
            return  # the pool's own business, not the keeper's
        self.passed.append(name)
        if self.budget is not None:
            if self.budget == 0:
                self.round.parent.switch()
            if self.budget is not None:
                self.budget -= 1
        if self.fails_at == name:
            self.fails_at = None
            raise StoreAway(f"failed at {name}")

    # -- what may happen to it --------------------------------------------------------

    def kill(self):
        """Gone, at this point. Its server sessions are not, yet."""
        if self.round is not None:
            self.round.throw(greenlet.GreenletExit)
            self.round = None
        self.world.host.alive.discard(self.store.member)
        self.world.living.remove(self)
        self.world.dead.append(self)

    def close(self, budget=None):
        """Leave in good order."""
        self.left = True
        self._go(self.keeper.close, budget)

    def fork(self):
        """Return the child: everything is copied, and then told."""
        child = copy.copy(self)
        child.store = copy.copy(self.store)
        child.store.process = child
        child._new_pool()
        child.keeper = copy.copy(self.keeper)
        child.keeper._store = child.store
        child.keeper._local = child.pool
        child.keeper._clock = child.clock
        child.pool.keeper = child.keeper
        child._begin()
        child.keeper.after_fork()
        child.pool.session = child.store.member
        self.world.living.append(child)
        return child

    @property
    def sessions(self):
        """Its sessions at the server."""
        return self.world.server.sessions_of(self.store.member)

    @property
    def strays(self):
        """Those that it does not have in its hands any more."""
        return [s for s in self.sessions if s not in self.pool.there]

    def server_notices(self, most=None):
        """The server ends the sessions of a dead process, or some of them."""
        for session in self.sessions[:most]:
            self.world.server.disconnect(session)
