"""The keeper: what it asks the store for and when, and what it does about the rest."""

from __future__ import annotations

import _thread
import json
import threading
from dataclasses import replace

import pytest
from support.ledger import TERMS, World, ask, close_idle, free, used
from support.ledger_simulation import simulate
from support.ledger_turns import LedgerTurns
from support.ledger_world import Host, MemoryStore, Server, SimPool
from support.threads import PATIENCE, eventually

from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.demand import TagDemand, condense
from sqla_fairpool.ledger.keeper import Keeper
from sqla_fairpool.ledger.rows import PROTOCOL, Left, Terms, member_key
from sqla_fairpool.ledger.store import LedgerError
from sqla_fairpool.ledger.watch import Pace
from sqla_fairpool.scheduling import policy
from sqla_fairpool.scheduling.tags import ALL

#: Those of members that do not agree with the others.
OTHER_TERMS = Terms(10, 5, 8, 60.0, 30.0)

# -- getting slots -----------------------------------------------------------------


def test_first_slot_is_one_transaction_and_its_session_another(world):
    world.member("a", 1)
    before = world.host.transactions
    process = world.start()
    process.pool.request("a")
    for transactions in (1, 2):
        process.step()
        assert world.host.transactions - before == transactions
        assert (process.pool.open, used(process)) == (1, [transactions - 1])
    assert [*process.row.sessions] == process.sessions


def test_what_is_asked_of_the_store_is_counted(world):
    process = world.start()
    process.pool.request("a")
    process.step()
    assert (
        process.keeper.stats().transactions == 3
    )  # it joins, and looks if it is alone
    process.step()  # the session, in one message, and a look
    assert process.keeper.stats().transactions == 5
    process.keeper.post(lambda answer: None)
    process.step()  # a reading
    assert process.keeper.stats().transactions == 6


def test_a_slot_goes_to_another_process_by_three_transactions_and_a_bell(world):
    """It is given, it is taken, and the new session is posted."""
    a, b = world.members(a=10, b=10)
    ask(b, "b2", 1)
    world.run(1.5)
    assert used(a, b) == [10, 10]
    transactions, began = world.host.transactions, world.now
    free(a, "a", 1)
    while used(b) == [10]:
        world.run(0.002)
    assert world.now - began < 0.05
    assert world.host.transactions - transactions == 3


def test_unused_slots_stay_until_another_is_short_or_their_connections_end(world):
    a, b = world.member("a", 12), world.start()
    free(a, "a", 12)
    world.run(5.0)
    assert a.row.owned == 12
    ask(b, "b", 10)
    world.run(0.1)
    assert used(b) == [10]
    assert a.row.owned == a.pool.open == 10
    close_idle(a)
    world.run(25.0)
    assert a.row.owned == 0


def test_a_new_tag_counts_within_a_beat_though_nobody_waits(world):
    a, b = world.start(), world.start()
    ask(a, "a", 15)
    ask(b, "a", 1)
    world.run(0.1)
    a.pool.request("b")
    world.run(1.2)
    assert a.pool.ceiling("a") + b.pool.ceiling("a") == 10


# -- sharing -----------------------------------------------------------------------


def test_nothing_is_written_while_all_are_saturated(world):
    for tag in "abcd":
        ask(world.start(), tag)
    world.churn(2.0)
    commits = world.host.commits
    holdings = [p.row.owned for p in world.living]
    world.churn(10.0)
    assert world.host.commits == commits
    assert [p.row.owned for p in world.living] == holdings == [5, 5, 5, 5]


def test_a_gap_between_two_checkouts_does_not_cost_the_slot(world):
    a, b = world.members(a=10, b=10)
    ask(b, "c", 10)
    world.churn(2.0)
    a.pool.waiting.clear()
    owned = a.row.owned
    assert owned in (6, 7)

    def loop():
        """Nobody waits; each connection is out again after a moment."""
        if a.pool.in_use["a"] == owned:
            free(a, "a", 1)
        else:
            a.pool.request("a")

    world.run(1.5, loop)
    commits = world.host.commits
    world.run(5.0, loop)
    assert world.host.commits == commits
    assert a.row.owned == owned
    # One that is not used again goes to those who wait.
    free(a, "a", 2)
    world.run(0.05)
    assert a.row.owned == a.pool.in_use["a"] < owned


def hand_over(world, giver, taker):
    """Return after how many ms/10 one has the slot that the other does not use."""
    began = world.now
    free(giver, "a")
    while not taker.pool.in_use.total():
        world.run(0.0001, tick=0.0001)
    return round((world.now - began) * 10_000)


def test_slots_are_given_up_sooner_while_none_is_wanted_back_at_once():
    world = World(Terms(1, 1, 1, 60.0, 30.0))
    a, b = world.members(a=1, b=1)

    def again(pause):
        """The slot goes from a to b, and after a pause back to a."""
        took = hand_over(world, a, b)
        world.run(pause, tick=0.0001)
        ask(a, "a", 1)
        world.run(0.01)
        free(b, "b")
        world.run(0.1)
        ask(b, "b", 1)
        world.run(0.1)
        return took

    longest = Pace().linger * 10_000
    at_most = longest / 16 + 3  # in steps of one
    assert all(again(0.1) >= longest for _ in range(8))
    assert longest / 16 <= again(0.1) <= at_most
    assert again(0.0) <= at_most  # and it is wanted back within a millisecond
    assert all(again(0.1) >= longest for _ in range(8))
    assert again(0.1) <= at_most


def test_more_processes_than_slots_take_turns():
    world = World(Terms(4, 4, 4, 60.0, 30.0))
    for _ in range(10):
        ask(world.start(), "a", 3)
    totals = dict.fromkeys(world.living, 0)
    for _ in range(600):
        world.churn(0.1, tick=0.01)
        for process in world.living:
            totals[process] += process.pool.in_use.total()
    mean = sum(totals.values()) / len(totals)
    assert all(0.6 * mean < n < 1.4 * mean for n in totals.values())
    assert sum(totals.values()) > 0.9 * 4 * 600


def test_a_lost_bell_costs_no_more_than_a_beat(world):
    a, _ = world.members(a=10, b=11)
    ask(a, "c", 1)
    world.run(1.0)
    free(a, "a", 1)
    a.keeper._store.ring = lambda members: None
    world.run(1.2)
    assert world.book.free == 0


def test_a_small_simulation_converges_and_keeps_the_bound():
    report = simulate(60, 6, 30, seconds=4.0, pace=Pace())
    assert report.most <= 30
    for phase in report.phases:
        assert phase.converged is not None and phase.converged < 2.5
        assert phase.jain_tags > 0.97
        assert phase.used > 0.9
    assert any("Jain" in line for line in report.lines())


# -- when nothing happens ----------------------------------------------------------


def test_who_is_idle_or_served_by_what_it_owns_leaves_the_store_alone(world):
    silent, a = world.start(), world.member("a", 15)
    free(a, "a", 15)
    transactions = world.host.transactions

    def loop():
        ask(a, "a", 15)
        free(a, "a", 15)

    world.run(5.0, loop)
    assert world.host.transactions == transactions
    a.pool.active.clear()
    world.run(2.0)
    transactions = world.host.transactions
    world.run(60.0, tick=0.01)
    assert world.host.transactions - transactions <= 14
    assert silent.keeper.member.rows.transactions == 0


def test_a_pool_without_a_user_is_seldom_looked_at_until_it_rings(world):
    a, b, c = world.members(a=2, b=1, c=1)
    free(a, "a", 2)
    world.run(2.0)
    a.passed.clear()
    is_there, rounds = a.store.in_place, []
    a.store.in_place = lambda: rounds.append(world.now) or is_there()
    world.run(40.0, tick=0.01)
    assert a.passed.count("demand") <= 20
    # Whether the file is the one at its place is asked each beat all the same.
    assert len(rounds) >= 39
    ask(b, "b", 9)
    ask(c, "c", 9)
    world.run(0.1)
    assert (a.row.owned, used(b, c)) == (0, [10, 10])


def test_callers_do_not_ring_whose_tag_goes_short_already(world):
    """Nobody waited when it posted that it uses what it has to share now."""
    a = world.member("a", 15)
    b = world.start()
    ask(b, "b", 15)
    world.run(0.01)
    free(a, "a", 5)
    world.run(0.05)
    assert (used(a, b), a.row.tags["a"][:2]) == ([10, 10], (15, 0))
    ask(a, "a", 5)
    a.passed.clear()
    world.churn(5.0)
    assert a.passed.count("demand") <= 10
    assert used(a, b) == [10, 10]
    # When nobody waits any more it says so.
    a.pool.waiting.clear()
    world.run(2.5)
    assert a.row.tags["a"][:2] == (10, 0)


def test_figures_are_published_for_whoever_asks_and_only_then(world):
    a = world.member("a", 2)
    a.keeper._figures = lambda: {"open": a.pool.in_use.total()}
    assert world.host.published == {}
    transactions, rows = world.host.transactions, dict(world.host.rows)
    for answer in (1, 2):
        a.store.asked = True
        a.step()
        said = json.loads(world.host.published[a.store.member])
        assert said == {"answer": answer, "open": 2}
        assert not a.store.asked
    assert (world.host.transactions, world.host.rows) == (transactions, rows)
    # Where that cannot be done, it is trouble like any other.
    world.host.is_away = a.store.asked = True
    a.step()
    assert a.keeper.trouble == "no answer"
    world.host.is_away = False
    ask(a, "a")
    world.run(10.0)
    assert (a.keeper.trouble, used(a)) == (None, [15])


def one_with_a_grant():
    """A world of one slot, and two members; `b` was given the slot and rung."""
    world = World(Terms(1, 1, 1, 60.0, 30.0))
    a, b = world.members(a=1, b=1)
    free(a, "a")
    while b.store.member not in world.host.rung:
        world.now += 0.001
        a.step()
    assert (b.row.owned, b.row.granted, b.pool.slots) == (1, 1, 0)
    return world, a, b


def test_one_that_goes_short_is_given_what_comes_free_and_has_it_in_one_write():
    world, _, b = one_with_a_grant()
    transactions = world.host.transactions
    counted = b.keeper.stats().transactions
    b.step()
    assert (b.row.owned, b.row.granted, b.pool.slots) == (1, 0, 1)
    assert b.keeper.stats().transactions - counted == 2  # a reading, and that write
    assert world.host.transactions - transactions == 1


def test_grant_that_is_taken_back_before_it_was_taken_opens_nothing():
    """Between the reading of the rows and the message that takes it."""
    world, a, b = one_with_a_grant()
    b.step(budget=0)
    while b.passed[-1] != "begin":
        b.step(budget=1)
    assert "read" in b.passed[-2:]
    with a.store.transaction() as rows:
        book = Book(rows)
        book.stall({b.store.member: book.texts[b.store.member]})
        book.tell()
    assert (b.row.owned, b.row.granted, b.row.stalled) == (0, 0, True)
    ask(a, "a", 1)
    world.run(0.01)
    assert (a.pool.open, b.pool.open) == (1, 0)
    free(a, "a")
    world.run(1.0)
    assert (a.pool.open, b.pool.open, world.server.most) == (0, 1, 1)


def test_grant_of_one_that_dies_or_does_not_answer_goes_to_the_next():
    world, a, b = one_with_a_grant()
    b.kill()
    ask(a, "a", 1)
    world.run(2.5)
    assert (a.pool.open, world.quarantined) == (1, 0)  # it had used none of its slots
    world, a, b = one_with_a_grant()
    b.stopped = True
    ask(a, "a", 1)
    world.run(1.0)
    assert a.pool.open == 0
    world.run(world.living[0].keeper._pace.patience + 1.0)
    assert (a.pool.open, b.row.granted) == (1, 0)


def test_the_bell_rings_once_and_only_for_what_may_change_something(world):
    a, b = world.start(), world.start()
    ask(a, "a")
    ask(b, "b")
    world.churn(0.5)
    a.store.nudged = False
    ask(a, "a", 100)
    assert not (a.keeper._rung or a.store.nudged)
    a.pool.request("new")
    assert a.keeper._rung
    nudges, a = [], world.start()
    a.keeper._wake = lambda: nudges.append(1)
    for _ in range(5):
        a.keeper.ring("a")
    assert len(nudges) == 1


def test_too_many_tags_are_summed_up():
    demand = {f"t{n}": TagDemand(n, 0, True) for n in range(300)}
    shown = condense(demand)
    assert len(shown) == 257
    assert sum(want.wants for want in shown.values()) == sum(range(300))
    assert condense({"a": TagDemand(1, 2, True)}) == {"a": TagDemand(1, 2, True)}


# -- the store is away -------------------------------------------------------------


def test_while_the_store_is_away_nothing_grows_and_it_is_tried_less_and_less(world):
    a, b = world.member("a", 5), world.start()
    world.host.is_away = True
    ask(a, "a", 5)
    ask(b, "b", 5)
    world.churn(120.0, tick=0.01)
    assert used(a, b) == [5, 0]
    assert 120 / 3 <= b.passed.count("open") <= 80
    assert a.clock() - a.keeper.away_since > 115
    assert a.keeper.trouble == "no answer"
    world.host.is_away = False
    world.run(6.0)
    assert used(a, b) == [10, 5]
    assert a.keeper.away_since is None


def test_stats_of_a_member(world):
    """Slots by state, transactions, time away, time until a slot was handed over."""
    a, b = world.members(a=15, b=15)
    world.run(2.0)
    stats = b.keeper.stats()
    assert stats.slots == {"owned": 5, "others": 15, "free": 0, "quarantined": 0}
    assert stats.members == 2
    assert stats.handover_time.count == 0
    transactions = stats.transactions
    world.run(1.0)
    free(a, "a", 3)
    world.run(0.1)
    stats = b.keeper.stats()
    assert stats.slots == {"owned": 8, "others": 12, "free": 0, "quarantined": 0}
    assert stats.transactions > transactions
    assert stats.handover_time.count == 3
    assert stats.handover_time.max == pytest.approx(3.0, abs=0.2)
    world.host.is_away = True
    ask(b, "b", 1)
    world.run(4.0)
    assert 2.9 < b.keeper.stats().away_time <= 4.0
    world.host.is_away = False
    world.run(6.0)
    away = b.keeper.stats().away_time
    assert 4.0 < away < 10.0
    world.run(2.0)
    assert b.keeper.stats().away_time == away
    a.kill()
    world.run(3.0)
    stats = b.keeper.stats()
    assert (stats.members, stats.slots["quarantined"]) == (1, 12)


def test_what_was_closed_while_the_store_was_away_is_given_back_after(world):
    a, b = world.member("a", 15), world.start()
    ask(b, "b", 10)
    world.run(0.1)
    world.host.is_away = True
    free(a, "a", 5)
    world.run(2.0)
    assert a.pool.open == 10  # it was asked to before
    assert used(b) == [5]
    world.host.is_away = False
    world.run(6.0)
    assert used(a, b) == [10, 10]


@pytest.mark.parametrize("where", ["begin", "locked", "commit", "committed", "ring"])
def test_a_failure_anywhere_is_made_good(world, where):
    a, b = world.member("a", 15), world.start()
    a.fails_at = b.fails_at = where
    ask(b, "b", 10)
    free(a, "a", 5)
    world.run(5.0)
    assert used(a, b) == [10, 10]


def test_no_exception_leaves_the_keeper(world, caplog):
    a = world.start()
    ask(a, "a", 1)
    demand, a.pool.demand = a.pool.demand, lambda: 1 / 0
    world.run(1.0)
    assert "ZeroDivisionError" in caplog.text
    a.pool.demand = demand
    world.run(6.0)
    assert used(a) == [1]


# -- the dead and the stopped ------------------------------------------------------


def test_slots_of_a_stopped_process_are_not_used_and_the_others_share_the_rest(world):
    a, b, c = world.member("a", 30), world.start(), world.start()
    a.stopped = True
    ask(b, "b")
    ask(c, "c")
    world.churn(10.0)
    assert used(a, b, c) == [15, 3, 2]
    assert a.row.stalled
    a.stopped = False
    world.churn(2.0)
    assert sorted(used(a, b, c)) == [6, 7, 7]
    assert not a.row.stalled


def test_one_that_was_taken_for_dead_opens_nothing_before_it_has_seen_its_row(world):
    """The server had nothing to keep its slots for: they are others' now."""
    a, b = world.member("a", 15), world.start()
    free(a, "a", 15)
    close_idle(a)
    assert (a.pool.slots, a.pool.open) == (15, 0)
    a.stopped = True
    a.store.lose()
    ask(b, "b", 10)
    ask(b, "c", 10)
    world.run(4.0)
    assert used(b) == [20]
    a.stopped = False
    points = 0
    while a.row is None:
        a.step(budget=points)  # wherever it is stopped on its way back
        a.pool.request("a")
        assert world.server.most <= 20
        points = 1
        world.now += 0.1  # it tries again after a while
    world.run(1.0)
    assert world.server.most <= 20


def test_a_quarantine_that_was_left_and_entered_again_is_another_one(world):
    key = world.member("a", 3).store.member
    book = Book(dict(world.host.rows))

    def all_gone():
        return {number: Left(gone, (), 0) for number, gone in book.gone.items()}

    book.reap(dict(book.texts))
    asked_about = all_gone()
    book.join(key, {}, TERMS, 1)
    book.reap(dict(book.texts))
    book.release(asked_about)
    assert book.gone[1].slots == 3
    book.release(all_gone())
    assert (book.gone, book.free) == ({}, 20)


def test_who_has_written_since_is_not_dead(world):
    a = world.member("a", 3)
    texts = dict(world.book.texts)
    ask(a, "a", 1)
    world.run(0.1)
    book = world.book
    assert book.reap(texts) == []
    assert not book.gone


# -- coming and going --------------------------------------------------------------


def test_newcomer_adopts_the_terms_in_force(world, caplog):
    world.member("a", 12)
    b = world.start(OTHER_TERMS)
    ask(b, "b", 15)
    world.run(2.0)
    assert world.book.terms == b.pool.terms == TERMS
    assert used(b) == [8]
    assert not b.pool.refusals
    (warning,) = caplog.messages
    assert warning == (
        "the ledger memory has capacity=20 soft_limit=10 max_limit=15, this process "
        "had capacity=10 soft_limit=5 max_limit=8: the ledger's limits are in force"
    )
    b.kill()
    b.server_notices()
    world.run(2.0)
    assert world.book.terms == TERMS


@pytest.mark.parametrize("how", ["a newcomer leads", "a member sets", "an operator"])
def test_terms_are_changed_for_all_members_at_once(world, how, caplog):
    caplog.set_level("INFO")
    a, b = world.members(a=15, b=15)
    world.churn(2.0)
    assert used(a, b) == [10, 10]
    if how == "a newcomer leads":
        c = world.start(OTHER_TERMS, leads=True)
        ask(c, "a", 1)
    elif how == "a member sets":
        a.keeper.set_terms(OTHER_TERMS)
    else:
        with a.store.transaction() as rows:
            book = Book(rows)
            book.change(terms=OTHER_TERMS, set_by={"program": "set"})
            book.tell()
        a.store.ring_all()
    world.run(0.1)
    assert world.book.terms == OTHER_TERMS == a.pool.terms == b.pool.terms
    told = [one.levelname for one in caplog.records if "limits are in" in one.message]
    assert told == ["INFO", "INFO"]  # to adopt a change is nothing to warn of
    assert used(a, b) == [10, 10]  # nothing is taken away
    world.churn(3.0)
    assert used(*world.living) == ([4, 5, 1] if "leads" in how else [5, 5])
    a.keeper.set_terms(TERMS)
    world.churn(2.0)
    assert sum(used(*world.living)) == 20
    assert world.server.most == 20


@pytest.mark.parametrize("tag", [ALL, "a"])
def test_pause_holds_for_members_and_newcomers_until_it_is_resumed(world, tag):
    (a,) = members = world.members(a=4)
    for _ in range(2):
        world.pause(tag)
    ask(a, "a", 2)
    world.run(0.1)
    members.append(world.start())
    ask(members[1], "a", 2)
    free(a, "a", 4)
    world.run(2.0)
    assert used(*members) == [0, 0]
    if tag != ALL:
        ask(a, "b", 3)
        world.run(0.1)
        assert used(*members) == [3, 0]
        free(a, "b", 3)
    began = world.now
    for _ in range(2):
        world.pause(tag, False)
    while used(*members) != [2, 2]:
        world.run(0.01)
    assert world.now - began < 0.1


def test_quarantine_of_the_dead_ends_while_it_is_paused(world):
    a, b = world.members(a=4, b=4)
    world.pause(ALL)
    world.run(0.1)
    a.kill()
    with b.store.transaction() as rows:  # as the command does that waits
        book = Book(rows)
        book.reap({a.store.member: rows[member_key(a.store.member)]})
        book.change()
    b.store.ring_all()
    world.run(2.0)
    assert world.quarantined == 4
    a.server_notices()
    world.run(2.0)
    assert world.quarantined == 0


def test_members_have_to_agree_on_the_limits_of_tags(world):
    world.member("a", 1)
    tags = '{"b": {"max": 2, "reserved": 0, "weight": 1.0}}'
    b = world.start(replace(TERMS, tags=tags), leads=True)
    ask(b, "b", 9)
    world.run(0.1)
    assert world.book.terms.tags == tags
    assert used(b) == [2]


def test_reserved_slot_is_used_under_its_tag_only():
    world = World(Terms(8, 8, 8, 60.0, 30.0, '{"health": {"reserved": 1}}'))
    a, b = world.members(web=30, jobs=30)

    def busy():
        for process in world.living:
            for tag in (
                process.pool.in_use.elements() if world.now * 7 % 1 < 0.1 else ()
            ):
                process.pool.release(tag)
                process.pool.request(tag)
        members = world.book.members.values()
        assert sum(member.owned - member.kept for member in members) <= 7

    world.run(1.0, busy)
    assert (sum(used(a, b)), world.book.free) == (7, 1)
    ask(b, "health", 1)
    world.run(0.02, busy)
    assert b.pool.in_use["health"] == 1
    free(b, "health")
    world.run(3.0, busy)
    # Its process keeps it, and the next time it asks nobody.
    assert (b.row.kept, b.row.owned) == (1, used(b)[0] + 1)
    ask(b, "health", 1)
    assert b.pool.in_use["health"] == 1
    free(b, "health")
    b.kill()
    b.server_notices()
    world.run(5.0, busy)
    assert (used(a), world.book.free) == ([7], 1)


@pytest.mark.parametrize("where", ["apart", "both", "by weight"])
def test_tags_get_the_same_time_whether_they_hold_long_or_in_several_processes(where):
    """The same per weight, where those of weight 3 are in one process."""
    heavy = ("tag0", "tag1", "tag2") if where == "by weight" else ()
    own = {tag: {"weight": 3.0} for tag in heavy}
    turns = LedgerTurns(2, capacity=4, tags=json.dumps(own))
    for n in range(16):
        tag, hold = f"tag{n}", 0.5 if n < 5 else 0.02
        here = n > 2 if where == "by weight" else n % 2
        turns.come(here, tag, 2, hold)
        if where == "both" and not n % 4:
            turns.come(1 - here, tag, 2, hold)
    turns.run(10.0)
    turns.forget()
    turns.run(50.0)
    turns.check()
    times = [turns.seconds[tag] / (3.0 if tag in own else 1.0) for tag in turns.holds]
    assert policy.jain(times) >= 0.98
    assert turns.server.most == 4


@pytest.mark.parametrize(("where", "hold"), [("0", 0.02), ("01", 0.02), ("01", 0.5)])
def test_tag_that_was_quiet_for_an_hour_gets_no_more_than_its_share(where, hold):
    turns = LedgerTurns(2, capacity=4)
    for process in where:
        turns.come(int(process), "quiet", 2, hold)
    turns.run(10.0)
    del turns.holds["quiet"]
    turns.run(3610.0)
    for n in range(19):
        turns.come(n % 2, f"tag{n}", 2, 0.5 if n < 6 else 0.02)
    turns.run(3630.0)
    turns.forget()
    for process in where:
        turns.come(int(process), "quiet", 2, hold)
    turns.run(3640.0)
    share = 4 * 10.0 / 20  # of the ten seconds that are a half-life
    most = share * 1.05 + hold * len(where)  # whole holds, in each process
    assert share / 2 <= turns.seconds["quiet"] <= most


def test_the_terms_of_the_dead_bind_nobody(world):
    a = world.member("a", 15)
    a.kill()
    b = world.start(OTHER_TERMS)
    ask(b, "b", 9)
    world.run(1.5)
    assert world.book.terms.capacity == 10
    assert used(b) == [0]  # fifteen sessions are there still
    a.server_notices()
    world.run(2.0)
    assert used(b) == [8]


def test_rows_of_a_later_version_are_refused(world):
    world.member("a", 1)
    meta = json.loads(world.host.rows["meta"])
    world.host.rows["meta"] = json.dumps(meta | {"protocol": PROTOCOL + 1})
    b = world.member("b", 1)
    assert type(b.pool.refusals[0]) is LedgerError
    assert f"protocol version {PROTOCOL + 1}" in str(b.pool.refusals[0])


def test_numbers_are_given_once():
    rows = {}
    book = Book(rows)
    assert book.join("one", {}, TERMS) == 1
    # One that a new ledger has given to another is not taken.
    assert book.join("two", {}, TERMS, 1) == 2
    assert book.join("three", {}, TERMS, 7) == 7
    assert book.join("four", {}, TERMS) == 8
    assert book.join("four", {}, TERMS, 3) == 8  # it is a member already
    Book(rows).reset()
    assert [*rows] == ["meta"]
    assert Book(rows).join("five", {}, TERMS) == 9


def test_close_gives_back_what_is_closed_and_leaves_the_rest_in_quarantine(world):
    a, b = world.members(a=15, b=15)
    world.churn(1.0)
    a.pool.waiting.clear()
    a.pool.detach("a")
    free(a, "a", 9)
    a.close()
    assert a.row is None
    assert a.store.member not in world.host.alive
    world.run(0.1)
    assert used(b) == [15]
    (gone,) = world.book.gone.values()
    assert (gone.slots, gone.why) == (1, "left connections open")
    a.server_notices()
    world.run(12.0)
    assert not world.book.gone


def test_a_forked_child_owns_nothing_and_its_parent_everything(world):
    parent, answers = world.member("a", 3), []
    parent.keeper.post(answers.append)
    child = parent.fork()
    assert child.store.member != parent.store.member
    assert (child.pool.slots, child.keeper.member.allotment) == (0, None)
    ask(child, "a", 2)
    world.run(0.1)
    assert (parent.row.owned, child.row.owned) == (3, 2)
    child.kill()
    other = parent.fork()
    other.keeper.close()  # which answers nothing for its parent
    world.run(1.0)
    assert (parent.row.owned, answers) == (3, [True])


def test_one_whose_row_was_reset_keeps_what_it_has_open(world):
    a, b = world.member("a", 12), world.start()
    Book(world.host.rows).reset()
    world.run(11.0)
    assert (a.row.owned, a.row.number) == (12, 1)
    ask(b, "b", 12)
    world.run(0.1)
    assert used(a, b) == [12, 8]


# -- the thread --------------------------------------------------------------------


class BlockingStore(MemoryStore):
    """One whose bell wakes a thread."""

    def __init__(self, host):
        super().__init__(host)
        self.bell = threading.Event()

    def nudge(self):
        self.bell.set()

    def wait(self, seconds):
        rung = self.bell.wait(seconds)
        self.bell.clear()
        return rung


class LockedPool(SimPool):
    """One that its keeper's thread and ours may call at once."""

    def __init__(self, server, session):
        super().__init__(server, session)
        lock = threading.RLock()
        for name in (
            *("demand", "allot", "close_surplus", "buried", "_answered"),
            *("request", "release"),
        ):
            setattr(self, name, locked(lock, getattr(self, name)))


def locked(lock, function):
    def call(*args):
        with lock:
            return function(*args)

    return call


@pytest.fixture
def pool():
    """One with a keeper that has a thread."""
    pool = LockedPool(Server(), "a")
    pool.keeper = Keeper(BlockingStore(Host()), TERMS, pool)
    yield pool
    pool.keeper.close()


def runners():
    """The threads of keepers."""
    return [t for t in threading.enumerate() if t.name == "sqla_fairpool-keeper"]


@pytest.mark.parametrize("how", ["before", "after"])
def test_interrupt_while_the_thread_is_started(pool, monkeypatch, how):
    """Before it is started, or after that: later there is one that does the work."""
    start = _thread.start_new_thread

    def interrupted(function, args):
        if how == "after":
            start(function, args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.request("a")
    pool.keeper.ring()
    eventually(lambda: pool.in_use["a"] == 1)
    eventually(lambda: len(runners()) == 1)
    pool.keeper.close()
    assert runners() == []


def test_a_post_starts_the_thread_and_is_answered_by_it(pool):
    told, answers = threading.Event(), []

    def done(answer):
        answers.append((answer, threading.current_thread().name))
        told.set()

    assert runners() == []
    pool.keeper.post(done)
    assert told.wait(PATIENCE)
    assert answers == [(True, "sqla_fairpool-keeper")]
    pool.keeper.close()
    pool.keeper.post(done)
    assert [answer for answer, _ in answers] == [True, False]


def test_a_keeper_that_was_closed_stays_closed(pool):
    pool.keeper.close()
    pool.request("a")
    assert (runners(), pool.in_use["a"]) == ([], 0)


def test_where_no_thread_can_be_started_a_post_is_denied(pool, monkeypatch):
    def start(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", start)
    answers = []
    for _ in range(2):
        pool.keeper.post(answers.append)
    assert answers == [False, False]
