"""Who holds a slot, who waits for one, and who gets the next.

Rules of this file:

* Everything that changes who has a slot lives here; what is kept for that, and what
  is asked of it, in :mod:`.state`.
* It never sees a thread, a connection or a clock. Time is an argument, in
  seconds on any steadily rising scale; one lock outside serialises the calls.
* Every public method is one transition. It leaves the invariants true and
  returns the tickets that were granted by it; waking their callers is the
  shell's business.
* A transition on the common path changes its counters without a call or a
  jump in between, so that a signal handler's exception falls before it or
  after it. (CPython looks for signals at calls, and 3.10 at each jump.)

What is promised, at every moment between two transitions (``check_valid`` in the tests
holds each of them, and is called after every step):

1. Conservation: the tags' `in_use` add up to the scheduler's `in_use`, which is
   the number of granted tickets.
2. Bounds: `in_use <= capacity`; no grant lifts a tag above its ceiling, nor takes a
   slot that is reserved for another tag. After a limit has changed, the excess drains.
3. Work conservation: no tag below its ceiling waits while a slot is free that is not
   reserved for another one. A tag that holds less than its reserve never waits, but
   while an excess drains.
4. Order: first in, first out inside a tag; a newcomer is not served past a
   waiter who could be.
5. Fairness: of the tags that wait below their ceiling the one that holds least
   per weight is next, of those that hold equally little the one that has used the
   fewest connection-seconds per weight lately (`policy.rank`, `usage`).
6. Once: a ticket is granted once per request and released once per grant; a
   cancelled one leaves no trace.

Costs: `request`, `release`, `cancel` and `move` are O(1) while no request waits and
O(log waiting tags) otherwise, O(log tags) for a tag that is new or was idle;
`tick` is O(log tags) for each tag whose idleness is due to be looked at. Any of them
is O(tags log tags) once in 900 half-lives of usage.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from .counters import BOUNDS
from .state import SchedulerState
from .tags import Pause
from .ticket import FREE, GRANTED, WAITING, LineFull, TagLimits, TagState, Ticket

_NO_GRANTS: tuple[Ticket, ...] = ()
_NOTHING: Mapping[str, Any] = {}


class Scheduler(SchedulerState):
    """Divides slots among tags by the rules of :mod:`.policy`.

    Its arguments are those of :class:`.SchedulerState`.
    """

    # -- transitions ---------------------------------------------------------

    def request(self, ticket: Ticket, tag: str, now: float) -> bool:
        """Ask for a slot under `tag`; tell if it was granted at once.

        If it was not, the ticket waits in the tag's line.

        :param ticket: a free ticket.
        :raises LineFull: when it would have to wait and may not.
        """
        assert ticket.state is FREE
        tag_state = self.tag_states.get(tag) or self.tags.get(tag, now)
        if tag_state.prompt:
            tag_state.last_activity = now
        elif not tag_state.silent:
            self.tags.touch(tag_state, now)
        ticket.tag_state = tag_state
        ticket.since = now
        # No ticket is overtaken: with a slot free, all that wait are at their ceilings
        # (promise 3), or the slot is reserved for this tag alone; this tag is below its
        # ceiling, so none of them is of this tag.
        if (
            self.in_use + self.kept_free < self.capacity or self.free_for(tag_state) > 0
        ) and (
            tag_state.in_use < tag_state.safe_ceiling.value
            or tag_state.in_use < self.ceiling(tag_state)
        ):
            usage = self.usage
            scale = usage.base + (now - usage.since) * usage.rise
            if now >= usage.until:
                scale = usage.scale(now)
            self._grant(ticket, now, scale)
            tag_state.counters.at_once += 1
            return True
        if self.max_waiting is not None and self.waiting >= self.max_waiting:
            raise LineFull
        self.arrivals += 1
        ticket.number = self.arrivals
        if not tag_state.waiters:
            self.usage.join_line(tag_state, now)
        if tag_state.waiters is None:
            tag_state.waiters = OrderedDict()
        # From here in one go, see the head of this file.
        ticket.state = WAITING
        self.waiting += 1
        tag_state.waiters[ticket] = None
        if len(tag_state.waiters) == 1:
            self.lines.begun(tag_state)
        return False

    def admit(self, ticket: Ticket, tag: str, now: float) -> None:
        """Grant a slot to a caller that has a connection already, whatever the limits.

        What is in use above them drains.
        """
        tag_state = self.tags.get(tag, now)
        if not tag_state.silent:
            self.tags.touch(tag_state, now)
        ticket.tag_state = tag_state
        self._grant(ticket, now, self.usage.scale(now))
        self.drains_from = max(self.drains_from, self.in_use)
        if tag_state.waiters:
            self.lines.changed(tag_state)

    def release(self, ticket: Ticket, now: float) -> Sequence[Ticket]:
        """Take a granted ticket's slot back; return who is granted by that."""
        tag_state = ticket.tag_state
        held = now - ticket.since
        ticket.held += held
        if held > ticket.held_max:
            ticket.held_max = held
        if held > BOUNDS[0]:
            ticket.note(held)
        if tag_state.prompt:
            tag_state.last_activity = now
        elif not tag_state.silent:
            self.tags.touch(tag_state, now)
        return self.vacate(ticket, now)

    def vacate(self, ticket: Ticket, now: float) -> Sequence[Ticket]:
        """:meth:`release` for a ticket whose last checkout was over before.

        No activity of its tag: that was when the checkout ended.
        """
        tag_state = ticket.tag_state
        assert ticket.state is GRANTED, f"released a ticket that is {ticket.state}"
        usage = self.usage
        scale = usage.base + (now - usage.since) * usage.rise  # as Usage.scale()
        if now >= usage.until:
            scale = usage.scale(now)
        is_kept = tag_state.in_use <= tag_state.reserved
        # From here in one go, see the head of this file.
        ticket.state = FREE
        self.in_use -= 1
        self.kept_free += is_kept
        tag_state.in_use -= 1
        tag_state.charged += scale
        # What is lost from here on is a figure, and no slot.
        if now - ticket.granted_at > ticket.held:
            self.usage.was_unused(ticket, tag_state, now, scale)
        if not tag_state.in_use and tag_state.charged + tag_state.lift > scale:
            self.usage.forgive(tag_state, scale)
        ticket.book(tag_state)
        if not self.waiting:
            return _NO_GRANTS
        if tag_state.waiters:
            self.lines.changed(tag_state)
        return self._dispatch(now, scale)

    def cancel(self, ticket: Ticket) -> bool:
        """Take a waiting ticket out of its line, wherever it stands there.

        Returns False, and does nothing, if the ticket does not wait any more:
        it was granted in the meantime, and there is a slot to give back.
        """
        if ticket.state is not WAITING:
            return False
        tag_state = ticket.tag_state
        assert tag_state.waiters is not None
        was_head = next(iter(tag_state.waiters)) is ticket
        # From here in one go, see the head of this file.
        del tag_state.waiters[ticket]
        ticket.state = FREE
        self.waiting -= 1
        if was_head:
            self.lines.head_left(tag_state)
        return True

    def expire(self, ticket: Ticket) -> bool:
        """:meth:`cancel` a ticket that has waited too long, and count it."""
        if not self.cancel(ticket):
            return False
        ticket.tag_state.timeouts += 1
        ticket.tag_state.counters.timeouts += 1
        return True

    def activity(self, ticket: Ticket, now: float) -> None:
        """Note that a granted ticket's holder works: a statement was executed.

        Never grants anything: a tag that becomes active can only lower
        ceilings. While the tag is active already, writing its tag_state's
        `last_activity` does the same, and needs no lock.
        """
        if ticket.state is GRANTED:
            self.tags.touch(ticket.tag_state, now)

    def move(self, ticket: Ticket, tag: str, now: float) -> Sequence[Ticket] | None:
        """Charge a granted ticket to another tag, if that tag is next.

        The same as releasing the slot and requesting it again under `tag`, in
        one step. Returns None, with the ticket where it was, when that request
        would have to wait. A move away from the silent tag takes back the
        checkout that was counted there.
        """
        source = ticket.tag_state
        assert ticket.state is GRANTED, f"moved a ticket that is {ticket.state}"
        if source.tag == tag:
            return _NO_GRANTS
        target = self.tags.get(tag, now)
        if not target.silent:
            self.tags.touch(target, now)
        scale = self.usage.scale(now)
        if not self._exchange(ticket, target, scale):
            return None
        if source.silent:
            ticket.again -= 1
            self.usage.was_unused(ticket, source, now, scale, now - ticket.since)
        else:
            held = now - ticket.since
            ticket.held += held
            ticket.note(held)
            self.usage.was_unused(ticket, source, now, scale)
        ticket.book(source)
        target.checkouts += 1
        if not target.silent:
            target.counters.checkouts += 1
        target.counters.at_once += 1
        ticket.since = ticket.granted_at = now
        return self._dispatch(now, scale)

    def tick(self, now: float) -> Sequence[Ticket]:
        """Look for idle tags, if that is due; return who is granted by it."""
        if now < self.next_tick:
            return _NO_GRANTS
        self.next_tick = now + self.reallocation_interval
        if self.tags.review(now) and self.tags.active <= 1:
            # Ceilings have risen, for the one tag that is left and for the
            # silent tag; no other tag can be waiting.
            self.lines.all_changed()
        return self._dispatch(now, self.usage.scale(now))

    def set_capacity(self, capacity: int, now: float) -> Sequence[Ticket]:
        """Change how many slots there are; return who is granted by it.

        Takes nothing away: what is in use above a lower capacity drains.
        """
        self.capacity = capacity
        self.drains_from = self.in_use
        return self._dispatch(now, self.usage.scale(now))

    def reconfigure(
        self,
        *,
        capacity: int,
        soft_limit: int,
        max_limit: int,
        idle_timeout: float,
        reallocation_interval: float,
        max_waiting: int | None,
        now: float,
        limits: Mapping[str, TagLimits] | None = None,
        usage_half_life: float = 10.0,
        usable: int | None = None,
    ) -> Sequence[Ticket]:
        """Change the rules' numbers; return who is granted by it. O(tags).

        Nothing is taken away: what is in use above a lower limit drains. Who
        waits already goes on waiting, even if fewer may.

        :param usable: how many slots there are now; None for the capacity.
        """
        self.max_waiting = max_waiting
        self.reallocation_interval = reallocation_interval
        self.next_tick = min(self.next_tick, now + reallocation_interval)
        self.tags.reconfigure(
            soft_limit, max_limit, idle_timeout, capacity, limits or {}
        )
        self.kept_free = self._reserved_unused()
        self.usage.rebase(now, usage_half_life)  # and rank all anew
        return self.set_capacity(capacity if usable is None else usable, now)

    def impose(
        self,
        capacity: int,
        ceilings: Mapping[str, int],
        other: int,
        now: float,
        reserves: Mapping[str, int] = _NOTHING,
        elsewhere: Mapping[str, Mapping[str, float]] = _NOTHING,
    ) -> Sequence[Ticket]:
        """Replace the rules' numbers by others from outside, until the next call.

        Returns who is granted by it. Nothing is taken away: what is in use above
        a lower number drains.

        :param ceilings: by tag.
        :param other: the ceiling of any tag not named.
        :param reserves: by tag, the slots of these that are kept for it.
        :param elsewhere: what tags have used there, see :meth:`.Usage.hear`.
        """
        self.usage.hear(elsewhere, now)
        self.tags.impose(ceilings, other, reserves)
        self.kept_free = self._reserved_unused()
        self.lines.all_changed()
        return self.set_capacity(capacity, now)

    def pause(self, pauses: Mapping[str, Pause], now: float) -> Sequence[Ticket]:
        """Grant nothing under these tags, and else again; return who is granted."""
        self.tags.pause(pauses)
        self.lines.all_changed()
        return self._dispatch(now, self.usage.scale(now))

    # -- the parts of a transition -------------------------------------------

    def _exchange(self, ticket: Ticket, target: TagState, scale: float) -> bool:
        """Have a slot be another tag's, if that one is next; tell if it was."""
        source, to = ticket.tag_state, ticket.tag_state
        has_rivals = self.waiting or self.tags.reserved
        if not has_rivals:
            if self.in_use > self.capacity or target.in_use >= self.ceiling(target):
                return False
            to = target
        is_kept = source.in_use <= source.reserved
        # From here in one go, see the head of this file.
        self.in_use -= 1
        self.kept_free += is_kept
        source.in_use -= 1
        source.charged += scale
        try:
            if has_rivals:  # as if it was released
                if source.waiters:
                    self.lines.changed(source)
                if self._is_next(target):
                    to = target
        finally:  # in one go again, whatever was raised
            self.in_use += 1
            self.kept_free -= to.in_use < to.reserved
            to.in_use += 1
            to.charged -= scale
            ticket.tag_state = to
        if to.in_use > to.peak:
            to.peak = to.in_use
        for tag_state in (source, to) if has_rivals else ():
            if tag_state.waiters:
                self.lines.changed(tag_state)
        return to is target

    def _dispatch(self, now: float, scale: float) -> Sequence[Ticket]:
        """Grant free slots to those that are next, until none is left or none waits."""
        if not self.waiting:
            return _NO_GRANTS
        granted = []
        lines = self.lines
        while self.in_use < self.capacity and (tag_state := lines.next()) is not None:
            assert tag_state.waiters
            if self.kept_free and self.free_for(tag_state) <= 0:
                break  # those below their reserve are ranked first: none waits
            if not tag_state.in_use and not tag_state.reserved:
                used = tag_state.charged + tag_state.lift
                self.usage.level = used / tag_state.weight
            ticket, _ = tag_state.waiters.popitem(last=False)
            self.waiting -= 1
            waited = now - ticket.since
            tag_state.wait_total += waited
            if waited > tag_state.wait_max:
                tag_state.wait_max = waited
            tag_state.counters.wait.add(waited)
            self._grant(ticket, now, scale)
            lines.head_left(tag_state)
            if not tag_state.silent:
                tag_state.last_activity = now
            granted.append(ticket)
        return granted

    def _grant(self, ticket: Ticket, now: float, scale: float) -> None:
        tag_state = ticket.tag_state
        ticket.since = ticket.granted_at = now
        is_kept = tag_state.in_use < tag_state.reserved
        # From here in one go, see the head of this file.
        self.in_use += 1
        self.kept_free -= is_kept
        tag_state.in_use += 1
        tag_state.charged -= scale
        ticket.state = GRANTED
        # What is lost here is a figure, and no slot.
        tag_state.checkouts += 1
        if tag_state.in_use > tag_state.peak:
            tag_state.peak = tag_state.in_use
        if not tag_state.silent:
            tag_state.counters.checkouts += 1
