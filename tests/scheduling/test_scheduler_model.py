"""The scheduler against a naive model that counts everything anew at each step."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from sqla_fairpool.scheduling import policy
from sqla_fairpool.scheduling.invariants import check_valid
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.ticket import FREE, GRANTED, WAITING, LineFull, Ticket

TAGS = ["a", "b", "c", "d", "unknown"]
WEIGHTS = {"d": 2.0}


class Model:
    """The rules, word for word, in lists. No counter, no heap, nothing kept."""

    def __init__(self, capacity, soft_limit, max_limit, idle_timeout, max_waiting):
        self.capacity = capacity
        self.soft_limit = soft_limit
        self.max_limit = max_limit
        self.idle_timeout = idle_timeout
        self.max_waiting = max_waiting
        self.holding = []  # (ticket, tag)
        self.waiting = []  # (arrival, ticket, tag)
        self.last = {}  # tag: last activity
        self.active = set()
        self.arrivals = 0
        self.paused = False

    def held(self, tag):
        return sum(t == tag for _, t in self.holding)

    def ceiling(self, tag):
        if self.paused:
            return 0
        return policy.ceiling(len(self.active - {tag}), self.soft_limit, self.max_limit)

    def touch(self, tag, now):
        self.last[tag] = now
        self.active.add(tag)

    def next(self):
        heads = {}
        for arrival, ticket, tag in self.waiting:
            heads.setdefault(tag, (arrival, ticket))
        candidates = [
            (policy.rank(self.held(tag), WEIGHTS.get(tag, 1.0), arrival), ticket, tag)
            for tag, (arrival, ticket) in heads.items()
            if self.held(tag) < self.ceiling(tag)
        ]
        return min(candidates, key=lambda c: c[0], default=None)

    def dispatch(self, now):
        granted = []
        while len(self.holding) < self.capacity and (found := self.next()):
            _, ticket, tag = found
            self.waiting = [w for w in self.waiting if w[1] is not ticket]
            self.holding.append((ticket, tag))
            if tag != "unknown":
                self.touch(tag, now)
            granted.append(ticket)
        return granted

    def request(self, ticket, tag, now):
        if tag != "unknown":
            self.touch(tag, now)
        self.arrivals += 1
        self.waiting.append((self.arrivals, ticket, tag))
        granted = self.dispatch(now)
        assert granted in ([], [ticket]), "a request served another one"
        over = self.max_waiting is not None and len(self.waiting) > self.max_waiting
        if not granted and over:
            self.waiting.pop()
            return None
        return bool(granted)

    def release(self, ticket, now):
        tag = next(t for k, t in self.holding if k is ticket)
        self.holding = [h for h in self.holding if h[0] is not ticket]
        if tag != "unknown":
            self.touch(tag, now)
        return self.dispatch(now)

    def cancel(self, ticket):
        self.waiting = [w for w in self.waiting if w[1] is not ticket]

    def move(self, ticket, tag, now):
        """Release and request again, tried out on copies."""
        source = next(t for k, t in self.holding if k is ticket)
        if source == tag:
            return []
        if tag != "unknown":
            self.touch(tag, now)
        before = self.holding, self.waiting, dict(self.last), set(self.active)
        self.holding = [h for h in self.holding if h[0] is not ticket]
        self.arrivals += 1
        self.waiting = [*self.waiting, (self.arrivals, ticket, tag)]
        granted = self.dispatch(now)
        if ticket not in granted:
            self.holding, self.waiting, self.last, self.active = before
            return None
        return [t for t in granted if t is not ticket]

    def tick(self, now):
        asking = {tag for _, _, tag in self.waiting if tag != "unknown"}
        for tag in self.active - asking:
            if self.last[tag] + self.idle_timeout <= now:
                self.active.discard(tag)
        return self.dispatch(now)


class SchedulerAgreesWithModel(RuleBasedStateMachine):
    tickets = Bundle("tickets")

    @initialize(
        capacity=st.integers(1, 8),
        soft=st.integers(1, 8),
        most=st.integers(1, 8),
        max_waiting=st.one_of(st.none(), st.integers(0, 6)),
    )
    def start(self, capacity, soft, most, max_waiting):
        most = min(most, capacity)
        soft = min(soft, most)
        self.now = 0.0
        self.model = Model(capacity, soft, most, 60.0, max_waiting)
        self.scheduler = Scheduler(
            capacity=capacity,
            soft_limit=soft,
            max_limit=most,
            idle_timeout=60.0,
            reallocation_interval=1.0,
            max_waiting=max_waiting,
            silent_tag="unknown",
            weights=WEIGHTS,
            now=self.now,
        )

    def agree(self, granted, expected):
        assert list(granted) == expected

    @rule(target=tickets, tag=st.sampled_from(TAGS))
    def request(self, tag):
        ticket = Ticket()
        expected = self.model.request(ticket, tag, self.now)
        try:
            assert self.scheduler.request(ticket, tag, self.now) is expected
        except LineFull:
            assert expected is None
        return ticket

    @rule(ticket=consumes(tickets))
    def leave(self, ticket):
        """The holder of a ticket is done with it, in whatever state it is."""
        if ticket.state is GRANTED:
            expected = self.model.release(ticket, self.now)
            self.agree(self.scheduler.release(ticket, self.now), expected)
        elif ticket.state is WAITING:
            self.model.cancel(ticket)
            assert self.scheduler.cancel(ticket)
        assert ticket.state is FREE

    @rule(ticket=tickets, tag=st.sampled_from(TAGS))
    def move(self, ticket, tag):
        if ticket.state is GRANTED:
            expected = self.model.move(ticket, tag, self.now)
            granted = self.scheduler.move(ticket, tag, self.now)
            assert (granted is None) == (expected is None)
            self.agree(granted or [], expected or [])

    @rule(ticket=tickets)
    def statement(self, ticket):
        if ticket.state is GRANTED:
            self.model.touch(ticket.tag_state.tag, self.now)
            self.scheduler.activity(ticket, self.now)

    @rule(
        capacity=st.integers(1, 8),
        soft=st.integers(1, 8),
        most=st.integers(1, 8),
        idle_timeout=st.sampled_from([1.0, 60.0]),
        max_waiting=st.one_of(st.none(), st.integers(0, 6)),
    )
    def reconfigure(self, capacity, soft, most, idle_timeout, max_waiting):
        most = min(most, capacity)
        numbers = {
            "capacity": capacity,
            "soft_limit": min(soft, most),
            "max_limit": most,
            "idle_timeout": idle_timeout,
            "max_waiting": max_waiting,
        }
        vars(self.model).update(numbers)
        expected = self.model.dispatch(self.now)
        granted = self.scheduler.reconfigure(
            **numbers, reallocation_interval=1.0, now=self.now
        )
        self.agree(granted, expected)

    @rule(paused=st.booleans())
    def pause(self, paused):
        self.model.paused = paused
        expected = self.model.dispatch(self.now)
        granted = self.scheduler.pause(self.now if paused else None, self.now)
        self.agree(granted, expected)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 30.0, 61.0, 400.0]))
    def time_passes(self, seconds):
        self.now += seconds
        if self.now >= self.scheduler.next_tick:
            expected = self.model.tick(self.now)
            self.agree(self.scheduler.tick(self.now), expected)

    @invariant()
    def same_state(self):
        if not hasattr(self, "scheduler"):
            return
        check_valid(self.scheduler, [ticket for ticket, _ in self.model.holding])
        tag_states = self.scheduler.tags.tag_states
        assert {t for t, a in tag_states.items() if a.active} == self.model.active
        for tag in TAGS:
            tag_state = tag_states.get(tag)
            assert (tag_state.in_use if tag_state else 0) == self.model.held(tag)
            line = list(tag_state.waiters or ()) if tag_state else []
            assert line == [k for _, k, t in self.model.waiting if t == tag]


SchedulerAgreesWithModel.TestCase.settings = settings(
    max_examples=300, stateful_step_count=60
)
TestSchedulerAgreesWithModel = SchedulerAgreesWithModel.TestCase
