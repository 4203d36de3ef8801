"""The ledger's protocol: processes that stop, die, fork and lose the store anywhere.

The keepers are the real ones. Each may be stopped between any two of its calls to the
store and to the pool, for ever or until later, while the pools go on.

In one kind of world signs of life can be lost, in the other the rows can be deleted.
Not both at once: who has neither a sign of life nor a row is known to nobody. For the
same reason nobody dies with connections open between the deletion of its row and the
moment at which it has joined again, unless they end with it.
"""

from __future__ import annotations

import os
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from support.ledger import World, ask

from sqla_fairpool.ledger.rows import Terms
from sqla_fairpool.ledger.watch import Pace
from sqla_fairpool.scheduling import policy
from sqla_fairpool.scheduling.tags import ALL

TAGS = ["x", "y", "z"]

#: Where a store may fail: before it did anything, before the commit, and after it,
#: so that nobody knows.
FAILURES = [
    *("open", "begin", "locked", "commit", "committed"),
    *("living", "strangers", "ring"),
]

#: No quarantine ends by time: in the model nothing rests on clocks.
PACE = Pace(reclaim_after=1e9)


def anybody(process):
    return True


def runs(process):
    return not process.stopped


def works(process):
    return not process.stopped and not process.left


def holds(process):
    return not process.stopped and process.pool.in_use.total() > 0


def steps(process):
    return not process.stopped and (not process.left or process.round is not None)


def of_a_process(where, **strategies):
    """Make a rule of a function that takes a living process of which `where` is so."""

    def decorate(function):
        def act(self, data, **values):
            those = [process for process in self.world.living if where(process)]
            function(self, data.draw(st.sampled_from(those)), **values)

        act.__name__ = function.__name__
        there_is_one = precondition(lambda self: any(map(where, self.world.living)))
        return there_is_one(rule(data=st.data(), **strategies)(act))

    return decorate


class LedgerHoldsItsPromises(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(1, 6),
        soft=st.integers(1, 6),
        most=st.integers(1, 6),
        members=st.integers(1, 3),
        asked=st.integers(0, 4),
        can_be_deleted=st.booleans(),
    )
    def start(self, capacity, soft, most, members, asked, can_be_deleted):
        most = min(most, capacity)
        soft = min(soft, most)
        self.world = World(Terms(capacity, soft, most, 60.0, 30.0), PACE)
        self.can_be_deleted = can_be_deleted
        self.world.members(**dict.fromkeys(TAGS[:members], asked))

    # -- the pools -----------------------------------------------------------------

    @of_a_process(works, tag=st.sampled_from(TAGS), times=st.integers(1, 4))
    def request(self, process, tag, times):
        ask(process, tag, times)

    @of_a_process(holds, times=st.integers(1, 4))
    def release(self, process, times):
        for tag in [*process.pool.in_use.elements()][:times]:
            process.pool.release(tag)

    @of_a_process(holds)
    def detach(self, process):
        process.pool.detach(next(process.pool.in_use.elements()))

    @of_a_process(lambda p: p.pool.detached and not p.stopped)
    def close_detached(self, process):
        process.pool.close_detached()

    @of_a_process(holds, known=st.booleans())
    def interrupt(self, process, known):
        process.pool.interrupt(next(process.pool.in_use.elements()), known)

    @of_a_process(lambda p: p.strays, number=st.integers(0, 5))
    def the_server_ends_a_lost_session(self, process, number):
        self.world.server.disconnect(process.strays[number % len(process.strays)])

    @of_a_process(works, tag=st.sampled_from(TAGS))
    def nobody_waits_any_more(self, process, tag):
        process.pool.waiting[tag] = 0
        process.pool.active.discard(tag)

    # -- the keepers ---------------------------------------------------------------

    @of_a_process(steps)
    def step(self, process):
        process.step()

    @of_a_process(steps, points=st.integers(0, 12))
    def a_part_of_a_step(self, process, points):
        process.step(points)

    @rule()
    def everybody_works_for_a_while(self):
        self.world.run(0.6, tick=0.1)

    @rule(seconds=st.sampled_from([0.001, 0.02, 0.5, 1.1, 4.0, 12.0]))
    def time_passes(self, seconds):
        self.world.now += seconds

    @of_a_process(anybody, seconds=st.sampled_from([0.1, 1.0, 86_400.0]))
    def timers_fire_early(self, process, seconds):
        process.ahead += seconds

    # -- what happens to processes -------------------------------------------------

    @precondition(lambda self: len(self.world.living) < 5)
    @rule()
    def another_one(self):
        self.world.start()

    @of_a_process(anybody)
    def kill(self, process):
        process.kill()
        if self.is_unknown(process):
            process.server_notices()

    @precondition(lambda self: self.world.dead)
    @rule(data=st.data(), most=st.one_of(st.none(), st.integers(1, 3)))
    def the_server_notices(self, data, most):
        dead = data.draw(st.sampled_from(self.world.dead))
        dead.server_notices(most)
        if not dead.sessions:
            self.world.dead.remove(dead)

    @rule()
    def the_server_can_be_asked_or_not(self):
        self.world.can_ask = not self.world.can_ask

    @of_a_process(anybody)
    def stop_or_go_on(self, process):
        process.stopped = not process.stopped

    @of_a_process(works)
    def fork(self, process):
        if len(self.world.living) < 5:
            process.fork()

    @of_a_process(
        lambda p: works(p) and p.round is None,
        points=st.one_of(st.none(), st.integers(0, 6)),
    )
    def leave(self, process, points):
        if not self.is_unknown(process):
            process.close(points)

    # -- what happens to the store -------------------------------------------------

    @rule()
    def the_store_goes_away_or_comes_back(self):
        self.world.host.is_away = not self.world.host.is_away

    @of_a_process(anybody, point=st.sampled_from(FAILURES))
    def the_store_fails(self, process, point):
        process.fails_at = point

    def is_unknown(self, process):
        """Tell if its row was deleted, and it has not joined again."""
        return self.world.host.deletions and process.row is None

    def nothing_would_be_forgotten(self):
        """Tell if all sessions are those of living members with a sign of life."""
        world = self.world
        known = {
            session
            for process in world.living
            if process.store.member in world.host.alive and not process.left
            for session in process.sessions
        }
        return not world.book.gone and known == world.server.sessions.keys()

    @precondition(
        lambda self: (
            self.can_be_deleted
            and self.world.host.rows
            and self.world.server.open > 0
            and self.nothing_would_be_forgotten()
        )
    )
    @rule(newcomers=st.integers(0, 1))
    def the_rows_are_deleted(self, newcomers):
        self.world.host.delete()
        for _ in range(newcomers):  # before anybody else sees it
            process = self.world.start()
            ask(process, TAGS[0], 4)
            process.step()

    @precondition(lambda self: not self.can_be_deleted)
    @of_a_process(lambda p: p.store.is_open)
    def a_sign_of_life_is_lost(self, process):
        process.store.lose()

    @rule()
    def bells_are_lost(self):
        self.world.host.rung.clear()

    @precondition(lambda self: self.world.host.rows and self.world.host.holder is None)
    @rule(tag=st.sampled_from([*TAGS, ALL]), paused=st.booleans())
    def somebody_pauses_or_resumes(self, tag, paused):
        self.world.pause(tag, paused)

    # -- the promises --------------------------------------------------------------

    def made(self):
        return hasattr(self, "world")

    @precondition(made)
    @invariant()
    def promises_are_kept(self):
        world, book = self.world, self.world.book
        # Never more connections than slots, and no slot is there twice.
        assert world.server.most <= world.terms.capacity
        if book.meta is not None:
            assert book.owned + book.quarantined <= world.terms.capacity
        world.check(self.is_unknown)

    def teardown(self):
        if self.made():
            self.everything_comes_to_rest()
            self.all_are_saturated()

    # -- and in the end ------------------------------------------------------------

    def everything_comes_to_rest(self):
        """All is well again but for those who are stopped: nothing is left over."""
        world = self.world
        world.host.is_away = False
        world.can_ask = True
        for process in [*world.living]:
            process.fails_at = None
            if process.left and process.round is not None and not process.stopped:
                process.step()
            if process.stopped and process.round is not None:
                process.stopped = False  # it may have the store's lock
            if process.left:
                process.kill()
            for session in process.strays:
                world.server.disconnect(session)
        for dead in world.dead:
            dead.server_notices()
        world.dead.clear()
        clocks = max((p.ahead for p in world.living), default=0.0)
        world.run(25.0 + min(clocks, 10.0), tick=0.05)
        self.promises_are_kept()
        book = world.book
        if book.meta is None:
            return
        self.just_what_is_paused_is_not_served()
        book = world.book
        plan = book.allocation()
        for process in world.living:
            if process.stopped:
                continue
            pool, row = process.pool, book.members.get(process.store.member)
            waiting = +pool.waiting
            if row is None:
                assert not waiting
                continue
            # Nobody waits who could have a slot; nobody who is stopped keeps one free.
            if book.free:
                assert row.owned >= plan.targets[process.store.member]
                assert not plan.unmet
            for tag in waiting:
                assert row.tags[tag].waiting, "nobody knows that it waits"
            # Nothing is unused that somebody else could use.
            if plan.unmet:
                assert not pool.idle or pool.open <= plan.claimed[process.store.member]

    def just_what_is_paused_is_not_served(self):
        world, pauses = self.world, self.world.book.pauses
        for process in world.living:
            if not process.stopped and process.row is not None:
                assert process.pool.paused == pauses
        for tag in pauses:
            world.pause(tag, False)
        if pauses:
            world.run(5.0, tick=0.05)

    def all_are_saturated(self):
        """Who is not stopped wants everything: the shares are max-min."""
        world = self.world
        for process in [*world.living]:
            process.stopped = False
        if not world.living:
            world.start()
        for process in world.living:
            for _ in range(process.pool.detached):
                process.pool.close_detached()
        working = {
            p: TAGS[n % len(TAGS)] for n, p in enumerate(world.living) if not p.left
        }

        def busy():
            """Everybody holds for a moment and asks again, and more wait."""
            for process, tag in working.items():
                pool = process.pool
                pool.active = {tag}
                for other in TAGS:
                    if other != tag:
                        pool.waiting[other] = 0
                for held in [*pool.in_use.elements()]:
                    pool.release(held)
                while pool.waiting[tag] < 8:
                    pool.request(tag)

        world.run(20.0, busy, tick=0.05)
        rounds = Counter()

        def count():
            busy()
            rounds[None] += 1
            for process, tag in working.items():
                rounds[process] += process.pool.in_use[tag]

        world.run(30.0, count, tick=0.05)
        self.promises_are_kept()
        mean = {p: rounds[p] / rounds[None] for p in working}
        terms = world.terms
        tags = sorted(set(working.values()))
        ceiling = policy.ceiling(len(tags) - 1, terms.soft_limit, terms.max_limit)
        free = terms.capacity - world.book.quarantined
        shares = policy.fair_shares([ceiling] * len(tags), free)
        for tag in tags:
            held = [mean[p] for p, t in working.items() if t == tag]
            # Slots that go from hand to hand are nobody's for a moment.
            assert min(shares) * 0.7 <= sum(held) <= max(shares), (tag, shares, mean)
            # Who works under one tag has as much of it as another one.
            assert max(held) - min(held) <= 1, (tag, mean)
            assert min(held) > 0 or not free, (tag, mean)
        assert sum(mean.values()) >= sum(shares) * 0.8, (shares, mean)


LedgerHoldsItsPromises.TestCase.settings = settings(
    max_examples=int(150 * float(os.environ.get("EXAMPLES", "1"))),
    stateful_step_count=60,
)
TestLedgerHoldsItsPromises = LedgerHoldsItsPromises.TestCase
