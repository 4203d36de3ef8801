"""The keeper: what it asks the store for and when, and what it does about the rest."""

from __future__ import annotations

import _thread
import json
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
from support.ledger import TERMS, World, ask, close_idle, free, used
from support.ledger_simulation import simulate
from support.ledger_world import Host, MemoryStore, Server, SimPool
from support.threads import PATIENCE, eventually

from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.demand import Pace, TagDemand, condense
from sqla_fairpool.ledger.errors import LedgerError, TermsDiffer
from sqla_fairpool.ledger.keeper import Keeper
from sqla_fairpool.ledger.rows import Left, Terms
from sqla_fairpool.scheduling.limits import TagLimits


class Churn:
    """Callers who hold for a while, return, and ask again: everybody is saturated."""

    def __init__(self, world, rounds=10):
        self.world = world
        self.rounds = rounds
        self.count = 0

    def __call__(self):
        self.count += 1
        if self.count % self.rounds:
            return
        for process in self.world.living:
            if not process.stopped:
                for tag in [*process.pool.in_use.elements()]:
                    process.pool.release(tag)
                    process.pool.request(tag)


# -- getting slots -----------------------------------------------------------------


def test_a_newcomer_gets_its_first_slot_in_one_transaction_and_posts_in_another(world):
    world.member("a", 1)
    before = world.host.transactions
    process = world.start()
    process.pool.request("a")
    process.step()
    assert world.host.transactions - before == 1
    assert (process.pool.open, used(process)) == (1, [0])
    process.step()
    assert world.host.transactions - before == 2
    assert used(process) == [1]
    assert [*process.row.sessions] == process.sessions


def test_four_scenarios_with_a_process_for_each_scraper(world):
    a, b, c = world.start(), world.start(), world.start()
    churn = Churn(world)
    ask(a, "layer1_5")
    world.run(0.5, churn)
    assert used(a, b, c) == [15, 0, 0]
    ask(b, "layer3")
    world.run(0.5, churn)
    assert used(a, b, c) == [10, 10, 0]
    ask(c, "layer2")
    world.run(0.5, churn)
    assert sorted(used(a, b, c)) == [6, 7, 7]
    c.pool.waiting.clear()
    free(c, "layer2", c.pool.in_use.total())
    c.pool.active.clear()
    world.run(1.5, churn)
    assert used(a, b, c) == [10, 10, 0]
    assert world.server.most <= 20


def test_a_slot_goes_to_another_process_by_three_transactions_and_a_bell(world):
    """It is given, it is taken, and the new session is posted."""
    a, b = world.start(), world.start()
    for process, tag in ((a, "a"), (b, "b")):
        ask(process, tag, 10)
    world.run(0.1)
    ask(b, "b2", 1)
    world.run(1.5)
    assert used(a, b) == [10, 10]
    transactions = world.host.transactions
    began = world.now
    free(a, "a", 1)
    while used(b) == [10]:
        world.run(0.002)
    assert world.now - began < 0.05
    assert world.host.transactions - transactions == 3


def test_unused_slots_stay_where_they_are_until_somebody_is_short_of_them(world):
    a, b = world.member("a", 12), world.start()
    free(a, "a", 12)
    world.run(5.0)
    assert a.row.owned == 12
    ask(b, "b", 10)
    world.run(0.1)
    assert used(b) == [10]
    assert a.row.owned == a.pool.open == 10


def test_slots_without_a_connection_are_given_up_in_time(world):
    a = world.member("a", 8)
    free(a, "a", 8)
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
    churn = Churn(world)
    world.run(2.0, churn)
    commits = world.host.commits
    holdings = [p.row.owned for p in world.living]
    world.run(20.0, churn)
    assert world.host.commits == commits
    assert [p.row.owned for p in world.living] == holdings == [5, 5, 5, 5]


def test_a_gap_between_two_checkouts_does_not_cost_the_slot(world):
    a, b = world.members(a=10, b=10)
    ask(b, "c", 10)
    world.run(2.0, Churn(world))
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


def test_more_processes_than_slots_take_turns():
    world = World(Terms(4, 4, 4, 60.0, 30.0))
    for _ in range(10):
        ask(world.start(), "a", 3)
    totals = dict.fromkeys(world.living, 0)
    churn = Churn(world)

    def busy():
        churn()
        for process in world.living:
            totals[process] += process.pool.in_use.total()

    world.run(60.0, busy, tick=0.01)
    mean = sum(totals.values()) / len(totals)
    assert all(0.6 * mean < n < 1.4 * mean for n in totals.values())
    assert sum(totals.values()) > 0.9 * 4 * 6000


def test_a_lost_bell_costs_no_more_than_a_beat(world):
    a, _ = world.members(a=10, b=11)
    ask(a, "c", 1)
    world.run(1.0)
    free(a, "a", 1)
    a.keeper._store.ring = lambda members: None
    world.run(1.2)
    assert world.book.free == 0


# -- when nothing happens ----------------------------------------------------------


def test_an_idle_process_hardly_touches_the_store(world):
    a = world.member("a", 3)
    free(a, "a", 3)
    a.pool.active.clear()
    world.run(2.0)
    transactions = world.host.transactions
    world.run(60.0, tick=0.01)
    assert world.host.transactions - transactions <= 14


def test_a_process_that_never_asks_never_touches_the_store(world):
    world.start()
    world.run(60.0, tick=0.05)
    assert world.host.transactions == 0


def test_local_traffic_within_what_is_owned_does_no_store_io(world):
    a = world.member("a", 15)
    free(a, "a", 15)
    transactions = world.host.transactions

    def loop():
        ask(a, "a", 15)
        free(a, "a", 15)

    world.run(5.0, loop)
    assert world.host.transactions == transactions


def test_figures_are_published_for_whoever_asks_and_only_then(world):
    a = world.start()
    a.keeper._figures = lambda: {"open": a.pool.in_use.total()}
    ask(a, "a", 2)
    world.run(0.1)
    assert world.host.published == {}
    for answer in (1, 2):
        a.store.asked = True
        a.step()
        said = json.loads(world.host.published[a.store.member])
        assert said == {"answer": answer, "open": 2}
        assert not a.store.asked
    transactions, rows = world.host.transactions, dict(world.host.rows)
    a.store.asked = True
    a.step()
    assert (world.host.transactions, world.host.rows) == (transactions, rows)


def test_figures_that_cannot_be_published_are_trouble_like_any_other(world):
    a = world.start()
    a.keeper._figures = dict
    ask(a, "a")
    world.run(0.1)
    world.host.is_away = True
    a.store.asked = True
    a.step()
    assert a.keeper.trouble == "no answer"
    world.host.is_away = False
    world.run(10.0)
    assert a.keeper.trouble is None
    assert used(a) == [15]


def test_waiting_that_changes_nothing_does_not_ring(world):
    a, b = world.start(), world.start()
    ask(a, "a")
    ask(b, "b")
    world.run(0.5, Churn(world))
    a.store.nudged = False
    ask(a, "a", 100)
    assert not a.keeper._rung
    assert not a.store.nudged
    a.pool.request("new")
    assert a.keeper._rung


def test_a_bell_that_rings_is_not_rung_again(world):
    a = world.start()
    nudges = []
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


def test_while_the_store_is_away_nothing_grows_and_what_is_owned_is_kept(world):
    a, b = world.member("a", 5), world.start()
    world.host.is_away = True
    ask(a, "a", 5)
    ask(b, "b", 5)
    world.run(20.0, Churn(world), tick=0.01)
    assert used(a, b) == [5, 0]
    assert a.clock() - a.keeper.away_since > 15
    assert a.keeper.trouble == "no answer"
    world.host.is_away = False
    world.run(6.0)
    assert used(a, b) == [10, 5]
    assert a.keeper.away_since is None


def test_while_the_store_is_away_it_is_tried_less_and_less(world):
    a = world.start()
    ask(a, "a", 1)
    world.host.is_away = True
    world.run(120.0, tick=0.01)
    assert 120 / 5 <= a.keeper.member.transactions + a.passed.count("open") <= 50


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
    for process in (a, b):
        process.fails_at = where
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


def test_slots_of_a_killed_process_come_back_when_its_sessions_are_gone(world):
    a, b = world.start(), world.start()
    ask(a, "a", 15)
    ask(b, "b", 15)
    world.run(1.0, Churn(world))
    assert used(a, b) == [10, 10]
    a.kill()
    world.run(20.0, Churn(world))
    assert used(b) == [10]
    ((number, gone),) = world.book.gone.items()
    assert (number, gone.slots, gone.why) == (1, 10, "died")
    a.server_notices()
    world.run(2.0, Churn(world))
    assert used(b) == [15]
    assert not world.book.gone


def test_where_the_server_cannot_be_asked_the_quarantine_has_an_end():
    world = World(can_ask=False)
    a, b = world.start(), world.start()
    ask(a, "a", 15)
    ask(b, "b", 15)
    world.run(1.0, Churn(world))
    a.kill()
    a.server_notices()
    world.run(9.0, Churn(world))
    assert used(b) == [10]
    world.run(4.0, Churn(world))
    assert used(b) == [15]


def test_a_newcomer_finds_the_slots_of_the_dead_by_itself(world):
    a = world.start()
    ask(a, "a", 10)
    ask(a, "b", 10)
    world.run(0.1)
    assert used(a) == [20]
    a.kill()
    a.server_notices()
    b = world.start()
    ask(b, "b", 15)
    world.run(2.0)
    assert used(b) == [15]


def test_slots_of_a_stopped_process_are_not_used_and_the_others_share_the_rest(world):
    a, b, c = world.start(), world.start(), world.start()
    ask(a, "a")
    world.run(0.1)
    a.stopped = True
    ask(b, "b")
    ask(c, "c")
    world.run(10.0, Churn(world))
    assert used(a, b, c) == [15, 3, 2]
    assert a.row.stalled
    a.stopped = False
    world.run(2.0, Churn(world))
    assert sorted(used(a, b, c)) == [6, 7, 7]
    assert not a.row.stalled


def test_a_stopped_process_does_not_keep_free_slots_from_the_others(world):
    a, b = world.member("a", 1), world.start()
    a.stopped = True
    a.pool.waiting["a"] = 20
    row = json.loads(world.host.rows["member/m00001"])
    row["tags"]["a"][1] = 20  # it had said so
    world.host.rows["member/m00001"] = json.dumps(row)
    ask(b, "b", 30)
    world.run(6.0, Churn(world))
    assert used(b) == [15]


def test_one_that_was_taken_for_dead_takes_its_slots_back(world):
    a, b = world.start(), world.start()
    ask(a, "a", 20)
    ask(b, "b", 20)
    world.run(0.5, Churn(world))
    a.stopped = True
    a.store.lose()
    world.run(5.0, Churn(world))
    assert [*world.book.gone] == [1]
    a.stopped = False
    world.run(2.0, Churn(world))
    assert not world.book.gone
    assert a.row.number == 1
    assert used(a, b) == [10, 10]


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
    a = world.member("a", 3)
    rows = dict(world.host.rows)
    key = a.store.member
    book = Book(rows)
    book.reap(dict(book.texts))
    asked_about = {n: Left(gone, (), 0) for n, gone in book.gone.items()}
    book.join(key, {}, TERMS, 1)
    book.reap(dict(book.texts))
    book.release(asked_about)
    assert book.gone[1].slots == 3
    book.release({n: Left(gone, (), 0) for n, gone in book.gone.items()})
    assert not book.gone
    assert book.free == 20


def test_who_has_written_since_is_not_dead(world):
    a = world.member("a", 3)
    texts = dict(world.book.texts)
    ask(a, "a", 1)
    world.run(0.1)
    book = world.book
    assert book.reap(texts) == []
    assert not book.gone


def test_a_number_that_a_new_ledger_gave_to_another_is_not_taken(world):
    rows = {}
    book = Book(rows)
    assert book.join("one", {}, TERMS) == 1
    assert book.join("two", {}, TERMS, 1) == 2
    assert book.join("three", {}, TERMS, 7) == 7
    assert book.join("four", {}, TERMS) == 8
    assert book.join("four", {}, TERMS, 3) == 8  # it is a member already


# -- coming and going --------------------------------------------------------------


def test_members_have_to_agree(world):
    world.member("a", 1)
    b = world.start(Terms(10, 5, 8, 60.0, 30.0))
    ask(b, "b", 1)
    world.run(0.1)
    (refusal, *_) = b.pool.refusals
    assert isinstance(refusal, TermsDiffer)
    assert str(refusal) == (
        "the members of a ledger have to agree on its limits: here capacity=10 "
        "soft_limit=5 max_limit=8, there capacity=20 soft_limit=10 max_limit=15 "
        "(members: here:m00001)"
    )
    assert b.keeper.trouble == str(refusal)
    assert b.store.member not in world.host.alive


def test_members_have_to_agree_on_the_limits_of_tags(world):
    world.member("a", 1)
    b = world.start(replace(TERMS, tags=Terms.text_of({"b": TagLimits(max=2)})))
    ask(b, "b", 1)
    world.run(0.1)
    (refusal, *_) = b.pool.refusals
    assert isinstance(refusal, TermsDiffer)
    assert 'here tags={"b": {"max": 2' in str(refusal)
    assert ", there tags={} (members" in str(refusal)


def test_the_terms_of_the_dead_bind_nobody(world):
    a = world.member("a", 15)
    a.kill()
    b = world.start(Terms(10, 5, 8, 60.0, 30.0))
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
    world.host.rows["meta"] = json.dumps(meta | {"protocol": 3})
    b = world.member("b", 1)
    assert type(b.pool.refusals[0]) is LedgerError
    assert "protocol version 3" in str(b.pool.refusals[0])


def test_close_gives_everything_back(world):
    a, b = world.start(), world.start()
    ask(a, "a", 15)
    ask(b, "b", 15)
    world.run(1.0, Churn(world))
    a.pool.waiting.clear()
    free(a, "a", 10)
    a.close()
    assert a.row is None
    assert a.store.member not in world.host.alive
    world.run(0.1)
    assert used(b) == [15]
    assert not world.book.gone


def test_close_leaves_slots_behind_for_connections_that_stay_open(world):
    a, b = world.member("a", 3), world.start()
    a.pool.detach("a")
    free(a, "a", 2)
    a.close()
    ((_, gone),) = world.book.gone.items()
    assert (gone.slots, gone.why) == (1, "left connections open")
    ask(b, "b", 1)
    world.run(0.1)
    a.server_notices()
    world.run(12.0)
    assert not world.book.gone


def test_a_forked_child_owns_nothing_and_its_parent_everything(world):
    parent = world.member("a", 3)
    child = parent.fork()
    assert child.store.member != parent.store.member
    assert (child.pool.slots, child.keeper.member.allotment) == (0, None)
    ask(child, "a", 2)
    world.run(0.1)
    assert (parent.row.owned, child.row.owned) == (3, 2)
    child.kill()
    world.run(1.0)
    assert parent.row.owned == 3


def test_a_reset_forgets_everything_but_the_numbers(world):
    a = world.member("a", 3)
    a.kill()
    rows = dict(world.host.rows)
    Book(rows).reset()
    assert [*rows] == ["meta"]
    world.host.rows = rows
    b = world.member("a", 3)
    assert b.row.number == 2


def test_one_whose_row_was_reset_keeps_what_it_has_open(world):
    a, b = world.member("a", 12), world.start()
    Book(world.host.rows).reset()
    world.run(11.0)
    assert a.row.owned == 12
    assert a.row.number == 1
    ask(b, "b", 12)
    world.run(0.1)
    assert used(a, b) == [12, 8]


# -- the thread --------------------------------------------------------------------


class BlockingStore(MemoryStore):
    """One whose lock is a lock, and whose bell wakes a thread."""

    lock = threading.Lock()

    def __init__(self, host, bells=None):
        super().__init__(host)
        self.bells = {} if bells is None else bells
        self.bells[self.member] = threading.Event()

    @contextmanager
    def transaction(self):
        with self.lock, super().transaction() as rows:
            yield rows

    def ring(self, members):
        for member in members:
            self.bells[member].set()

    def nudge(self):
        self.ring([self.member])

    def wait(self, seconds):
        rung = self.bells[self.member].wait(seconds)
        self.bells[self.member].clear()
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
def two_threads():
    """The pools of two processes, each with a keeper that has a thread."""
    host, server, bells = Host(), Server(), {}
    pools = [LockedPool(server, name) for name in "ab"]
    for pool in pools:
        store = BlockingStore(host, bells)
        pool.keeper = Keeper(store, TERMS, pool, sessions=server.look)
    yield pools
    for pool in pools:
        pool.keeper.close()


def test_threads_hand_slots_to_each_other(two_threads):
    a, b = two_threads
    for _ in range(20):
        a.request("a")
    eventually(lambda: a.in_use["a"] == 15)
    for _ in range(20):
        b.request("b")
    eventually(lambda: b.in_use["b"] == 5)
    eventually(lambda: a.slots == 10)  # before, what is free goes to its own callers
    for _ in range(5):
        a.release("a")
    eventually(lambda: b.in_use["b"] == 10)
    assert a.at_server.most <= 20
    assert threading.active_count() >= 3
    a.waiting.clear()
    for _ in range(10):
        a.release("a")
    a.keeper.close()
    assert a.keeper.member.allotment is None
    eventually(lambda: b.in_use["b"] >= 10)


def test_no_thread_before_somebody_rings(two_threads):
    names = [t.name for t in threading.enumerate()]
    assert "sqla_fairpool-keeper" not in names


@pytest.mark.parametrize("how", ["before", "after"])
def test_interrupt_while_the_thread_is_started(two_threads, monkeypatch, how):
    """Before it is started, or after that: later there is one that does the work."""
    a, _ = two_threads
    start = _thread.start_new_thread

    def interrupted(function, args):
        if how == "after":
            start(function, args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            a.request("a")
    a.keeper.ring()
    eventually(lambda: a.in_use["a"] == 1)

    def runners():
        return [t for t in threading.enumerate() if t.name == "sqla_fairpool-keeper"]

    eventually(lambda: len(runners()) == 1)
    a.keeper.close()
    assert runners() == []


def test_a_keeper_that_was_closed_stays_closed(two_threads):
    a, _ = two_threads
    a.keeper.close()
    a.request("a")
    test_no_thread_before_somebody_rings(two_threads)
    assert a.in_use["a"] == 0


def test_a_post_starts_the_thread_and_is_answered_by_it():
    pool = SimPool(Server(), "a")
    keeper = pool.keeper = Keeper(BlockingStore(Host()), TERMS, pool)
    told, answers = threading.Event(), []

    def done(answer):
        answers.append((answer, threading.current_thread().name))
        told.set()

    keeper.post(done)
    assert told.wait(PATIENCE)
    assert answers == [(True, "sqla_fairpool-keeper")]
    keeper.close()
    keeper.post(done)
    assert [answer for answer, _ in answers] == [True, False]


def test_where_no_thread_can_be_started_a_post_is_denied(monkeypatch):
    def start(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", start)
    keeper = Keeper(BlockingStore(Host()), TERMS, SimPool(Server(), "a"))
    answers = []
    for _ in range(2):
        keeper.post(answers.append)
    assert answers == [False, False]


# -- many --------------------------------------------------------------------------


def test_a_small_simulation_converges_and_keeps_the_bound():
    report = simulate(60, 6, 30, seconds=4.0, pace=Pace())
    assert report.most <= 30
    for phase in report.phases:
        assert phase.converged is not None
        assert phase.converged < 2.5
        assert phase.jain_tags > 0.97
        assert phase.used > 0.9
    assert any("Jain" in line for line in report.lines())
