"""What is written down at a transition, and shows only later. Found by mutants."""

from __future__ import annotations

from sqla_fairpool.scheduling import tags
from sqla_fairpool.scheduling.heap import IndexedHeap
from sqla_fairpool.scheduling.invariants import check_valid
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.ticket import GRANTED, Ticket

RULES = {"capacity": 20, "soft_limit": 10, "max_limit": 15}
RULES |= {"idle_timeout": 60.0, "reallocation_interval": 30.0}


def make():
    return Scheduler(**RULES, now=0.0)


def test_equal_keys_are_in_the_order_of_their_entry():
    heap = IndexedHeap()
    for item in "bca":
        heap.put(item, 1)
    assert [(heap.first(), heap.remove(heap.first()[1]))[0] for _ in "bca"] == [
        *[(1, "b"), (1, "c"), (1, "a")]
    ]


def test_admitted_caller_makes_its_tag_active():
    scheduler, ticket = make(), Ticket()
    scheduler.admit(ticket, "a", 0.0)
    assert ticket.state is GRANTED
    assert scheduler.tag_states["a"].active
    assert scheduler.tags.active == 1
    check_valid(scheduler, [ticket])


def test_checkouts_that_one_grant_served_are_in_the_figures_of_its_tag():
    scheduler, ticket = make(), Ticket()
    scheduler.request(ticket, "a", 0.0)
    ticket.again, ticket.held = 2, 3.0
    ticket.note(2.0)
    ticket.note(1.0)
    scheduler.release(ticket, 4.0)
    state = scheduler.tag_states["a"]
    assert state.checkouts == 3
    assert 3.0 <= state.hold_total <= 7.0
    assert state.hold_max >= 2.0


def test_shorter_idle_timeout_holds_for_tags_that_are_active():
    scheduler, ticket = make(), Ticket()
    scheduler.request(ticket, "a", 0.0)
    scheduler.release(ticket, 0.0)
    scheduler.reconfigure(**RULES | {"idle_timeout": 5.0}, max_waiting=None, now=0.0)
    scheduler.tick(31.0)
    assert not scheduler.tag_states["a"].active


def test_tag_that_is_forgotten_to_make_room_is_not_counted(monkeypatch):
    monkeypatch.setattr(tags, "_MAX_REMEMBERED", 8)
    scheduler, ticket = make(), Ticket()
    for n in range(50):
        scheduler.request(ticket, f"tag{n}", 0.0)
        scheduler.release(ticket, 0.0)
        assert scheduler.tags.active == len(scheduler.tag_states) <= 8
    check_valid(scheduler, [])
