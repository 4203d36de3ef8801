"""Usage decides among tags that hold equally much: by time, in virtual time."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest
from support.invariants import check_valid

from sqla_fairpool.scheduling import policy, usage
from sqla_fairpool.scheduling.scheduler import Scheduler
from sqla_fairpool.scheduling.ticket import GRANTED, TagLimits, Ticket

from ..support.turns import Turns

LONG, SHORT = 1.0, 0.01

#: What one connection that is always held comes to.
ALWAYS = 10.0 / math.log(2)


def many_tenants(long, short, turns):
    """More tags than slots, some of which hold a hundred times as long as others."""
    for n in range(long):
        turns.come(f"long{n}", 4, LONG)
    for n in range(short):
        turns.come(f"short{n}", 4, SHORT)


def waits_of(turns, beginning):
    return [
        wait
        for tag, waits in turns.waits.items()
        if tag.startswith(beginning)
        for wait in waits
    ]


@pytest.mark.parametrize(("long", "short"), [(30, 70), (10, 90)])
def test_tags_that_hold_long_and_tags_that_hold_short_get_the_same_time(long, short):
    turns = Turns()
    many_tenants(long, short, turns)
    turns.run(10.0)
    turns.forget()
    turns.run(40.0)
    assert len(turns.seconds) == 100
    assert policy.jain([*turns.seconds.values()]) >= 0.98
    assert median(waits_of(turns, "short")) <= 0.2


@pytest.mark.parametrize("hold", [LONG, SHORT])
def test_tag_that_was_quiet_for_an_hour_gets_its_share_and_no_more(hold):
    turns = Turns()
    turns.come("quiet", 4, hold)
    turns.run(10.0)
    turns.leave("quiet")
    turns.run(3600.0)
    many_tenants(30, 69, turns)
    turns.run(20.0)
    turns.forget()
    turns.come("quiet", 4, hold)
    turns.run(10.0)
    share = 20 * 10.0 / 100
    # One that holds for a second gets whole seconds.
    assert share * 0.95 - hold <= turns.seconds["quiet"] <= share + hold


def test_tag_that_had_everything_for_a_minute_is_not_shut_out_for_one():
    turns = Turns()
    turns.come("alone", 30, SHORT)
    turns.run(60.0)
    for n in range(99):
        turns.come(f"tag{n}", 4, SHORT)
    turns.run(30.0)
    turns.forget()
    turns.run(10.0)
    assert turns.seconds["alone"] == pytest.approx(2.0, abs=0.1)


def test_weights_divide_the_slots_in_proportion():
    turns = Turns(limits={"api": TagLimits(weight=3.0)})
    for tag in ("api", "b", "c"):
        turns.come(tag, 30, LONG)
        turns.run(0.3)
    turns.run(20.0)
    states = turns.scheduler.tag_states
    assert [states[tag].in_use for tag in ("api", "b", "c")] == [12, 4, 4]


def test_weights_divide_the_time_where_there_are_more_tags_than_slots():
    turns = Turns(4, limits={"api": TagLimits(weight=3.0)})
    for n in range(20):
        turns.come(f"tag{n}", 4, 0.1)
    turns.come("api", 4, 0.02)
    turns.run(20.0)
    turns.forget()
    turns.run(60.0)
    assert turns.seconds["api"] / turns.seconds["tag0"] == pytest.approx(3.0, rel=0.1)


def test_of_tags_that_used_the_same_the_first_that_came_is_next():
    scheduler = make_scheduler(1)
    holder = Ticket()
    scheduler.request(holder, "z", 0.0)
    tickets = [Ticket() for _ in range(9)]
    for n, ticket in enumerate(tickets):
        scheduler.request(ticket, f"tag{-n}", 0.0)
    for ticket in tickets:
        assert list(scheduler.release(holder, 1.0)) == [ticket]
        holder = ticket


def make_scheduler(capacity, **options):
    defaults = {"soft_limit": capacity, "max_limit": capacity, "idle_timeout": 60.0}
    defaults |= {"reallocation_interval": 30.0, "now": 0.0}
    return Scheduler(capacity=capacity, **{**defaults, **options})


def reconfigure(scheduler, capacity, **options):
    """Change options after five seconds."""
    rules = dict.fromkeys(("capacity", "soft_limit", "max_limit"), capacity)
    rules |= {"idle_timeout": 60.0, "reallocation_interval": 30.0, "max_waiting": None}
    scheduler.reconfigure(**rules, **options, now=5.0)


def test_usage_is_the_integral_of_what_was_held_decayed():
    random.seed(3)
    scheduler = make_scheduler(50)
    held, now = [], 0.0
    out = []
    for _ in range(300):
        now += random.expovariate(3.0)
        if out and random.random() < 0.5:
            ticket = out.pop(random.randrange(len(out)))
            held.append((ticket.since, now))
            scheduler.release(ticket, now)
        else:
            ticket = Ticket()
            if scheduler.request(ticket, "a", now):
                out.append(ticket)
    assert out
    held += [(ticket.since, now) for ticket in out]
    rate = math.log(2) / 10.0
    expected = sum(
        (math.exp((end - now) * rate) - math.exp((begin - now) * rate)) / rate
        for begin, end in held
    )
    state = scheduler.tag_states["a"]
    assert scheduler.usage.seconds(state, now) == pytest.approx(expected)


def test_no_moment_counts_for_more_or_less_than_it_should():
    scheduler, ticket = make_scheduler(5, usage_half_life=10.0), Ticket()
    random.seed(4)
    state, begin = scheduler.tags.get("a", 0.0), 0.0
    for _ in range(300):
        end = begin + random.choice([1e-4, 1e-3, 0.1])
        before = state.charged
        scheduler.request(ticket, "a", begin)
        scheduler.release(ticket, end)
        expected = 10.0 / math.log(2) * (2 ** (end / 10.0) - 2 ** (begin / 10.0))
        assert state.charged - before == pytest.approx(expected, rel=4e-4)
        begin = end + random.choice([0.0, 1e-4, 0.1])


@pytest.mark.parametrize("seconds", [1000.0, 1.0])
def test_time_in_which_a_connection_was_kept_warm_does_not_count(seconds):
    scheduler = make_scheduler(5)
    ticket = Ticket()
    scheduler.request(ticket, "a", 0.0)
    ticket.again, ticket.held = 3, 0.5  # four checkouts, without the scheduler
    scheduler.vacate(ticket, seconds)
    used = scheduler.usage.seconds(scheduler.tag_states["a"], seconds)
    charged = ALWAYS * (1 - 2.0 ** (-seconds / 10.0))
    assert used == pytest.approx(charged * 0.5 / seconds)


def test_order_outlasts_the_landmark():
    scheduler = make_scheduler(1, usage_half_life=1.0, idle_timeout=1e6)
    landmark = scheduler.usage.landmark
    holder = Ticket()
    scheduler.request(holder, "z", 0.0)
    more, less = Ticket(), Ticket()
    for tag, seconds in (("more", 0.3), ("less", 0.2)):
        now = 899.0
        scheduler.release(holder, now)
        scheduler.request(holder, tag, now)
        scheduler.release(holder, now + seconds)
        scheduler.request(holder, "z", now + seconds)
    scheduler.request(more, "more", 900.0)
    scheduler.request(less, "less", 900.0)
    third = Ticket()
    scheduler.request(third, "more", 950.0)
    scheduler.release(holder, 950.0)
    assert scheduler.usage.landmark > landmark
    assert less.state is GRANTED
    check_valid(scheduler)


def test_scale_between_two_points_of_the_curve_is_on_a_line():
    scale = make_scheduler(1).usage.scale
    for now in (0.0, 5.0, 5.005, 5.009, 5.02):
        assert scale(now) == pytest.approx(ALWAYS * 2 ** (now / 10.0), rel=1e-6)


def test_landmark_can_be_as_long_ago_as_the_clock_can_tell():
    scheduler = make_scheduler(1, usage_half_life=0.001)
    ticket = Ticket()
    for now in (0.0, 0.5, 1e6, 1e9):
        scheduler.request(ticket, "a", now)
        scheduler.release(ticket, now + 0.001)
        seconds = scheduler.usage.seconds(scheduler.tag_states["a"], now + 0.001)
        assert 0.0 < seconds < 0.0015
    assert math.isfinite(2.0**usage._LANDMARK_LIFE * 1e9)


def test_half_life_can_change_while_connections_are_out():
    scheduler = make_scheduler(4)
    ticket = Ticket()
    scheduler.request(ticket, "a", 0.0)
    state = ticket.tag_state
    before = scheduler.usage.seconds(state, 5.0)
    reconfigure(scheduler, 4, usage_half_life=2.0)
    assert scheduler.usage.seconds(state, 5.0) == pytest.approx(before)
    always = 2.0 / math.log(2)
    assert scheduler.usage.seconds(state, 100.0) == pytest.approx(always)


def test_what_was_used_elsewhere_counts_and_decays_from_when_it_was_heard_first():
    scheduler = make_scheduler(1)
    scheduler.request(Ticket(), "a", 0.0)
    state, counted = scheduler.tag_states["a"], scheduler.usage
    always = 10.0 / math.log(2)

    def elsewhere(now):
        return state.elsewhere / counted.scale(now) * always

    for now, said, expected in [
        (0.0, {"p": 8.0}, 8.0),
        (10.0, {"p": 8.0, "q": 1.0}, 5.0),
        (20.0, {"p": 2.0, "q": 1.0}, 2.5),
        (9100.0, {"p": 2.0, "q": 4.0}, 4.0),  # the landmark has moved
        (9110.0, {}, 0.0),
    ]:
        scheduler.impose(1, {}, 1, now, {}, {"a": said, "unknown": said})
        assert elsewhere(now) == pytest.approx(expected, abs=1e-9)
        assert state.lift == pytest.approx(state.elsewhere)
    assert "unknown" not in scheduler.tag_states
    assert not counted._heard


@pytest.mark.parametrize(
    ("charged", "lift", "weight", "after"),
    [
        *[(2.0, 0.0, 1.0, 1.0), (0.5, 0.7, 1.0, 1.0), (2.0, -1.5, 1.0, 0.5)],
        *[(3.0, 0.5, 2.0, 2.0), (1.5, 0.0, 2.0, 1.5), (0.8, 0.0, 0.5, 0.8)],
        *[(1.5, 0.0, 0.5, 1.0), (-2.0, 1.0, 1.0, -1.0)],
    ],
)
def test_tag_that_returns_its_last_slot_has_used_one_at_most(
    charged, lift, weight, after
):
    scheduler = make_scheduler(2, limits={"a": TagLimits(weight=weight)})
    first, last = Ticket(), Ticket()
    for ticket in first, last:
        scheduler.request(ticket, "a", 5.0)
    state, scale = first.tag_state, scheduler.usage.scale(5.0)
    state.charged = 5 * scale
    scheduler.vacate(first, 5.0)
    assert state.lift == 0.0  # the last slot is still out
    state.charged, state.lift = (charged - 1) * scale, lift * scale
    scheduler.vacate(last, 5.0)
    assert (state.charged + state.lift) / scale == pytest.approx(after)


@pytest.mark.parametrize(
    ("weight", "in_use", "used", "before", "lift"),
    [
        *[(1.0, 0, 1.0, 0.0, 2.0), (2.0, 0, 1.0, 0.0, 5.0), (0.5, 0, 2.0, 0.0, 0.0)],
        *[(2.0, 1, 1.0, 0.0, 4.0), (1.0, 0, 1.0, 0.5, 2.0), (1.0, 0, 3.0, 0.5, 0.5)],
        (1.0, 0, 2.99, 0.0, 0.01),
    ],
)
def test_lead_of_a_tag_that_was_quiet_is_taken_when_it_begins_to_wait(
    weight, in_use, used, before, lift
):
    scheduler = make_scheduler(1, limits={"a": TagLimits(weight=weight)})
    scheduler.request(Ticket(), "a" if in_use else "z", 5.0)
    scale = scheduler.usage.scale(5.0)
    state = scheduler.tags.get("a", 5.0)
    state.charged, scheduler.usage.level = used * scale, 3.0 * scale
    state.lift = before * scale
    for _ in range(2):
        assert not scheduler.request(Ticket(), "a", 5.0)
        assert state.lift / scale == pytest.approx(lift)


@pytest.mark.parametrize(
    ("limits", "in_use", "level"),
    [
        (TagLimits(weight=2.0), 0, 1.5),
        (TagLimits(weight=2.0), 1, 0.0),
        (TagLimits(reserved=1), 0, 0.0),
    ],
)
def test_level_is_what_the_tag_served_last_had_used(limits, in_use, level):
    scheduler = make_scheduler(2)
    for tag in ("z", "a" if in_use else "z"):
        scheduler.request(Ticket(), tag, 5.0)
    reconfigure(scheduler, 2, limits={"a": limits})
    scale, waiting = scheduler.usage.scale(5.0), Ticket()
    assert not scheduler.request(waiting, "a", 5.0)
    waiting.tag_state.charged, waiting.tag_state.lift = 2.0 * scale, scale
    scheduler.set_capacity(3, 5.0)
    assert waiting.state is GRANTED
    assert scheduler.usage.level / scale == pytest.approx(level)


@pytest.mark.parametrize(
    ("half_life", "changed", "used"), [(1.0, None, 0.5), (10.0, 5.0, None)]
)
def test_time_that_was_not_used_is_taken_back_over_a_landmark(half_life, changed, used):
    scheduler, ticket = make_scheduler(1, usage_half_life=half_life), Ticket()
    scheduler.request(ticket, "a", 0.0)
    state = ticket.tag_state
    end = 10.0 if changed else 951.0
    if changed:
        reconfigure(scheduler, 1, usage_half_life=2.0)
        half_life = 2.0
    before = scheduler.usage.seconds(state, end - 1.0)
    ticket.held = end / 2
    scheduler.vacate(ticket, end)
    always = half_life / math.log(2)
    decay = 2.0 ** (-1.0 / half_life)
    charged = before * decay + always * (1 - decay)
    if changed:  # what was charged with another half-life stays
        expected = charged - always * (1 - 2.0 ** (-(end - changed) / 2.0)) / 2
    else:
        expected = always * used
    assert scheduler.usage.seconds(state, end) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("source", "moved_hold", "checkouts"), [("unknown", 0.0, 1), ("b", 0.5, 2)]
)
def test_move_takes_back_what_was_not_used(source, moved_hold, checkouts):
    """Of the silent tag the last checkout, too: it turns out to be another tag's."""
    scheduler, ticket = make_scheduler(2, silent_tag="unknown"), Ticket()
    scheduler.request(ticket, source, 90.0)
    ticket.again, ticket.held, ticket.since = 1, 0.5, 99.5
    assert scheduler.move(ticket, "a", 100.0) is not None
    state = scheduler.tag_states[source]
    # The last half second is charged to the tag that it began under.
    used = scheduler.usage.seconds(state, 100.0)
    assert used == pytest.approx(ALWAYS * 0.5 * 1.0 / 10.0)
    assert (state.hold_total, state.checkouts) == (0.5 + moved_hold, checkouts)
    assert ticket.tag_state.counters.hold.count == 0


def test_tag_that_used_more_elsewhere_is_served_after_one_that_used_less():
    scheduler = make_scheduler(1)
    holder, more, less = Ticket(), Ticket(), Ticket()
    for ticket, tag in ((holder, "z"), (more, "more"), (less, "less")):
        scheduler.request(ticket, tag, 0.0)
    scheduler.impose(1, {}, 1, 0.0, {}, {"more": {"p": 3.0}, "less": {"p": 2.0}})
    check_valid(scheduler)
    assert list(scheduler.release(holder, 1.0)) == [less]
