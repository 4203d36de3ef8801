"""All processes that share a budget in one picture: sums, limits and shares."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_fairpool.ledger.overview import (
    LeftRow,
    Limits,
    Part,
    ProcessRow,
    compile_overview,
)
from sqla_fairpool.scheduling.ticket import LimitsByTag, TagLimits
from sqla_fairpool.stats import TagStats, condensed, decode, encode

LIMITS = Limits(20, 20, 10, 15)


def process(pid, state="answers", host="here", **more):
    return ProcessRow(host, pid, "scraper.py", state, **more)


def busy(tag, in_use, waiting=0, **more):
    return TagStats(tag, True, in_use, waiting=waiting, **more)


def shares(overview):
    return {
        row.name: (row.connections, row.limit, row.fair_share)
        for row in overview.scrapers
    }


def overview_of(*rows, limits=LIMITS, **more):
    """Return the overview of one process."""
    return compile_overview([Part(process(1), rows)], limits, **more)


@pytest.mark.parametrize(
    ("rows", "expected", "jain"),
    [
        ([busy("a", 15, 5)], {"a": (15, 15, 15)}, 1.0),
        (
            [busy("a", 7, 9), busy("b", 6, 9), busy("c", 7, 9)],
            {"a": (7, 10, 7), "b": (6, 10, 6), "c": (7, 10, 7)},
            1.0,
        ),
        ([busy("a", 10), busy("b", 0, 10)], {"a": (10, 10, 10), "b": (0, 10, 10)}, 0.5),
        ([], {}, None),
    ],
)
def test_ceilings_and_shares(rows, expected, jain):
    """The index is of what each has of its share."""
    held = sum(row.connections for row in rows)
    parts = [Part(process(number), [row]) for number, row in enumerate(rows)]
    for overview in (compile_overview(parts, LIMITS), overview_of(*rows)):
        assert shares(overview) == expected
        assert overview.jain == jain
        assert (overview.checked_out, overview.available) == (held, 20 - held)
        assert overview.utilization == held / 20
        assert overview.average == pytest.approx(held / len(rows) if rows else 0.0)


def test_strategy_is_in_words():
    assert overview_of(busy("a", 15)).strategy == "1 active: at most 15"
    assert overview_of().strategy == "nobody active: the first may have 15"


def test_what_is_idle_or_in_quarantine_has_no_share():
    idle = TagStats("idle", False, 2, idle_for=70.0, held_for=90.0)
    overview = overview_of(busy("a", 10, 9), idle)
    assert shares(overview) == {"a": (10, 15, 15), "idle": (2, 10, 0)}
    assert [row.status for row in overview.scrapers] == ["active", "idle"]
    assert overview.active_scrapers == 1
    limits = Limits(20, 20, 10, 15, quarantined=10)
    overview = overview_of(busy("a", 5, 9), busy("b", 5, 9), limits=limits)
    assert shares(overview) == {"a": (5, 10, 5), "b": (5, 10, 5)}
    assert overview.available == 0
    (row,) = overview_of(registered=["a"]).scrapers
    assert (row.name, row.status, row.idle_for) == ("a", "idle", None)


def test_one_tag_in_several_processes_is_one_row():
    first = busy("a", 3, 1, idle_for=5.0, waiting_for=1.0, held_for=2.0)
    parts = [
        Part(process(1), [first]),
        Part(process(2), [busy("a", 4, 2, idle_for=0.5, held_for=9.0, timeouts=1)]),
        Part(process(2), [busy("a", 0, checkouts=7)]),
    ]
    (row,) = compile_overview(parts, LIMITS).scrapers
    assert (row.connections, row.waiting, row.limit) == (7, 3, 15)
    assert (row.idle_for, row.waiting_for, row.held_for) == (0.5, 1.0, 9.0)
    assert (row.checkouts, row.timeouts) == (7, 1)
    assert row.processes == ("1", "2")
    parts = [Part(process(1, host=host), [busy("a", 1)]) for host in "xy"]
    (row,) = compile_overview(parts, LIMITS).scrapers
    assert row.processes == ("x:1", "y:1")


def test_connections_beyond_the_size_are_overflow():
    parts = [Part(process(1, open=13)), Part(process(2, "silent", slots=4))]
    overview = compile_overview(parts, Limits(15, 20, 10, 15))
    assert (overview.open, overview.overflow) == (17, 2)


def test_warnings_say_who():
    parts = [
        Part(process(1, "silent", slots=3), [busy("a", 3)]),
        Part(process(2, "dead", slots=2)),
        Part(process(3), [busy("b", 1, held_for=61.4)]),
    ]
    overview = compile_overview(parts, LIMITS, warnings=["first"])
    assert overview.warnings == (
        "first",
        "scraper.py (here:1) does not answer: it keeps its 3 slots",
        "b holds a connection for 61 s",
    )
    assert [row.status for row in overview.scrapers] == ["silent", "active"]
    assert overview_of(busy("b", 1, held_for=59.9)).warnings == ()


def test_what_is_left_is_free_as_soon_as_the_server_has_no_session_of_it():
    left = [LeftRow(1, 2, "a (h:1)"), LeftRow(2, 3, "b (h:2)", "died")]
    left.append(LeftRow(3, 1, "c (h:3)", "left connections open"))
    overview = compile_overview([], LIMITS, left=left, warnings=["first"])
    assert overview.limits.quarantined == 6
    assert overview.warnings == (
        "first",
        "a (h:1) has ended without leaving: its 2 slots are free when the server has "
        "no session of it",
        "3 slots in quarantine: b (h:2) died",
        "1 slots in quarantine: c (h:3) left connections open",
    )
    seen = overview.with_sessions({2})
    assert seen.limits.quarantined == 3
    assert seen.warnings == (
        "first",
        "a (h:1) has ended: its 2 slots are free for whoever comes next",
        "3 slots in quarantine: b (h:2) died",
        "c (h:3) left connections open: its 1 slots are free for whoever comes next",
    )


def test_it_is_ready_for_json():
    overview = overview_of(busy("a", 5))
    plain = json.loads(json.dumps(overview.as_dict()))
    assert plain["pool"]["checked_out"] == 5
    assert plain["scrapers"][0]["processes"] == ["1"]
    assert plain["processes"][0]["pid"] == 1
    assert plain["efficiency"]["jain_index"] == 1.0


figures = st.builds(
    TagStats,
    st.sampled_from("abcde"),
    st.booleans(),
    st.integers(0, 8),
    waiting=st.integers(0, 30),
)


@given(st.lists(st.lists(figures, max_size=4), max_size=5), st.integers(0, 20))
def test_shares_add_up_and_nothing_is_lost(members, quarantined):
    limits = Limits(20, 20, 10, 15, quarantined)
    parts = [Part(process(n), tags) for n, tags in enumerate(members)]
    overview = compile_overview(parts, limits)
    said = [row for tags in members for row in tags]
    assert overview.checked_out == sum(row.connections for row in said)
    assert overview.waiting == sum(row.waiting for row in said)
    assert {row.name for row in overview.scrapers} == {row.name for row in said}
    wanted = [
        min(row.connections + row.waiting, row.limit)
        for row in overview.scrapers
        if row.active
    ]
    there = 20 - quarantined
    assert sum(row.fair_share for row in overview.scrapers) == min(there, sum(wanted))
    assert all(row.fair_share <= row.limit for row in overview.scrapers)
    assert overview.jain is None or 0.0 <= overview.jain <= 1.0 + 1e-9


def test_what_a_process_tells_is_what_others_hear():
    rows = [busy("a", 1, 2, waiting_for=1.5, checkouts=3), TagStats("b")]
    assert decode(json.loads(json.dumps(encode(rows)))) == rows


def test_of_very_many_tags_those_are_named_that_want_most():
    rows = [
        TagStats(f"t{n:04d}", n == 999, n % 2, idle_for=n, held_for=n, checkouts=1)
        for n in range(1000)
    ]
    found = condensed(rows)
    assert len(found) == 257
    assert found[0].name == "t0999"
    assert sum(row.connections for row in found) == 500
    assert sum(row.checkouts for row in found) == 1000
    rest = found[-1]
    assert (rest.name, rest.idle_for, rest.held_for) == ("", 0.0, 998.0)
    assert condensed(rows[:256]) == rows[:256]


def test_limits_of_tags_are_in_the_ceilings_and_in_the_shares():
    own = {"api": TagLimits(weight=3.0), "reports": TagLimits(max=2)}
    wanted = [
        TagStats(name, True, connections=1, waiting=30)
        for name in ("api", "reports", "web")
    ]
    limits = Limits(20, 20, 20, 20, tags=LimitsByTag(own))
    rows = compile_overview([Part(process("a", 1), wanted)], limits).scrapers
    assert [row.limit for row in rows] == [20, 2, 20]
    assert [row.fair_share for row in rows] == [13, 2, 5]
    assert [(row.weight, row.max) for row in rows] == [
        (3.0, None),
        (1.0, 2),
        (1.0, None),
    ]
