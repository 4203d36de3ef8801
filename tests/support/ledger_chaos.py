"""A ledger's members in a world where anything goes wrong, from a seed.

    PYTHONPATH=tests python -m support.ledger_chaos --worlds 1000 --members 10

As in the model (`test_ledger_model.py`) the keepers are the real ones. Here members are
cut off one by one, from the store or from the server, timers are late, and operators
change the limits; the worlds are larger and live longer. What happens is a list of
(event, number, number), so a world that breaks a promise is made smaller by leaving
events out, and printed as a script for `play`.
"""

from __future__ import annotations

import argparse
import logging
import random
import time

import greenlet

from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.keeper import Pace
from sqla_fairpool.ledger.rows import Terms

from .ledger import World, ask, close_idle

TAGS = "xyz"
#: Where a store fails, the commit or its answer among them.
FAILURES = [*("open", "begin", "locked", "commit", "committed"), *("living", "ring")]
#: Seconds that pass at once.
TIMES = [0.001, 0.02, 0.02, 0.5, 1.1, 4.0, 12.0, 3600.0]
#: No quarantine ends by time: nothing here rests on clocks.
PACE = Pace(reclaim_after=1e9)


def terms(capacity):
    return Terms(capacity, -(-capacity // 2), -(-capacity * 3 // 4), 60.0, 30.0)


class Chaos:
    """A world, and what may happen in it: how often, and what."""

    def __init__(self, members, capacity):
        self.members = members
        self.world = World(terms(capacity), PACE)
        #: Commits that added slots where there were no more. A keeper catches errors.
        self.broken = []
        #: Rows, and what was understood of them.
        self.rows, self.book = self.world.host.rows, self.world.book
        self.commit, self.world.host.commit = self.world.host.commit, self.look_at
        for _ in range(members):
            self.start(0, 0)

    def start(self, a, b):
        if len(self.world.living) < self.members * 2:
            ask(self.world.start(), TAGS[a % 3], b % 4)

    def pick(self, number, where=lambda process: True):
        those = [p for p in self.world.living if not p.left and where(p)]
        return those[number % len(those)] if those else None

    def happen(self, event, a, b):
        """Let it happen, if it can; then the promises must be kept."""
        if hasattr(self, event):
            getattr(self, event)(a, b)
        elif process := self.pick(a, lambda p: event == "goes_on" or not p.stopped):
            getattr(self, f"one_{event}")(process, b)
        self.check()

    def look_at(self, rows):
        """Commit. Limits that are lowered end no connection; none is added above."""
        is_known = self.rows is self.world.host.rows
        before, book = self.book if is_known else self.world.book, Book(dict(rows))
        slots = book.owned + book.quarantined
        if slots > max(before.owned + before.quarantined, book.terms.capacity):
            self.broken.append((before.members, rows))
        self.commit(rows)
        self.rows, self.book = rows, book

    def check(self):
        world, host = self.world, self.world.host
        assert not self.broken, "more slots than there are"
        if self.rows is not host.rows:
            self.rows, self.book = host.rows, world.book
        slots = self.book.owned + self.book.quarantined
        assert world.server.open <= slots, "a connection without a slot"
        world.check(book=self.book)

    # -- a member ------------------------------------------------------------------

    def one_asks(self, process, b):
        ask(process, TAGS[b % 3], 1 + b % 4)

    def one_gives(self, process, b):
        for tag in [*process.pool.in_use.elements()][: 1 + b % 4]:
            process.pool.release(tag)
        if b % 3 == 0:
            close_idle(process)

    def one_steps(self, process, b):
        process.step()

    def one_steps_a_part(self, process, b):
        process.step(b % 13)

    def one_is_stopped(self, process, b):
        process.stopped = True

    def one_goes_on(self, process, b):
        process.stopped = False

    def one_is_killed(self, process, b):
        process.kill()

    def one_leaves(self, process, b):
        if process.round is None:
            process.close(b % 7 if b % 2 else None)

    def one_loses_a_connection(self, process, b):
        if process.pool.in_use.total():
            process.pool.interrupt(next(process.pool.in_use.elements()), b % 2 == 0)

    def one_loses_its_sign(self, process, b):
        if process.store.is_open:
            process.store.lose()

    def one_fails(self, process, b):
        process.fails_at = FAILURES[b % len(FAILURES)]

    def one_is_cut_from_the_store(self, process, b):
        process.store_cut = not process.store_cut

    def one_is_cut_from_the_server(self, process, b):
        process.server_cut = not process.server_cut
        while process.server_cut and process.pool.in_use.total():
            self.one_loses_a_connection(process, b)

    def one_has_an_early_timer(self, process, b):
        process.ahead += TIMES[b % len(TIMES)]

    def one_sets_limits(self, process, b):
        process.keeper.set_terms(terms(1 + b % (2 * self.world.terms.capacity)))

    # -- all of them ---------------------------------------------------------------

    def time_passes(self, a, b):
        self.world.now += TIMES[b % len(TIMES)]

    def all_work(self, a, b):
        self.world.run(0.3, tick=0.1)

    def store_is_away_or_back(self, a, b):
        self.world.host.is_away = not self.world.host.is_away

    def server_notices(self, a, b):
        for process in self.world.dead + self.world.living:
            strays = process.sessions if process in self.world.dead else process.strays
            for session in strays[: 1 + b % 3]:
                self.world.server.disconnect(session)

    def ends_well(self):
        """Nothing more goes wrong: no slot is left over, each has what it is due."""
        world = self.world
        world.host.is_away = False
        for process in [*world.living]:
            process.stopped = process.store_cut = process.server_cut = False
            process.fails_at = None
            if process.left:
                process.step() if process.round is not None else None
                process.kill()
        for _ in range(len(world.server.sessions) + 1):
            self.server_notices(0, 2)
        world.dead.clear()
        self.start(0, 0)
        for process in world.living:
            ask(process, TAGS[0], 2)
        early = min(max(p.ahead for p in world.living), 10.0)
        world.run(15.0 + early, self.check, tick=0.05)
        book = world.book
        plan = book.allocation()
        # Where no member has said which server it is, none is asked; time decides.
        assert book.server is None or not book.quarantined, "left in quarantine"
        owned = {member: row.owned for member, row in book.members.items()}
        assert sum(owned.values()) >= sum(plan.targets.values()), (owned, plan.targets)
        assert not (book.free and plan.unmet), "free slots that somebody waits for"


#: How often each happens, of all.
WEIGHTS = {
    "steps": 20, "steps_a_part": 10, "asks": 8, "time_passes": 8, "gives": 7,
    "goes_on": 4, "all_work": 3, "fails": 3, "server_notices": 3, "start": 1.5,
    "is_stopped": 1, "is_killed": 1, "loses_a_connection": 1, "leaves": 0.5,
    "is_cut_from_the_store": 1, "is_cut_from_the_server": 1, "loses_its_sign": 0.5,
    "has_an_early_timer": 1, "sets_limits": 0.7, "store_is_away_or_back": 0.5,
}  # fmt: skip


def play(script, members, capacity):
    """Let all of it happen; return what was not kept, and how many events it took."""
    chaos = Chaos(members, capacity)
    done = 0
    try:
        for event in script:
            done += 1
            chaos.happen(*event)
        chaos.ends_well()
    except AssertionError as error:
        return str(error), done
    finally:
        for process in chaos.world.living:
            if process.round is not None:
                process.round.throw(greenlet.GreenletExit)
    return None, len(script)


def explore(seed, events, members, capacity):
    """Play one world; an AssertionError with a small script if a promise is broken."""
    chance = random.Random(seed)
    names = chance.choices([*WEIGHTS], [*WEIGHTS.values()], k=events)
    script = [(n, chance.randrange(1000), chance.randrange(1000)) for n in names]
    error, done = play(script, members, capacity)
    if error is None:
        return
    script, size = script[:done], done // 2
    while size:
        for n in range(len(script) - size, -1, -size):
            less = script[:n] + script[n + size :]
            if less and play(less, members, capacity)[0] is not None:
                script = less
        size //= 2
    error = play(script, members, capacity)[0]
    raise AssertionError(f"seed {seed}: {error}\nplay({script}, {members}, {capacity})")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    for name, value in {"worlds": 100, "events": 400, "members": 6, "slots": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    logging.disable()
    began = time.process_time()
    for seed in range(given.seed, given.seed + given.worlds):
        explore(seed, given.events, given.members, given.slots)
    print(f"{given.worlds * given.events} events, {time.process_time() - began:.0f} s")


if __name__ == "__main__":
    main()
