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
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from support.counting_server import CountingServer
from support.sampler import CAPACITY, Server
from support.threads import PATIENCE, eventually

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

PROGRAM = Path(__file__).parents[1] / "support" / "scraper_program.py"


@pytest.fixture
def server(postgres_url):
    server = Server(postgres_url)
    yield server
    server.close()
    assert server.most <= CAPACITY
    assert server.looks > 10


@pytest.fixture(params=["host", "postgresql"])
def ledger(request, tmp_path, postgres_url):
    """Where a new ledger is, of each kind."""
    if request.param == "host":
        return str(tmp_path / "app.ledger")
    url = make_url(postgres_url).update_query_dict({"ledger": uuid.uuid4().hex})
    return url.render_as_string(hide_password=False)


@pytest.fixture
def scraper(server, ledger):
    """Start scrapers, each a process; they are gone after the test."""
    processes = []

    @contextmanager
    def scraper(name, threads=25, hold=0.2, *how):
        process = start(name, threads, hold, *how)
        yield process
        process.stdin.close()
        code = process.wait(PATIENCE)
        assert code == 0, process.stderr.read()

    def start(name, threads=25, hold=0.2, *how):
        url = server.url.render_as_string(hide_password=False)
        command = [sys.executable, PROGRAM, url, ledger]
        process = subprocess.Popen(
            [*map(str, [*command, name, threads, hold]), *how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "working\n"
        return process

    scraper.start = start
    yield scraper
    for process in processes:
        process.kill()
        process.wait()
        print(process.args[4], process.stderr.read())  # shown if the test fails
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def test_four_scenarios_with_a_process_per_scraper(server, scraper):
    with scraper("layer1"):
        server.until(layer1=15)
        server.stays(0.5, layer1=15)
        with scraper("layer3"):
            server.until(layer1=10, layer3=10)
            server.stays(0.5, layer1=10, layer3=10)
            with scraper("layer2"):
                server.until(layer1=7, layer2=6, layer3=7)
                server.stays(0.5, layer1=7, layer2=6, layer3=7)
            server.until(layer1=10, layer3=10)
            server.stays(0.5, layer1=10, layer3=10)
    server.until()


def test_idle_scraper_frees_everything_and_comes_back(server, scraper):
    with scraper("layer1"), scraper("layer2") as idle:
        server.until(layer1=10, layer2=10)
        idle.stdin.write("pause\n")
        idle.stdin.flush()
        assert idle.stdout.readline() == "paused\n"
        server.until(layer1=15)
        server.stays(0.5, layer1=15)


def test_two_processes_under_one_tag_have_one_ceiling(server, scraper):
    with scraper("layer1"), scraper("layer1"):
        server.until(layer1=15)
        server.stays(0.5, layer1=15)
        with scraper("layer2"):
            server.until(layer1=10, layer2=10)
            server.stays(0.5, layer1=10, layer2=10)


def test_killed_in_the_middle_of_a_query(server, scraper):
    """Its server sessions outlive it, and its slots are theirs until they end."""
    victim = scraper.start("victim", 25, 3.0)
    server.until(victim=15)
    victim.kill()
    with scraper("heir"):
        server.until(heir=15)
        server.stays(0.3, heir=15)


def test_stopped_process_keeps_what_it_has(server, scraper):
    with scraper("stopped") as stopped:
        server.until(stopped=15)
        os.kill(stopped.pid, signal.SIGSTOP)
        with scraper("other"):
            server.until(other=5)
            server.stays(1.5, other=5)
            assert server.open == {"stopped": 15, "other": 5}
            os.kill(stopped.pid, signal.SIGCONT)
            server.until(stopped=10, other=10)
    server.until()


def test_forked_worker_is_a_member_of_its_own(server, scraper):
    with scraper("parent", 25, 0.2, "fork"), scraper("other"):
        server.until(parent=10, other=10)
        server.stays(0.5, parent=10, other=10)


@pytest.mark.parametrize("how", ["preload", "multiprocessing"])
def test_workers_of_one_application_share_its_tags_part(server, scraper, how):
    """As gunicorn's and Celery's: the engine is made before they are forked."""
    with scraper("workers", 15, 0.2, how) as parent, scraper("other"):
        assert parent.stdout.readline() == "working\n"  # the second of them, too
        server.until(workers=10, other=10)
        server.stays(0.5, workers=10, other=10)


def test_members_killed_again_and_again(server, scraper):
    """Whenever it hits them: in a connect, a transaction, a query."""
    with scraper("steady"):
        for n in range(8):
            victim = scraper.start("victim", 25, 0.02)
            time.sleep(n * 0.03)  # another moment each time; orders nothing
            victim.kill()
            victim.wait()
        server.until(steady=15)


def test_killed_while_it_holds_the_stores_lock(server, scraper, ledger):
    """The kernel, or the server, releases the lock with its process."""
    with scraper("steady"):
        victim = subprocess.Popen(
            [sys.executable, PROGRAM.with_name("lock_holder.py"), ledger],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert victim.stdout.readline() == "locked\n"
        with pytest.raises(subprocess.TimeoutExpired):
            victim.wait(0.5)
        victim.kill()
        victim.wait()
        victim.stdout.close()
        with scraper("other"):
            server.until(steady=10, other=10)


def test_store_that_is_away_under_load(server, scraper, ledger, postgres_url):
    """What is owned is kept, and nothing grows; then all goes on."""
    with scraper("steady"):
        server.until(steady=15)
        holder = subprocess.Popen(
            [sys.executable, PROGRAM.with_name("lock_holder.py"), ledger],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout.readline() == "locked\n"
        with ThreadPoolExecutor() as pool:
            late = pool.submit(scraper.start, "late")
            server.stays(1.0, steady=15)
            if ledger.startswith("postgresql"):  # and its sessions are cut
                engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
                with engine.connect() as connection:
                    connection.execute(
                        text(
                            "select pg_terminate_backend(pid) from pg_stat_activity "
                            "where application_name = 'sqla_fairpool ledger' "
                            "and state <> 'idle in transaction'"  # the holder
                        )
                    )
                engine.dispose()
            server.stays(1.0, steady=15)
            holder.kill()
            holder.wait()
            holder.stdout.close()
            late = late.result(PATIENCE)
        server.until(steady=10, late=10)
        late.stdin.close()
        assert late.wait(PATIENCE) == 0, late.stderr.read()
        server.until(steady=15)


@contextmanager
def counted(server, ledger, name):
    """A process whose connections a counting server counts."""
    program = PROGRAM.with_name("counting_server.py")
    process = subprocess.Popen(
        [sys.executable, program, str(server.port), ledger, name, "25"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "working\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_accepts_and_closes_are_counted_exactly(ledger):
    """Any database, which cannot be asked: killed, stopped and polite members."""
    server = CountingServer()
    try:
        with counted(server, ledger, "a") as polite, counted(server, ledger, "b") as b:
            eventually(lambda: server.open == 20)
            # Until nothing moves any more: who is stopped in a transaction has the
            # store to himself as long as he sleeps.
            time.sleep(1.0)
            os.kill(b.pid, signal.SIGSTOP)
            polite.stdin.close()
            assert polite.wait(PATIENCE) == 0
            eventually(lambda: server.open < 20)
            with counted(server, ledger, "c"):
                eventually(lambda: server.open == 20)
                os.kill(b.pid, signal.SIGCONT)
                for _ in range(3):
                    with counted(server, ledger, "killed"):
                        pass
                b.kill()  # what it had is in quarantine for ten seconds
                eventually(lambda: server.open < 20)
                eventually(lambda: server.open >= 15)
    finally:
        server.close()
    assert server.most == CAPACITY
