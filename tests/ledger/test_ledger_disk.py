"""Faults of the disk under pools that share a host ledger, from first to last.

Each is done to the ledger of two pools that are in use. What is promised of each: no
more connections than slots, no caller that fails for another reason than that it has no
slot, one warning of each process, and all as before once it is mended. What happens in
the store is in ``test_ledger_host.py``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support import state
from support.stores import Elsewhere
from support.stub import StubServer
from support.threads import PATIENCE, Caller, connect, eventually, give

from sqla_fairpool import CheckoutTimeout
from sqla_fairpool.ledger.store import LedgerError

SLOTS = 4

#: Any user but root.
USER = 54001


def mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.fixture
def disk():
    """A small disk of its own."""
    # Not below pytest's own directory, which other sessions remove.
    path = Path(tempfile.mkdtemp(prefix="fairpool-disk-"))
    is_mounted = mount("-t", "tmpfs", "-o", "size=256k", "none", str(path))
    try:
        if not is_mounted:
            pytest.skip("only root may mount a disk here")
        yield path
    finally:
        while (
            subprocess.run(["umount", "-l", path], capture_output=True).returncode == 0
        ):
            pass
        shutil.rmtree(path)


class Busy:
    """Pools in use by threads, all the time; counts what happens."""

    def __init__(self, path):
        self.server, self.path = StubServer(), path
        self.over = threading.Event()
        self.pools, self.threads = [], []
        self.served, self.errors = Counter(), []

    def start(self):
        limits = {"pool_size": SLOTS, "soft_limit": SLOTS, "max_limit": SLOTS}
        pool = self.server.pool(ledger=str(self.path), timeout=0.5, **limits)
        number = len(self.pools)
        self.pools.append(pool)
        for _ in range(2):
            thread = threading.Thread(target=self._use, args=(pool, number))
            thread.start()
            self.threads.append(thread)

    def _use(self, pool, number):
        while not self.over.is_set():
            try:
                connection = connect(pool, "ab"[number % 2])
                self.over.wait(0.005)
                connection.close()
                self.served[number] += 1
            except (CheckoutTimeout, LedgerError):
                self.over.wait(0.01)
            except BaseException as error:
                self.errors.append(error)
                raise

    def all_are_served(self):
        """Return once each pool has served many more, with the ledger in order."""
        before = self.served.copy()
        eventually(
            lambda: (
                all(self.served[n] > before[n] + 20 for n in range(len(self.pools)))
                and not any(state.share(pool).keeper.trouble for pool in self.pools)
            ),
            "all are served",
        )

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join()
        for pool in self.pools:
            state.share(pool).keeper.close()


@contextmanager
def full(path):
    filler = path.parent / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))
    yield
    filler.unlink()


@contextmanager
def read_only(path):
    there = path.parent
    assert mount("-t", "tmpfs", "-o", "ro", "none", str(there))
    yield
    subprocess.run(["umount", there], check=True)


@contextmanager
def deleted(path):
    path.unlink()
    yield


@contextmanager
def replaced(path):
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    copy.rename(path)
    yield


@contextmanager
def truncated(path):
    os.truncate(path, 0)
    yield


@contextmanager
def noise(path):
    copy = path.read_bytes()
    with path.open("r+b") as file:
        file.write(os.urandom(len(copy)))
    yield
    path.write_bytes(copy)


@contextmanager
def directory_gone(path):
    shutil.rmtree(path.parent)
    yield


@contextmanager
def no_permission(path):
    path.parent.chmod(0)
    yield
    path.parent.chmod(0o700)


def hold(store, reached):
    with store.transaction():
        reached.touch()
        signal.pause()


@contextmanager
def stopped_in_a_transaction(path):
    other, reached = Elsewhere(path), path.parent / "reached"
    other.begin(hold, reached)
    eventually(reached.exists)
    os.kill(other.process.pid, signal.SIGSTOP)
    yield
    other.kill()


FAULTS = [
    full,
    read_only,
    deleted,
    replaced,
    truncated,
    noise,
    directory_gone,
    no_permission,
    stopped_in_a_transaction,
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_of_the_disk(fault, disk, caplog):
    path = disk / "run" / "app.ledger"
    busy = Busy(path)
    if fault is no_permission:  # to root everything is permitted
        os.seteuid(USER)
    path.parent.mkdir()
    try:
        busy.start()
        busy.start()
        busy.all_are_served()
        assert not caplog.records
        with fault(path):
            # Another one comes meanwhile. Without rows and signs of life nobody knows
            # of the members until they find out, within a second.
            if fault is not directory_gone:
                busy.start()
            eventually(lambda: caplog.records, "somebody warns")
            before = sum(busy.served.values())
            eventually(lambda: sum(busy.served.values()) > before + 20, "those served")
        busy.all_are_served()
    finally:
        busy.end()
        os.seteuid(0)
    assert not busy.errors
    assert busy.server.most <= SLOTS
    messages = [record.getMessage() for record in caplog.records]
    assert all(str(path) in message for message in messages)
    assert len(messages) <= len(busy.pools)


@pytest.mark.parametrize("how", ["in place", "renamed"])
def test_copy_of_before_others_joined_gives_away_no_slot_of_theirs(tmp_path, how):
    """The slots of a process that the copy does not know are not free."""
    server, path = StubServer(), tmp_path / "app.ledger"
    limits = {"pool_size": SLOTS, "soft_limit": SLOTS, "max_limit": SLOTS}
    pools = [server.pool(ledger=str(path), **limits) for _ in range(3)]
    unknown, known, newcomer = pools
    try:
        connect(known, "b").close()
        copy = path.read_bytes()
        held = [connect(unknown) for _ in range(SLOTS - 1)]
        if how == "renamed":
            path.with_suffix(".copy").write_bytes(copy)
            path.with_suffix(".copy").rename(path)
        else:
            path.write_bytes(copy)
        for pool in (known, newcomer):
            pool.reconfigure(timeout=0.3)
            threads = [Caller(connect, pool, "b") for _ in range(SLOTS)]
            for thread in threads:
                with suppress(CheckoutTimeout):
                    held.append(thread.result())
            pool.reconfigure(timeout=PATIENCE)
        assert server.most <= SLOTS
        give(held)
        give([connect(known, "b"), connect(newcomer, "b")])
        assert server.most <= SLOTS
    finally:
        for pool in pools:
            state.share(pool).keeper.close()
