"""The parts of a pool's core, built without a pool, and fakes of what they work on."""

from __future__ import annotations

from types import SimpleNamespace

from sqla_fairpool.options import PoolOptions
from sqla_fairpool.pool.checkout import Checkout, Generation, RecordState
from sqla_fairpool.pool.connections import Connections, LedgerSlots, Slots
from sqla_fairpool.pool.housekeeping import Housekeeping
from sqla_fairpool.pool.lock import PoolLock
from sqla_fairpool.pool.physical import PhysicalConnection, PhysicalConnections
from sqla_fairpool.pool.transitions import Transitions
from sqla_fairpool.pool.waiters import ThreadWaiter
from sqla_fairpool.scheduling.scheduler import Scheduler

from .threads import VirtualClock

#: What a checkout asks of the core that it belongs to.
CORE = SimpleNamespace(alive=lambda: None)


class Record:
    """A connection record. Closing it ends its session at once."""

    def __init__(self, existing=None, is_open=True):
        self.info = {}
        self.existing = existing
        self.dbapi_connection = object() if is_open else None
        physical = PhysicalConnection(self)
        physical.opening = False
        self.fair = RecordState(physical, Checkout(CORE))
        if existing is not None and is_open:
            existing.add(physical)

    def close(self):
        self.dbapi_connection = None
        self.existing.ended(self.fair.physical)


class Parts:
    """What a core is made of, with a virtual clock.

    :param member: the pool's side of a ledger, None without one.
    :param options: those of a pool.
    """

    def __init__(self, member=None, **options):
        self.options = PoolOptions.parse(**options)
        self.clock = VirtualClock()
        self.lock = PoolLock(self.clock, lambda: True)
        self.scheduler = Scheduler(
            capacity=self.options.capacity,
            soft_limit=self.options.capacity,
            max_limit=self.options.capacity,
            idle_timeout=60,
            reallocation_interval=30,
            now=self.clock(),
        )
        self.connections = Connections(use_lifo=False)
        self.existing = PhysicalConnections(lambda: None, may_block=True)
        shared = self.scheduler, self.connections, self.existing
        if member is None:
            self.slots = Slots(self.options.capacity, *shared)
        else:
            self.slots = LedgerSlots(member, self.lock, *shared)
        self.state = Transitions(
            self.options,
            ThreadWaiter.here,
            self.lock,
            self.scheduler,
            self.connections,
            self.slots,
        )
        self.housekeeping = Housekeeping(self.state, use_lifo=False)

    def record(self):
        """Return an open record that is nowhere yet."""
        record = Record(self.existing)
        self.connections.all.add(record)
        return record

    def idle(self, since=0.0):
        """Return a record that has been idle since a time."""
        record = self.record()
        record.fair.idle_since = since
        self.connections.idle.append(record)
        return record

    def out(self, tag="a"):
        """Return a record that is checked out."""
        record = self.record()
        assert self.scheduler.request(record.fair.checkout, tag, self.clock())
        return record

    def opener(self):
        """Return what opens a pool's connections; each belongs to its opener."""
        return SimpleNamespace(generation=Generation(), _create_connection=self.record)
