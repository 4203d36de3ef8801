"""A fleet of processes under load while its limits change, it restarts and is paused.

    PYTHONPATH=tests python -m support.fleet [--rounds N] [host|postgresql ...]

Starts a PostgreSQL and looks at its sessions all the time. Prints for each store how
long it took until shares were right, the most sessions, and how many checkouts there
were. Exits with 1 if there were more sessions than the larger of the numbers in force,
a checkout failed, or the shares were late. The machine should be otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, exc, make_url, text
from sqlalchemy.pool import NullPool

from sqla_fairpool import FairQueuePool, tag
from sqla_fairpool.demo import EmbeddedServer

#: Members of the fleet, threads of each, and how long each holds a connection.
MEMBERS, THREADS, HOLD = 6, 10, 0.1
#: Shares are right within two beats of the keepers, which are a second each.
TWO_BEATS = 2.0
#: Of the members.
ROLE = "fleet"
#: Seconds in which anything that is waited for has to happen.
PATIENCE = 30.0

_SESSIONS = text(
    "SELECT application_name, count(*), count(*) FILTER (WHERE state = 'active') "
    "FROM pg_stat_activity WHERE application_name LIKE 'fleet %' GROUP BY 1"
)


# -- a member --------------------------------------------------------------------------


def work(url: str, ledger: str, name: str, size: str, on_other_terms: str) -> None:
    """Use connections until the standard input ends; tell then what came of it."""
    engine = create_engine(
        url,
        poolclass=FairQueuePool,
        pool_size=int(size),
        pool_timeout=PATIENCE,
        ledger=ledger,
        on_other_terms=on_other_terms,
        connect_args={"application_name": f"fleet {name}"},
    )
    over = threading.Event()
    failures: list[str] = []
    waits: list[float] = []

    def use() -> None:
        began = time.monotonic()
        with tag(name), engine.connect() as connection:
            waits.append(time.monotonic() - began)
            connection.execute(text(f"SELECT pg_sleep({HOLD})"))

    def go_on() -> None:
        while not over.is_set():
            try:
                use()
            except Exception as error:
                failures.append(str(error)[:300])

    use()
    print("working", flush=True)
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in range(THREADS):
            threads.submit(go_on)
        sys.stdin.read()
        over.set()
    told = {"checkouts": len(waits), "longest": max(waits), "failures": failures}
    print(json.dumps(told), flush=True)


# -- the fleet -------------------------------------------------------------------------


class Fleet:
    """The members, and a look at their sessions all the time."""

    def __init__(self, url: str, ledger: str) -> None:
        self.ledger = ledger
        # Of another role than the members: who looks at the sessions is no suspect.
        self._url = make_url(url).set(username=ROLE).render_as_string(False)
        engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._connection = engine.connect()
        with suppress(exc.ProgrammingError):  # it is there
            self._connection.execute(text(f"CREATE ROLE {ROLE} LOGIN SUPERUSER"))
        self.members: dict[str, subprocess.Popen[str]] = {}
        self.faults: list[str] = []
        self.checkouts, self.longest = 0, 0.0
        #: The larger of the numbers in force, and the most sessions under it.
        self.bound = self.most = 0
        self.open: dict[str, int] = {}
        self.active = 0
        self._over = threading.Event()
        self._looks = threading.Thread(target=self._look)
        self._looks.start()

    def _look(self) -> None:
        before = 0
        while not self._over.is_set():
            bound = self.bound  # as it was before the look
            rows = self._connection.execute(_SESSIONS).all()
            self.open = {row[0].removeprefix("fleet "): row[1] for row in rows}
            self.active = sum(row[2] for row in rows)
            # The view is read session by session: one look may see one and its heir.
            there = sum(self.open.values())
            self.most = max(self.most, min(there, before))
            if min(there, before) > max(bound, self.bound):
                self.faults.append(f"{there} sessions of {bound}")
            before = there

    def start(self, name: str, size: int, on_other_terms: str = "adopt") -> None:
        command = [sys.executable, "-m", "support.fleet", "--member"]
        member = subprocess.Popen(
            [*command, self._url, self.ledger, name, str(size), on_other_terms],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert member.stdout is not None
        if member.stdout.readline() != "working\n":
            raise SystemExit(f"{name} does not work")
        self.members[name] = member

    def stop(self, name: str) -> None:
        """End a member as a program ends."""
        out, _ = self.members.pop(name).communicate(timeout=PATIENCE)
        told = json.loads(out)
        self.checkouts += told["checkouts"]
        self.longest = max(self.longest, told["longest"])
        self.faults += [f"{name}: {failure}" for failure in told["failures"]]

    def kill(self, name: str) -> None:
        member = self.members.pop(name)
        member.kill()
        member.communicate()

    def command(self, *arguments: str) -> tuple[int, str]:
        places = ("--ledger", self.ledger, "--url", self._url)
        done = subprocess.run(
            [sys.executable, "-m", "sqla_fairpool", "ledger", *arguments, *places],
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def shares(self, size: int, within: float = TWO_BEATS) -> float:
        """Return how long it took until all had their shares, and held them."""
        low, more = divmod(size, len(self.members))
        wanted = [low] * (len(self.members) - more) + [low + 1] * more
        began = right = time.monotonic()
        while time.monotonic() - right < 0.2:
            time.sleep(0.002)
            if sorted(self.open.get(name, 0) for name in self.members) != wanted:
                right = time.monotonic()
                if right - began > PATIENCE:
                    self.faults.append(f"shares of {size} are {self.open}")
                    break
        if right - began > within:
            self.faults.append(f"shares of {size} took {right - began:.2f} s")
        return right - began

    def close(self) -> None:
        for name in [*self.members]:
            with suppress(Exception):
                self.stop(name)
        self._over.set()
        self._looks.join()
        self._connection.close()


# -- what is done to it ----------------------------------------------------------------


def change_limits(fleet: Fleet) -> str:
    """20, 30, 12, 20, while two are killed and two start with other numbers."""
    fleet.bound = 20
    for n in range(MEMBERS):
        fleet.start(f"m{n}", 20)
    took = [fleet.shares(20, PATIENCE)]

    def change(size: int) -> None:
        fleet.bound = max(fleet.bound, size)
        status, said = fleet.command("set", f"pool_size={size}")
        if status:
            fleet.faults.append(said)

    change(30)
    fleet.kill("m0")
    fleet.start("n0", 25)
    took.append(fleet.shares(30))
    change(12)
    fleet.kill("m1")
    fleet.start("n1", 40)
    took.append(fleet.shares(12))
    fleet.bound = 12
    change(20)
    took.append(fleet.shares(20))
    return "shares right after " + ", ".join(f"{t:.2f}" for t in took[1:]) + " s"


def restart(fleet: Fleet) -> str:
    """From 20 to 30, one member after the other, the newest leads."""
    fleet.bound = 20
    for n in range(MEMBERS):
        fleet.start(f"m{n}", 20, "lead")
    fleet.shares(20, PATIENCE)
    fleet.bound = 30
    for n in range(MEMBERS):
        fleet.start(f"n{n}", 30, "lead")
        fleet.stop(f"m{n}")
    return f"shares right after {fleet.shares(30):.2f} s"


def pause(fleet: Fleet) -> str:
    """Pause under load, with a member that was killed; nothing is active; resume."""
    fleet.bound = 20
    for n in range(MEMBERS - 1):
        fleet.start(f"m{n}", 20)
    paused, resumed = 0.0, 0.0
    for n in range(5):
        fleet.start(f"v{n}", 20)
        fleet.kill(f"v{n}")
        began = time.monotonic()
        status, said = fleet.command("pause", "--wait", str(PATIENCE))
        paused = max(paused, time.monotonic() - began)
        if status:
            fleet.faults.append(said)
        end = time.monotonic() + 0.5
        time.sleep(0.02)  # a look that began before
        while time.monotonic() < end:
            if fleet.active:
                fleet.faults.append(f"{fleet.active} sessions are active")
            time.sleep(0.002)
        fleet.command("resume")
        began = time.monotonic()  # after the row was written
        while not fleet.active and time.monotonic() - began < PATIENCE:
            time.sleep(0.002)
        resumed = max(resumed, time.monotonic() - began)
    if resumed > TWO_BEATS / 2:
        fleet.faults.append(f"served {resumed:.2f} s after resume")
    return f"pause --wait took {paused:.2f} s at most, resume {resumed * 1000:.0f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("stores", nargs="*", default=["host", "postgresql"])
    arguments = parser.parse_args()
    server, faults = EmbeddedServer(), 0
    server.start()
    try:
        for n in range(arguments.rounds):
            for store in arguments.stores:
                for what in (change_limits, restart, pause):
                    faults += run(server.url, store, f"{what.__name__}{n}", what)
    finally:
        server.stop()
    return 1 if faults else 0


def run(url: str, store: str, name: str, what: Any) -> int:
    """Do something to a fleet of its own; print what came of it, return the faults."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = str(Path(folder, "ledger"))
        if store != "host":
            place = make_url(url).set(username=ROLE).update_query_dict({"ledger": name})
            ledger = place.render_as_string(hide_password=False)
        fleet = Fleet(url, ledger)
        try:
            found = what(fleet)
        finally:
            fleet.close()
    print(
        f"{store}, {name}: {found}; {fleet.checkouts} checkouts, the longest waited "
        f"{fleet.longest:.2f} s; at most {fleet.most} sessions"
    )
    for fault in fleet.faults[:5]:
        print(f"  FAULT {fault}")
    return len(fleet.faults)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--member"]:
        work(*sys.argv[2:])
    else:
        sys.exit(main())
