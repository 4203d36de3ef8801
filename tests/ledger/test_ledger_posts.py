"""What a pool is told about its posts; rows that were deleted, or are older."""

from __future__ import annotations

import pytest
from support.ledger import TERMS, ask, close_idle, free, posted, used
from support.ledger_world import Server

from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.errors import LedgerError, ServerDiffers
from sqla_fairpool.ledger.inspector import read
from sqla_fairpool.ledger.rows import Terms

# -- posts -------------------------------------------------------------------------


def test_a_post_is_acknowledged_after_the_commit(world):
    a = world.member()
    answers = []
    a.keeper.post(answers.append)
    assert answers == []
    a.step(budget=0)
    while a.passed[-1] != "committed":
        a.step(budget=1)
        assert answers == []
    a.step()
    assert answers == [True]


def test_all_posts_before_a_look_are_answered_by_one_transaction(world):
    a = world.member()
    transactions = world.host.transactions
    answers = []
    for _ in range(20):
        a.keeper.post(answers.append)
    a.step()
    assert answers == [True] * 20
    assert world.host.transactions - transactions == 1


def test_one_that_posts_before_it_is_a_member_becomes_one(world):
    a = world.start()
    answers = []
    a.keeper.post(answers.append)
    world.run(0.1)
    assert answers == [True]
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


@pytest.mark.parametrize("where", ["begin", "locked", "commit", "committed"])
def test_a_transaction_that_fails_denies_its_posts(world, where):
    a = world.member()
    answers = []
    a.keeper.post(answers.append)
    a.fails_at = where
    a.step()
    assert answers == [False]


def test_a_closed_keeper_denies_posts(world):
    a, answers = world.member(), []
    a.keeper.post(answers.append)
    a.close()
    assert answers == [False]
    a.keeper.post(answers.append)
    assert answers == [False, False]


def test_one_that_is_refused_is_denied(world):
    world.member()
    b = world.start(Terms(10, 5, 8, 60.0, 30.0))
    assert posted(b) == [False]


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


def test_after_a_lost_sign_of_life_nothing_is_acknowledged_before_the_row_is_seen(
    world,
):
    a, answers = world.member(), []
    a.store.lose()
    a.keeper.post(answers.append)
    a.step()
    assert answers == [False]
    assert a.pool.frozen
    world.now += 0.2
    a.keeper.post(answers.append)
    a.step(budget=0)
    while a.passed[-1] != "committed":
        assert answers == [False]
        assert a.pool.frozen
        a.step(budget=1)
    a.step()
    assert answers == [False, True]
    assert not a.pool.frozen


def test_a_forked_child_answers_nothing_for_its_parent(world):
    a, answers = world.member(), []
    a.keeper.post(answers.append)
    child = a.fork()
    child.keeper.close()
    assert answers == []
    a.step()
    assert answers == [True]


def test_new_sessions_are_posted_though_nobody_asks_for_it(world):
    a = world.member()
    session = world.server.connect(a.store.member)
    a.pool.there.append(session)
    a.pool.slots = a.pool.open
    world.run(11.0)
    assert session in a.row.sessions


# -- errors ------------------------------------------------------------------------


def test_an_error_does_not_reach_the_callers_of_one_that_owns_slots(world, caplog):
    a = world.member()
    world.host.rows["gone/9"] = "nonsense"
    ask(a, "a", 2)
    world.run(3.0)
    assert a.pool.refusals == []
    assert a.pool.waiting["a"] == 2
    assert "'gone/9' cannot be read" in a.keeper.trouble
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    a.pool.release("a")
    assert used(a) == [3]  # by what it owns
    del world.host.rows["gone/9"]
    world.run(2.0)
    assert a.keeper.trouble is None
    assert used(a) == [4]


def test_an_error_reaches_the_callers_of_one_that_owns_nothing(world):
    world.member()
    world.host.rows["gone/9"] = "nonsense"
    b = world.member("b", 2)
    assert isinstance(b.pool.refusals[0], LedgerError)


# -- which server ------------------------------------------------------------------


def elsewhere(world):
    process = world.start()
    process.pool.at_server = Server()
    process.pool.at_server.name = "another"
    return process


def test_members_whose_connections_go_to_another_server_are_refused(world):
    a = world.member()
    assert world.book.meta.server == read(a.store).book.server == "the server"
    b = elsewhere(world)
    ask(b, "b", 3)
    world.run(5.0)
    refusal = b.pool.refusals[0]
    assert isinstance(refusal, ServerDiffers)
    assert str(refusal) == (
        "the members of this ledger use server the server, and this pool's "
        "connections go to server another: name another ledger for it "
        "(members: here:m00001)"
    )
    assert used(b) == [0]
    assert b.row is None
    assert b.pool.at_server.open == 0
    assert world.book.free == 17
    ask(a, "a", 12)
    world.run(0.1)
    assert used(a) == [15]


def test_the_server_of_the_dead_binds_nobody(world):
    a = world.member()
    a.kill()
    b = elsewhere(world)
    ask(b, "b", 3)
    world.run(2.0)
    assert used(b) == [3]
    assert world.book.meta.server == "another"


# -- rows that were deleted --------------------------------------------------------


def test_when_the_rows_are_deleted_all_meet_in_the_new_ones(world, caplog):
    a, b = world.member("a", 10), world.start()
    ask(b, "b", 10)
    world.run(0.1)
    world.host.delete()
    c = world.start()
    ask(c, "c")
    ask(a, "d")
    ask(b, "e")
    world.run(5.0)
    assert world.server.most <= 20
    book = world.book
    assert book.members.keys() == {p.store.member for p in (a, b, c)}
    assert not book.is_fresh
    assert book.owned == 20
    free(a, "a", 5)
    world.run(2.0)
    assert used(c)[0] > 0
    assert world.server.most <= 20
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 2  # by each that was a member before


def test_who_does_not_notice_that_the_rows_were_deleted_keeps_its_slots(world):
    a = world.member("a", 12)
    a.stopped = True
    world.host.delete()
    b = world.start()
    ask(b, "b", 15)
    world.run(30.0, tick=0.01)
    assert used(b) == [0]
    assert read(b.store).book.is_fresh
    a.stopped = False
    world.run(3.0)
    assert world.server.most <= 20
    assert len(a.sessions) >= 10
    assert len(a.sessions) + used(b)[0] == 20 or used(b) == [10]
    assert not world.book.is_fresh


def test_idle_members_of_deleted_rows_are_woken(world):
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


def test_the_dead_of_deleted_rows_do_not_keep_the_new_ones_closed(world):
    a = world.member("a", 12)
    a.stopped = True
    world.host.delete()
    b = world.start()
    ask(b, "b", 15)
    world.run(2.0)
    a.kill()
    a.server_notices()
    world.run(2.0)
    assert used(b) == [15]


def test_a_member_of_deleted_rows_opens_nothing_until_it_has_joined_again(world):
    a = world.member("a", 3)
    ask(a, "a", 12)
    world.run(0.1)
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


def test_one_whose_row_is_older_takes_what_is_free_for_what_it_has_open(world):
    a = world.member("a", 3)
    copy = dict(world.host.rows)
    ask(a, "a", 9)
    world.run(0.1)
    assert len(a.sessions) == 12
    world.host.rows = copy
    b = world.member("b", 4)
    world.run(11.0)
    assert (a.row.owned, b.row.owned) == (12, 4)
    assert set(a.row.sessions) == set(a.sessions)


def test_one_that_has_more_open_than_it_owns_opens_nothing(world):
    a = world.member("a", 3)
    copy = dict(world.host.rows)
    ask(a, "a", 12)
    world.run(0.1)
    world.host.rows = copy
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
    b = world.start()
    ask(b, "b", 15)
    world.run(3.0)
    assert used(b) == [0]
    a.stopped = False
    world.run(12.0)
    assert world.server.most <= 20
    assert used(b)[0] >= 8
