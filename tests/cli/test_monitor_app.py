"""The monitor's screen and its keys, driven by Textual's pilot."""

import asyncio
import dataclasses
import re
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
from support.overviews import EVIL, overview, process
from support.tasks import until
from support.threads import VirtualClock
from textual.containers import VerticalScroll
from textual.renderables.bar import Bar
from textual.renderables.sparkline import Sparkline
from textual.scrollbar import ScrollBarRender
from textual.widgets import DataTable, ProgressBar

from sqla_fairpool.cli import monitor_app
from sqla_fairpool.cli.monitor_app import Monitor
from sqla_fairpool.cli.poller import Picture
from sqla_fairpool.cli.server import ServerFigures, Sessions
from sqla_fairpool.ledger.overview import Limits, Part, compile_overview
from sqla_fairpool.stats import TagStats

SERVER = ServerFigures(
    total=Sessions(20, 18, 2),
    scrapers={"layer1_5": Sessions(7, 7), "layer3": Sessions(3, 0, hidden=3)},
    others=3,
    max_connections=100,
    warnings=("the server warns",),
)


class Looks:
    """Answers with pictures, at once unless it is slow; its clock stands still."""

    def __init__(self, *pictures):
        self.pictures = list(pictures)
        self.clock = VirtualClock()
        self.asked = 0
        self.is_slow = False
        self.answer = None

    def start(self):
        self.asked += 1
        self.answer = Future()
        if not self.is_slow:
            self.finish()
        return self.answer

    def finish(self):
        more = len(self.pictures) > 1
        self.answer.set_result(self.pictures.pop(0) if more else self.pictures[0])

    async def after(self, seconds, app, pilot, times=1):
        """Let seconds go by, on the clock; show what comes of it."""
        for _ in range(times):
            self.clock.advance(seconds)
            app.tick()
            app.tick()
        await pilot.pause()


def seen(names=("layer1_5", "layer2", "layer3"), server=SERVER, **more):
    return Picture(overview(names, **more), server, 1000.0)


def drive(script, *pictures, size=(80, 24), name="/run/app.ledger"):
    """Run a script on an application that has seen the first of the pictures."""
    looks = Looks(*(pictures or [seen()]))

    async def run():
        app = Monitor(looks.start, 5.0, name, looks.clock)
        async with app.run_test(size=size) as pilot:
            await looks.after(0, app, pilot)
            await script(app, pilot, looks)

    asyncio.run(run())


def shown(app):
    return [strip.text.rstrip() for strip in app.screen._compositor.render_strips()]


def screen(*pictures, **more):
    """Return the lines of the screen."""
    found = []

    async def script(app, pilot, looks):
        await until(lambda: shown(app)[-1], "the line of keys")
        found.extend(shown(app))

    drive(script, *pictures, **more)
    return found


def names_in(app):
    table = app.query_one(DataTable)
    return [table.get_row_at(n)[0].plain for n in range(table.row_count)]


# -- the screen ------------------------------------------------------------------------


def test_screen():
    assert not any("server" in line for line in screen(seen(server=None)))
    lines = screen(size=(120, 24))
    history = "▁" * 19 + "▂"
    assert lines[:9] == [
        "sqla-fairpool  2026-11-25 09:40:45 UTC  every 5 s, by scraper",
        "ledger /run/app.ledger",
        f"pool {'━' * 12}{' ' * 29}30 %  6 of 20 in use, 6 waiting",
        "total 20, in use 6, available 14, overflow 0, open 6, waiting 6, "
        "quarantined 0",
        "",
        " scraper▲  status  connections  limit  share  waiting  longest   idle"
        "  server  history               processes",
        " layer1_5  active            2     10      3        1     41 s  0.3 s"
        f"     7/7  {history}  1001",
        " layer2    idle              2     10      0        2     41 s  0.6 s"
        f"       -  {history}  1002",
        " layer3    active            2     10      5        3     41 s  0.9 s"
        f"     ?/3  {history}  1003",
    ]
    assert lines[-8:] == [
        "Allocation: 2 active: equal shares, at most 10 each",
        "Efficiency: 2 active, 2.0 connections each, 30 % utilization, Jain index 0.94",
        "ledger: 6 of 20 slots owned, 6 in use",
        "server: 20 sessions of members, 18 active, 2 idle in transaction; 3 others; "
        "max_connections 100",
        "",
        "! the server warns",
        "! layer1_5 holds a connection for 125 s",
        " q Quit  p Pause  s Sort  +/- Interval  d Detail",
    ]


def test_troubleshooting_looks_at_what_is_shown():
    page = Path(__file__).parents[2] / "docs" / "guides" / "static-pools.md"
    text = page.read_text(encoding="utf-8").partition("## Troubleshooting")[2]
    text = text.partition("\n## ")[0]
    named = set(re.findall(r"(?<!\*)\*([^*|]+)\*(?!\*)", text))
    found = " ".join(screen(size=(120, 24)))
    assert len(named) > 5
    missing = {name for name in named if name not in found} - set(monitor_app._DETAILS)
    assert missing == set()


@pytest.mark.parametrize("size", [(20, 6), (40, 10), (80, 24), (300, 60)])
@pytest.mark.parametrize("number", [0, 200])
def test_every_size_has_rows_and_keys(size, number):
    lines = screen(seen([f"s_{n:03d}" for n in range(number)]), size=size)
    assert "q Quit" in lines[-1]
    if size > (20, 6):
        assert lines[0].startswith("sqla-fairpool")
        assert any("s_000" in line for line in lines) == (number > 0)
    if size > (40, 10):
        assert ("no scrapers" in lines) == (number == 0)


@pytest.mark.parametrize("size", [(40, 10), (200, 60)])
def test_names_can_do_nothing(size):
    evil = "\x1b]0;title\x07"
    server = ServerFigures(error=evil, warnings=(evil,))
    picture = seen(EVIL, server, ledger=evil, warnings=[evil, "\u202eevil"])
    lines = screen(picture, size=size, name=evil)
    assert all(line.isprintable() for line in lines)
    if size == (200, 60):
        # Neither interpreted nor lost.
        assert any("[red]markup[/red]" in line for line in lines)
        assert any("\\x1b[2J" in line for line in lines)


def test_the_table_is_in_natural_order_and_stays_where_it_is_scrolled_to():
    names = [f"scraper_{n}" for n in range(200)]

    async def script(app, pilot, looks):
        assert names_in(app) == names  # 2 before 10
        await pilot.press("pagedown", "pagedown", "down", "right")
        table = app.query_one(DataTable)
        before, row = table.scroll_offset, table.cursor_row
        assert before.y > 3 and row > 10
        await looks.after(5, app, pilot)
        assert (table.scroll_offset, table.cursor_row) == (before, row)
        assert any(f"scraper_{row}" in line for line in shown(app))
        assert not any(line.startswith(" scraper_2 ") for line in shown(app))
        await pilot.press("ctrl+end", "d")
        assert app.detail == "scraper_199"

    drive(script, seen(sorted(names)))


def test_a_scraper_in_detail_with_each_of_its_processes():
    parts = [
        Part(process("a", n), [TagStats("a", True, n, held_for=9.0 * n, checkouts=n)])
        for n in (1, 2)
    ]
    limits = Limits(20, 20, 10, 15)
    both = compile_overview([*parts, Part(process("b", 3), [TagStats("b")])], limits)
    gone = compile_overview([Part(process("b", 3), [TagStats("b")])], limits)

    async def script(app, pilot, looks):
        for keys in (["d", "escape"], ["enter", "enter"]):
            await pilot.press(keys[0])
            table = app.query_one(DataTable)
            headings = [column.label.plain for column in table.ordered_columns]
            rows = [
                " ".join(cell.plain for cell in table.get_row_at(n)) for n in range(3)
            ]
            assert ", ".join(headings) == (
                "scraper, processes, status, connections, longest hold, waiting, "
                "longest wait, checkouts, time-outs, used lately, own limits"
            )
            assert rows == [
                "a active 3 18 s 0 - 3 0 0.0 s -",
                "  a.py (host1:1001) answers 1 9.0 s 0 - 1 0 0.0 s -",
                "  a.py (host1:1002) answers 2 18 s 0 - 2 0 0.0 s -",
            ]
            await pilot.press(keys[1])
            assert names_in(app) == ["a", "b"]
        await pilot.press("down", "d")
        assert app.detail == "b"
        await pilot.press("d", "up", "d")
        await looks.after(5, app, pilot)  # it has gone meanwhile
        assert (app.detail, names_in(app)) == (None, ["b"])

    pictures = [Picture(view, None, 1000.0) for view in (both, gone)]
    drive(script, *pictures, size=(110, 24))


def test_bars_are_ascii_where_the_terminal_has_no_blocks(monkeypatch):
    class Terminal:
        encoding = "latin-1"

    names = ("HALF_BAR_LEFT", "BAR", "HALF_BAR_RIGHT")
    names = [(Bar, n) for n in names] + [(Sparkline, "BARS")]
    names += [(ScrollBarRender, f"{n}_BARS") for n in ("VERTICAL", "HORIZONTAL")]
    for owner, name in names:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(sys, "__stderr__", Terminal())
    many = [f"s_{n}" for n in range(50)]
    for lines in (screen(), screen(seen(many)), screen(size=(40, 10))):
        assert "".join(lines).isascii()
    (bar,) = [line for line in screen() if line.startswith("pool ")]
    assert bar.startswith("pool ====") and " scraper^ " in screen()[5]
    assert "_____." in screen(size=(120, 24))[6]


def test_warnings_leave_room_for_the_table_and_are_scrolled():
    async def script(app, pilot, looks):
        lines = shown(app)
        assert any("layer3" in line for line in lines)
        assert "! the server warns" in " ".join(lines)
        warnings = app.query_one(VerticalScroll)
        assert warnings.max_scroll_y > 40
        await pilot.press("tab")  # from now on the arrows are for them
        assert app.focused is warnings
        warnings.scroll_end(animate=False)
        await pilot.pause()
        assert any("! layer1_5 holds" in line for line in shown(app))

    drive(script, seen(warnings=[f"warning {n}" for n in range(50)]))


def with_connections(number):
    view = overview(["a"])
    row = dataclasses.replace(view.scrapers[0], connections=number)
    return Picture(dataclasses.replace(view, scrapers=(row,)), None, 1000.0)


def test_history_has_sixty_looks_the_most_of_each_three():
    looked = [20, *[0] * 50, 1, 0, 0, 10, 0, 0, 0, 20, 0]

    async def script(app, pilot, looks):
        await looks.after(5, app, pilot, len(looked) - 1)
        blocks = f"█{'▁' * 16}▂▅█ "
        assert blocks in shown(app)[6]
        await looks.after(5, app, pilot)
        assert blocks not in shown(app)[6] and "█" in shown(app)[6]

    drive(script, *map(with_connections, looked), size=(120, 24))


def test_more_connections_than_the_limit_are_marked():
    def style(number):
        async def script(app, pilot, looks):
            (span,) = app.query_one(DataTable).get_row_at(0)[2].spans or [None]
            found.append(span and span.style)

        found = []
        drive(script, with_connections(number))
        return found[0]

    assert style(11) is None  # with 20 for one
    assert style(12) == "yellow"


# -- keys ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "status"),
    [("q", 0), ("Q", 0), ("ctrl+c", 130), ("ctrl+d", 0), ("ctrl+q", 0)],
)
@pytest.mark.parametrize("hangs", [False, True])
def test_quit_also_while_a_look_hangs(key, status, hangs):
    async def script(app, pilot, looks):
        looks.is_slow = hangs
        await looks.after(5, app, pilot)
        assert app.return_code is None
        await pilot.press(key)
        assert app.return_code == status
        assert looks.asked == 2

    drive(script)


def test_sorts_cycle_and_order_the_rows():
    async def script(app, pilot, looks):
        orders = {}
        for _ in range(4):
            assert f"by {app.order}" in shown(app)[0]
            mark = "▲" if app.order == "scraper" else "▼"
            assert re.findall(r"(\w+)[▲▼]", shown(app)[5]) == [app.order]
            assert f"{app.order}{mark}" in shown(app)[5]
            orders[app.order] = names_in(app)
            await pilot.press("s")
        assert app.order == "scraper"
        assert orders == {
            "scraper": ["layer1_5", "layer2", "layer3"],
            "connections": ["layer1_5", "layer2", "layer3"],
            "waiting": ["layer3", "layer2", "layer1_5"],
            "idle": ["layer3", "layer2", "layer1_5"],
        }
        assert looks.asked == 1

    drive(script)


def test_interval_goes_in_steps():
    async def script(app, pilot, looks):
        found = []
        for key in "++=+--_--x-":
            await pilot.press(key)
            found.append(app.interval)
        assert found == [10, 30, 60, 60, 30, 10, 5, 2, 1, 1, 1]
        assert "every 1 s" in shown(app)[0]
        for given, key, expected in ((0.5, "-", 0.5), (3600, "+", 3600), (7, "-", 5)):
            app.interval = given
            await pilot.press(key)
            assert app.interval == expected

    drive(script)


def test_it_looks_at_the_interval_which_counts_from_the_last_look():
    async def script(app, pilot, looks):
        asked = []
        for _ in range(10):
            await looks.after(2, app, pilot)
            asked.append(looks.asked)
        assert asked == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
        await pilot.press("-")
        await looks.after(0, app, pilot)
        assert looks.asked == 5

    drive(script)


@pytest.mark.parametrize("key", ["p", "space"])
def test_paused_it_does_not_look_and_going_on_it_looks_at_once(key):
    async def script(app, pilot, looks):
        await pilot.press(key)
        assert "PAUSED" in shown(app)[0]
        await looks.after(60, app, pilot)
        assert looks.asked == 1
        await pilot.press(key)
        await looks.after(0, app, pilot)
        assert looks.asked == 2
        assert "PAUSED" not in shown(app)[0]

    drive(script)


# -- looks that fail, or are late ------------------------------------------------------


def test_the_ledger_away_and_back():
    first = seen()
    away = dataclasses.replace(first, trouble="the ledger is away: locked")

    async def script(app, pilot, looks):
        assert not any("away" in line for line in shown(app))
        await looks.after(5, app, pilot)
        assert "! the ledger is away: locked, last seen 5 s ago" in shown(app)
        assert names_in(app) == ["layer1_5", "layer2", "layer3"]
        assert sum(map(bool, app.history)) == 1  # what is old is no sample
        await looks.after(4, app, pilot)
        assert "! the ledger is away: locked, last seen 9 s ago" in shown(app)
        await looks.after(1, app, pilot)
        assert not any("away" in line for line in shown(app))

    drive(script, first, away, first)


def test_an_answer_that_does_not_come():
    async def script(app, pilot, looks):
        looks.is_slow = True
        await looks.after(5, app, pilot)
        await looks.after(3, app, pilot)
        assert "! no answer for 3 s" in shown(app)
        await looks.after(60, app, pilot)
        assert looks.asked == 2  # not again before it has answered
        looks.is_slow = False
        looks.finish()
        await looks.after(0, app, pilot)
        assert not any("no answer" in line for line in shown(app))
        assert app.query_one(ProgressBar).progress == 6

    drive(script)


@pytest.mark.parametrize("trouble", [None, "there is no ledger at /x: as yet"])
def test_nothing_seen_yet(trouble):
    lines = screen(Picture(trouble=trouble), name="/x")
    assert f"! {trouble or 'looking at /x ...'}" in lines
