"""The harness: crowds and workflows; and a pool that is unfair is caught."""

import asyncio
import threading
import time
from collections import Counter

import pytest
from sqlalchemy import exc, make_url

from benchmarks.harness import workload
from benchmarks.harness.bench import Bench, Scenario
from benchmarks.harness.contenders import TASKS, THREADS, Setup
from benchmarks.harness.crowd import Caller, Outcome, in_tasks, in_threads
from benchmarks.harness.database import BenchError, Database
from benchmarks.harness.findings import TARGETS, figure
from benchmarks.harness.pools import queue_engine
from benchmarks.harness.workload import Job, Scraper, backlog, bursts
from benchmarks.scenarios import SCENARIOS, contention, generator, peers, static

#: Seconds: how long crowds run here. Nothing that is asserted depends on it.
MOMENT = 0.05


class Connection:
    def close(self):
        pass


class AsyncConnection:
    async def close(self):
        pass


class UnfairPool:
    """Serves its favourites only, the others when those have gone."""

    def __init__(self, favourites):
        self._most = favourites
        self._favourites = []
        self._lock = threading.Lock()

    def connect(self):
        me = threading.current_thread()
        with self._lock:
            if me not in self._favourites and len(self._favourites) < self._most:
                self._favourites.append(me)
        if me not in self._favourites:
            for favourite in self._favourites:
                favourite.join()
        time.sleep(0.0005)
        return Connection()


def outcome(served, wait=0.01, pending=None):
    """Return an outcome in which each caller was served so often."""
    waits = [[wait] * each for each in served]
    return Outcome(1.0, waits, pending or [0.0] * len(served))


def fail(*args):
    raise RuntimeError("no connection")


# -- what is unfair is caught ---------------------------------------------------------


def test_unfair_pool_is_caught():
    found = in_threads([Caller(UnfairPool(2).connect, 0.0)] * 20, MOMENT, settle=0.1)
    # Fairness is that of the favourites at most ...
    assert found.fairness <= 2 / 20 + 1e-9
    for key in ("fair 200", "fair 7679", "threads: jain"):
        assert not TARGETS[key].met(found.fairness)
    # ... callers that starved are counted, and so are waits that had not ended.
    assert found.never_served == 18
    assert sum(waiting > 0 for waiting in found.pending) >= 18
    assert found.longest_wait >= MOMENT
    assert len(found.all_waits) >= sum(found.served) + 18
    assert not TARGETS["threads: spread"].met(found.spread)


def test_fair_and_unfair_outcomes_are_told_apart():
    fair = outcome([97] * 50 + [98] * 50)
    assert TARGETS["fair 7679"].met(fair.fairness)
    assert TARGETS["threads: spread"].met(fair.spread)
    assert fair.throughput == 97.5 * 100
    # A tag may be favoured though the threads are served alike.
    by_thread = outcome([10] * sum(peers.UNEVEN))
    assert by_thread.fairness == 1.0
    assert not TARGETS["threads: tags"].met(peers.over_tags(by_thread))
    served = [n for each in peers.UNEVEN for n in [600 // each] * each]
    assert TARGETS["threads: tags"].met(peers.over_tags(outcome(served)))
    # A light tag that was never served has a wait all the same.
    starved = outcome([5, 0], pending=[0.0, 0.5])
    assert peers.light_p99(starved) == 500
    assert contention.starved([starved]) == "never served"


@pytest.mark.parametrize(("alone", "verdict"), [(100, "met"), (5, "NOT MET")])
def test_crowd_that_costs_too_much_is_told(monkeypatch, alone, verdict):
    monkeypatch.setattr(generator, "cheapest", lambda seconds: outcome([1]))
    monkeypatch.setattr(generator, "alone_in_threads", lambda *args: outcome([alone]))
    (found,) = generator.headroom(Bench(short=True))
    assert (found.median, found.verdict) == (1 / alone, verdict)


# -- crowds ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_crowd_that_fails_or_is_interrupted_leaves_no_thread(monkeypatch, error):
    before, sleep = threading.enumerate(), time.sleep

    def interrupt(seconds):
        if threading.current_thread() is threading.main_thread():
            raise error
        sleep(seconds)

    callers = [Caller(Connection, 0.0)] * 3
    if error is RuntimeError:
        callers.append(Caller(fail, 0.0))
    else:
        monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(error):
        in_threads(callers, 60.0, settle=0.0)
    assert [t for t in threading.enumerate() if t not in before] == []


def test_given_up_checkouts_are_counted_and_are_no_waits():
    def connect():
        time.sleep(0.001)
        raise exc.TimeoutError("too late")

    caller = Caller(connect, 0.0, gives_up=(exc.TimeoutError,))
    found = in_threads([caller], MOMENT, settle=0.05)
    assert found.served == [0]
    assert found.given_up[0] > 0


def test_tasks_take_turns_and_raise_their_errors():
    async def connect():
        return AsyncConnection()

    async def connect_in_vain():
        fail()

    found = asyncio.run(in_tasks([Caller(connect, 0.0)] * 4, MOMENT, settle=0.0))
    assert found.never_served == 0
    assert max(found.served) - min(found.served) <= 1
    with pytest.raises(RuntimeError, match="no connection"):
        asyncio.run(in_tasks([Caller(connect_in_vain, 0.0, patience=1)], MOMENT, 0.0))


def test_every_second_checkout_of_an_impatient_task_is_cancelled():
    cancelled, calls = [], 0

    async def connect():
        nonlocal calls
        calls += 1
        if calls % 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(calls)
                raise
        return AsyncConnection()

    caller = Caller(connect, 0.0, patience=0.001)
    found = asyncio.run(in_tasks([caller], MOMENT, settle=0.0))
    assert cancelled == list(range(1, 2 * len(cancelled), 2))
    assert abs(found.given_up[0] - found.served[0]) <= 1


# -- the scrapers' work ---------------------------------------------------------------


def test_jobs_are_the_same_for_the_same_seed_and_as_many_as_asked_for():
    jobs = backlog(50, 0.1, seed=3)
    assert jobs == backlog(50, 0.1, seed=3) != backlog(50, 0.1, seed=4)
    assert all(job.due == 0.0 and 0.05 <= job.service <= 0.15 for job in jobs)
    jobs = bursts(1000.0, 4.0, 15, 0.05, seed=1)
    assert jobs == bursts(1000.0, 4.0, 15, 0.05, seed=1)
    assert [job.due for job in jobs] == sorted(job.due for job in jobs)
    demand = sum(job.service for job in jobs) / 1000.0
    assert demand == pytest.approx(4.0, rel=0.1)
    sizes = Counter(job.due for job in jobs).values()
    assert (min(sizes), max(sizes)) == (5, 15)
    assert list(workload.shift(0.0, 0.0, 1.0)) == []  # it has ended


def test_every_workflow_is_done_once_and_counted_from_when_it_was_due():
    done = []
    engine = queue_engine(2)
    scraper = Scraper("a", engine, engine.pool.checkedout, threads=4)
    jobs = [Job(0.0, n) for n in range(40)]
    found = workload.run(lambda c, name, n: done.append((name, n)), {scraper: jobs})
    assert sorted(done) == [("a", n) for n in range(40)]
    assert found.throughput == 40 / found.seconds
    # Also if it was due long before any thread had time for it.
    found = workload.run(lambda *args: None, {scraper: [Job(-100.0, 0.0)]})
    assert found.mean > 100
    # None begins after the limit, or after an error.
    late = [Job(0.0, 0.0), Job(1e6, 0.0)]
    found = workload.run(lambda *args: None, {scraper: late}, limit=MOMENT)
    assert len(found.all_latencies) == 1
    with pytest.raises(RuntimeError, match="no connection"):
        workload.run(fail, {scraper: late})


def test_looks_are_summed_up():
    held = {"a": list(enumerate([0, 0, 3, 3, 3, 1, 1]))}
    changes = workload.Outcome(held=held).changes
    assert changes == {"a": [(0, 0), (2, 3), (5, 1), (6, 1)]}
    looks = [(0.0, 0), (0.3, 15), (0.5, 15), (0.7, 15), (0.95, 2)]
    found = workload.Outcome(seconds=1.0, held={"layer1_5": looks})
    assert static.unused(found, 20) == 5  # in the middle of the run
    scene = static.SCENE
    story = [  # moment, layer1_5, layer2, layer3
        (0.1, 15, 0, 0),
        (scene + 0.01, 14, 0, 5),
        (scene + 0.04, 10, 0, 10),
        (2 * scene + 0.1, 7, 6, 7),
        (3 * scene + 0.05, 8, 0, 8),
        (3 * scene + 0.07, 10, 0, 10),
        (4 * scene + 0.05, 10, 0, 0),
        (4 * scene + 0.95, 15, 0, 0),
    ]
    names = enumerate(("layer1_5", "layer2", "layer3"), 1)
    held = {name: [(look[0], look[n]) for look in story] for n, name in names}
    times = static.times(workload.Outcome(seconds=9.0, held=held))
    expected = {"first": 0.01, "full": 0.04, "freed": 0.02, "idle": 0.9}
    assert times == pytest.approx(expected)


# -- the bench, the scenarios, the contenders -----------------------------------------


def test_steps_are_told_and_the_short_form_is_a_part():
    steps = []

    def part(bench):
        runs = bench.interleave("what", {"A": int, "B": int}, bench.pick(9, 2))
        yield figure("a", runs["A"])

    scenario = Scenario("one", "Title", "Text.", (part, part), more=(part,))
    found = scenario.run(Bench(short=True, on_step=steps.append))
    assert [len(each.values) for each in found] == [2, 2]
    assert steps[:3] == ["what: A, 1 of 2", "what: B, 1 of 2", "what: A, 2 of 2"]
    assert len(scenario.run(Bench())) == 3
    with pytest.raises(BenchError, match="needs a database"):
        _ = Bench().database


def test_scenarios_targets_and_contenders_have_names_of_their_own():
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    claimed = {key for scenario in SCENARIOS for key in scenario.targets}
    # What only the full form measures is not missed in the short one.
    assert set(TARGETS) - claimed == {"light, full", "light, connection"}
    assert claimed <= set(TARGETS)
    assert len({(t.what, t.beside) for t in TARGETS.values()}) == len(TARGETS)
    for side in (THREADS, TASKS):
        assert len({peer.name for peer in side}) == len(side)
        assert all(peer.how for peer in side)


@pytest.mark.parametrize("peer", THREADS[:4], ids=lambda peer: peer.name)
def test_contender_serves_as_many_as_it_has_connections(peer):
    setup = Setup(Database(make_url("null://")), 4, 2, timeout=0.0)
    with peer.open(setup) as connects:
        for _ in range(2):  # what is closed can be had again
            taken = [connects(tag)() for tag in "aabb"]
            with pytest.raises(exc.TimeoutError):
                connects("b")()
            for connection in taken:
                connection.close()
        if "semaphore" in peer.name:  # it holds a tag to its part
            taken = [connects("a")(), connects("a")()]
            with pytest.raises(exc.TimeoutError):
                connects("a")()


def test_dsn_is_what_libpq_reads():
    url = make_url("postgresql+psycopg2://u:p%40@h:5/d?sslmode=require")
    assert Database(url).dsn == "postgresql://u:p%40@h:5/d?sslmode=require"
