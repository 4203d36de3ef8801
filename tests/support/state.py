"""What must be true of a pool when a test ends."""

from __future__ import annotations


def assert_quiet(pool):
    """Nothing is out, nobody waits, and the accounting is consistent."""
    exchange = pool._exchange
    with exchange.section():
        exchange.scheduler.check_valid([])
        assert exchange.scheduler.in_use == 0
        assert exchange.scheduler.waiting == 0
        assert not exchange._inbox
        assert not exchange._bells
        assert not exchange._chores
        assert exchange.scheduler.capacity == exchange.options.capacity
        assert exchange._watch is None
        assert len(exchange._idle) <= exchange.options.pool_size


def assert_consistent(pool):
    """The scheduler agrees with the seats that are out."""
    exchange = pool._exchange
    with exchange.section():
        exchange.scheduler.check_valid()
