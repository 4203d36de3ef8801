"""Callers that take turns on a scheduler, in virtual time: who gets how much of it."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict

from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.ticket import Ticket
from support.invariants import check_valid


class Turn(Ticket):
    """A ticket that knows when it was asked for."""

    asked_at = served_at = 0.0


class Turns:
    """Each caller asks, holds for as long as its tag does, and asks again at once.

    :param options: the scheduler's; the limits are the capacity where not given.
    """

    def __init__(self, capacity=20, **options):
        limits = {"soft_limit": capacity, "max_limit": capacity}
        times = {"idle_timeout": 60.0, "reallocation_interval": 30.0, "now": 0.0}
        self.scheduler = Scheduler(capacity=capacity, **{**limits, **times, **options})
        self.now = 0.0
        self.holds = {}
        #: By tag: connection-seconds, and how long each caller waited.
        self.seconds = defaultdict(float)
        self.waits = defaultdict(list)
        self._events = []
        self._numbers = itertools.count()

    def come(self, tag, callers, hold):
        """Let callers of a tag begin now."""
        self.holds[tag] = hold
        for _ in range(callers):
            self._later(0.0, self._ask, Turn(), tag)

    def leave(self, tag):
        """Let the callers of a tag go when they have had their turn."""
        del self.holds[tag]

    def forget(self):
        """Count anew from now on."""
        self.seconds.clear()
        self.waits.clear()

    def run(self, seconds):
        """Let time pass."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, do, arguments = heapq.heappop(self._events)
            self._granted(self.scheduler.tick(self.now))
            do(*arguments)
        self.now = end
        check_valid(self.scheduler)

    def _later(self, seconds, do, *arguments):
        event = self.now + seconds, next(self._numbers), do, arguments
        heapq.heappush(self._events, event)

    def _ask(self, ticket, tag):
        ticket.asked_at = self.now
        if self.scheduler.request(ticket, tag, self.now):
            self._granted([ticket])

    def _granted(self, tickets):
        for ticket in tickets:
            tag = ticket.tag_state.tag
            self.waits[tag].append(self.now - ticket.asked_at)
            self._later(self.holds.get(tag, 0.0), self._return, ticket)

    def _return(self, ticket):
        tag = ticket.tag_state.tag
        self.seconds[tag] += self.now - ticket.since
        self._granted(self.scheduler.release(ticket, self.now))
        if tag in self.holds:
            self._ask(ticket, tag)
