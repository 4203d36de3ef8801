"""The promises of the scheduler, as a check: those at the head of its file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.ticket import GRANTED, WAITING, Ticket


def check_valid(
    scheduler: Scheduler, granted: Collection[Ticket] | None = None
) -> None:
    """Assert the invariants. O(everything).

    :param granted: all granted tickets, if the caller knows them.
    """
    _check_tags(scheduler)
    ceiling = scheduler.ceiling
    tag_states = list(scheduler.tag_states.values())
    lines = [a for a in tag_states if a.waiters]
    below = [a for a in lines if a.in_use < ceiling(a)]
    # 1, 2
    assert scheduler.in_use == sum(a.in_use for a in tag_states)
    assert all(a.in_use >= 0 for a in tag_states)
    assert scheduler.in_use <= max(scheduler.capacity, scheduler.drains_from)
    kept = sum(max(a.reserved - a.in_use, 0) for a in tag_states)
    unknown = scheduler.tags.reserved - sum(a.reserved for a in tag_states)
    assert scheduler.kept_free == kept + unknown
    if not scheduler.drains_from:
        assert scheduler.in_use + scheduler.kept_free <= scheduler.capacity
    # 3
    if scheduler.in_use < scheduler.capacity:
        assert not [a for a in below if a.in_use < a.reserved]
    full = scheduler.in_use + scheduler.kept_free >= scheduler.capacity
    assert full or not below, f"{below} wait for nothing"
    # 4
    assert scheduler.waiting == sum(a.waiting for a in tag_states)
    assert set(scheduler.lines) == set(lines)
    for tag_state in lines:
        assert tag_state.waiters
        numbers = [ticket.number for ticket in tag_state.waiters]
        assert numbers == sorted(numbers)
        assert all(t.state is WAITING for t in tag_state.waiters)
        assert all(t.tag_state is tag_state for t in tag_state.waiters)
    # 5
    assert scheduler.lines.next() is min(below, key=scheduler.lines.rank, default=None)
    # 6
    if granted is not None:
        assert all(ticket.state is GRANTED for ticket in granted)
        held = Counter(ticket.tag_state for ticket in granted)
        assert held == Counter({a: a.in_use for a in tag_states if a.in_use})


def _check_tags(scheduler: Scheduler) -> None:
    """Assert what the scheduler builds on."""
    tags = scheduler.tags
    tag_states = tags.tag_states.values()
    assert tags.active == sum(a.active for a in tag_states)
    assert all(a.active for a in tag_states if a.waiters and not a.silent)
    assert all(tags.is_reviewed(a) for a in tag_states if a.active)
    assert all(a.prompt == (a.active and not a.silent) for a in tag_states)
    for a in tag_states:
        if not (a.active or a.silent):
            continue
        if tags.imposed is None and not a.reserved:
            assert tags.ceiling(a) == a.safe_ceiling.value
        else:
            assert tags.ceiling(a) >= a.safe_ceiling.value
