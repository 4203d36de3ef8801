"""The scheduler against a naive model that counts everything anew at each step.

The model says which tags may be next; where two have used equally much, but for what
floats round off, it follows the scheduler's choice.
"""

from __future__ import annotations

import copy
import math
import os

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
from support.invariants import check_valid

from sqla_fairpool.scheduling import policy
from sqla_fairpool.scheduling.counters import BOUNDS, Counters
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.tags import ALL, Pause
from sqla_fairpool.scheduling.ticket import (
    FREE,
    GRANTED,
    NO_LIMITS,
    WAITING,
    LineFull,
    TagLimits,
    Ticket,
)

TAGS = ["a", "b", "c", "d", "unknown"]


@st.composite
def rules(draw):
    """Draw the numbers of the rules, as a pool would let them pass."""
    capacity = draw(st.integers(1, 8))
    most = draw(st.integers(1, capacity))
    limits, left = {}, capacity - 1
    for tag in draw(st.sets(st.sampled_from(TAGS))):
        reserved = draw(st.integers(0, left))
        left -= reserved
        own = draw(st.one_of(st.none(), st.integers(max(reserved, 1), capacity)))
        weight = draw(st.sampled_from([0.5, 1.0, 2.0, 3.0]))
        limits[tag] = TagLimits(weight=weight, max=own, reserved=reserved)
    return {
        "capacity": capacity,
        "max_limit": most,
        "soft_limit": draw(st.integers(1, most)),
        "idle_timeout": draw(st.sampled_from([1.0, 60.0])),
        "max_waiting": draw(st.one_of(st.none(), st.integers(0, 6))),
        "limits": limits,
        "usage_half_life": draw(st.sampled_from([1.0, 10.0])),
    }


class Figures:
    """What is counted for a tag."""

    def __init__(self):
        self.checkouts = self.at_once = self.timeouts = self.peak = 0
        self.waited, self.held = [], []
        self.known_from = 0, 0

    def copy(self):
        new = copy.copy(self)
        new.waited, new.held = [*self.waited], [*self.held]
        return new

    def forget(self):
        self.peak, self.known_from = 0, (len(self.waited), len(self.held))

    def check(self, counters):
        own = self.checkouts, self.at_once, self.timeouts
        assert own == (counters.checkouts, counters.at_once, counters.timeouts)
        others = counters.refusals, counters.deadlocks, counters.create_failures
        assert others == (0, 0, 0)
        for histogram, seconds in (
            (counters.wait, self.waited),
            (counters.hold, self.held),
        ):
            expected = [0] * (len(BOUNDS) + 1)
            for one in seconds:
                expected[sum(one > bound for bound in BOUNDS)] += 1
            assert histogram.counts == expected
            assert math.isclose(histogram.total, sum(seconds))
            assert histogram.max == max(seconds, default=0.0)

    def check_state(self, tag_state):
        """The same of what is known of the tag itself."""
        waited = self.waited[self.known_from[0] :]
        held = self.held[self.known_from[1] :]
        assert math.isclose(tag_state.wait_total, sum(waited))
        assert math.isclose(tag_state.hold_total, sum(held))
        longest = max(waited, default=0.0), max(held, default=0.0)
        assert (tag_state.wait_max, tag_state.hold_max) == longest
        assert tag_state.peak == self.peak


class Model:
    """The rules, word for word, in lists. No counter, no heap, nothing kept."""

    def __init__(self, rules):
        vars(self).update(rules)
        self.holding = []  # (ticket, tag)
        self.waiting = []  # (arrival, ticket, tag)
        self.last = {}  # tag: last activity
        self.active = set()
        self.arrivals = 0
        self.now = 0.0
        self.used = dict.fromkeys(TAGS, 0.0)  # decayed connection-seconds
        self.lift = dict.fromkeys(TAGS, 0.0)  # what counts beside them
        self.level = 0.0
        self.paused = set()
        self.figures = {tag: Figures() for tag in TAGS}
        self.since = {}  # ticket: when it was requested, or granted

    def limits_of(self, tag):
        return self.limits.get(tag, NO_LIMITS)

    def held(self, tag):
        return sum(t == tag for _, t in self.holding)

    @property
    def always(self):
        """What one connection that is always held comes to."""
        return self.usage_half_life / math.log(2)

    def reach(self, now):
        """Let time pass."""
        decay = 2 ** ((self.now - now) / self.usage_half_life)
        for tag in TAGS:
            while_held = self.held(tag) * self.always * (1 - decay)
            self.used[tag] = self.used[tag] * decay + while_held
            self.lift[tag] *= decay
        self.level *= decay
        self.now = now

    def counted(self, tag):
        return (self.used[tag] + self.lift[tag]) / self.limits_of(tag).weight

    def ceiling(self, tag):
        if self.paused & {tag, ALL}:
            return 0
        own = self.limits_of(tag)
        others = len(self.active - {tag})
        rule = policy.ceiling(others, self.soft_limit, self.max_limit)
        if own.max is not None:
            rule = own.max
        for_others = sum(x.reserved for t, x in self.limits.items() if t != tag)
        return max(min(rule, self.capacity - for_others), own.reserved)

    def free_for(self, tag):
        free = self.capacity - len(self.holding)
        if self.held(tag) >= self.limits_of(tag).reserved:
            free -= sum(
                max(x.reserved - self.held(t), 0) for t, x in self.limits.items()
            )
        return free

    def touch(self, tag, now):
        self.last[tag] = now
        self.active.add(tag)

    def next(self):
        """Return those that may be next: the tickets, with their tags."""
        heads = {}
        for _, ticket, tag in self.waiting:
            heads.setdefault(tag, ticket)
        waiting = [
            (self.held(tag) >= own.reserved, self.held(tag) / own.weight, tag)
            for tag in heads
            if self.held(tag) < self.ceiling(tag) and self.free_for(tag) > 0
            for own in [self.limits_of(tag)]
        ]
        first = min(waiting, default=None)
        equal = [tag for *rank, tag in waiting if rank == [*first[:2]]]
        least = min(map(self.counted, equal), default=0.0)
        tags = [tag for tag in equal if self.counted(tag) <= least + 1e-6]
        return [(heads[tag], tag) for tag in tags]

    def dispatch(self, now, chosen, newcomer=None):
        """Grant all that can be; return them.

        :param chosen: those whom the scheduler grants, in order.
        :param newcomer: has not waited.
        """
        granted = []
        while found := self.next():
            left = [t for t in chosen if t not in granted]
            ticket, tag = min(
                found, key=lambda f: left.index(f[0]) if f[0] in left else len(left)
            )
            is_first = not self.held(tag) and not self.limits_of(tag).reserved
            if is_first and ticket is not newcomer:
                self.level = self.counted(tag)
            self.waiting = [w for w in self.waiting if w[1] is not ticket]
            self.holding.append((ticket, tag))
            figures = self.figures[tag]
            if ticket is newcomer:
                figures.at_once += 1
            else:
                figures.waited.append(now - self.since[ticket])
            self.since[ticket] = now
            figures.peak = max(figures.peak, self.held(tag))
            if tag != "unknown":
                figures.checkouts += 1
                self.touch(tag, now)
            granted.append(ticket)
        return granted

    def enter(self, ticket, tag, now):
        if tag != "unknown":
            self.touch(tag, now)
        self.arrivals += 1
        self.since[ticket] = now
        self.waiting.append((self.arrivals, ticket, tag))

    def request(self, ticket, tag, now):
        self.enter(ticket, tag, now)
        granted = self.dispatch(now, [ticket], ticket)
        assert granted in ([], [ticket]), "a request served another one"
        over = self.max_waiting is not None and len(self.waiting) > self.max_waiting
        if not granted and over:
            self.waiting.pop()
            return None
        if not granted and sum(t == tag for _, _, t in self.waiting) == 1:
            lead = self.level - self.counted(tag)
            self.lift[tag] += max(lead, 0.0) * self.limits_of(tag).weight
        return bool(granted)

    def give_back(self, ticket, now):
        tag = next(t for k, t in self.holding if k is ticket)
        self.holding = [h for h in self.holding if h[0] is not ticket]
        self.figures[tag].held.append(now - self.since[ticket])
        if tag != "unknown":
            self.touch(tag, now)
        else:  # it may have turned out to be another tag's before
            self.figures[tag].checkouts += 1
        return tag

    def release(self, ticket, now, chosen):
        tag = self.give_back(ticket, now)
        most = self.always * max(self.limits_of(tag).weight, 1.0)
        if not self.held(tag) and self.used[tag] + self.lift[tag] > most:
            self.lift[tag] = most - self.used[tag]
        return self.dispatch(now, chosen)

    def cancel(self, ticket):
        self.waiting = [w for w in self.waiting if w[1] is not ticket]

    def move(self, ticket, tag, now, chosen):
        """Release and request again, tried out on a copy.

        :param chosen: None if the scheduler did not move it.
        """
        source = next(t for k, t in self.holding if k is ticket)
        if source == tag:
            return []
        if tag != "unknown":
            self.touch(tag, now)
        trial = copy.copy(self)
        trial.last, trial.active = dict(self.last), set(self.active)
        trial.waiting, trial.since = [*self.waiting], dict(self.since)
        trial.figures = {tag: figures.copy() for tag, figures in self.figures.items()}
        if source == "unknown":
            trial.figures[source].at_once -= 1
        else:
            trial.figures[source].held.append(now - self.since[ticket])
        trial.holding = [h for h in self.holding if h[0] is not ticket]
        trial.enter(ticket, tag, now)
        if chosen is None:
            others = [k for _, k, _ in self.waiting]
            assert ticket not in trial.dispatch(now, others)
            return None
        # Which of several goes first is not told, where there is a slot for each.
        granted = trial.dispatch(now, [ticket, *chosen], ticket)
        assert ticket in granted
        vars(self).update(vars(trial))
        return [t for t in granted if t is not ticket]

    def tick(self, now, chosen):
        asking = {tag for _, _, tag in self.waiting if tag != "unknown"}
        for tag in self.active - asking:
            if self.last[tag] + self.idle_timeout <= now:
                self.active.discard(tag)
        return self.dispatch(now, chosen)


class SchedulerAgreesWithModel(RuleBasedStateMachine):
    tickets = Bundle("tickets")

    @initialize(rules=rules())
    def start(self, rules):
        self.now = 0.0
        self.model = Model(rules)
        self.scheduler = Scheduler(
            **rules, reallocation_interval=1.0, silent_tag="unknown", now=self.now
        )

    @rule(target=tickets, tag=st.sampled_from(TAGS))
    def request(self, tag):
        ticket = Ticket()
        expected = self.model.request(ticket, tag, self.now)
        try:
            assert self.scheduler.request(ticket, tag, self.now) is expected
        except LineFull:
            assert expected is None
        return ticket

    @rule(ticket=consumes(tickets), late=st.booleans())
    def leave(self, ticket, late):
        """The holder of a ticket is done with it, in whatever state it is."""
        if ticket.state is GRANTED:
            granted = [*self.scheduler.release(ticket, self.now)]
            assert granted == self.model.release(ticket, self.now, granted)
        elif ticket.state is WAITING:
            self.model.cancel(ticket)
            self.model.figures[ticket.tag_state.tag].timeouts += late
            end = self.scheduler.expire if late else self.scheduler.cancel
            assert end(ticket)
        assert ticket.state is FREE
        assert not self.scheduler.expire(ticket)

    @rule(ticket=tickets)
    def look(self, ticket):
        """Ask what a return would do, and do it to a copy."""
        if ticket.state is GRANTED:
            scheduler, other = copy.deepcopy((self.scheduler, ticket))
            assert self.scheduler.wanted(ticket) == bool(
                scheduler.vacate(other, self.now)
            )
        elif ticket.state is WAITING:
            line = [*ticket.tag_state.waiters]
            assert self.scheduler.place(ticket) == line.index(ticket) + 1

    @rule(ticket=tickets, tag=st.sampled_from(TAGS))
    def move(self, ticket, tag):
        if ticket.state is GRANTED:
            granted = self.scheduler.move(ticket, tag, self.now)
            expected = self.model.move(ticket, tag, self.now, granted)
            assert (granted is None) == (expected is None)
            assert [*(granted or [])] == (expected or [])

    @rule(ticket=tickets)
    def statement(self, ticket):
        if ticket.state is GRANTED:
            self.model.touch(ticket.tag_state.tag, self.now)
            self.scheduler.activity(ticket, self.now)

    @rule(rules=rules())
    def reconfigure(self, rules):
        granted = [
            *self.scheduler.reconfigure(
                **rules, reallocation_interval=1.0, now=self.now
            )
        ]
        vars(self.model).update(rules)
        assert granted == self.model.dispatch(self.now, granted)

    @rule(paused=st.sets(st.sampled_from([*TAGS, ALL]), max_size=2))
    def pause(self, paused):
        pauses = dict.fromkeys(paused, Pause(self.now))
        granted = [*self.scheduler.pause(pauses, self.now)]
        self.model.paused = paused
        assert granted == self.model.dispatch(self.now, granted)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 30.0, 61.0, 400.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.model.reach(self.now)
        if self.now >= self.scheduler.next_tick:
            granted = [*self.scheduler.tick(self.now)]
            assert granted == self.model.tick(self.now, granted)

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
            if tag_state is None:  # it was forgotten
                self.model.used[tag] = self.model.lift[tag] = 0.0
                self.model.figures[tag].forget()
                self.model.last.pop(tag, None)
            if tag_state is not None:
                self.model.figures[tag].check_state(tag_state)
            used = self.scheduler.usage.seconds(tag_state, self.now) if tag_state else 0
            assert math.isclose(used, self.model.used[tag], abs_tol=1e-6)
            if tag_state is not None:
                lift = self.in_seconds(tag_state.lift)
                assert math.isclose(lift, self.model.lift[tag], abs_tol=1e-6)
                assert tag_state.last_activity == self.model.last.get(tag)
        level = self.in_seconds(self.scheduler.usage.level)
        assert math.isclose(level, self.model.level, abs_tol=1e-6)

    def in_seconds(self, at_landmark):
        return at_landmark / self.scheduler.usage.scale(self.now) * self.model.always

    def teardown(self):
        by_tag = self.scheduler.tags.counters.by_tag
        for tag, figures in self.model.figures.items():
            figures.check(by_tag.get(tag) or Counters())


SchedulerAgreesWithModel.TestCase.settings = settings(
    max_examples=int(300 * float(os.environ.get("EXAMPLES", "1"))),
    stateful_step_count=60,
)
TestSchedulerAgreesWithModel = SchedulerAgreesWithModel.TestCase
