"""A ledger without processes, files or time: for simulations and model checks.

The keepers are the real ones, and so is everything that they write. What is made up:
the store (a dictionary), the pools (connections that are sessions, callers that are
counted), the server (a list of sessions), and the clock.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from contextlib import contextmanager
from functools import partial

from sqla_fairpool.ledger.demand import TagDemand
from sqla_fairpool.ledger.keeper import Keeper
from sqla_fairpool.ledger.rows import Session
from sqla_fairpool.ledger.store import Store as RealStore
from sqla_fairpool.ledger.store import StoreAway
from sqla_fairpool.ledger.watch import Present
from sqla_fairpool.scheduling.tags import ALL


class Host:
    """What the members' stores have in common."""

    def __init__(self):
        self.rows = {}
        #: How often the rows were deleted, with all that was open on them.
        self.deletions = 0
        self.holder = None
        #: Signs of life.
        self.alive = set()
        #: Members whose bells ring.
        self.rung = set()
        #: What members say of themselves.
        self.published = {}
        self.is_away = False
        self.transactions = self.commits = 0
        #: Ids that no process has had.
        self.new_member = map("m{:05d}".format, itertools.count(1)).__next__

    def delete(self):
        """Take the rows away; who opens the store next makes new ones."""
        self.rows = {}
        self.deletions += 1

    def commit(self, rows):
        """Make these the rows."""
        self.commits += rows != self.rows
        self.rows = rows


class MemoryStore:
    """A store in a dictionary. :meth:`point` is called wherever something may happen:
    the model check has the process stop, die or fail there."""

    kind = "memory"
    name = "memory"
    control_connections = 0
    can_lose_sign = True
    watches_place = False

    def __init__(self, host):
        self.host = host
        self.member = host.new_member()
        self._deletions = 0
        self.is_open, self.signed = False, True
        #: The process itself has rung.
        self.nudged = self.asked = False

    def point(self, name):
        """Called at each step of which the outside may see the effect."""

    def _reach(self):
        if self.host.is_away:
            raise StoreAway("no answer")

    def open(self):
        self.point("open")
        self._reach()
        self.host.alive.add(self.member)
        self._deletions = self.host.deletions
        self.is_open = self.signed = True

    def in_place(self):
        return self._deletions == self.host.deletions

    def _look(self):
        self._reach()
        if not self.is_open:
            raise StoreAway("the connection was lost")
        if not self.in_place():
            self.is_open = self.signed = False  # the sign of life itself stands
            raise StoreAway("the rows were deleted")

    @contextmanager
    def transaction(self, bells=(), *, durable=True):
        host = self.host
        self.point("begin")
        self._look()
        if host.holder is not None:
            raise StoreAway("the lock is taken")
        host.holder = self
        host.transactions += 1
        try:
            rows = dict(host.rows)
            self.point("locked")
            yield rows
            self.point("commit")
            self._reach()
            if self.in_place():  # else it is kept where nobody looks any more
                host.commit(rows)
        finally:
            host.holder = None
        self.point("committed")
        self.ring(bells)

    def read(self):
        self.point("read")
        self._look()
        return dict(self.host.rows)

    swap = RealStore.swap

    def living(self, members):
        self.point("living")
        self._reach()
        return self.host.alive.intersection(members)

    def strangers(self, members):
        self.point("strangers")
        self._reach()
        return len(self.host.alive - {*members, self.member})

    def ring(self, members):
        self.point("ring")
        self.host.rung.update(members)

    def ring_all(self):
        self.ring(self.host.alive)

    def ask(self, members):
        raise AssertionError("nobody looks on in a simulation")

    def publish(self, text):
        self._reach()
        self.host.published[self.member] = text

    def published(self, members):
        return {m: t for m, t in self.host.published.items() if m in members}

    def wait(self, seconds):
        raise AssertionError("nobody sleeps in a simulation")

    def nudge(self):
        self.nudged = True

    def close(self):
        self.is_open = False
        self.host.alive.discard(self.member)

    def lose(self):
        """Lose the sign of life, as with a connection that is cut."""
        self.is_open = self.signed = False
        self.host.alive.discard(self.member)

    def after_fork(self):
        self.member = self.host.new_member()
        self.is_open, self.signed, self.nudged = False, True, False


class Server:
    """Knows whose session each is. The ids of processes are given again at once."""

    name = "the server"

    def __init__(self):
        self.sessions = {}
        self.most = 0
        self._began = itertools.count(1)
        self._free = []

    @property
    def open(self):
        return len(self.sessions)

    def connect(self, whose):
        pid = heapq.heappop(self._free) if self._free else self.open + 1
        session = Session(pid, next(self._began))
        self.sessions[session] = whose
        self.most = max(self.most, self.open)
        return session

    def disconnect(self, session):
        del self.sessions[session]
        heapq.heappush(self._free, session.pid)

    def sessions_of(self, whose):
        return [session for session, owner in self.sessions.items() if owner == whose]

    def look(self, server=None):
        """What it tells who asks for the sessions on `server`."""
        there = frozenset(self.sessions)
        return Present(self.name, there, there)


class SimKeeper(Keeper):
    """A keeper whose rounds are done by somebody else."""

    def _start(self):
        pass

    def _wake(self):
        self._store.nudge()


class SimPool:
    """A pool that counts: the keeper's view of one, with the promises of a real one.

    :param session: whose connections these are at the server.
    """

    def __init__(self, server, session):
        self.at_server = server
        self.session = session
        self.keeper = None
        #: The ledger's, if they are not those asked for.
        self.terms = None
        self.slots = 0
        self.frozen = False
        self.ceilings, self.other, self.reserves = {}, 0, {}
        #: By tag.
        self.in_use, self.waiting, self.peak = Counter(), Counter(), Counter()
        self.active = set()
        self.idle = self.detached = 0
        #: The sessions of all these, and of those that are not posted yet.
        self.there = []
        self.pending = set()
        #: Connections whose end is not known; None for one whose session is not, too.
        self.interrupted = []
        #: It knows which server that is.
        self.has_been_there = False
        #: The keeper has said no: opens nothing until something changes.
        self.rebuffed = False
        self.refusals = []
        #: The tags that the ledger has paused.
        self.paused = {}
        #: Tags of callers who were served since somebody looked.
        self.served = deque()

    @property
    def open(self):
        """Connections that exist."""
        return len(self.there) + len(self.interrupted)

    # -- called by the keeper ----------------------------------------------------------

    def demand(self):
        peak, self.peak = self.peak, self.in_use.copy()
        tags = {t for t, n in (peak + self.waiting).items() if n} | self.active
        return self.open, {
            tag: TagDemand(peak[tag], self.would_get(tag), tag in self.active)
            for tag in sorted(tags)
        }

    def sessions(self):
        return self.there

    def server(self):
        return self.at_server.name if self.has_been_there else None

    def lost(self):
        return self.interrupted

    def buried(self, lost):
        self.slots = max(self.slots - len(lost), 0)
        for session in lost:
            self.interrupted.remove(session)

    def read(self, rows, member):
        pass

    def allot(self, slots, ceilings, other, reserves, elsewhere=()):
        self.reserves = reserves
        self.slots, self.ceilings, self.other = slots, ceilings, other
        self.frozen = self.rebuffed = False
        self._dispatch()

    def close_surplus(self):
        while self.idle and self.open > self.slots:
            self._close_idle()
        self._dispatch()

    def freeze(self):
        self.frozen = True
        self.slots = min(self.slots, self.open)

    def adopt(self, terms):
        self.terms = terms

    def pause(self, pauses):
        self.paused = pauses
        self._dispatch()
        self._ring()

    def would_get(self, tag):
        """Return how many wait under a tag that is not paused."""
        return 0 if {tag, ALL} & self.paused.keys() else self.waiting[tag]

    def press(self, pressed):
        pass  # it looks at its keeper

    def refuse(self, error):
        self.refusals.append(error)
        self.waiting.clear()

    # -- called by callers ------------------------------------------------------------

    def request(self, tag):
        """Ask for a connection."""
        self.active.add(tag)
        self.waiting[tag] += 1
        self.rebuffed = False
        self._dispatch()
        if self.waiting[tag]:
            self._ring(tag)

    def release(self, tag):
        """Return a connection."""
        self.in_use[tag] -= 1
        self.idle += 1
        if self.open > self.slots:
            self._close_idle()
            self._ring()
        self._dispatch()
        if self.idle and self.keeper is not None and self.keeper.pressed:
            self._ring()

    def detach(self, tag):
        """Take a connection out of the pool; it keeps its slot."""
        self.in_use[tag] -= 1
        self.detached += 1

    def close_detached(self):
        self.detached -= 1
        self._end(self._any_posted())
        self._dispatch()
        self._ring()

    def interrupt(self, tag, known=True):
        """Lose a connection of which only the server knows when it ends."""
        self.in_use[tag] -= 1
        session = self._any_posted()
        self.there.remove(session)
        self.interrupted.append(session if known else None)
        self._ring()

    def ceiling(self, tag):
        return self.ceilings.get(tag, self.other)

    def connect(self):
        """Open a connection, if that is possible."""
        return self.at_server.connect(self.session)

    def try_again(self):
        """Open what is wanted, though the keeper has said no before."""
        self.rebuffed = False
        self._dispatch()

    # -- inside -----------------------------------------------------------------

    def _dispatch(self):
        """Serve the tags in turn, while there is a connection for one."""
        while True:
            eligible = {
                tag: min(n, self.ceiling(tag) - self.in_use[tag])
                for tag, n in self.waiting.items()
                if self.would_get(tag)
                and self.in_use[tag] < self.ceiling(tag)
                and self._is_free(tag)
            }
            if not eligible or self.open > self.slots:
                return  # nobody can be served; or what is idle is to be closed
            if not self.idle:
                wanted = sum(eligible.values()) > len(self.pending)
                may_open = self.open < self.slots and not self.rebuffed and wanted
                if not may_open or not self._open_another():
                    return
                continue
            tag = min(eligible, key=lambda tag: (self.in_use[tag], tag))
            self.idle -= 1
            self.in_use[tag] += 1
            self.peak[tag] = max(self.peak[tag], self.in_use[tag])
            self.waiting[tag] -= 1
            self.served.append(tag)

    def _is_free(self, tag):
        """Tell if there is a slot that is not reserved for another tag."""
        kept = sum(max(n - self.in_use[t], 0) for t, n in self.reserves.items())
        is_below = self.in_use[tag] < self.reserves.get(tag, 0)
        return is_below or self.in_use.total() + self.detached + kept < self.slots

    def _open_another(self):
        session = self.connect()
        if session is None:
            return False
        self.has_been_there = True
        self.there.append(session)
        self.pending.add(session)
        if self.keeper is not None:
            self.keeper.post(partial(self._answered, session))
        return True

    def _answered(self, session, is_ours):
        """Use a connection, or close it: the ledger has it, or has not."""
        self.pending.discard(session)
        if is_ours:
            self.idle += 1
        else:
            self.rebuffed = True
            self._end(session)
        self._dispatch()

    def _close_idle(self):
        self.idle -= 1
        self._end(self._any_posted())

    def _any_posted(self):
        return next(session for session in self.there if session not in self.pending)

    def _end(self, session):
        self.there.remove(session)
        self.at_server.disconnect(session)
        if self.frozen:
            self.slots = min(self.slots, self.open)

    def _ring(self, tag=None):
        if self.keeper is not None:
            self.keeper.ring(tag)
