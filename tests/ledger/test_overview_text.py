"""An overview as plain text."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support.overviews import EVIL, overview, process

from sqla_fairpool.ledger.overview import Limits, Part, compile_overview
from sqla_fairpool.ledger.overview_text import (
    cells,
    cut,
    lines,
    percent,
    printable,
    seconds_text,
)
from sqla_fairpool.scheduling.ticket import LimitsByTag, TagLimits
from sqla_fairpool.stats import TagStats


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer\u00e93 \u6570", "layer\u00e93 \u6570"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb", "a\\nb"),
        ("\u202eb", "\\u202eb"),
        ("\x9b\x7f", "\\x9b\\x7f"),
        ("\U000e0001", "\\U000e0001"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_is_not_printable_is_escaped(text, shown):
    assert printable(text) == shown
    assert shown.isprintable()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1e-9, "0.0 s"),
        (0.3, "0.3 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (41, "41 s"),
        (59.6, "1 m 00 s"),
        (125, "2 m 05 s"),
        (3599.7, "1 h 00 m"),
        (11220, "3 h 07 m"),
        (180000, "2 d 02 h"),
    ],
)
def test_times(seconds, text):
    assert seconds_text(seconds) == text


def test_percent_is_all_or_nothing_only_when_it_is():
    assert [percent(part) for part in (0, 0.001, 0.5, 0.999, 1)] == [
        "0 %",
        "1 %",
        "50 %",
        "99 %",
        "100 %",
    ]


def test_columns_of_a_terminal():
    assert [cells(text) for text in ("abc", "\u6570\u636e", "e\u0301")] == [3, 4, 1]
    assert cut("abcdef", 5) == "ab..."
    assert cut("\u6570\u636e\u5e93", 5) == "\u6570..."
    assert cut("\u6570\u636e\u5e93", 6) == "\u6570\u636e\u5e93"
    assert cut("abcdef", 2) == ".."


def test_blocks():
    assert lines(overview()) == [
        "2026-11-25 09:40:45 UTC  ledger /run/app.ledger",
        "Pool: total 20, in use 6, available 14, overflow 0, open 6, waiting 6, "
        "quarantined 0",
        "utilization 30 % [######--------------]",
        "scraper   status  connections  limit  share  waiting  longest   idle"
        "  processes",
        "layer1_5  active            2     10      3        1     41 s  0.3 s  1001",
        "layer2    idle              2     10      0        2     41 s  0.6 s  1002",
        "layer3    active            2     10      5        3     41 s  0.9 s  1003",
        "Allocation: 2 active: equal shares, at most 10 each",
        "Efficiency: 2 active, 2.0 connections each, 30 % utilization, Jain index 0.94",
        "ledger: 6 of 20 slots owned, 6 in use",
        "Warning: layer1_5 holds a connection for 125 s",
    ]


def test_a_budget_of_one_process_without_scrapers():
    first, *_, table, _, efficiency = lines(overview([], ledger=None))
    assert first == "2026-11-25 09:40:45 UTC  this process alone"
    assert table == "no scrapers"
    assert efficiency.endswith("0 % utilization, Jain index -")


@pytest.mark.parametrize("width", [10, 60, 77])
@pytest.mark.parametrize("names", [["a", "b"], EVIL])
def test_the_table_is_no_wider_than_asked_for(width, names):
    whole, found = lines(overview(names)), lines(overview(names), width)
    table = slice(3, 4 + len(names))
    assert max(map(cells, found[table])) <= width < max(map(cells, whole[table]))
    del whole[table], found[table]
    assert found == whole


def test_names_can_do_nothing():
    found = lines(overview(EVIL, ledger="\x1b]0;x\x07", warnings=["a\nb"]))
    assert all(line.isprintable() for line in found)
    assert "\\x1b[31mred" in "".join(found)


def test_a_long_name_is_cut():
    row = lines(overview(["x" * 128]))[4]
    assert row.startswith("x" * 37 + "...  active") and row.endswith("0.3 s  1001")


def test_the_sum_of_very_many_has_a_name():
    assert any(line.startswith("(others)  ") for line in lines(overview([""])))


def test_own_limits_and_usage_are_columns_where_there_are_any():
    own = {"a": TagLimits(weight=3.0, reserved=1), "b*": TagLimits(max=2)}
    parts = [
        Part(process(name, n), [TagStats(name, True, 1, usage=12.0)])
        for n, name in enumerate(["a", "b1", "c"])
    ]
    limits = Limits(20, 20, 10, 15)
    tags = LimitsByTag(own)
    table = lines(compile_overview(parts, replace(limits, tags=tags)))[3:7]
    own_limits = ["own limits", "weight 3, 1 reserved", "max 2", "-"]
    used = ["used", *["12 s"] * 3]
    cut = [row[table[0].index("used") : table[0].index("processes")] for row in table]
    expected = [list(pair) for pair in zip(used, own_limits, strict=True)]
    assert [re.split("  +", row.strip()) for row in cut] == expected
    assert "own limits" not in lines(compile_overview(parts, limits))[3]
    few = Limits(2, 2, 2, 2)  # connections, for three tags
    assert "used  own limits" in lines(compile_overview(parts, few))[3]
