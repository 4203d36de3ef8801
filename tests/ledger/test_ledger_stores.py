"""Both stores: rows, signs of life, bells and figures, between real processes."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from support import state
from support.stores import join, rows_of, store_at, write
from support.stub import all_for_one
from support.threads import PATIENCE, Caller, connect, eventually, give

from sqla_fairpool.ledger.store import StoreAway, changes

# -- rows -----------------------------------------------------------------------------


def test_rows_are_kept_unless_there_is_an_exception_and_seen_by_others(make):
    one, two = make(), make()
    write(one, a="1", b="ü\n")
    assert rows_of(two) == {"a": "1", "b": "ü\n"}
    with two.transaction() as rows:
        del rows["a"]
        rows["b"] = "3"
    with pytest.raises(ZeroDivisionError), two.transaction() as rows:
        rows["b"] = str(1 / len([]))
    assert rows_of(one) == {"b": "3"}


def test_only_what_has_changed_is_written():
    before = {"a": "1", "b": "2", "c": "3"}
    after = {"b": "2", "c": "4", "d": "5"}
    assert changes(before, after) == (["a"], [("c", "4"), ("d", "5")])


def add_many(store, times=50):
    for _ in range(times):
        with store.transaction() as rows:
            rows["n"] = str(int(rows.get("n", "0")) + 1)


def test_transactions_are_exclusive_over_processes(make, place, elsewhere):
    others = [elsewhere(place) for _ in range(3)]
    for other in others:
        other.begin(add_many)
    store = make()
    add_many(store)
    for other in others:
        other.result()
    assert rows_of(store) == {"n": "200"}


def test_closed_store_is_away(place):
    store = store_at(place)
    for _ in range(2):
        with pytest.raises(StoreAway), store.transaction():
            pass
        store.nudge()
        store.close()
        store.open()
        store.open()
        assert rows_of(store) == {}
        store.close()


def test_reserved_connection_is_kept_in_every_process(server, ledger):
    limits = {"tags": {"health": {"reserved": 1}}, **all_for_one(3)}
    one, two = [server.engine(ledger=ledger, **limits) for _ in range(2)]
    held = [Caller(connect, engine, "web").result() for engine in (one, two)]
    waiting = [Caller(connect, engine, "web") for engine in (one, two)]
    for _ in range(3):
        Caller(connect, two, "health").result().close()
    assert two.pool.stats().tag("web").connections == 1
    give(held)
    give([caller.result() for caller in waiting])
    for engine in (one, two):
        state.keeper(engine).close()


# -- signs of life --------------------------------------------------------------------


def fork(store):
    child = os.fork()
    if not child:
        store.after_fork()
        signal.pause()
    return child


def test_sign_stands_until_the_process_is_gone_or_closes_its_store(
    make, place, elsewhere
):
    store, other, closing = make(), elsewhere(place), elsewhere(place)
    both = {other.member, store.member}
    assert store.living([*both, "nobody"]) == both
    closing(type(store).close)
    child = other(fork)  # which does not keep its parent's sign
    try:
        os.kill(other.process.pid, signal.SIGSTOP)
        assert other.member in store.living([other.member])
        other.kill()
        eventually(lambda: not store.living([other.member, closing.member]))
    finally:
        os.kill(child, signal.SIGKILL)


def test_after_fork_a_store_is_another_member(make):
    store = make()
    member = store.member
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        store.after_fork()
        os.write(writing, store.member.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100).decode() not in ("", member)
    os.close(reading)
    os.close(writing)
    assert store.living([member]) == {member}
    assert rows_of(store) == {}


def test_strangers_are_members_that_are_in_no_row(make):
    store, one, two = make(), make(), make()
    join(one)
    join(two)
    assert store.strangers([]) == 2
    assert store.strangers([one.member, "nobody"]) == 1
    assert store.strangers([one.member, two.member, store.member]) == 0
    one.close()
    two.close()
    eventually(lambda: store.strangers([]) == 0)


# -- bells ----------------------------------------------------------------------------


def test_bells_ring_in_other_processes_and_for_all_without_a_row(
    make, place, elsewhere
):
    store, other, here = make(), elsewhere(place), make()
    other.begin(type(store).wait, PATIENCE)
    store.ring([other.member, "nobody"])
    assert other.result() is True
    store.ring_all()
    assert here.wait(PATIENCE)


def test_bell_that_rang_before_the_wait_is_heard_once(make):
    one, two = make(), make()
    for _ in range(5):
        one.ring([two.member])
    assert two.wait(PATIENCE)
    while two.wait(0.05):
        pass  # a server may send them one by one
    assert not two.wait(0)


def test_bells_of_a_transaction_ring_with_its_commit_only(make):
    one, two = make(), make()
    with pytest.raises(ZeroDivisionError), one.transaction([two.member]):
        raise ZeroDivisionError
    assert not two.wait(0.05)
    with one.transaction([two.member]) as rows:
        rows["a"] = "new"
    assert two.wait(PATIENCE)
    assert rows_of(two)["a"] == "new"


def test_nudges_never_block_and_are_one(make):
    store = make()
    for _ in range(100_000):  # more than a FIFO holds
        store.nudge()
    assert store.wait(0)
    assert not store.wait(0)
    caller = Caller(store.wait, None)
    threading.Thread(target=store.nudge).start()
    assert caller.result() is True


# -- figures --------------------------------------------------------------------------


def test_asking_is_heard_and_what_is_published_is_read(make):
    store, other = make(), make()
    assert not store.asked
    other.ring([store.member])
    assert store.wait(PATIENCE)
    assert not store.asked
    other.ask([store.member, "nobody"])
    rows_of(store)  # what comes during a statement is heard after it
    assert store.wait(PATIENCE)
    assert store.asked
    member, both = store.member, [store.member, other.member]
    assert other.published(both) == {}
    store.publish("one")
    store.publish("two\u20ac")
    assert other.published(both) == {member: "two\u20ac"}
    assert store.published([other.member]) == {}
    # What dead members have published is removed.
    store.publish("figures")
    store.close()
    other.living([member])
    other.published([other.member])
    assert other.published([member]) == {}
