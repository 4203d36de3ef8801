"""The monitor's screen at every size, and what the keys do to it."""

from __future__ import annotations

import dataclasses
import io
from contextlib import contextmanager

import pytest
from rich.console import Console
from support.overviews import EVIL, overview
from support.threads import VirtualClock

from sqla_fairpool.cli.monitor_board import SORTS, Board, History
from sqla_fairpool.cli.monitor_live import Live
from sqla_fairpool.cli.monitor_view import Screen, frame
from sqla_fairpool.cli.server_view import ServerFigures, Sessions
from sqla_fairpool.cli.terminal import END, SUSPEND, Keys
from sqla_fairpool.cli.watching import Picture

SERVER = ServerFigures(
    total=Sessions(20, 18, 2),
    scrapers={"layer1_5": Sessions(7, 7), "layer3": Sessions(3, 0, hidden=3)},
    others=3,
    max_connections=100,
    warnings=("the server warns",),
)


def board(names=("layer1_5", "layer2", "layer3"), server=SERVER, **more):
    """Return a board that has seen an overview."""
    board = Board(5.0, "/run/app.ledger")
    board.see(Picture(overview(names, **more), server, seen_at=1000.0))
    return board


def shown(board, width, height, now=1000.0):
    """Return the lines as a terminal gets them, styles and all, and as plain text."""
    text = frame(board, width, height, now)
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=True)
    console.print(text)
    return out.getvalue(), text.plain.split("\n")


def cells(line):
    from rich.cells import cell_len

    return cell_len(line)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 300])
@pytest.mark.parametrize("height", [3, 10, 24, 60])
@pytest.mark.parametrize("number", [0, 1, 3, 200])
def test_no_line_is_too_wide_and_there_are_as_many_as_fit(width, height, number):
    seen = board([f"scraper_{n}" for n in range(number)], capacity=400)
    _, lines = shown(seen, width, height)
    assert len(lines) == height
    assert max(map(cells, lines)) <= width
    assert lines[0].startswith("sqla-fairpool")
    assert "quit" in lines[-1]


@pytest.mark.parametrize("width", [1, 5, 12])
@pytest.mark.parametrize("height", [1, 2])
def test_a_window_that_is_no_more_than_a_corner(width, height):
    _, lines = shown(board(), width, height)
    assert len(lines) == height
    assert max(map(cells, lines)) <= width


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("height", [10, 60])
def test_names_can_do_nothing(width, height):
    evil = "\x1b]0;title\x07"
    server = ServerFigures(error=evil, warnings=(evil,))
    seen = board(EVIL, server, ledger=evil, warnings=[evil, "\u202eevil"])
    seen.name = evil
    text, lines = shown(seen, width, height)
    assert all(line.isprintable() for line in lines)
    assert max(map(cells, lines)) <= width
    for bad in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e", "\u2028", "\r", "\t"):
        assert bad not in text
    if height == 60:
        # Neither interpreted nor lost.
        assert any("[red]m" in line for line in lines)
        assert any("\\x1b[2J" in line for line in lines)


def test_screen_of_eighty_columns():
    _, lines = shown(board(), 80, 24)
    blocks = str.maketrans({"#": "\u2588", "_": "\u2591", "~": "\u2582", "|": "_"})
    assert lines[:13] == [
        line.translate(blocks)
        for line in (
            "sqla-fairpool  2026-11-25 09:40:45 UTC  every 5 s",
            "ledger /run/app.ledger",
            "",
            "pool ############____________________________  30 %  6 of 20 in use, "
            "6 waiting",
            "     total 20  available 14  overflow 0  open 6  quarantined 0",
            "",
            "scraper  status connections limit share waits longest   idle server "
            "history pid",
            "layer1|5 active  2 #_______    10     3     1     41s   0.3s    7/7 "
            "      ~ 1001",
            "layer2   idle    2 #_______    10     0     2     41s   0.6s      - "
            "      ~ 1002",
            "layer3   active  2 #_______    10     5     3     41s   0.9s    ?/3 "
            "      ~ 1003",
            "",
            "Allocation: 2 active: equal shares, at most 10 each",
            "Efficiency: 2 active, 2.0 connections each, 30 % utilization, Jain "
            "index 0.94",
        )
    ]
    assert lines[-1] == (" q  quit   p  pause   s  sort: name   +/-  interval: 5 s  ")


def test_rows_that_have_no_room_are_counted():
    _, lines = shown(board([f"scraper_{n:03d}" for n in range(200)]), 80, 24)
    (more,) = [line for line in lines if line.startswith("... and")]
    rows = [line for line in lines if line.startswith("scraper_")]
    assert len(rows) >= 10
    assert more == f"... and {200 - len(rows)} more"


def test_what_the_server_and_the_ledger_say():
    _, lines = shown(board(), 120, 40)
    assert (
        "server: 20 sessions of members, 18 active, 2 idle in transaction; 3 others; "
        "max_connections 100" in lines
    )
    assert "ledger: 6 of 20 slots owned, 6 in use" in lines
    assert "! the server warns" in lines
    assert "! layer1_5 holds a connection for 125 s" in lines


def test_without_a_server_there_is_no_column_of_it():
    assert not any("server" in line for line in shown(board(server=None), 120, 40)[1])


def test_warnings_that_have_no_room_are_counted():
    seen = board(warnings=[f"warning {n}" for n in range(50)])
    _, lines = shown(seen, 80, 24)
    assert any("layer3   active" in line for line in lines)
    assert lines[-4:-1] == ["! warning 3", "! warning 4", "! ... and 46 more"]


def test_the_newest_sample_is_at_the_right():
    seen = Board(5.0, "x")
    for connections in (0, 1, 10, 20):
        view = overview(["a"])
        row = view.scrapers[0]
        object.__setattr__(row, "connections", connections)
        seen.see(Picture(view))
    (line,) = [n for n in shown(seen, 80, 24)[1] if n.startswith("a ")]
    assert " \u2581\u2582\u2585\u2588 " in line


# -- the board -------------------------------------------------------------------------


def test_history_is_bounded_and_forgets_who_is_gone():
    history = History()
    history.add(overview(["old"]))
    for _ in range(70):
        history.add(overview(["new"]))
    assert len(history) == 1
    assert history.of("new", 100) == [None] * 11 + [2] * 60
    assert history.of("new", 3) == [2, 2, 2]
    assert history.of("old", 5) == [None] * 5


def test_few_cells_show_all_the_time_that_is_kept():
    def look(connections):
        row = dataclasses.replace(overview(["a"]).scrapers[0], connections=connections)
        return dataclasses.replace(overview(["a"]), scrapers=(row,))

    history = History()
    for connections in range(1, 61):
        history.add(look(connections))
    assert history.of("a", 6) == [19, 29, 39, 49, 59, 60]
    history.add(look(0))
    assert history.of("a", 6) == [19, 29, 39, 49, 59, 60]  # they do not dance


def test_sorts_cycle_and_order_the_rows():
    seen = board()
    orders = {}
    for _ in SORTS:
        orders[seen.sort] = [row.scraper for row in seen.rows()]
        seen.press("s")
    assert seen.sort == "name"
    assert orders["name"] == ["layer1_5", "layer2", "layer3"]
    assert orders["waiting"] == ["layer3", "layer2", "layer1_5"]
    assert orders["idle"] == ["layer3", "layer2", "layer1_5"]


def test_interval_goes_in_steps():
    seen = Board(5.0, "x")
    found = []
    for key in "++++----- -":
        seen.press(key)
        found.append(seen.interval)
    assert found[:9] == [10, 30, 60, 60, 30, 10, 5, 2, 1]
    assert found[-1] == 1
    for interval, key, expected in ((0.5, "-", 0.5), (3600, "+", 3600), (7, "-", 5)):
        seen.interval = interval
        seen.press(key)
        assert seen.interval == expected


# -- the loop --------------------------------------------------------------------------


class FakeLooker:
    """Answers at once, unless it is told to be slow."""

    def __init__(self, *pictures):
        self.pictures = list(pictures)
        self.asked = 0
        self.is_slow = False

    def ask(self):
        self.asked += 1

    def poll(self, seconds=0.0):
        if self.is_slow:
            return None
        return self.pictures.pop(0) if len(self.pictures) > 1 else self.pictures[0]


class FakeKeys(Keys):
    """Types a script: keys, or a function that is called. The clock goes on."""

    def __init__(self, clock, *script):
        self.clock, self.script = clock, list(script)
        self.suspended = 0

    def read(self, seconds):
        self.clock.advance(seconds)
        step = self.script.pop(0) if self.script else "q"
        return step if isinstance(step, str) else (step() or "")

    def suspend(self):
        self.suspended += 1


class FakeScreen:
    def __init__(self):
        self.size = (80, 24)
        self.drawn = []
        self.is_left = 0

    def draw(self, board, now):
        self.drawn.append(frame(board, *self.size, now).plain)

    @contextmanager
    def left(self):
        self.is_left += 1
        yield


@pytest.fixture
def live():
    """Run the loop on a script of keys; return its parts."""

    def run(*script, pictures=None, seen=None):
        clock = VirtualClock()
        looker = FakeLooker(*(pictures or [Picture(overview(), None, clock())]))
        screen, keys = FakeScreen(), FakeKeys(clock)
        seen = seen or Board(5.0, "/run/app.ledger")
        keys.script = [
            (lambda step=step: step(looker, screen, clock)) if callable(step) else step
            for step in script
        ]
        Live(seen, looker, keys, screen, clock).run()
        return seen, looker, screen, keys

    return run


@pytest.mark.parametrize("key", ["q", "Q", END])
def test_quit(live, key):
    _, looker, screen, _ = live(key, "s", "s")
    assert looker.asked == 1
    assert len(screen.drawn) == 1


def test_it_looks_at_the_interval_only(live):
    # Twenty seconds in ticks of 0.2.
    _, looker, screen, _ = live(*[""] * 99)
    assert looker.asked == 4
    assert len(screen.drawn) == 1  # they all look the same


def test_keys_are_shown_at_once(live):
    seen, looker, screen, _ = live("s", "+", "x", "\x1b")
    assert (seen.sort, seen.interval, looker.asked) == ("connections", 10.0, 1)
    assert len(screen.drawn) == 3
    assert "sort: connections" in screen.drawn[1]
    assert "interval: 10 s" in screen.drawn[2]


def test_paused_it_does_not_look_and_going_on_it_looks_at_once(live):
    asked = []

    def note(looker, screen, clock):
        asked.append(looker.asked)

    _, _, screen, _ = live("p", *[""] * 99, note, " ", "", note)
    assert asked == [1, 2]
    assert "PAUSED" in screen.drawn[1]
    assert "PAUSED" not in screen.drawn[2]


def test_a_shorter_interval_counts_from_the_last_look(live):
    asked = []

    def note(looker, screen, clock):
        asked.append(looker.asked)

    live(*[""] * 9, "-", *[""] * 2, note)
    assert asked == [2]


def test_a_new_size_is_drawn_at_once(live):
    def resize(looker, screen, clock):
        screen.size = (40, 10)

    _, looker, screen, _ = live(resize, "")
    assert looker.asked == 1
    assert [len(text.split("\n")) for text in screen.drawn] == [24, 10]


def test_ctrl_z_leaves_the_screen_and_draws_it_again(live):
    _, _, screen, keys = live(SUSPEND, "")
    assert (screen.is_left, keys.suspended, len(screen.drawn)) == (1, 1, 2)


def test_the_ledger_away_and_back(live):
    view = overview()
    pictures = [
        Picture(view, None, 1000.0),
        Picture(view, None, 1000.0, "the ledger is away: locked"),
        Picture(view, None, 1010.0),
    ]
    _, _, screen, _ = live(*[""] * 99, pictures=pictures)
    assert "away" not in screen.drawn[0]
    assert "! the ledger is away: locked, last seen 5 s ago" in screen.drawn[1]
    assert "layer1_5" in screen.drawn[1]
    # How long ago goes on, and then it is back.
    assert "last seen 9 s ago" in screen.drawn[-2]
    assert "away" not in screen.drawn[-1]


def test_nothing_seen_yet(live):
    pictures = [Picture(trouble="there is no ledger at /x: nobody has used it yet")]
    _, _, screen, _ = live("", "", pictures=pictures)
    assert "there is no ledger at /x" in screen.drawn[0]


def test_an_answer_that_does_not_come(live):
    def slow(looker, screen, clock):
        looker.is_slow = True

    def fast(looker, screen, clock):
        looker.is_slow = False

    _, looker, screen, _ = live(slow, *[""] * 99, fast, "")
    assert looker.asked == 2  # not again before it has answered
    assert any("no answer for 3 s" in text for text in screen.drawn)
    assert "no answer" not in screen.drawn[-1]


def test_screen_of_a_terminal():
    out = io.StringIO()
    console = Console(file=out, width=80, height=24, force_terminal=True)
    with Screen(console) as screen:
        assert screen.size == (80, 24)
        screen.draw(board(), 1000.0)
        with screen.left():
            left = out.getvalue()
    assert left.count("\x1b[?1049h") == left.count("\x1b[?1049l") == 1
    assert out.getvalue().count("\x1b[?1049l") == 2
    assert "layer1_5" in left
