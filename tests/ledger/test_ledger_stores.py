"""Both stores: rows, signs of life, bells and figures, between real processes."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from support.stores import rows_of, store_at, write
from support.threads import PATIENCE, Caller, eventually

from sqla_fairpool.ledger.store import StoreAway, changes

# -- rows -----------------------------------------------------------------------------


def test_rows_are_kept_and_seen_by_others(make):
    one, two = make(), make()
    write(one, a="1", b="ü\n")
    assert rows_of(two) == {"a": "1", "b": "ü\n"}
    with two.transaction() as rows:
        del rows["a"]
        rows["b"] = "3"
    assert rows_of(one) == {"b": "3"}


def test_exception_undoes_everything(make):
    store = make()
    with pytest.raises(ZeroDivisionError), store.transaction() as rows:
        rows["a"] = str(1 / len([]))
    assert rows_of(store) == {}


def test_only_what_has_changed_is_written():
    before = {"a": "1", "b": "2", "c": "3"}
    assert changes(before, {"b": "2", "c": "4", "d": "5"}) == (
        ["a"],
        [("c", "4"), ("d", "5")],
    )


def add_many(store, times=100):
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
    assert rows_of(store) == {"n": "400"}


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


# -- signs of life --------------------------------------------------------------------


def fork(store):
    child = os.fork()
    if not child:
        store.after_fork()
        signal.pause()
    return child


def test_sign_stands_until_the_process_is_gone(make, place, elsewhere):
    store, other = make(), elsewhere(place)
    both = {other.member, store.member}
    assert store.living([*both, "nobody"]) == both
    os.kill(other.process.pid, signal.SIGSTOP)
    assert store.living([other.member]) == {other.member}
    other.kill()
    eventually(lambda: store.living([other.member]) == set())


def test_closing_gives_the_sign_up(make, place, elsewhere):
    store, other = make(), elsewhere(place)
    other(type(store).close)
    eventually(lambda: store.living([other.member]) == set())


def test_forked_child_does_not_keep_its_parents_sign(make, place, elsewhere):
    store, other = make(), elsewhere(place)
    child = other(fork)
    try:
        other.kill()
        eventually(lambda: store.living([other.member]) == set())
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


# -- bells ----------------------------------------------------------------------------


def test_bell_rings_in_another_process(make, place, elsewhere):
    store, other = make(), elsewhere(place)
    other.begin(type(store).wait, PATIENCE)
    store.ring([other.member, "nobody"])
    assert other.result() is True


def test_bell_that_rang_before_the_wait_is_heard_once(make):
    one, two = make(), make()
    for _ in range(5):
        one.ring([two.member])
    assert two.wait(PATIENCE)
    while two.wait(0.05):
        pass  # a server may send them one by one
    assert not two.wait(0)


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
    assert store.wait(PATIENCE)
    assert store.asked
    both = [store.member, other.member]
    assert other.published(both) == {}
    store.publish("one")
    store.publish("two\u20ac")
    assert other.published(both) == {store.member: "two\u20ac"}
    assert store.published([other.member]) == {}


def test_what_dead_members_have_published_is_removed(make):
    store, other = make(), make()
    store.publish("figures")
    member = store.member
    store.close()
    other.living([member])
    other.published([other.member])
    assert other.published([member]) == {}
