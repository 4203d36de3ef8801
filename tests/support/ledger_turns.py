"""Callers that take turns in several processes with one ledger, in virtual time.

As :mod:`.turns`, with the real scheduler in each process, keeper, rows and allocation.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from functools import partial

from sqla_fairpool.ledger.demand import TagDemand
from sqla_fairpool.ledger.rows import Terms
from sqla_fairpool.ledger.watch import Pace
from sqla_fairpool.scheduling.scheduler import Scheduler
from support.invariants import check_valid

from .ledger_simulation import _Process, _World
from .ledger_world import SimPool
from .turns import Turn


class ScheduledPool(SimPool):
    """A pool that counts, whose slots a real scheduler divides."""

    def __init__(self, server, session, terms, clock):
        super().__init__(server, session)
        self.clock = clock
        limits = terms.limits(0)
        self.scheduler = Scheduler(
            capacity=limits.capacity,
            soft_limit=limits.soft_limit,
            max_limit=limits.max_limit,
            idle_timeout=terms.idle_timeout,
            reallocation_interval=terms.reallocation_interval,
            limits=limits.tags.given,
            now=clock(),
        )
        self.scheduler.impose(0, {}, 0, clock())
        #: Tickets that have a slot, and no connection yet.
        self.granted = deque()

    def demand(self):
        self.granted.extend(self.scheduler.tick(self.clock()))
        tags = {}
        for state in self.scheduler.tag_states.values():
            peak, state.peak = state.peak, state.in_use
            if peak or state.waiting or state.active:
                used = self.scheduler.usage.seconds(state, self.clock())
                demand = TagDemand(peak, state.waiting, state.active, used=used)
                tags[state.tag] = demand
        return self.open, tags

    def allot(self, slots, ceilings, other, *more):
        self.slots, self.frozen, self.rebuffed = slots, False, False
        now = self.clock()
        granted = self.scheduler.impose(slots, ceilings, other, now, *more)
        self.granted.extend(granted)
        self._dispatch()

    def request(self, ticket, tag):
        self.rebuffed = False
        if self.scheduler.request(ticket, tag, self.clock()):
            self.granted.append(ticket)
        self._dispatch()
        if ticket not in self.served:
            self._ring(tag)

    def release(self, ticket):
        self.idle += 1
        if self.open > self.slots:
            self._close_idle()
            self._ring()
        self.granted.extend(self.scheduler.release(ticket, self.clock()))
        self._dispatch()
        if self.idle and self.keeper.pressed:
            self._ring()

    def _dispatch(self):
        while self.granted:
            if self.idle:
                self.idle -= 1
                self.served.append(self.granted.popleft())
                continue
            wanted = len(self.granted) > len(self.pending)
            may_open = self.open < self.slots and not self.rebuffed and wanted
            if not may_open or not self._open_another():
                return


class _TurnsProcess(_Process):
    def __init__(self, world, number):
        super().__init__(world, number, None)

    def new_pool(self, number):
        world = self.world
        return ScheduledPool(world.server, number, world.terms, lambda: world.now)

    def ask(self, ticket, tag):
        ticket.asked_at = self.world.now
        self.pool.request(ticket, tag)
        self.world.after(self)

    def serve(self):
        world = self.world
        while self.pool.served:
            ticket = self.pool.served.popleft()
            tag = ticket.tag_state.tag
            world.waits[tag].append(world.now - ticket.asked_at)
            ticket.served_at = world.now
            hold = world.holds.get(tag, 0.0)
            world.at(world.now + hold, lambda ticket=ticket: self._return(ticket))

    def _return(self, ticket):
        tag = ticket.tag_state.tag
        self.world.seconds[tag] += self.world.now - max(
            ticket.served_at, self.world.since
        )
        self.pool.release(ticket)
        if tag in self.world.holds:
            self.ask(ticket, tag)
        self.world.after(self)


class LedgerTurns(_World):
    """Processes, and callers in each that ask, hold and ask again at once.

    :param tags: the ledger's limits of tags, as JSON.
    """

    def __init__(self, processes=2, capacity=20, tags="", seed=1):
        terms = Terms(capacity, capacity, capacity, 60.0, 30.0, tags)
        super().__init__(terms, Pace(), 0.0, 0.0, seed)
        self.holds, self.seconds, self.waits = {}, Counter(), defaultdict(list)
        self.since = 0.0
        for number in range(processes):
            process = _TurnsProcess(self, number)
            self.processes.append(process)
            self.by_member[process.store.member] = process

    def come(self, process, tag, callers, hold):
        self.holds[tag] = hold
        for _ in range(callers):
            begin = self.now + self.random.random() * 0.01
            self.at(begin, partial(self.processes[process].ask, Turn(), tag))

    def forget(self):
        """Count anew from now on."""
        self.since = self.now
        self.seconds.clear()
        self.waits.clear()

    def check(self):
        for process in self.processes:
            check_valid(process.pool.scheduler)
