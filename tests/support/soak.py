"""Processes, threads and tasks on one ledger, for as long as asked.

    PYTHONPATH=tests python -m support.soak --minutes 120 --store host

A process of threads and one of tasks live all the time. Others come, and end in good
order, are killed, or are stopped for a while; the server is restarted now and then,
every other time at once as if it crashed. Prints a line of samples every ten seconds,
and at the end what grows how fast, and what went wrong. Exits with 1 if there was
ever one connection too many, or if slots are left over.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import sqla_fairpool
from sqla_fairpool import AsyncAdaptedFairQueuePool, FairQueuePool
from sqla_fairpool.demo import EmbeddedServer
from sqla_fairpool.ledger.addresses import make_store
from sqla_fairpool.ledger.inspector import read
from sqla_fairpool.ledger.store import LedgerError, StoreAway

from .cluster import restart

SLOTS, CALLERS, NAME = 6, 6, "soak"
#: Seconds between samples, between newcomers, between restarts of the server.
SAMPLE, CHURN, RESTART = 10.0, 20.0, 300.0
WORK = text("select pg_sleep(0.02)")
COUNT = text(f"select count(*) from pg_stat_activity where application_name = '{NAME}'")

# -- one of the processes --------------------------------------------------------------


def member(url, ledger, how, seed):
    """Use connections until SIGTERM, then print what happened, by kind."""
    over, seen, chance = threading.Event(), collections.Counter(), random.Random(seed)
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    options = {"ledger": ledger, "max_overflow": 0, "idle_timeout": 2.0}
    options |= dict.fromkeys(("pool_size", "soft_limit", "max_limit"), SLOTS)
    tags = [f"{how}{n % 3}" for n in range(CALLERS)]
    if how == "tasks":
        url = make_url(url).set(drivername="postgresql+asyncpg")
        options["connect_args"] = {"server_settings": {"application_name": NAME}}
        options["poolclass"] = AsyncAdaptedFairQueuePool
        engine = create_async_engine(url, **options)
        asyncio.run(_tasks(engine, over, seen, chance, tags))
    else:
        options["connect_args"] = {"application_name": NAME}
        engine = create_engine(url, poolclass=FairQueuePool, **options)
        with ThreadPoolExecutor(CALLERS) as pool:
            for tag in tags:
                pool.submit(_thread, engine, over, seen, chance, tag)
            # SIGTERM after a stop may reach another thread than the main one, which
            # runs the handler, and has to be awake for that.
            while not over.is_set():
                time.sleep(1.0)
        engine.dispose()
    print(json.dumps(seen), flush=True)


def _note(seen, error=None):
    """Count a turn. That the server cuts what it has is no fault of the pool."""
    is_cut = isinstance(error, (DBAPIError, OSError))
    what = "cut" if is_cut else f"{type(error).__name__}: {error}"[:200]
    seen[what if error else "served"] += 1


def _thread(engine, over, seen, chance, tag):
    while not over.wait(chance.random()):
        try:
            with sqla_fairpool.tag(tag), engine.connect() as connection:
                connection.execute(WORK)
            _note(seen)
        except Exception as error:
            _note(seen, error)


async def _tasks(engine, over, seen, chance, tags):
    async def caller(tag):
        with sqla_fairpool.tag(tag):
            while not over.is_set():
                await asyncio.sleep(chance.random())
                try:
                    async with engine.connect() as connection:
                        await connection.execute(WORK)
                    _note(seen)
                except Exception as error:
                    _note(seen, error)

    await asyncio.gather(*map(caller, tags))
    await engine.dispose()


# -- the driver ------------------------------------------------------------------------


class Soak:
    def __init__(self, kind, seed):
        self.random = random.Random(seed)
        self.server = EmbeddedServer()
        self.server.start()
        self.url, self.folder = self.server.url, tempfile.TemporaryDirectory()
        place = Path(self.folder.name, "ledger")
        self.ledger = "database" if kind == "database" else str(place)
        self.store = make_store(self.ledger, make_url(self.url), observes=True)
        self.most = self.restarts = 0
        self.samples, self.ended = [], collections.Counter()
        self.is_over = threading.Event()
        self.processes = {}

    def start(self, how):
        command = [sys.executable, "-m", "support.soak", "member", self.url]
        command += [self.ledger, how, str(self.random.random())]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def end(self, process, number=signal.SIGTERM):
        process.send_signal(number)
        said = process.communicate(timeout=120)[0]
        self.ended.update(json.loads(said) if said else {"killed": 1})

    def watch(self):
        """Look at the server all the time, beside the restarts."""
        engine = create_engine(self.url, poolclass=NullPool)
        before = 0
        while not self.is_over.wait(0.05):
            try:
                with engine.connect() as connection:
                    while not self.is_over.wait(0.1):
                        now = connection.scalar(COUNT)
                        self.most, before = max(self.most, min(now, before)), now
                        connection.rollback()
            except DBAPIError:
                before = 0

    def churn(self):
        """Have processes come and go."""
        while not self.is_over.wait(CHURN * (0.5 + self.random.random())):
            process = self.start(self.random.choice(["threads", "tasks"]))
            self.is_over.wait(5 + CHURN * self.random.random())
            if self.random.random() < 0.2:
                process.send_signal(signal.SIGSTOP)
                self.is_over.wait(10)
                process.send_signal(signal.SIGCONT)
            self.end(process, self.random.choice([signal.SIGKILL, signal.SIGTERM]))

    def restart(self):
        restart(self.server, ["immediate", "fast"][self.restarts % 2])
        self.restarts += 1

    def slots(self):
        """Return the slots that are owned, and in quarantine, as the ledger has it."""
        try:
            self.store.open()
            book = read(self.store).book
            return book.owned, book.quarantined
        except (
            LedgerError,
            StoreAway,
        ):  # no member yet, or the server is just being restarted
            return None, None

    def sample(self, began):
        psutil = import_module("psutil")
        sample = {"hours": round((time.monotonic() - began) / 3600, 4)}
        for how, process in self.processes.items():
            its = psutil.Process(process.pid)
            sample[f"{how} KiB"] = its.memory_full_info().uss // 1024
            sample[f"{how} descriptors"] = its.num_fds()
            sample[f"{how} OS threads"] = its.num_threads()
        sample["slots owned"], sample["in quarantine"] = self.slots()
        files = [path.stat() for path in Path(self.folder.name).rglob("*")]
        sample["ledger files"] = len(files)
        sample["ledger bytes"] = sum(file.st_size for file in files)
        self.samples.append(sample | {"most sessions": self.most})
        print(json.dumps(self.samples[-1]), flush=True)

    def run(self, minutes):
        self.processes = {how: self.start(how) for how in ("threads", "tasks")}
        began = time.monotonic()
        end, next_restart = began + minutes * 60, began + RESTART
        with ThreadPoolExecutor(2) as helpers:
            others = [helpers.submit(self.watch), helpers.submit(self.churn)]
            while time.monotonic() < end:
                time.sleep(SAMPLE)
                self.sample(began)
                if time.monotonic() > next_restart:
                    self.restart()
                    next_restart += RESTART
            self.is_over.set()
            for other in others:
                other.result()
        for process in self.processes.values():
            self.end(process)
        last = self.start(
            "threads"
        )  # which frees what others had when they were killed
        time.sleep(20)
        self.end(last)
        while None in (left := self.slots()):
            time.sleep(1.0)
        self.store.close()
        return left

    def report(self, left):
        """Print what grew: the slope of a line through the samples but the first."""
        warm = [s for s in self.samples if s["hours"] >= self.samples[-1]["hours"] / 10]
        for name in [n for n in warm[0] if n not in {"hours", "most sessions"}]:
            pairs = [(s["hours"], s[name]) for s in warm if s[name] is not None]
            slope = statistics.linear_regression(*zip(*pairs, strict=True)).slope
            values = [value for _, value in pairs]
            print(f"{name}: {min(values)} to {max(values)}, {slope:+.1f} an hour")
        print(f"most sessions {self.most} of {SLOTS}, {self.restarts} restarts")
        print(f"left in the ledger (owned, in quarantine): {left}; {dict(self.ended)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--store", choices=["host", "database"], default="host")
    parser.add_argument("--seed", type=int, default=os.getpid())
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    soak = Soak(arguments.store, arguments.seed)
    try:
        left = soak.run(arguments.minutes)
        soak.report(left)
    finally:
        soak.is_over.set()
        soak.server.stop()
    sys.exit(soak.most > SLOTS or any(left))


if __name__ == "__main__":
    member(*sys.argv[2:]) if sys.argv[1:2] == ["member"] else main()
