"""Many processes share one ledger, on a clock that is made up.

    python -m benchmarks.ledger_simulation --processes 1000 --tags 100

Prints, for each phase, how long it took until every tag had its share, how many
transactions the store had to bear, and how even the shares were.

Each process has threads that check a connection out, hold it, return it and think.
The keepers, the rows and the allocation are the real ones; see
:mod:`.ledger_world` for what is not. Times of the store, of bells and of connecting
are those of the host store, as assumptions: they delay, nothing is decided by them.
"""

from __future__ import annotations

import argparse
import heapq
import inspect
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

from sqla_fairpool.ledger.allocation import allocate
from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.keeper import Pace
from sqla_fairpool.ledger.rows import Terms
from sqla_fairpool.scheduling.policy import jain

from .ledger_world import Host, MemoryStore, Server, SimKeeper, SimPool

#: From a bell or a timer to the keeper's round: a thread has to wake up.
_WAKE = 0.0005

#: How often shares are looked at.
_LOOK = 0.05


@dataclass
class Phase:
    """What was measured from one event until the next."""

    name: str
    #: Until every tag's use, in the mean of a second, was within one of its share.
    converged: float | None
    #: For each second.
    transactions: float
    commits: float
    #: Over tags, and over processes: connection seconds.
    jain_tags: float
    jain_processes: float
    #: Part of the slots that were in use.
    used: float
    #: Processes that wanted a connection all the time and got none.
    starved: int
    longest_wait: float

    def __str__(self):
        converged = "not within"
        if self.converged is not None:
            converged = f"{self.converged:.2f} s"
        return (
            f"{self.name}: converged {converged}, {self.transactions:.0f} "
            f"transactions/s ({self.commits:.0f} write), slots in use {self.used:.1%}, "
            f"Jain over tags {self.jain_tags:.4f}, over processes "
            f"{self.jain_processes:.4f}, starved {self.starved}, longest wait "
            f"{self.longest_wait:.1f} s"
        )


@dataclass
class Report:
    """The answer of a simulation."""

    size: str
    phases: list[Phase]
    #: Most connections that were ever open at once.
    most: int
    #: Seconds that a member's look at the whole board took, real ones, in the mean.
    look: float

    def lines(self):
        """Yield the report, for people."""
        yield f"{self.size}; most connections open at once: {self.most}"
        look = self.look * 1000
        yield f"one allocation over the whole board: {look:.2f} ms of a core"
        yield from map(str, self.phases)


class _Process:
    """A process with threads that all work under one tag."""

    def __init__(self, world, number, tag):
        self.world, self.tag = world, tag
        self.works, self.alive = False, True
        self.store = MemoryStore(world.host)
        self.pool = self.new_pool(number)
        self.keeper = SimKeeper(
            self.store,
            world.terms,
            self.pool,
            sessions=world.server.look,
            pace=world.pace,
            clock=lambda: world.now,
            chance=world.random.random,
            who=lambda: {"host": "simulated", "pid": number},
        )
        self.pool.keeper = self.keeper
        self.wake_at = float("inf")
        #: When each waiting thread began to wait.
        self.since = []
        self.connection_seconds = 0.0

    def new_pool(self, number):
        return SimPool(self.world.server, number)

    def step(self, at):
        """Do a round, if it is time for one still."""
        if not self.alive or at != self.wake_at:
            return
        host = self.world.host
        rung = self.store.member in host.rung
        host.rung.discard(self.store.member)
        self.wake_at = float("inf")
        self.plan(self.keeper.step(self.world.now, rung))
        self.world.after(self)

    def plan(self, at):
        """Do a round then, or earlier."""
        if at < self.wake_at:
            self.wake_at = at
            self.world.at(at, lambda: self.step(at))

    def ask(self):
        """A thread asks for a connection."""
        if self.alive and self.works:
            self.since.append(self.world.now)
            self.pool.request(self.tag)
            self.world.after(self)

    def serve(self):
        """Threads that were served hold their connection for a while."""
        world = self.world
        while self.pool.served:
            self.pool.served.popleft()
            waited = world.now - self.since.pop(0)
            world.longest_wait = max(world.longest_wait, waited)
            hold = world.random.expovariate(1 / world.hold)
            self.connection_seconds += hold
            world.at(world.now + hold, self._return)

    def _return(self):
        if self.alive:
            self.pool.release(self.tag)
            think = self.world.think * self.world.random.random()
            self.world.at(self.world.now + think, self.ask)
            self.world.after(self)

    def begin(self, threads):
        self.works = True
        for _ in range(threads):
            self.ask()

    def stop(self):
        """Nobody asks any more; who waits gives up; the tag is idle."""
        self.works = False
        self.pool.waiting.clear()
        self.pool.active.clear()
        self.since.clear()

    def kill(self):
        self.alive = False
        self.world.host.alive.discard(self.store.member)
        for session in self.world.server.sessions_of(self.pool.session):
            self.world.server.disconnect(session)
        self.pool.in_use.clear()


class _World:
    def __init__(self, terms, pace, hold, think, seed):
        self.terms, self.pace, self.hold, self.think = terms, pace, hold, think
        self.random = random.Random(seed)
        self.host, self.server = Host(), Server()
        self.now = self.longest_wait = 0.0
        self.processes, self.by_member = [], {}
        self._events, self._count = [], itertools.count()

    def start(self, tag):
        process = _Process(self, len(self.processes), tag)
        self.processes.append(process)
        self.by_member[process.store.member] = process
        return process

    def at(self, when, what):
        heapq.heappush(self._events, (when, next(self._count), what))

    def after(self, process):
        """What an event of this process has left to do."""
        process.serve()
        if process.store.nudged:
            process.store.nudged = False
            process.plan(self.now + _WAKE)
        for member in sorted(self.host.rung):
            self.by_member[member].plan(self.now + _WAKE)

    def run(self, until):
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = until

    def is_fair(self, window):
        tags = {p.tag for p in self.processes if p.alive and p.works}
        shares = Book(dict(self.host.rows)).allocation().shares
        mean = {t: sum(use[t] for use in window) / len(window) for t in shares}
        is_even = all(abs(mean[tag] - shares[tag]) <= 1 for tag in shares)
        return tags <= shares.keys() and is_even

    def measure(self, name, seconds):
        """Let time pass; see what comes of it."""
        host, begin = self.host, self.now
        transactions, commits = host.transactions, host.commits
        before = {p: p.connection_seconds for p in self.processes}
        self.longest_wait = used = 0.0
        window, converged, looks = [], None, round(seconds / _LOOK)
        for n in range(1, looks + 1):
            self.run(begin + n * _LOOK)
            use = Counter()
            for process in self.processes:
                use[process.tag] += process.pool.in_use[process.tag]
            window = [*window[-19:], use]
            used += use.total() / self.terms.capacity / looks
            if converged is None and n % 5 == 0 and self.is_fair(window):
                # That the window's mean is fair says that it was from its middle on.
                converged = max((n - len(window) / 2) * _LOOK, 0.0)
        working = [p for p in self.processes if p.alive and p.works]
        gained = {p: p.connection_seconds - before.get(p, 0.0) for p in working}
        by_tag = Counter()
        for process, n_seconds in gained.items():
            by_tag[process.tag] += n_seconds
        return Phase(
            name,
            converged,
            (host.transactions - transactions) / seconds,
            (host.commits - commits) / seconds,
            jain([*by_tag.values()]),
            jain([*gained.values()]),
            used,
            sum(not n for n in gained.values()),
            max(
                [
                    self.longest_wait,
                    *(self.now - p.since[0] for p in working if p.since),
                ]
            ),
        )

    def time_of_a_look(self):
        book = Book(dict(self.host.rows))
        limits = self.terms.limits(book.quarantined)
        began, rounds = time.perf_counter(), 20
        for _ in range(rounds):
            allocate(book.members, book.places, limits)
        return (time.perf_counter() - began) / rounds


def simulate(
    processes=1000,
    tags=100,
    capacity=250,
    threads=2,
    seconds=10.0,
    hold=0.2,
    think=0.005,
    seed=1,
    pace=None,
):
    """Start them all, let half of the tags fall idle and return, kill a tenth.

    :param threads: in each process.
    :param seconds: of each phase.
    :param hold: mean, in seconds.
    :param think: most, in seconds.
    """
    soft, most = -(-capacity // 2), -(-capacity * 3 // 4)
    terms = Terms(capacity, soft, most, 60.0, 30.0)
    world = _World(terms, pace or Pace(), hold, think, seed)
    crew = [world.start(f"tag{n % tags:03}") for n in range(processes)]

    def begin(some):
        for process in some:
            world.at(world.now + world.random.random(), partial(process.begin, threads))

    begin(crew)
    phases = [world.measure("all start within a second", seconds)]
    half = [p for p in crew if int(p.tag[3:]) % 2]
    for process in half:
        process.stop()
    phases.append(world.measure("half of the tags fall idle", seconds))
    begin(half)
    phases.append(world.measure("they come back", seconds))
    for process in world.random.sample(crew, processes // 10):
        process.kill()
    phases.append(world.measure("a tenth is killed", seconds))
    size = f"{processes} processes, {tags} tags, {capacity} slots"
    return Report(size, phases, world.server.most, world.time_of_a_look())


def main():
    """Run a simulation and print what came of it."""
    parser = argparse.ArgumentParser(
        description="simulate processes on one ledger",
        epilog=inspect.getdoc(simulate),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, given in inspect.signature(simulate).parameters.items():
        if given.default is not None:
            kind = type(given.default)
            parser.add_argument(f"--{name}", type=kind, default=given.default)
    began = time.perf_counter()
    for line in simulate(**vars(parser.parse_args())).lines():
        print(line)
    print(f"simulated in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
