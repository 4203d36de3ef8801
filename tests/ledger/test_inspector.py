"""Looking at a ledger from outside: who answers, who does not, what is then shown."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support import state
from support.stores import stop
from support.stub import StubServer
from support.threads import PATIENCE, VirtualClock, eventually

from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.inspector import Inspector
from sqla_fairpool.ledger.rows import Session, TagDemand, Terms
from sqla_fairpool.ledger.store import LedgerError

TERMS = Terms(20, 10, 15, 60.0, 30.0)
WHO = {"host": "here", "pid": 4711, "program": "a.py"}


class Member:
    """One that answers when the inspector sleeps, or does not."""

    def __init__(self, path, figures=None):
        self.store = HostStore(path)
        self.store.open()
        self.key = self.store.member
        self.figures = figures
        self.answers = 0
        with self.book() as book:
            book.join(self.key, WHO, TERMS)

    @contextmanager
    def book(self):
        with self.store.transaction() as rows:
            book = Book(rows)
            yield book
            book.tell(book.allocation())

    def post(self, owned, **more):
        """Write what it owns, and more of its row."""
        with self.book() as book:
            book.write(self.key, replace(book.members[self.key], owned=owned, **more))

    def run(self):
        self.store.wait(0)
        if self.store.asked and self.figures is not None:
            self.store.asked = False
            self.answers += 1
            self.store.publish(json.dumps({"answer": self.answers, **self.figures}))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "app.ledger")


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def members():
    members = []
    yield members
    for member in members:
        member.store.close()


@pytest.fixture
def join(path, members):
    """Make members."""

    def join(figures=None):
        members.append(Member(path, figures))
        return members[-1]

    return join


@pytest.fixture
def inspector(path, clock, members):
    """One in whose sleep the members run."""

    def sleep(seconds):
        clock.advance(seconds)
        for member in members:
            if member.store.member == member.key:  # it is not closed
                member.run()

    with contextlib.closing(
        Inspector(HostStore(path), clock=clock, sleep=sleep)
    ) as inspector:
        yield inspector


def tags(*rows):
    names = ("name", "active", "connections")
    return {"tags": [dict(zip(names, row, strict=True)) for row in rows]}


def connections(overview):
    return {row.name: row.connections for row in overview.scrapers}


def test_figures_are_those_of_the_moment(join, inspector):
    member = join(tags(("a", True, 3)) | {"open": 4, "size": 18})
    overview = inspector.look()
    assert connections(overview) == {"a": 3}
    limits = overview.limits
    assert (overview.open, limits.size, limits.capacity) == (4, 18, 20)
    assert inspector.name == overview.ledger
    # What a later version says more is left out.
    later = {"name": "b", "connections": 1, "mood": "good"}
    member.figures = {"tags": [*tags(("a", True, 5))["tags"], later], "weather": 1}
    assert connections(inspector.look()) == {"a": 5, "b": 1}


def test_sessions_are_those_that_members_and_quarantines_have_posted(join, inspector):
    member, mine, lost = join(), Session(4711, 5), Session(4712, 6)
    member.post(2, sessions=(mine,))
    with member.book() as book:
        book.quarantine(member.key, [lost])
        book.write(member.key, book.members[member.key])
        (number,) = book.gone
    assert inspector.sessions == {}
    inspector.look()
    assert inspector.sessions == {mine: 1, lost: number}


def test_one_that_does_not_answer_is_shown_with_what_it_posted(join, inspector, clock):
    silent = join()
    # Posted when it was promised three, and it has four.
    silent.post(4, tags={"a": TagDemand(3, 2, True, 1, 10)})
    join(tags(("b", True, 1)))
    overview = inspector.look()
    a, b = overview.scrapers
    assert (a.status, a.connections, a.waiting) == ("silent", 4, 1)
    assert b.status == "active"
    assert overview.warnings == ("a.py (here:4711) does not answer: it keeps 4 slots",)
    # It is waited for once; and is back as soon as it answers.
    before = clock.now
    inspector.look()
    assert clock.now - before < 0.1
    silent.figures = tags(("a", True, 9))
    silent.run()  # late, to the question before
    overview = inspector.look()
    assert connections(overview)["a"] == 9
    assert overview.warnings == ()


def test_dead_ones_and_quarantines_are_told(join, inspector):
    dead, other = join(), join()
    dead.post(4, tags={"a": TagDemand(4, 2, True, 1, 10)})
    dead.store.close()
    overview = inspector.look()
    assert overview.warnings[0] == (
        "a.py (here:4711) has ended without leaving: 4 slots free when the "
        "server has no session of it"
    )
    assert overview.scrapers == ()
    assert (overview.checked_out, overview.available) == (0, 16)
    with other.book() as book:
        assert book.reap({dead.key: book.texts[dead.key]})
    overview = inspector.look()
    assert overview.limits.quarantined == 4
    assert overview.warnings[0] == "4 slots in quarantine: a.py (here:4711) died"


def test_it_needs_members_is_none_and_leaves_nothing(join, inspector, path):
    with pytest.raises(LedgerError, match="no process has joined"):
        inspector.look()
    member = join(tags())
    assert len(inspector.look().processes) == 1
    inspector.close()
    names = {file.stem for file in Path(f"{path}.members").iterdir()}
    assert names == {member.key}


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from support.stub import StubServer
engine = StubServer().engine(ledger={path!r}).execution_options(scraper="other")
held = [engine.connect(), engine.connect()]
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(path):
    """A process that holds two connections under the tag 'other'."""
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), path=path)
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def test_real_pools_answer_and_a_stopped_process_does_not(path, other):
    engine = StubServer().engine(ledger=path).execution_options(scraper="mine")
    held = [engine.connect() for _ in range(3)]
    inspector = Inspector(HostStore(path), patience=PATIENCE)
    impatient = Inspector(HostStore(path), patience=0.5)
    try:
        overview = inspector.look()
        rows = {row.name: row for row in overview.scrapers}
        assert (rows["mine"].connections, rows["other"].connections) == (3, 2)
        assert rows["mine"].processes == (str(os.getpid()),)
        assert rows["other"].processes == (str(other.pid),)
        assert (overview.checked_out, overview.open) == (5, 5)
        assert rows["mine"].held_for > 0
        held.pop().close()
        assert inspector.look().checked_out == 4
        stop(other, path)
        status = {row.name: row.status for row in impatient.look().scrapers}
        assert status == {"mine": "active", "other": "silent"}
        other.send_signal(signal.SIGCONT)
        eventually(lambda: not inspector.look().warnings)
    finally:
        inspector.close()
        impatient.close()
        for connection in held:
            connection.close()
        engine.dispose()
        state.keeper(engine).close()
