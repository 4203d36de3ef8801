"""The rules without their consequences: what would they have done?

:class:`DryRunScheduler` serves all requests as one line, in order of arrival, up to the
capacity. Beside it, :attr:`DryRunScheduler.rules` is a scheduler that keeps the rules
and decides about the same requests: each ticket has a twin there, which is requested
with it and released with it. What the twins had to wait, and which of them would have
been refused, stands in the counters of that scheduler.

A twin that still waits when its ticket comes back has waited *at least* so long. What
its caller would have done later is not played through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import policy
from .scheduler import Scheduler
from .state import Lines
from .ticket import GRANTED, LineFull, TagLimits, TagState, Ticket


class _OneLine(Lines):
    """The lines of all tags as one: who came first is next."""

    def rank(self, tag_state: TagState) -> policy.Rank:
        assert tag_state.waiters
        return True, 0.0, 0.0, next(iter(tag_state.waiters)).number


class DryRunScheduler(Scheduler):
    """Grants slots as if there were no tags, with the rules beside.

    :param options: as for :class:`.Scheduler`.
    """

    def __init__(self, *, now: float, silent_tag: str | None, **options: Any) -> None:
        super().__init__(**_without_rules(options), now=now, silent_tag=silent_tag)
        self.lines = _OneLine(self.tags)
        self.usage.moved = self.lines.all_changed
        self.rules = self._rules = Scheduler(**options, now=now, silent_tag=silent_tag)
        self._twins: dict[Ticket, Ticket] = {}
        self._now = now

    # -- transitions ---------------------------------------------------------

    def request(self, ticket: Ticket, tag: str, now: float) -> bool:
        granted = super().request(ticket, tag, now)
        self._enter(ticket, tag, now)
        return granted

    def admit(self, ticket: Ticket, tag: str, now: float) -> None:
        super().admit(ticket, tag, now)
        twin = self._twins[ticket] = Ticket()
        self._rules.admit(twin, tag, now)

    def vacate(self, ticket: Ticket, now: float) -> Sequence[Ticket]:
        granted = super().vacate(ticket, now)
        self._leave(ticket, now)
        return granted

    def cancel(self, ticket: Ticket) -> bool:
        if not super().cancel(ticket):
            return False
        self._leave(ticket, self._now)
        return True

    def activity(self, ticket: Ticket, now: float) -> None:
        super().activity(ticket, now)
        twin = self._twins.get(ticket)
        if twin is not None:
            self._rules.activity(twin, now)

    def move(self, ticket: Ticket, tag: str, now: float) -> Sequence[Ticket] | None:
        granted = super().move(ticket, tag, now)
        if granted is None:
            return None
        twin = self._twins.get(ticket)
        if (
            twin is None
            or twin.state is not GRANTED
            or self._rules.move(twin, tag, now) is None
        ):
            self._leave(ticket, now)
            self._enter(ticket, tag, now)
        return granted

    def tick(self, now: float) -> Sequence[Ticket]:
        self._rules.tick(now)
        return super().tick(now)

    def set_capacity(self, capacity: int, now: float) -> Sequence[Ticket]:
        self._rules.set_capacity(capacity, now)
        return super().set_capacity(capacity, now)

    def reconfigure(self, *, now: float, **options: Any) -> Sequence[Ticket]:
        self._rules.reconfigure(**options, now=now)
        return super().reconfigure(**_without_rules(options), now=now)

    def impose(self, capacity: int, *numbers: Any, **more: Any) -> Sequence[Ticket]:
        raise NotImplementedError("with a ledger the rules are in force")

    # -- the parts of a transition -------------------------------------------

    def _enter(self, ticket: Ticket, tag: str, now: float) -> None:
        """Request a slot for a ticket's twin, where the rules count."""
        self._now = now
        twin = Ticket()
        try:
            self._rules.request(twin, tag, now)
        except LineFull:
            self._rules.tags.counters.of(tag).refusals += 1
        else:
            self._twins[ticket] = twin

    def _leave(self, ticket: Ticket, now: float) -> None:
        """Take the twin's slot back, or have it wait no more."""
        self._now = now
        twin = self._twins.pop(ticket, None)
        if twin is None:
            return
        if self._rules.cancel(twin):
            twin.tag_state.counters.wait.add(now - twin.since)
        else:
            self._rules.release(twin, now)

    def _is_next(self, newcomer: TagState) -> bool:
        return self.in_use + self.waiting < self.capacity


def _without_rules(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by which each tag may have all, and any number may wait."""
    capacity, limits = options["capacity"], dict[str, TagLimits]()
    none = {"soft_limit": capacity, "max_limit": capacity, "limits": limits}
    return {**options, **none, "max_waiting": None}
