"""Many threads, many operations, faults: nothing is lost, nothing given twice."""

from __future__ import annotations

import random
import threading

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from support.state import assert_consistent, assert_quiet
from support.stub import StubError
from support.threads import Caller, connect, give, take

TAGS = ["a", "b", "c", "unknown"]


@pytest.mark.parametrize("overflow", [0, 2])
def test_no_connection_is_handed_out_twice(make_pool, server, overflow):
    """Each worker writes its name into the connection it holds.

    A foreign name when it comes back is a double hand-out (the test of Vitess's
    pool, ``go/pools/smartconnpool/stress_test.go``).
    """
    pool = make_pool(
        pool_size=4, max_overflow=overflow, soft_limit=3, max_limit=4, timeout=30
    )
    barrier = threading.Barrier(16)

    def work(name):
        chance = random.Random(name)
        barrier.wait()
        for n in range(300):
            connection = connect(pool, chance.choice(TAGS))
            dbapi_connection = connection.dbapi_connection
            assert dbapi_connection.owner is None, "another caller has it"
            assert not dbapi_connection.closed
            mine = dbapi_connection.owner = (name, n)
            for _ in range(chance.randrange(20)):
                assert dbapi_connection.owner == mine
            dbapi_connection.owner = None
            connection.close()

    for caller in [Caller(work, f"worker{n}") for n in range(16)]:
        caller.result()
    assert server.most <= 4 + overflow


class Faults:
    """Makes the stub fail now and then, with errors of every kind."""

    def __init__(self, server, seed):
        self.chance = random.Random(seed)
        server.before["connect"] = lambda: self.perhaps(0.05)
        server.before["rollback"] = lambda: self.perhaps(0.02)

    def perhaps(self, probability):
        if self.chance.random() < probability:
            raise self.chance.choice([StubError, KeyboardInterrupt, MemoryError])


EXPECTED = (StubError, KeyboardInterrupt, MemoryError, PoolTimeoutError)

#: Tags become idle all the time.
OFTEN_IDLE = {"idle_timeout": 0.01, "reallocation_interval": 0.003}


class Visitor:
    """Does random things with a pool, in one thread, until it is told to leave."""

    def __init__(self, pool, seed):
        self.pool = pool
        self.chance = random.Random(seed)
        self.held = []

    def step(self):
        action = self.chance.random()
        try:
            if action < 0.01:
                self.change()
            elif action < 0.5:
                self.held.append(connect(self.pool, self.chance.choice(TAGS)))
            elif self.held:
                self.leave(self.chance.randrange(len(self.held)), action)
        except EXPECTED:
            pass

    def change(self):
        """What an operator does meanwhile; the capacity stays as it is."""
        size = self.pool.options.pool_size
        number = self.chance.randint(1, size)
        change = self.chance.choice(
            [
                {"soft_limit": 1, "max_limit": number},
                {"soft_limit": None, "max_limit": None},
                {"min_idle": number},
                {"idle_connection_ttl": 0.001},
                {"idle_connection_ttl": None},
            ]
        )
        self.pool.reconfigure(**change)
        self.chance.choice([self.pool.warm_up, self.pool.upkeep])()

    def leave(self, index, action):
        connection = self.held.pop(index)
        if action < 0.52:
            connection.invalidate()
        elif action < 0.54:
            connection.invalidate(soft=True)
            connection.close()
        elif action < 0.56:
            connection.detach()
            connection.close()
        elif action < 0.58:
            del connection  # leaked: the collector returns it
        elif action < 0.585:
            connection.close()
            self.pool.dispose()
        else:
            connection.close()

    def check(self):
        """The pool agrees with what is held here; return how many that is."""
        assert_consistent(self.pool)
        out = sum(connection.is_valid for connection in self.held)
        assert self.pool.checkedout() == out
        return out

    def go(self):
        while self.held:
            try:
                self.held.pop().close()
            except EXPECTED:
                pass


# Faults in a finaliser are reported as unraisable.
with_faults = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def _silent(caplog):
    caplog.set_level("CRITICAL", "sqlalchemy.pool")


@pytest.mark.slow
@with_faults
@pytest.mark.parametrize("overflow", [0, 3])
def test_random_operations_with_faults_in_one_thread(make_pool, server, overflow):
    """Checked after every step."""
    options = {"pool_size": 3, "soft_limit": 2, "max_limit": 3, "timeout": 0}
    pool = make_pool(max_overflow=overflow, **options, **OFTEN_IDLE)
    Faults(server, 3)
    visitor = Visitor(pool, 4)
    for _ in range(30_000):
        visitor.step()
        visitor.check()
    visitor.go()
    server.before.clear()
    assert server.most <= 3 + overflow


@pytest.mark.slow
@with_faults
def test_random_changes_of_the_capacity(make_pool, server):
    """Open at the server: never more than the largest capacity since it drained."""
    pool = make_pool(pool_size=4, soft_limit=1, max_limit=4, timeout=0)
    Faults(server, 6)
    visitor = Visitor(pool, 7)
    chance = random.Random(8)
    for step in range(20_000):
        if step % 20 == 0:
            size, overflow = chance.randint(1, 6), chance.randint(0, 2)
            pool.reconfigure(
                pool_size=size,
                max_overflow=overflow,
                soft_limit=None,
                max_limit=None,
                min_idle=chance.randint(0, size),
            )
        visitor.step()
        out = visitor.check()
        assert pool.checkedin() <= pool.options.pool_size
        assert pool.checkedin() + out <= max(pool.options.capacity, out)
    visitor.go()
    server.before.clear()


@pytest.mark.slow
@with_faults
@pytest.mark.parametrize("overflow", [0, 3])
def test_random_operations_with_faults_in_many_threads(make_pool, server, overflow):
    options = {"pool_size": 4, "soft_limit": 3, "max_limit": 4, "timeout": 0.002}
    pool = make_pool(max_overflow=overflow, max_waiting=6, **options, **OFTEN_IDLE)
    Faults(server, 5)
    barrier = threading.Barrier(10)

    def work(seed):
        visitor = Visitor(pool, seed)
        barrier.wait()
        for _ in range(2_000):
            visitor.step()
            if len(visitor.held) > 2:
                visitor.go()
        visitor.go()

    for caller in [Caller(work, seed) for seed in range(10)]:
        # 20,000 steps: much work, which takes 100 s on a slow machine.
        caller.result(300.0)
    server.before.clear()
    assert_quiet(pool)
    pool.reconfigure(soft_limit=3, max_limit=4)
    held = take(pool, 2, "late") + take(pool, 2, "later")
    assert pool.checkedout() == 4
    give(held)


def test_each_of_many_callers_is_served_equally(world):
    """100 callers on 10 connections: none is more than a little ahead.

    SQLAlchemy issue 7679: with QueuePool 90 threads of them get nothing at all.
    """
    pool = world.pool(10)
    counts = [0] * 100

    def work(n):
        while sum(counts) < 2000:
            with connect(pool):
                world.sleep(0.001)
                counts[n] += 1

    holders = take(pool, 10)
    callers = [world.start(work, n) for n in range(100)]
    world.ensure_waiting(pool, 100)
    give(holders)
    for caller in callers:
        caller.result()
    jain = sum(counts) ** 2 / (len(counts) * sum(count**2 for count in counts))
    assert jain >= 0.99
