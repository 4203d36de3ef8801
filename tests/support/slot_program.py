"""Processes that take slots in a host store and give them back.

Usage: slot_program.py PATH HOW

HOW is stores, used, fresh or threads. Counts in shared memory, beside the ledger, how
many slots are taken; prints the most there were at once, and how many turns were done.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from programs import in_child, wait_for

from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.store import StoreAway

SLOTS = 4
WORKERS = 6
CHILDREN = 40


class Count:
    """What is taken, as it is, whatever the ledger says."""

    def __init__(self):
        self.taken = multiprocessing.Value("i", 0)
        self.most = multiprocessing.Value("i", 0, lock=False)
        self.turns = multiprocessing.Value("i", 0)

    def add(self, number):
        with self.taken.get_lock():
            self.taken.value += number
            self.most.value = max(self.most.value, self.taken.value)


def take(store, slot):
    with store.transaction() as rows:
        if len(rows) >= SLOTS:
            return False
        rows[slot] = "x" * 100
        return True


def turn(store, count):
    """Take a slot as soon as one is free, and give it back."""
    slot = uuid.uuid4().hex
    while not take(store, slot):
        time.sleep(0.001)
    count.add(1)
    with count.turns.get_lock():
        count.turns.value += 1
    time.sleep(0.001)  # so that others find it taken
    count.add(-1)
    with store.transaction() as rows:
        del rows[slot]


def work(path, store, count, turns):
    """Take turns; look at the ledger through another store now and then."""
    store.open()
    for number in range(turns):
        turn(store, count)
        if number % 10 == 0:
            other = HostStore(path)
            other.open()
            with other.transaction() as rows:
                len(rows)
            other.close()
    store.close()


def threads(path, count):
    """Ten threads in transactions while children are forked."""
    over = threading.Event()

    def go_on():
        store = HostStore(path)
        store.open()
        while not over.is_set():
            turn(store, count)
        store.close()

    shared = HostStore(path)  # by children and threads
    shared.open()
    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(go_on) for _ in range(10)]
        wait_for([in_child(work, path, shared, count, 20) for _ in range(CHILDREN)])
        over.set()
    for thread in running:
        thread.result()
    shared.close()


def main(path, how):
    count, store = Count(), HostStore(path)
    if how == "threads":
        threads(path, count)
    else:
        if how == "used":
            store.open()
            turn(store, count)
        # With stores of their own, or with that of their parent, which ends before.
        stores = [HostStore(path) if how == "stores" else store for _ in range(WORKERS)]
        children = [in_child(work, path, each, count, 200) for each in stores]
        if how != "stores":
            store.open()
            turn(store, count)
            store.close()
        wait_for(children)
    store.close()
    store.open()
    with store.transaction() as rows:
        left = len(rows)
    store.close()
    said = {"most": count.most.value, "turns": count.turns.value, "left": left}
    print(json.dumps(said))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except StoreAway as error:
        sys.exit(f"away: {error}")
