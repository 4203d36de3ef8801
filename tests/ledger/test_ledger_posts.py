"""What a pool is told about its posts; rows that were deleted, or are older."""

from __future__ import annotations

import pytest
from support.ledger import TERMS, ask, close_idle, free, posted, used
from support.ledger_world import Server

from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.inspector import read
from sqla_fairpool.ledger.store import LedgerError, ServerDiffers

# -- posts -------------------------------------------------------------------------


def step_until(process, point, answers):
    """Stop a member at a point of its round; nobody is answered before that."""
    before = [*answers]
    process.step(budget=0)
    while process.passed[-1] != point:
        assert answers == before
        process.step(budget=1)
    assert answers == before


def test_posts_are_acknowledged_together_after_the_look(world):
    a, answers = world.member(), []
    transactions, reads = world.host.transactions, a.passed.count("read")
    for _ in range(20):
        a.keeper.post(answers.append)
    step_until(a, "read", answers)
    a.step()
    assert answers == [True] * 20
    assert world.host.transactions == transactions  # nobody had to wait for that
    assert a.passed.count("read") == reads + 1


def test_posts_are_answered_before_others_are_looked_after(world):
    _, b = world.members(a=20, b=20)
    world.run(0.1)
    assert b.keeper.member.vain
    answers = []
    world.now += 2.0
    b.keeper.post(answers.append)
    b.step(budget=0)
    while b.passed[-1] != "living":
        b.step(budget=1)
    assert answers == [True]


def test_one_that_posts_before_it_is_a_member_becomes_one(world):
    a = world.start()
    assert posted(a, lambda: world.run(0.1)) == [True]
    assert a.row.owned == 0


def test_while_the_store_is_away_posts_are_denied_at_once(world):
    a = world.member()
    world.host.is_away = True
    assert posted(a) == [False]
    points = len(a.passed)
    assert posted(a) == [False]
    assert "begin" not in a.passed[points:]  # nothing was tried for that
    world.host.is_away = False
    world.run(6.0)
    assert posted(a) == [True]


@pytest.mark.parametrize("where", ["read", "begin", "locked", "commit", "committed"])
def test_a_transaction_that_fails_denies_its_posts(world, where):
    a = world.member()
    if where != "read":  # without news the row is looked at, and the lock not taken
        ask(a, "b")
    a.fails_at = where
    assert posted(a) == [False]


def test_one_that_is_closed_or_refused_is_denied(world):
    a, refused = world.member(), elsewhere(world)
    world.run(1.0)
    assert posted(refused) == [False]
    assert posted(a, a.close) == [False]
    assert posted(a, lambda: None) == [False]


def test_one_that_owns_less_than_it_has_open_is_denied(world):
    """Its slots were given on while nothing could be asked."""
    world.can_ask = False
    a, b = world.member("a", 15), world.start()
    a.stopped = True
    a.store.lose()
    ask(b, "b")
    ask(b, "c")
    world.run(15.0)
    assert used(b) == [20]
    a.stopped = False
    world.run(1.0)
    assert a.row is not None
    assert posted(a) == [False]
    assert a.keeper.trouble is None
    assert a.pool.slots < a.pool.open == 15


def test_after_a_lost_sign_nothing_is_acknowledged_before_the_row_is_seen(world):
    a = world.member()
    a.store.lose()
    answers = posted(a)
    assert (answers, a.pool.frozen) == ([False], True)
    world.now += 0.2
    a.keeper.post(answers.append)
    step_until(a, "committed", answers)
    assert a.pool.frozen
    a.step()
    assert (answers, a.pool.frozen) == ([False, True], False)


def test_new_sessions_are_posted_though_nobody_asks_for_it(world):
    a = world.member()
    session = world.server.connect(a.store.member)
    a.pool.there.append(session)
    a.pool.slots = a.pool.open
    world.run(11.0)
    assert session in a.row.sessions


# -- errors ------------------------------------------------------------------------


def test_an_error_reaches_the_callers_of_those_that_own_nothing(world, caplog):
    a = world.member()
    world.host.rows["gone/9"] = "nonsense"
    ask(a, "a", 2)
    world.run(3.0)
    assert (a.pool.refusals, a.pool.waiting["a"]) == ([], 2)
    assert "'gone/9' cannot be read" in a.keeper.trouble
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert isinstance(world.member("b", 2).pool.refusals[0], LedgerError)
    a.pool.release("a")
    assert used(a) == [3]  # by what it owns
    del world.host.rows["gone/9"]
    world.run(2.0)
    assert (a.keeper.trouble, used(a)) == (None, [4])


# -- which server ------------------------------------------------------------------


def elsewhere(world):
    """A process that wants three connections, at another server."""
    process = world.start()
    process.pool.at_server = Server()
    process.pool.at_server.name = "another"
    ask(process, "b", 3)
    return process


def test_members_whose_connections_go_to_another_server_are_refused(world):
    a = world.member()
    assert world.book.meta.server == read(a.store).book.server == "the server"
    b = elsewhere(world)
    world.run(5.0)
    refusal = b.pool.refusals[0]
    assert isinstance(refusal, ServerDiffers)
    assert refusal.args[0] == (
        "the members of this ledger use server the server, and this pool's "
        "connections go to server another: name another ledger for it "
        "(members: here:m00001)"
    )
    assert (used(b), b.row, b.pool.at_server.open) == ([0], None, 0)
    assert world.book.free == 17
    ask(a, "a", 12)
    world.run(0.1)
    assert used(a) == [15]


def test_the_server_of_the_dead_binds_nobody(world):
    world.member().kill()
    b = elsewhere(world)
    world.run(2.0)
    assert used(b) == [3]
    assert world.book.meta.server == "another"


# -- rows that were deleted --------------------------------------------------------


@pytest.mark.parametrize("comes_back", [True, False])
def test_who_does_not_notice_that_the_rows_were_deleted_keeps_its_slots(
    world, comes_back
):
    a = world.member("a", 12)
    a.stopped = True
    world.host.delete()
    b = world.member("b", 15)
    world.run(30.0, tick=0.01)
    assert used(b) == [0]
    assert read(b.store).book.is_fresh
    if comes_back:
        a.stopped = False
    else:
        a.kill()
        a.server_notices()
    world.run(3.0)
    assert world.server.most <= 20
    assert not world.book.is_fresh
    assert (len(a.sessions) >= 10) == comes_back
    assert len(a.sessions) + used(b)[0] == 20 or used(b) == [10 if comes_back else 15]


def test_idle_members_of_deleted_rows_are_woken_and_say_so(world, caplog):
    a = world.member("a", 3)
    free(a, "a", 3)
    a.pool.active.clear()
    world.run(30.0, tick=0.01)
    world.host.delete()
    b = world.start()
    ask(b, "b", 10)
    world.run(0.5)
    assert a.row is not None
    assert used(b) == [10]
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_a_member_of_deleted_rows_opens_nothing_until_it_has_joined_again(world):
    a = world.member("a", 15)
    free(a, "a", 15)
    close_idle(a, left=2)
    assert a.pool.slots == 15
    world.host.delete()
    a.wake_at = 0.0
    a.step()
    assert a.pool.slots == 2
    ask(a, "a", 5)
    assert a.pool.open == 2
    world.run(1.0)
    assert a.pool.open == 5


def test_a_confirmation_counts_only_for_the_rows_it_was_asked_for():
    book = Book({})
    book.join("a", {}, TERMS)
    book.confirm(["a", "b"])
    assert book.is_fresh
    assert (book.free, book.left) == (0, 20)
    book.confirm(["a"])
    assert book.free == 20


# -- rows that are older than what is so -------------------------------------------


def with_older_row(world, now):
    """A member with so many connections open, in whose row there are three."""
    a = world.member("a", 3)
    rows = dict(world.host.rows)
    ask(a, "a", now - 3)
    world.run(0.1)
    assert len(a.sessions) == now
    world.host.rows = rows
    return a


def test_one_whose_row_is_older_takes_what_is_free_for_what_it_has_open(world):
    a, b = with_older_row(world, 12), world.member("b", 4)
    world.run(11.0)
    assert (a.row.owned, b.row.owned) == (12, 4)
    assert set(a.row.sessions) == set(a.sessions)


def test_one_that_has_more_open_than_it_owns_opens_nothing(world):
    a = with_older_row(world, 15)
    world.member("b", 15)
    assert len(a.sessions) == 15
    before = world.server.open
    ask(a, "c", 5)
    for _ in range(15):
        a.pool.release("a")
        ask(a, "a", 1)
        world.run(1.0, tick=0.01)
        assert world.server.open <= before
        before = max(world.server.open, 20)
    assert world.book.owned + world.book.quarantined <= 20
    assert len(a.sessions) <= a.row.owned


def test_a_reset_while_members_live_hands_out_nothing_before_they_are_back(world):
    a = world.member("a", 12)
    a.stopped = True
    Book(world.host.rows).reset()
    b = world.member("b", 15)
    world.run(3.0)
    assert used(b) == [0]
    a.stopped = False
    world.run(12.0)
    assert world.server.most <= 20
    assert used(b)[0] >= 8
