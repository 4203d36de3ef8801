"""A dry run serves in order of arrival, and counts what the rules would have done."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.invariants import check_valid

from sqla_fairpool.scheduling.dry_run import DryRunScheduler
from sqla_fairpool.scheduling.ticket import GRANTED, WAITING, TagLimits, Ticket


class Script:
    def __init__(self, **options):
        rules = {"capacity": 4, "soft_limit": 2, "max_limit": 3}
        rules |= {"idle_timeout": 60.0, "reallocation_interval": 30.0}
        self.now = 0.0
        self.scheduler = DryRunScheduler(
            **{**rules, "max_waiting": None, **options}, silent_tag="unknown", now=0.0
        )

    def requests(self, tag, number):
        tickets = [Ticket() for _ in range(number)]
        for ticket in tickets:
            self.scheduler.request(ticket, tag, self.now)
        self.check()
        return tickets

    def release(self, ticket):
        granted = self.scheduler.release(ticket, self.now)
        self.check()
        return list(granted)

    def check(self):
        check_valid(self.scheduler)
        check_valid(self.scheduler.rules)

    def counters(self, tag):
        return self.scheduler.rules.tags.counters.of(tag)


def test_all_are_one_line_whatever_the_rules_say():
    script = Script(limits={"a": TagLimits(max=1), "b": TagLimits(reserved=1)})
    a = script.requests("a", 6)
    b = script.requests("b", 1)
    assert [ticket.state for ticket in a] == [GRANTED] * 4 + [WAITING] * 2
    assert script.release(a[0]) == [a[4]]
    assert script.release(a[1]) == [a[5]]
    assert script.release(a[2]) == b


def test_waits_by_the_rules_are_counted_with_their_length():
    script = Script()
    a = script.requests("a", 4)  # by the rules, three
    script.now = 2.0
    script.release(a[0])  # here the fourth would have got its slot
    assert script.counters("a").wait.count == 1
    assert script.counters("a").wait.total == 2.0
    more = script.requests("a", 1)
    script.now = 5.0
    script.release(more[0])  # it would have waited for as long as it was held
    assert script.counters("a").wait.count == 2
    assert script.counters("a").wait.total == 5.0


def test_refusals_by_the_rules_are_counted_and_refuse_nobody():
    script = Script(max_waiting=1)
    tickets = script.requests("a", 7)
    assert [ticket.state for ticket in tickets] == [GRANTED] * 4 + [WAITING] * 3
    assert script.counters("a").refusals == 3
    for ticket in tickets:
        if ticket.state is WAITING:
            assert script.scheduler.cancel(ticket)
        else:
            script.release(ticket)
    assert script.scheduler.in_use == script.scheduler.rules.in_use == 0
    assert not script.scheduler._twins


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["request", "leave", "move", "pass", "capacity"]),
            st.integers(0, 9),
            st.sampled_from(["a", "b", "c", "unknown"]),
        ),
        max_size=60,
    )
)
def test_any_script_leaves_both_schedulers_valid_and_in_the_end_empty(steps):
    script = Script(limits={"a": TagLimits(max=1), "b": TagLimits(reserved=1)})
    scheduler, tickets = script.scheduler, []
    for step, number, tag in steps:
        ticket = tickets[number % len(tickets)] if tickets else None
        if step == "request":
            tickets += script.requests(tag, 1)
        elif step == "pass":
            script.now += number * 10.0
            scheduler.tick(script.now)
        elif step == "capacity":
            scheduler.set_capacity(1 + number % 4, script.now)
        elif ticket is not None and step == "leave":
            tickets.remove(ticket)
            if ticket.state is GRANTED:
                script.release(ticket)
            else:
                scheduler.cancel(ticket)
        elif ticket is not None and ticket.state is GRANTED:
            scheduler.move(ticket, tag, script.now)
        script.check()
    for ticket in tickets:
        if not scheduler.cancel(ticket):
            scheduler.release(ticket, script.now)
    script.check()
    assert scheduler.in_use == scheduler.rules.in_use == 0
    assert scheduler.waiting == scheduler.rules.waiting == 0
    assert not scheduler._twins
