"""The harness: crowds, work and stages; and a pool that is unfair is caught."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

import pytest
from sqlalchemy import exc, make_url

from benchmarks import generator, rivalry, rivals, shift, static, workload
from benchmarks.catalogue import SCENARIOS, play
from benchmarks.contenders import TASKS, THREADS, Setup
from benchmarks.crowd import Crowd, Member, Outcome
from benchmarks.database import BenchError, Database
from benchmarks.figures import Figure
from benchmarks.peers import queue_engine
from benchmarks.report import Findings
from benchmarks.stage import Scenario, Stage
from benchmarks.targets import TARGETS
from benchmarks.tasks import TaskCrowd, TaskMember
from benchmarks.workload import Job, Scraper, Shift, backlog, bursts

#: Seconds: how long crowds run here. Nothing that is asserted depends on it.
MOMENT = 0.05


class Connection:
    def close(self):
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


# -- an unfair pool is caught ---------------------------------------------------------


def test_unfair_pool_is_caught():
    found = Crowd([Member(UnfairPool(2).connect, 0.0)] * 20).run(MOMENT, settle=0.1)
    # Fairness is that of the favourites at most ...
    assert found.fairness <= 2 / 20 + 1e-9
    for key in ("fair 200", "fair 7679", "threads: jain"):
        assert not TARGETS[key].met(found.fairness)
    # ... who starved is counted ...
    assert found.never_served == 18
    assert sum(waiting > 0 for waiting in found.pending) >= 18
    # ... and so are waits that had not ended.
    assert found.longest_wait >= MOMENT
    assert len(found.all_waits) >= sum(found.served) + 18
    assert not TARGETS["threads: spread"].met(rivalry.spread(found))


def outcome(served, wait=0.01, pending=None):
    """Return an outcome in which each thread was served so often."""
    waits = [[wait] * each for each in served]
    return Outcome(1.0, waits, pending or [0.0] * len(served))


def test_threads_that_are_served_alike_are_fair():
    found = outcome([97] * 50 + [98] * 50)
    assert TARGETS["fair 7679"].met(found.fairness)
    assert TARGETS["threads: spread"].met(rivalry.spread(found))
    assert found.throughput == 97.5 * 100


def test_favoured_tag_is_caught_though_its_threads_are_served_alike():
    by_thread = outcome([10] * sum(rivals.UNEVEN))
    assert by_thread.fairness == 1.0
    assert not TARGETS["threads: tags"].met(rivalry.over_tags(by_thread))
    served = [n for each in rivals.UNEVEN for n in [600 // each] * each]
    assert TARGETS["threads: tags"].met(rivalry.over_tags(outcome(served)))


def test_light_tag_that_was_never_served_is_caught():
    runs = {"ours": [outcome([5, 0], pending=[0.0, 0.5])]}
    assert [rivalry._light(each) for each in runs["ours"]] == [0.5]
    rows = rivalry._waits(rivalry._THREADS, "", {"QueuePool": runs["ours"]}, light=True)
    assert rows.rows[0].remark == "never served"


# -- crowds ---------------------------------------------------------------------------


def test_error_of_a_thread_ends_the_crowd_and_is_raised():
    def connect():
        raise RuntimeError("no connection")

    crowd = Crowd([Member(Connection, 0.0), Member(connect, 0.0)])
    with pytest.raises(RuntimeError, match="no connection"):
        crowd.run(MOMENT, settle=0.0)
    assert not any(thread.is_alive() for thread in crowd._threads)


def test_given_up_checkouts_are_counted_and_are_no_waits():
    def connect():
        time.sleep(0.001)
        raise exc.TimeoutError("too late")

    member = Member(connect, 0.0, gives_up=(exc.TimeoutError,))
    found = Crowd([member]).run(MOMENT, settle=0.05)
    assert found.served == [0]
    assert found.given_up[0] > 0


def test_interrupted_crowd_leaves_no_thread(monkeypatch):
    crowd = Crowd([Member(Connection, 0.0)] * 3)
    sleep = time.sleep

    def interrupt(seconds):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        crowd.run(MOMENT)
    assert not any(thread.is_alive() for thread in crowd._threads)


class AsyncConnection:
    async def close(self):
        pass


def test_tasks_take_turns_too():
    async def connect():
        return AsyncConnection()

    async def run():
        return await TaskCrowd([TaskMember(connect, 0.0)] * 4).run(MOMENT, settle=0.0)

    found = asyncio.run(run())
    assert found.never_served == 0
    assert max(found.served) - min(found.served) <= 1


def test_every_second_checkout_of_an_impatient_task_is_cancelled():
    cancelled = []
    calls = 0

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

    async def run():
        member = TaskMember(connect, 0.0, patience=0.001)
        return await TaskCrowd([member]).run(MOMENT, settle=0.0)

    found = asyncio.run(run())
    assert cancelled == list(range(1, 2 * len(cancelled), 2))
    assert abs(found.given_up[0] - found.served[0]) <= 1


def test_error_of_a_task_is_raised():
    async def connect():
        raise RuntimeError("no connection")

    async def run():
        member = TaskMember(connect, 0.0, patience=0.001)
        return await TaskCrowd([member]).run(MOMENT, settle=0.0)

    with pytest.raises(RuntimeError, match="no connection"):
        asyncio.run(run())


# -- the scrapers' work ---------------------------------------------------------------


def test_backlog_is_the_same_for_the_same_seed():
    jobs = backlog(50, 0.1, seed=3)
    assert jobs == backlog(50, 0.1, seed=3) != backlog(50, 0.1, seed=4)
    assert {job.due for job in jobs} == {0.0}
    assert all(0.05 <= job.service <= 0.15 for job in jobs)


def test_bursts_ask_for_what_they_are_told_to():
    jobs = bursts(1000.0, 4.0, 15, 0.05, seed=1)
    assert jobs == bursts(1000.0, 4.0, 15, 0.05, seed=1)
    assert [job.due for job in jobs] == sorted(job.due for job in jobs)
    demand = sum(job.service for job in jobs) / 1000.0
    assert demand == pytest.approx(4.0, rel=0.1)
    sizes = Counter(job.due for job in jobs).values()
    assert (min(sizes), max(sizes)) == (5, 15)


@pytest.fixture
def scraper():
    engine = queue_engine(2)
    yield Scraper("a", engine, engine.pool.checkedout, threads=4)
    engine.dispose()


def test_every_workflow_is_done_once(scraper):
    done = []
    jobs = [Job(0.0, n) for n in range(40)]
    found = workload.run(lambda c, name, n: done.append((name, n)), {scraper: jobs})
    assert sorted(done) == [("a", n) for n in range(40)]
    assert found.done == 40
    assert len(found.all_latencies) == 40
    assert found.throughput == 40 / found.seconds


def test_latency_is_counted_from_when_a_workflow_was_due(scraper):
    """Also if it was due long before anybody had time for it."""
    found = workload.run(lambda *args: None, {scraper: [Job(-100.0, 0.0)]})
    assert found.mean > 100


def test_error_of_a_workflow_ends_the_run(scraper):
    def work(connection, name, seconds):
        raise RuntimeError("no table")

    with pytest.raises(RuntimeError, match="no table"):
        workload.run(work, {scraper: backlog(10, 0.0, 0)})


def test_no_workflow_begins_after_the_limit(scraper):
    found = workload.run(
        lambda *args: None, {scraper: [Job(0.0, 0.0), Job(1e6, 0.0)]}, limit=MOMENT
    )
    assert found.done == 1


def test_shift_ends():
    late = iter(Shift(0.0, 0.0, 1.0))
    assert list(late) == []


def test_unchanged_looks_are_left_out_of_plots():
    looks = [0, 0, 3, 3, 3, 1, 1]
    found = workload.Outcome(held={"a": list(enumerate(looks))})
    assert found.changes == {"a": [(0, 0), (2, 3), (5, 1), (6, 1)]}


def test_unused_connections_are_those_in_the_middle_of_a_run():
    held = [(0.0, 0), (0.3, 15), (0.5, 15), (0.7, 15), (0.95, 2)]
    found = workload.Outcome(seconds=1.0, held={"layer1_5": held})
    assert static._unused(found, 20) == 5


def test_times_of_a_shift_are_those_of_its_looks():
    scene = shift._SCENE
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
    held = {
        name: [(look[0], look[place]) for look in story]
        for place, name in enumerate(("layer1_5", "layer2", "layer3"), 1)
    }
    times = shift._times(workload.Outcome(seconds=9.0, held=held))
    assert times == pytest.approx(
        {"first": 0.01, "full": 0.04, "freed": 0.02, "idle": 0.9}
    )


# -- the generator is not the bottleneck ----------------------------------------------


@pytest.mark.parametrize(("alone", "verdict"), [(100, "met"), (5, "NOT MET")])
def test_crowd_that_costs_too_much_is_told(monkeypatch, alone, verdict):
    monkeypatch.setattr(generator, "cheapest", lambda seconds: outcome([1]))
    monkeypatch.setattr(
        generator, "alone_in_threads", lambda callers, hold, seconds: outcome([alone])
    )
    (figure,) = generator.headroom(Stage(short=True)).figures
    assert figure.median == 1 / alone
    assert figure.verdict == verdict


# -- the stage and the catalogue ------------------------------------------------------


class Listener:
    def __init__(self):
        self.heard = []

    def section(self, title):
        self.heard.append(title)

    def step(self, text, done):
        self.heard.append((text, done))

    def found(self, section):
        self.heard.append(section.name)


def test_audience_hears_of_every_turn():
    listener = Listener()
    stage = Stage(audience=listener)

    def part(stage):
        stage.expect(2)
        for what in ("first", "second"):
            stage.interleave(what, {"A": int, "B": int}, 2)
        return Findings(notes=(what,))

    scenario = Scenario("one", "Title", "Text.", (part, part))
    (section,) = play(stage, [scenario])
    assert section.findings.notes == ("second", "second")
    assert listener.heard[0] == "Title"
    assert listener.heard[-1] == "one"
    steps = listener.heard[1:-1]
    assert [text for text, _ in steps[:3]] == [
        "first: A, 1 of 2",
        "first: B, 1 of 2",
        "first: A, 2 of 2",
    ]
    assert [done for _, done in steps] == [n / 16 for n in range(16)]


def test_measurement_without_its_database_says_so():
    with pytest.raises(BenchError, match="needs a database"):
        _ = Stage().place


def test_short_form_is_the_shorter_one():
    assert (Stage().pick(1, 2), Stage(short=True).pick(1, 2)) == (1, 2)


def test_scenarios_have_names_of_their_own_and_targets_that_exist():
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
    claimed = {key for scenario in SCENARIOS for key in scenario.targets}
    # What only the full form measures is not missed in the short one.
    assert set(TARGETS) - claimed == {"light, full", "light, connection"}
    assert claimed <= set(TARGETS)


def test_targets_have_texts_of_their_own():
    texts = [(target.what, target.beside) for target in TARGETS.values()]
    assert len(set(texts)) == len(texts)


# -- the contenders -------------------------------------------------------------------


def null_place():
    return Database(make_url("null://"))


@pytest.mark.parametrize("peers", [THREADS, TASKS])
def test_contenders_are_named_and_explained(peers):
    assert len({peer.name for peer in peers}) == len(peers)
    assert [peer.role for peer in peers[:2]] == ["ours", "base"]
    assert all(peer.how for peer in peers)


@pytest.mark.parametrize("peer", THREADS[:4], ids=lambda peer: peer.name)
def test_contender_serves_as_many_as_it_has_connections(peer):
    with peer.open(Setup(null_place(), 4, 2, timeout=0.0)) as connects:
        for _ in range(2):  # what is closed can be had again
            taken = [connects("a")(), connects("a")(), connects("b")(), connects("b")()]
            with pytest.raises(exc.TimeoutError):
                connects("b")()
            for connection in taken:
                connection.close()


def test_semaphore_holds_a_tag_to_its_part():
    (peer,) = (peer for peer in THREADS if "semaphore" in peer.name)
    with peer.open(Setup(null_place(), 4, 2, timeout=0.0)) as connects:
        taken = [connects("a")(), connects("a")()]
        with pytest.raises(exc.TimeoutError):
            connects("a")()
        for connection in taken:
            connection.close()


def test_dsn_is_what_libpq_reads():
    place = Database(make_url("postgresql+psycopg2://u:p%40@h:5/d?sslmode=require"))
    assert place.dsn == "postgresql://u:p%40@h:5/d?sslmode=require"


def test_figures_of_parts_are_put_together():
    one = Findings((Figure("a", "-", (1.0,)),), notes=("n",))
    both = one + Findings((Figure("b", "-", (1.0,)),))
    assert [figure.what for figure in both.figures] == ["a", "b"]
    assert both.notes == ("n",)
