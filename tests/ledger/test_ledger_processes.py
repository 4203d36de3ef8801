"""Several processes, one ledger, a real PostgreSQL: the bound holds at every instant.

The server itself holds them to it: their role has a connection limit of as many, and
one more connection would be refused, which fails the test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
from sqlalchemy import create_engine
from support.counting_server import CountingServer
from support.sampler import CAPACITY, Server
from support.stores import SUPPORT, end, run, start, stop
from support.threads import PATIENCE, eventually, give

from sqla_fairpool.cli import main
from sqla_fairpool.ledger.addresses import make_store
from sqla_fairpool.ledger.inspector import Inspector

pytestmark = [pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture
def server(postgres_url):
    server = Server(postgres_url)
    yield server
    server.close()
    assert server.most <= CAPACITY + server.beside
    assert server.looks > 10


@pytest.fixture
def server_url(server):
    return server.url.render_as_string(hide_password=False)


@pytest.fixture
def started():
    """Start programs; they are gone after the test."""
    processes = []

    def started(*args, **options):
        processes.append(start(*args, **options))
        return processes[-1]

    yield started
    for process in processes:
        print(*process.args[1:], end(process))  # shown if the test fails


@pytest.fixture
def scraper(started, server_url, ledger):
    """Start scrapers, each a process."""
    program = "scraper_program.py", server_url, ledger

    def begin(name, threads=25, hold=0.2, *how):
        return started(*program, name, threads, hold, *how)

    @contextmanager
    def scraper(*args):
        process = begin(*args)
        yield process
        finish(process)

    scraper.start = begin
    return scraper


def finish(process):
    """Let a scraper end as scripts do; it has nothing to say."""
    process.stdin.close()
    assert process.wait(PATIENCE) == 0, process.stderr.read()


def kill(process):
    process.kill()
    process.wait()


def test_four_scenarios_with_a_process_per_scraper(server, scraper):
    with scraper("layer1"):
        server.settles(layer1=15)
        with scraper("layer3"):
            server.settles(layer1=10, layer3=10)
            with scraper("layer2"):
                server.settles(layer1=7, layer2=6, layer3=7)
            server.settles(layer1=10, layer3=10)
    server.until()


def test_idle_scraper_frees_everything_and_comes_back(server, scraper):
    with scraper("layer1"), scraper("layer2") as idle:
        server.until(layer1=10, layer2=10)
        idle.stdin.write("pause\n")
        idle.stdin.flush()
        assert idle.stdout.readline() == "paused\n"
        server.settles(layer1=15)


def test_two_processes_under_one_tag_have_one_ceiling(server, scraper):
    with scraper("layer1"), scraper("layer1"):
        server.settles(layer1=15)
        with scraper("layer2"):
            server.settles(layer1=10, layer2=10)


def test_killed_in_the_middle_of_a_query(server, scraper):
    """Its server sessions outlive it, and its slots are theirs until they end."""
    victim = scraper.start("victim", 25, 3.0)
    server.until(victim=15)
    victim.kill()
    with scraper("heir"):
        server.until(heir=15)
        server.stays(0.3, heir=15)


def test_stopped_process_keeps_what_it_has(server, scraper, ledger):
    with scraper("stopped") as stopped:
        server.until(stopped=15)
        stop(stopped, ledger)
        with scraper("other"):
            server.until(other=5)
            server.stays(1.5, other=5)
            assert server.open == {"stopped": 15, "other": 5}
            os.kill(stopped.pid, signal.SIGCONT)
            server.until(stopped=10, other=10)
    server.until()


def test_forked_worker_is_a_member_of_its_own(server, scraper):
    with scraper("parent", 25, 0.2, "fork"), scraper("other"):
        server.settles(parent=10, other=10)


@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
@pytest.mark.parametrize("ledger", ["postgresql"], indirect=True)
def test_children_forked_in_the_middle_of_checkouts(server, server_url, ledger, driver):
    """Each of them gets a connection; ten threads of their parent go on meanwhile."""
    url = server_url.replace("psycopg2", driver)
    said = run(SUPPORT / "member_program.py", url, ledger, "threads")
    assert said == "done\n" * 26  # of 25 children and their parent
    eventually(lambda: not server.open)


@pytest.mark.parametrize("how", ["preload", "multiprocessing"])
def test_workers_of_one_application_share_its_tags_part(server, scraper, how):
    """As gunicorn's and Celery's: the engine is made before they are forked."""
    with scraper("workers", 15, 0.2, how) as parent, scraper("other"):
        assert parent.stdout.readline() == "working\n"  # the second of them, too
        server.settles(workers=10, other=10)


def test_members_killed_again_and_again(server, scraper):
    """Whenever it hits them: in a connect, a transaction, a query."""
    with scraper("steady"):
        for n in range(8):
            victim = scraper.start("victim", 25, 0.02)
            time.sleep(n * 0.03)  # another moment each time; orders nothing
            kill(victim)
        server.until(steady=15)


def test_limits_change_while_members_come_and_go(server, scraper, ledger):
    """Nobody is refused, and the server sees no more than the larger of the limits."""

    def change(size):
        main(["ledger", "set", "--ledger", ledger, f"pool_size={size}"])

    with scraper("a"), scraper("b"):
        victim = scraper.start("victim", 25, 0.2)
        server.until(a=7, b=7, victim=6)
        change(12)
        kill(victim)
        server.settles(a=6, b=6)
        with scraper("late"):
            server.settles(a=4, b=4, late=4)
            change(20)
            server.until(a=7, b=7, late=6)
        server.settles(a=10, b=10)


def test_nothing_is_active_while_it_is_paused(server, scraper, ledger, capsys):
    """Under load, with a member that was killed; its last statements end before."""

    def command(*args):
        assert main(["ledger", *args, "--ledger", ledger]) == 0
        return capsys.readouterr().out

    with scraper("a"), scraper("b"):
        victim = scraper.start("victim", 25, 0.2)
        server.until(a=7, b=7, victim=6)
        kill(victim)
        assert command("pause", "--wait", "30") == "paused\nnothing is out\n"
        server.until()
        looks = server.looks
        eventually(lambda: server.now or server.looks > looks + 50)
        assert server.now == {}
        command("resume")
        server.until(a=10, b=10)


@pytest.fixture
def limited(server, server_url, ledger, postgres_url, operator, capsys):
    """Have the server hold the role to what `ledger limit` prints, for 3 processes.

    Those for a monitor and a command are taken.
    """
    budget = ["--connections", str(CAPACITY), "--processes", "3"]
    main(["ledger", "limit", "--url", server_url, "--ledger", ledger, *budget])
    _, _, statement = capsys.readouterr().out.rpartition("ALTER ROLE ")
    number = int(statement.split()[-1])
    in_server = ledger.startswith("postgresql")
    tools = 4 if in_server else 2
    assert number == CAPACITY + 3 * (1 + in_server) + tools
    # Where the ledger is not in the server, each process may ask by one more.
    server.beside = 0 if in_server else 3
    operator(postgres_url, f"alter role {statement}")
    taken = create_engine(server.url, pool_size=tools)
    held = [taken.connect() for _ in range(tools)]
    yield
    give(held)
    taken.dispose()


@pytest.fixture
def own_database(server, postgres_url, operator):
    """A database in which the scrapers' role may create a ledger."""
    name = f"d{uuid.uuid4().hex}"
    operator(postgres_url, f"create database {name} owner scraper")
    yield server.url.set(database=name).render_as_string(hide_password=False)
    operator(postgres_url, f"drop database {name} with (force)")


@pytest.mark.parametrize("ledger", ["host", "own_database"], indirect=True)
@pytest.mark.usefixtures("limited")
def test_role_that_is_limited_to_what_the_command_prints(server, scraper):
    """Members are killed under load, and asked after: nobody is refused, or hears of
    it."""
    steadies = [scraper.start(name) for name in ("one", "two")]
    server.until(one=10, two=10)
    for _ in range(3):
        victim = scraper.start("victim", 25, 0.5)
        eventually(lambda: server.now.get("victim", 0) > 3)
        kill(victim)
    server.until(one=10, two=10)
    for steady in steadies:
        finish(steady)
        assert steady.stderr.read() == ""


@pytest.mark.parametrize(
    ("way", "leaves"),
    [
        *(("end", True), ("tasks", True), ("SystemExit", True)),
        *(("fork", True), ("spawn", True), ("celery", True)),
        *(("os._exit", False), ("SIGTERM", False)),
    ],
)
def test_program_that_ends_properly_is_no_crash(
    postgres_url, ledger, capsys, way, leaves
):
    """It leaves where Python tells of the end; else its slots are said to be free."""
    program = [sys.executable, SUPPORT / "ending_program.py", postgres_url, ledger, way]
    done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (-15 * (way == "SIGTERM"), "")
    place = ["--ledger", ledger, "--url", postgres_url]

    def said(*command):
        assert main([*command, *place]) == 0
        return capsys.readouterr().out

    shown = said("ledger", "show")
    assert ("free for whoever" not in shown and "has ended" not in shown) == leaves
    assert ": 0 owned by 0 members" in shown
    if not leaves:
        # The server notices the end of a session in a moment.
        free = "has ended: 1 slot free for whoever comes next"
        eventually(lambda: free in said("ledger", "show"))
        stats = said("stats")
        assert "Warning: ending_program.py" in stats and free in stats
        assert "quarantined 0" in stats


def test_store_that_is_away_under_load(
    server, scraper, started, ledger, postgres_url, operator
):
    """What is owned is kept, and nothing grows; then all goes on.

    The kernel, or the server, releases the store's lock with its process.
    """
    with scraper("steady"):
        server.until(steady=15)
        holder = started("lock_holder.py", ledger, says="locked")
        with ThreadPoolExecutor() as pool:
            late = pool.submit(scraper.start, "late")
            server.stays(1.0, steady=15)
            if ledger.startswith("postgresql"):  # and its sessions are cut
                operator(postgres_url, END_WAITING)
            server.stays(1.0, steady=15)
            assert holder.poll() is None
            kill(holder)
            late = late.result(PATIENCE)
        server.until(steady=10, late=10)
        finish(late)
        server.until(steady=15)


# The holder of the lock is in a transaction.
END_WAITING = (
    "select pg_terminate_backend(pid) from pg_stat_activity "
    "where application_name = 'sqla_fairpool ledger' and state <> 'idle in transaction'"
)


def connections(ledger):
    """Return how many connections each scraper has, as the members say."""
    inspector = Inspector(make_store(ledger, None, observes=True))
    with closing(inspector):
        return {row.name: row.connections for row in inspector.look().scrapers}


def test_accepts_and_closes_are_counted_exactly(ledger, started):
    """Any database, which cannot be asked: killed, stopped and polite members."""
    server = CountingServer()

    def counted(name):
        return started("counting_server.py", server.port, ledger, name, 25)

    try:
        polite, b = counted("a"), counted("b")
        eventually(lambda: connections(ledger) == {"a": 10, "b": 10})
        stop(b, ledger)
        finish(polite)
        eventually(lambda: server.open < 20)
        c = counted("c")
        eventually(lambda: server.open == 20)
        os.kill(b.pid, signal.SIGCONT)
        for _ in range(3):
            kill(counted("killed"))
        kill(b)  # what it had is in quarantine for ten seconds
        eventually(lambda: server.open < 20)
        eventually(lambda: server.open >= 15)
        kill(c)
    finally:
        server.close()
    assert server.most == CAPACITY
