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
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from sqla_fairpool.ledger.allocation import allocate
from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.keeper import Pace
from sqla_fairpool.ledger.rows import Terms
from sqla_fairpool.scheduling.policy import jain

from .ledger_world import Host, MemoryStore, Server, SimKeeper, SimPool

__all__ = ["Phase", "Report", "simulate"]

#: From a bell or a timer to the keeper's round: a thread has to wake up.
_WAKE = 0.0005

#: How often shares are looked at.
_LOOK = 0.05


@dataclass(slots=True)
class Phase:
    """What was measured from one event until the next."""

    name: str
    seconds: float
    #: Until every tag's use, in the mean of a second, was within one of its share.
    converged: float | None = None
    transactions: float = 0.0
    commits: float = 0.0
    #: Over tags, and over processes: connection seconds.
    jain_tags: float = 0.0
    jain_processes: float = 0.0
    #: Part of the slots that were in use.
    used: float = 0.0
    #: Processes that wanted a connection all the time and got none.
    starved: int = 0
    longest_wait: float = 0.0


@dataclass(slots=True)
class Report:
    """The answer of a simulation."""

    processes: int
    tags: int
    capacity: int
    phases: list[Phase] = field(default_factory=list)
    #: Most connections that were ever open at once.
    most: int = 0
    #: Seconds that a member's look at the whole board took, real ones, in the mean.
    look: float = 0.0

    def lines(self) -> Iterator[str]:
        """Yield the report, for people."""
        yield (
            f"{self.processes} processes, {self.tags} tags, {self.capacity} slots; "
            f"most connections open at once: {self.most}"
        )
        yield (
            f"one allocation over the whole board: {self.look * 1000:.2f} ms of a core"
        )
        for phase in self.phases:
            converged = (
                "not within" if phase.converged is None else f"{phase.converged:.2f} s"
            )
            yield (
                f"{phase.name}: converged {converged}, "
                f"{phase.transactions:.0f} transactions/s "
                f"({phase.commits:.0f} write), slots in use {phase.used:.1%}, "
                f"Jain over tags {phase.jain_tags:.4f}, "
                f"over processes {phase.jain_processes:.4f}, "
                f"starved {phase.starved}, longest wait {phase.longest_wait:.1f} s"
            )


class _Process:
    """A process with threads that all work under one tag."""

    def __init__(self, world: _World, number: int, tag: str) -> None:
        self.world = world
        self.tag = tag
        self.works = False
        self.alive = True
        self.store = MemoryStore(world.host)
        self.pool = SimPool(world.server, number)
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
        self.since: list[float] = []
        self.connection_seconds = 0.0

    def step(self, at: float) -> None:
        """Do a round, if it is time for one still."""
        if not self.alive or at != self.wake_at:
            return
        host = self.world.host
        rung = self.store.member in host.rung
        host.rung.discard(self.store.member)
        self.wake_at = float("inf")
        self.plan(self.keeper.step(self.world.now, rung))
        self.world.after(self)

    def plan(self, at: float) -> None:
        """Do a round then, or earlier."""
        if at < self.wake_at:
            self.wake_at = at
            self.world.at(at, lambda: self.step(at))

    def ask(self) -> None:
        """A thread asks for a connection."""
        if self.alive and self.works:
            self.since.append(self.world.now)
            self.pool.request(self.tag)
            self.world.after(self)

    def serve(self) -> None:
        """Threads that were served hold their connection for a while."""
        world = self.world
        while self.pool.served:
            self.pool.served.popleft()
            waited = world.now - self.since.pop(0)
            world.longest_wait = max(world.longest_wait, waited)
            hold = world.random.expovariate(1 / world.hold)
            self.connection_seconds += hold
            world.at(world.now + hold, self._return)

    def _return(self) -> None:
        if self.alive:
            self.pool.release(self.tag)
            think = self.world.think * self.world.random.random()
            self.world.at(self.world.now + think, self.ask)
            self.world.after(self)

    def stop(self) -> None:
        """Nobody asks any more; who waits gives up; the tag is idle."""
        self.works = False
        self.pool.waiting.clear()
        self.pool.active.clear()
        self.since.clear()

    def kill(self) -> None:
        self.alive = False
        self.world.host.alive.discard(self.store.member)
        for session in self.world.server.sessions_of(self.pool.session):
            self.world.server.disconnect(session)
        self.pool.in_use.clear()


class _World:
    def __init__(
        self, terms: Terms, pace: Pace, hold: float, think: float, seed: int
    ) -> None:
        self.terms, self.pace, self.hold, self.think = terms, pace, hold, think
        self.random = random.Random(seed)
        self.host, self.server = Host(), Server()
        self.now = 0.0
        self.longest_wait = 0.0
        self.processes: list[_Process] = []
        self.by_member: dict[str, _Process] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def start(self, tag: str) -> _Process:
        process = _Process(self, len(self.processes), tag)
        self.processes.append(process)
        self.by_member[process.store.member] = process
        return process

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), what))

    def after(self, process: _Process) -> None:
        """What an event of this process has left to do."""
        process.serve()
        if process.store.nudged:
            process.store.nudged = False
            process.plan(self.now + _WAKE)
        for member in sorted(self.host.rung):
            self.by_member[member].plan(self.now + _WAKE)

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = until

    def shares(self) -> dict[str, int]:
        book = Book(dict(self.host.rows))
        return book.allocation().shares


def _measure(world: _World, name: str, seconds: float) -> Phase:
    """Let time pass; see what comes of it."""
    phase = Phase(name, seconds)
    host = world.host
    begin, transactions, commits = world.now, host.transactions, host.commits
    before = {p: p.connection_seconds for p in world.processes}
    world.longest_wait = 0.0
    window: list[Counter[str]] = []
    used = 0.0
    looks = round(seconds / _LOOK)
    for n in range(1, looks + 1):
        world.run(begin + n * _LOOK)
        use: Counter[str] = Counter()
        for process in world.processes:
            use[process.tag] += process.pool.in_use[process.tag]
        window = [*window[-19:], use]
        used += use.total() / world.terms.capacity / looks
        if phase.converged is None and n % 5 == 0 and _is_fair(world, window):
            # That the window's mean is fair says that it was from its middle on.
            phase.converged = max((n - len(window) / 2) * _LOOK, 0.0)
    phase.used = used
    phase.transactions = (host.transactions - transactions) / seconds
    phase.commits = (host.commits - commits) / seconds
    working = [p for p in world.processes if p.alive and p.works]
    gained = {p: p.connection_seconds - before.get(p, 0.0) for p in working}
    by_tag: Counter[str] = Counter()
    for process, n_seconds in gained.items():
        by_tag[process.tag] += n_seconds  # type: ignore[assignment]
    phase.jain_tags = jain([*by_tag.values()])
    phase.jain_processes = jain([*gained.values()])
    phase.starved = sum(not n for n in gained.values())
    waits = [world.now - p.since[0] for p in working if p.since]
    phase.longest_wait = max([world.longest_wait, *waits])
    return phase


def _is_fair(world: _World, window: Sequence[Counter[str]]) -> bool:
    tags = {p.tag for p in world.processes if p.alive and p.works}
    shares = world.shares()
    mean = {t: sum(use[t] for use in window) / len(window) for t in shares}
    return tags <= shares.keys() and all(abs(mean[t] - shares[t]) <= 1 for t in tags)


def simulate(
    processes: int = 1000,
    tags: int = 100,
    capacity: int = 250,
    threads: int = 2,
    seconds: float = 10.0,
    hold: float = 0.2,
    think: float = 0.005,
    pace: Pace | None = None,
    seed: int = 1,
) -> Report:
    """Start them all, let half of the tags fall idle and return, kill a tenth."""
    soft, most = -(-capacity // 2), -(-capacity * 3 // 4)
    terms = Terms(capacity, soft, most, 60.0, 30.0)
    world = _World(terms, pace or Pace(), hold, think, seed)
    report = Report(processes, tags, capacity)
    crew = [world.start(f"tag{n % tags:03}") for n in range(processes)]

    def begin(process: _Process) -> None:
        process.works = True
        for _ in range(threads):
            process.ask()

    def begin_all(some: Sequence[_Process]) -> None:
        for process in some:
            world.at(world.now + world.random.random(), partial(begin, process))

    begin_all(crew)
    report.phases.append(_measure(world, "all start within a second", seconds))
    half = [p for p in crew if int(p.tag[3:]) % 2]
    for process in half:
        process.stop()
    report.phases.append(_measure(world, "half of the tags fall idle", seconds))
    begin_all(half)
    report.phases.append(_measure(world, "they come back", seconds))
    for process in world.random.sample(crew, processes // 10):
        process.kill()
    report.phases.append(_measure(world, "a tenth is killed", seconds))
    report.most = world.server.most
    report.look = _time_of_a_look(world)
    return report


def _time_of_a_look(world: _World) -> float:
    book = Book(dict(world.host.rows))
    limits = world.terms.limits(book.quarantined)
    began, rounds = time.perf_counter(), 20
    for _ in range(rounds):
        allocate(book.members, book.places, limits)
    return (time.perf_counter() - began) / rounds


def main() -> None:
    """Run a simulation and print what came of it."""
    parser = argparse.ArgumentParser(description="simulate processes on one ledger")
    parser.add_argument("--processes", type=int, default=1000)
    parser.add_argument("--tags", type=int, default=100)
    parser.add_argument("--capacity", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2, help="in each process")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--hold", type=float, default=0.2, help="mean, in seconds")
    parser.add_argument("--think", type=float, default=0.005, help="most, in seconds")
    parser.add_argument("--seed", type=int, default=1)
    began = time.perf_counter()
    report = simulate(**vars(parser.parse_args()))
    for line in report.lines():
        print(line)
    print(f"simulated in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
