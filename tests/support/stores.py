"""Stores of the ledger, and programs that use them, here and in other processes."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

from sqla_fairpool.ledger.host import HostStore
from sqla_fairpool.ledger.postgres import PostgresStore
from sqla_fairpool.ledger.rows import member_key

from .threads import PATIENCE

SUPPORT = Path(__file__).parent
SPAWN = multiprocessing.get_context("spawn")

#: Seconds after which a program is taken to hang.
LONG = 120


def store_at(place):
    """Return the store at a path, or at (URL, ledger)."""
    return PostgresStore(*place) if isinstance(place, tuple) else HostStore(place)


def rows_of(store):
    with store.transaction() as rows:
        return dict(rows)


def write(store, bells=(), /, **values):
    with store.transaction(bells) as rows:
        rows.update(values)


def join(store):
    """Give a store's process a row."""
    write(store, **{member_key(store.member): "{}"})


class Elsewhere:
    """A process with an open store, that calls functions with it.

    :param prepare: what it calls before, without it.
    """

    def __init__(self, place, prepare=None):
        self._pipe, theirs = SPAWN.Pipe()
        args = place, theirs, prepare
        self.process = SPAWN.Process(target=_serve, args=args, daemon=True)
        self.process.start()
        self.member = self.result()

    def begin(self, function, *args):
        """Have it call a function with its store, and more."""
        self._pipe.send((function, args))

    def result(self):
        """Return what that has returned, or what the function itself has sent."""
        assert self._pipe.poll(PATIENCE), "the process hangs"
        result = self._pipe.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def __call__(self, function, *args):
        self.begin(function, *args)
        return self.result()

    def send(self, order):
        """Send something to a function that takes the pipe."""
        self._pipe.send(order)

    def kill(self):
        self.process.kill()
        self.process.join()


def _serve(place, pipe, prepare):
    try:
        if prepare is not None:
            prepare()
        store = store_at(place)
        store.open()
        result = store.member
        while True:
            pipe.send(result)
            function, args = pipe.recv()
            result = function(store, *args)
    except BaseException as error:
        pipe.send(error)


def run(*command):
    """Run a Python program; return what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(program, *args, says="working"):
    """Start one of these programs; return its process when it has said something."""
    process = subprocess.Popen(
        [sys.executable, SUPPORT / program, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = process.stdout.readline()
    assert said == f"{says}\n", process.communicate()
    return process


def stop(process, ledger):
    """Stop a child when it does not have its ledger's lock.

    It would keep a host ledger's; a server ends such a transaction itself.
    """
    with open(os.devnull if "://" in str(ledger) else ledger) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)


def end(process):
    """Kill a program; return what it has written to its standard error."""
    process.kill()
    process.wait()
    errors = process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
    return errors
