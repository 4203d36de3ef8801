"""The one thread of a process that talks to the ledger's store.

It turns what the pool wants into rows, and what it reads there into two numbers for
the pool: how many connections it may open, and the ceiling of each tag. A checkout
never waits for it while there is a connection, or a slot for one.

No exception leaves the thread. While the store is away, what is owned is kept, nothing
grows, and the pool's shrinking goes on by itself; giving back follows.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ..stats import LedgerStats
from ..threads import start_thread
from .demand import Local, TagBounds
from .member import Membership
from .rows import Terms, dump
from .store import LedgerError, Store, StoreAway
from .watch import Pace, Sessions

_log = logging.getLogger(__name__)

#: A step is not followed by another one at once, unless the pool rings.
_LEAST = 0.0002

#: Other numbers in a forked child, and none of an application that seeds `random`.
_random = random.SystemRandom().random


def describe_process() -> Mapping[str, Any]:
    """Return host, pid, program and the time, for people: nothing depends on them."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "program": os.path.basename(sys.argv[0]) if sys.argv else "",
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


class Keeper:
    """Keeps one pool's slots in a ledger.

    :param terms: the limits that this process asks for; all members share some.
    :param leads: these are to be in force, also where members have others.
    :param local: the pool.
    :param sessions: asks the server which sessions there are.
    :param figures: what the process says of itself, ready for JSON, when it is asked.
    :param clock: seconds on a steadily rising scale.
    :param chance: a random number below 1.
    :param who: describes the process, for people.
    """

    def __init__(
        self,
        store: Store,
        terms: Terms,
        local: Local,
        sessions: Sessions | None = None,
        *,
        figures: Callable[[], Mapping[str, Any]] | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = _random,
        who: Callable[[], Mapping[str, Any]] = describe_process,
        leads: bool = False,
    ) -> None:
        self._store = store
        self._terms = terms
        self._local = local
        self._sessions = sessions
        self._figures = figures
        self._pace = pace or Pace()
        self._clock = clock
        self._chance = chance
        self._who = who
        self._answers = 0
        self._begin(leads)

    def _begin(self, leads: bool = False) -> None:
        #: The thread's, but for `pressed` and `vain`, which others may read.
        self.member = Membership(
            self._store,
            self._terms,
            self._local,
            self._sessions,
            self._pace,
            self._chance,
            self._who,
            leads,
        )
        # What does the rounds: the thread, or this object if it was closed before. The
        # first that is entered is it; without a lock, which an interrupt could leave
        # locked.
        self._runner: dict[str, threading.Thread | Keeper] = {}
        # Rings while the store cannot: taken by the keeper, released to wake it.
        self._bell = threading.Lock()
        self._bell.acquire()
        self._rung = False
        self._closing = False
        # The thread has ended, or will not begin.
        self._ended = False
        # Terms that are to be in force from now on.
        self._new_terms: deque[Terms] = deque(maxlen=1)
        # To be called when the row is as the pool was then, see `post`.
        self._posts: deque[Callable[[bool], None]] = deque()
        # Seconds for which the store did not answer, and since when it does not: in one
        # object, for other threads.
        self._away: tuple[float, float | None] = 0.0, None
        #: Why it does not, or why we are refused.
        self.trouble: str | None = None
        # How often in a row that did not work, and when to try again.
        self._failures = 0
        self._retry_at = 0.0

    @property
    def away_since(self) -> float | None:
        """Since when the store does not answer."""
        return self._away[1]

    def stats(self) -> LedgerStats:
        """Return what is known of the ledger. From any thread."""
        return self.member.stats(self._away_time())

    def _away_time(self) -> float:
        away, since = self._away
        return away if since is None else away + max(self._clock() - since, 0.0)

    @property
    def pressed(self) -> bool:
        """Others go short of slots."""
        return self.member.pressed

    def ring(self, tag: str | None = None) -> None:
        """Have the keeper look at the pool: a caller waits, or something was closed.

        Never blocks. Left out where one more that waits under `tag` changes nothing.
        """
        if self._rung or tag in self.member.short:
            return
        try:
            self._rung = True
            if not self._runner:
                self._start()
            if self.member.is_open:
                self._store.nudge()
            else:
                self._wake()
        except BaseException:  # a signal handler's: the next ring must not be left out
            self._rung = False
            raise

    def post(self, done: Callable[[bool], None]) -> None:
        """Have the pool's state of now in the ledger. From any thread; never blocks.

        :param done: called once, as a rule by the keeper's thread: True if the store
          has it and this process owns a slot for each open connection, False if that
          cannot be now. Must not raise. Not called in a forked child.
        """
        self._posts.append(done)
        self.ring()
        if self._ended:
            _answer(self._take_posts(), False)

    def _take_posts(self) -> list[Callable[[bool], None]]:
        posts = []
        with suppress(IndexError):
            while True:
                posts.append(self._posts.popleft())
        return posts

    def _wake(self) -> None:
        with suppress(RuntimeError):  # it was ringing already
            self._bell.release()

    def _start(self) -> None:
        # It may be interrupted anywhere: the next caller starts another thread, which
        # ends at once if it is not the first.
        _started.add(self)
        _leave_before_exit()
        start_thread(self._run, "sqla_fairpool-keeper", self._not_started)

    def _not_started(self) -> None:
        self._rung = False
        _answer(self._take_posts(), False)

    def _is_runner(self, who: threading.Thread | Keeper) -> bool:
        return self._runner.setdefault("runner", who) is who

    def set_terms(self, terms: Terms) -> None:
        """Have other limits in force, for all members; soon."""
        self._new_terms.append(terms)
        self.ring()

    def after_fork(self) -> None:
        """In the child: be a new process that owns nothing."""
        self._store.after_fork()
        self._terms = self.member.terms
        self._begin()
        self._local.allot(0, *TagBounds())

    def close(self) -> None:
        """Give everything back that is closed, and leave. Waits for the thread."""
        self._closing = True
        if self._is_runner(self):
            self._end()
            return
        thread = self._runner["runner"]
        if self.member.is_open:
            self._store.nudge()
        self._wake()
        if thread not in (self, threading.current_thread()):
            thread.join(self._pace.retry)  # type: ignore[union-attr]  # not this object

    @property
    def is_hindered(self) -> bool:
        """The ledger cannot be reached or used now; what is owned is kept."""
        has = self.member.allotment
        return self.trouble is not None and has is not None and has.row.owned > 0

    def _run(self) -> None:
        if not self._is_runner(threading.current_thread()):
            return
        rung = False
        while not self._closing:
            wake_at = self.step(self._clock(), rung)
            rung = False
            if not self._rung and not self._closing:
                woken = self._sleep(max(wake_at - self._clock(), 0.0))
                # By the pool, or from outside? Where it matters, from both.
                rung = woken and (self.member.is_uneasy or not self._is_rung())
        self._end()

    def _end(self) -> None:
        self.member.leave()
        self._ended = True
        _answer(self._take_posts(), False)

    def _sleep(self, seconds: float) -> bool:
        if self.member.is_open:
            try:
                return self._store.wait(seconds)
            except Exception as error:
                self._fail(error, self._clock())
                return False
        return self._bell.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))

    def _is_rung(self) -> bool:
        return self._rung

    def step(self, now: float, rung: bool = False) -> float:
        """Do one round; return when to do the next. Others may have `rung`."""
        if self._rung:
            self.member.rung(now)
        self._rung = False
        posts = self._take_posts()  # before the pool is looked at
        try:
            if now < self._retry_at:
                self._local.close_surplus()
            else:
                if self._store.asked:
                    self._publish()
                transactions = self.member.rows.transactions
                if self._new_terms:
                    self.member.set_terms(self._new_terms[0])
                    self._new_terms.popleft()
                self.member.round(now, rung, bool(posts))
                # As of what was read or written last, which was in this round.
                allotment = self.member.allotment
                _answer(posts, allotment is not None and allotment.covered)
                self.member.watch_others(now)
                if self.member.rows.transactions > transactions:
                    self._away, self.trouble = (self._away_time(), None), None
                    self._failures = 0
                    self._local.read(self.member.rows.known, self._store.member)
        except LedgerError as error:
            self._refuse(error, now)
        except Exception as error:
            self._fail(error, now)
        _answer(posts, False)
        if now < self._retry_at:
            return self._retry_at
        return max(min(self.member.times(now)), now + _LEAST)

    def _publish(self) -> None:
        self._store.asked = False
        if self._figures is not None:
            # Unlike the answer before, which is how it is told from that.
            self._answers += 1
            self._store.publish(dump({"answer": self._answers, **self._figures()}))

    def _fail(self, error: Exception, now: float) -> None:
        """The store is away, or something broke: keep what is owned, try again."""
        if not isinstance(error, StoreAway):
            _log.error("the ledger %s: %r", self._store.name, error, exc_info=error)
        if self.away_since is None:
            self._away = self._away[0], now
            why = str(error).removeprefix(f"{self._store.name}: ")
            _log.warning("the ledger %s is away: %s", self._store.name, why)
        self.trouble = str(error)
        self.member.away()
        delay = min(self._pace.beat * 0.1 * 2**self._failures, self._pace.retry)
        self._failures = min(self._failures + 1, 16)
        self._retry_at = now + delay * (0.5 + 0.5 * self._chance())

    def _refuse(self, error: LedgerError, now: float) -> None:
        """The operator has to mend something: tell callers that have no slot."""
        trouble, self.trouble = self.trouble, str(error.args[0])
        self._retry_at = now + self._pace.beat
        allotment = self.member.allotment
        if allotment is None:
            self.member.exclude()
        else:
            self.member.away()  # to be opened again: the store may have closed it
        if allotment is None or not allotment.row.owned:
            self._local.refuse(error)
        elif trouble != self.trouble:
            _log.warning("the ledger %s cannot be used: %s", self._store.name, error)


def _answer(posts: list[Callable[[bool], None]], answer: bool) -> None:
    while posts:
        posts.pop(0)(answer)


# -- leaving in good order -------------------------------------------------------------

# Those that are to leave before the process ends.
_started: weakref.WeakSet[Keeper] = weakref.WeakSet()


@atexit.register
def _leave_all(**_: object) -> None:
    for keeper in list(_started):
        keeper.close()


def _leave_before_exit() -> None:
    """Have them leave also in children that end by ``os._exit()``, without ``atexit``.

    In children only: elsewhere, functions of the user's that ``atexit`` calls may need
    connections after multiprocessing's finalizers.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        # Below 0: after the child has joined those of its own.
        Finalize(None, _leave_all, exitpriority=-1)
    signals = sys.modules.get("celery.signals")
    if signals is not None:  # its workers leave multiprocessing's finalizers out
        signals.worker_process_shutdown.connect(_leave_all, weak=False)
