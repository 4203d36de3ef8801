"""Sessions of the dead and lost connections: whose slots are free again, and when."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ledger import TERMS, ask, close_idle, free

from sqla_fairpool.ledger import rows as ledger_rows
from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.inspector import read
from sqla_fairpool.ledger.rows import (
    LOST,
    PROTOCOL,
    Gone,
    Left,
    Member,
    Session,
    among,
    dump,
)
from sqla_fairpool.ledger.store import LedgerError
from sqla_fairpool.ledger.watch import Present, still_there, unaccounted


def pair(world):
    """One that holds 10 connections, and one that wants more than its 10."""
    a, b = world.members(a=10, b=30)
    world.run(1.0)
    assert (len(a.sessions), len(b.sessions)) == (10, 10)
    ask(b, "c")
    return a, b


def killed_before_it_connected(world, slots):
    """One that has taken slots, and no more; another one goes short."""
    b, a = world.member("b", 5), world.start()
    ask(a, "a", slots)
    a.step(budget=0)
    while a.row is None or a.row.owned < slots:
        a.step(budget=1)
    a.kill()
    assert a.sessions == []
    ask(b, "c")


def present(*sessions):
    return Present("s", frozenset(sessions), frozenset(sessions))


# -- the rule ----------------------------------------------------------------------

pids = st.integers(1, 6)
began = st.one_of(st.none(), st.integers(1, 3))
sessions = st.builds(Session, pids, began)
#: What a server shows: one session for each process.
shown = st.dictionaries(pids, began, max_size=6).map(
    lambda found: frozenset(Session(*item) for item in found.items())
)


@given(
    st.integers(1, 8),
    st.sampled_from(["died", LOST]),
    st.frozensets(sessions, max_size=6),
    shown,
    st.frozensets(sessions, max_size=8),
)
def test_no_slot_is_free_whose_session_may_be_there(slots, why, known, there, suspects):
    gone = Gone(slots, why, sessions=tuple(known))
    left = still_there(gone, present(*there), suspects)
    alive = [
        k
        for k in known
        if any(k.pid == t.pid and (k[1] == t[1] or None in (k[1], t[1])) for t in there)
    ]
    assert sorted(left.sessions, key=str) == sorted(alive, key=str)
    unposted = max(slots - len(known), 0)
    if why != LOST:  # it may have opened one more in the place of each that has ended
        young = [s for s in suspects if all((s[1] or 0) > (k[1] or 0) for k in known)]
        young = [s for s in young if s[1] is not None]
        unposted += min(len(known) - len(alive), len(young))
    assert left.slots == min(slots, len(alive) + min(unposted, len(suspects)))


@given(st.frozensets(sessions), st.frozensets(sessions))
def test_a_session_is_in_a_row_or_in_none(there, accounted):
    missing = unaccounted(there, accounted)
    assert missing | set(among(there, accounted)) == there
    assert not among(missing, accounted)


def test_one_that_had_more_open_than_it_owned_is_kept_with_all_its_sessions():
    rows = {}
    book = Book(rows)
    book.join("a", {}, TERMS)
    three = tuple(Session(pid, 1) for pid in (1, 2, 3))
    book.write("a", Member(1, {}, 2, sessions=three))
    book.reap(dict(book.texts))
    gone = Book(rows).gone[1]
    assert (gone.slots, gone.sessions) == (2, three)
    for number, slots in ((2, 2), (1, 1)):
        assert still_there(gone, present(*three[:number]), ()).slots == slots


# -- the dead ----------------------------------------------------------------------


def test_a_session_in_the_place_of_one_that_had_ended_keeps_its_slot(world):
    """Its member died after it was opened, and before the row could name it."""
    a, b = world.member("a", 1), world.member("b", 30)
    free(a, "a")
    close_idle(a)
    ask(a, "a", 1)
    assert not world.book.accounted >= set(a.sessions)
    a.kill()
    ask(b, "c")
    world.run(3.0)
    assert len(a.sessions) == world.quarantined == 1
    a.server_notices()
    world.run(1.0)
    assert world.quarantined == 0


def test_a_long_statement_of_a_killed_member_keeps_one_slot(world):
    a, b = pair(world)
    a.kill()
    world.run(20.0, tick=0.01)
    assert len(b.sessions) == 10
    ((number, gone),) = world.book.gone.items()
    assert (number, gone.slots, gone.why) == (1, 10, "died")
    a.server_notices(9)
    world.run(2.0)
    assert (world.quarantined, len(b.sessions)) == (1, 19)
    world.run(60.0, tick=0.01)
    assert world.quarantined == 1
    a.server_notices()
    world.run(2.0)
    assert (world.quarantined, len(b.sessions)) == (0, 20)


def test_slots_without_a_session_come_back_at_once(world):
    a, b = world.member("a", 10), world.member("b", 10)
    free(a, "a", 10)
    close_idle(a, left=2)
    assert a.row.owned == 10
    a.kill()
    ask(b, "c")
    world.run(2.0)
    assert (world.quarantined, len(b.sessions)) == (2, 18)


@pytest.mark.parametrize("leaves", [False, True])
def test_a_strangers_session_counts_while_it_stays_and_for_a_stated_time(world, leaves):
    """One that comes in its place is nobody's of the dead: it came too late."""
    stranger = world.server.connect("psql")
    killed_before_it_connected(world, 8)
    for seconds in (3.0, 5.0):
        world.run(seconds)
        assert world.quarantined == 1
    if leaves:
        world.server.disconnect(stranger)
        world.server.connect("psql")
    world.run(1.5)
    assert world.quarantined == (0 if leaves else 1)
    world.run(3.0)
    assert world.quarantined == 0


# -- a server that cannot be asked -------------------------------------------------


def test_a_failed_question_is_one_warning_and_said_in_the_ledger(world, caplog):
    answers = []

    def sessions(server):
        if not answers:
            raise RuntimeError("no token for this record\nand more")
        return world.server.look()

    world.sessions = sessions
    a, b = pair(world)
    a.kill()
    world.run(5.0)
    assert len(b.sessions) == 10
    reason = "RuntimeError: no token for this record"
    assert b.keeper.member.watch.unasked == read(b.store).unasked == reason
    (warning,) = [r for r in caplog.records if "cannot be asked" in r.message]
    assert (warning.levelname, warning.exc_info) == ("WARNING", None)
    assert warning.message.endswith(reason)
    a.server_notices()
    answers.append(1)
    world.run(2.0)
    assert len(b.sessions) == 20
    world.run(15.0)
    assert b.keeper.member.watch.unasked is read(b.store).unasked is None


def test_another_server_is_not_asked(world):
    world.sessions = lambda server: Present("another", frozenset(), frozenset())
    a, b = pair(world)
    a.kill()
    world.run(9.0)
    assert len(b.sessions) == 10
    assert b.keeper.member.watch.unasked == (
        "asked server another, the sessions are on the server"
    )
    a.server_notices()
    world.run(4.0)
    assert len(b.sessions) == 20


def test_what_was_seen_alive_has_its_whole_time_from_then_on(world):
    a, b = pair(world)
    a.kill()
    a.server_notices(9)
    world.run(30.0, tick=0.01)
    assert world.quarantined == 1
    world.can_ask = False
    world.run(9.0, tick=0.01)
    assert world.quarantined == 1
    a.server_notices()
    world.run(3.0)
    assert (world.quarantined, len(b.sessions)) == (0, 20)


def test_what_is_left_of_a_quarantine_keeps_its_time(world):
    a, _ = pair(world)
    a.kill()
    world.can_ask = False
    world.run(6.0)
    world.can_ask = True
    a.server_notices(5)
    world.run(1.0)
    assert world.quarantined == 5
    (left,) = world.book.gone.values()
    rows = dict(world.host.rows)
    Book(rows).release({1: Left(left, left.sessions[:3], 3)})
    (less,) = Book(rows).gone.values()
    assert (less.slots, less.stamp) == (3, left.stamp)
    Book(rows).release({1: Left(left, (), 0)})  # of what it was before
    assert Book(rows).gone[1].slots == 3


# -- lost connections --------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_a_connection_whose_end_is_not_known_keeps_its_one_slot(world, known):
    a = world.member("a", 20)
    for _ in range(2):
        a.pool.interrupt("a", known)
    world.run(0.1)
    assert a.pool.interrupted == []
    (gone,) = world.book.gone.values()
    assert (gone.slots, gone.why) == (2, "lost connections")
    assert gone.member == a.store.member
    assert len(gone.sessions) == (2 if known else 0)
    assert world.book.owned + world.book.quarantined + world.book.free == 20
    ask(a, "b", 20)
    world.run(5.0)
    assert world.quarantined == 2
    assert world.server.open == world.server.most == 20
    for session in a.strays:
        world.server.disconnect(session)
    world.run(2.0)
    assert (world.quarantined, len(a.pool.there)) == (0, 20)


def test_a_lost_connection_is_not_put_into_quarantine_twice(world):
    a = world.member("a", 5)
    a.pool.interrupt("a")
    a.fails_at = "committed"  # so that it does not know
    world.run(5.0)
    assert (world.quarantined, a.pool.interrupted) == (1, [])
    book = world.book
    assert book.owned + book.quarantined + book.free == 20
    assert a.pool.slots == a.row.owned >= 4


def test_lost_connections_wait_for_their_slots_the_first_ones_first():
    book = Book({})
    book.join("a", {}, TERMS)
    lost = [Session(2, None), None, Session(1, 5)]
    for owned, open_, found, left in (
        *((0, 0, [], 0), (1, 1, [], 1), (1, 2, [], 1), (2, 1, lost[:1], 1)),
        *((1, 2, lost[:1], 1), (3, 0, lost, 1)),  # the first is there already
    ):
        book.write("a", Member(1, {}, owned))
        assert book.quarantine("a", lost, open_) == found
        assert book.members["a"].owned == left
    one, two = book.gone.values()
    assert (one.slots, one.sessions) == (1, (lost[0],))
    assert (two.slots, two.sessions) == (2, (lost[2],))
    assert book.quarantine("a", lost[:1]) == lost[:1]
    assert book.members["a"].owned == 1


def test_member_that_has_lost_more_connections_than_it_may_own_slots(world):
    """Its sign of life was lost, its slots were given on, and others want them all."""
    a, b, c = world.members(a=8, b=0, c=0)
    for _ in range(8):
        a.pool.interrupt("a", known=False)
    for session in a.strays:
        world.server.disconnect(session)
    a.stopped = True
    a.store.lose()
    for other, tag in ((b, "b"), (c, "c")):
        ask(other, tag, 40)
    world.run(30.0)
    assert len(b.pool.there) + len(c.pool.there) == 20
    a.stopped = False
    ask(a, "a", 8)
    for _ in range(10):
        free(b, "b")
        free(c, "c")
        world.run(1.0)
    assert a.pool.interrupted == []
    assert a.pool.in_use["a"] > 0


def test_each_loss_has_a_number_that_no_member_has_and_outlives_its_member(world):
    a = world.member("a", 5)
    for _ in range(2):
        a.pool.interrupt("a")
        world.run(0.1)
    assert [*world.book.gone] == [2, 3]
    assert world.member("b", 1).row.number == 4
    a.pool.interrupt("a")  # not in quarantine yet
    free(a, "a", 2)
    a.close()
    gone = world.book.gone.values()
    assert [g.slots for g in gone] == [1, 1, 1]
    assert {s for g in gone for s in g.sessions} == set(a.sessions)


# -- rows that cannot be read ------------------------------------------------------


def understand(rows):
    """Do all with rows that a newcomer does."""
    book = Book(dict(rows))
    if book.accepts("new", TERMS):
        book.join("new", {}, TERMS)
    book.tell(book.allocation())
    str((book.places, book.due, book.gone, book.accounted))


GONE = {"slots": "3", "why": "", "who": {}, "member": "", "stamp": 1}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("meta", "nonsense"),
        ("meta", "[]"),
        ("meta", dump({"protocol": PROTOCOL})),
        ("tags", dump({"a": "one"})),
        ("due", "[1]"),
        ("member/x", "{"),
        ("member/x", dump({"number": 1})),
        ("gone/7", dump(GONE)),
        ("gone/seven", "{}"),
    ],
)
def test_rows_that_cannot_be_read_are_named_and_can_be_reset(world, key, text):
    a = world.member("a", 1)
    rows = {**world.host.rows, key: text}
    with pytest.raises(LedgerError, match=key) as caught:
        understand(rows)
    assert "\n" not in str(caught.value)
    assert "`sqla-fairpool ledger reset`" in str(caught.value)
    assert a.store.member in Book(rows).texts
    Book(rows).reset()
    assert rows.keys() <= {"meta"}
    book = Book(rows)
    book.join("b", {}, TERMS)
    assert book.is_fresh
    book.confirm(())
    assert book.free == 20


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_no_value_in_a_row_is_a_traceback(value):
    rows = {}
    book = Book(rows)
    book.join("a", {}, TERMS)
    book.write("a", Member(1, {}, 3, sessions=(Session(1, 2),)))
    book.quarantine("a", [Session(3, None), None])
    book.tell(book.allocation())
    for key in [*rows]:
        for name in json.loads(rows[key]):
            broken = {**rows, key: dump(json.loads(rows[key]) | {name: value})}
            with contextlib.suppress(LedgerError):
                understand(broken)


def test_the_texts_that_are_kept_parsed_are_bounded():
    most = ledger_rows.parse_member.cache_info().maxsize
    for number in range(most + 10):
        text = Member(number).text
        assert ledger_rows.parse_member("x", text).number == number
    assert ledger_rows.parse_member("x", text) is ledger_rows.parse_member("x", text)
    assert ledger_rows.parse_member.cache_info().currsize == most


# -- versions ----------------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False])
def test_rows_of_an_earlier_version_are_raised_by_who_joins_alone(world, alone):
    a = world.member("a", 3)
    for key, text in world.host.rows.items():
        row = json.loads(text)
        for name in ("sessions", "unasked", "server", "fresh", "set_by"):
            row.pop(name, None)
        world.host.rows[key] = dump(row | ({"protocol": 1} if key == "meta" else {}))
    rows = dict(world.host.rows)
    if alone:
        a.kill()
        a.server_notices(2)
    else:
        a.stopped = True
    b = world.member("b", 30)
    world.run(2.0)
    if alone:
        assert world.book.meta.protocol == PROTOCOL
        assert world.quarantined == 1  # that session is no one's that is known
        assert len(b.sessions) == 15
    else:
        (refusal, *_) = map(str, b.pool.refusals)
        assert "an older version of sqla_fairpool uses the ledger" in refusal
        assert (world.host.rows, b.sessions) == (rows, [])
