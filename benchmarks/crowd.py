"""Threads that all want a connection, and what each of them got."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sqla_fairpool.scheduling.policy import jain

from .figures import percentile

__all__ = ["Closing", "Crowd", "Member", "Outcome"]


class Closing(Protocol):
    """What has to be given back."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Member:
    """One thread: pauses, checks out, holds, returns, and begins again."""

    connect: Callable[[], Closing]
    hold: float
    #: Seconds between a checkin and the next checkout.
    pause: float = 0.0
    #: Raised by `connect` when it gives up waiting; the member tries again.
    gives_up: tuple[type[BaseException], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What happened between the start and the end of the measurement."""

    seconds: float
    #: For each thread, how long each checkout waited that was served meanwhile.
    waits: list[list[float]]
    #: For each thread, how long it had been waiting when the time was over.
    pending: list[float]
    #: For each thread, checkouts that were given up meanwhile.
    given_up: list[int] = field(default_factory=list)

    @property
    def served(self) -> list[int]:
        """Checkouts of each thread."""
        return [len(waits) for waits in self.waits]

    @property
    def throughput(self) -> float:
        """Checkouts per second."""
        return sum(self.served) / self.seconds

    @property
    def fairness(self) -> float:
        """Jain's index over the threads' checkouts."""
        return jain(self.served)

    @property
    def never_served(self) -> int:
        """Threads that got no connection at all."""
        return self.served.count(0)

    @property
    def longest_wait(self) -> float:
        """Of all threads; a wait that was not over counts as far as it had come."""
        return max(max(self.pending), *(max(w, default=0.0) for w in self.waits))

    @property
    def all_waits(self) -> list[float]:
        """All threads' waits, with those that were not over, as far as they came.

        Without these the worst would be left out: who waits until the end was
        never served, and has no wait that ended.
        """
        ended = [wait for waits in self.waits for wait in waits]
        return ended + [wait for wait in self.pending if wait]

    def wait(self, percent: float, thread: int) -> float:
        """Return a percentile of one thread's waits; of the pending one, if only."""
        return percentile(self.waits[thread] or [self.pending[thread]], percent)


class Crowd:
    """Members that want connections, each in a thread of its own.

    :param latecomers: members who join when the others have settled.
    """

    def __init__(
        self, members: Sequence[Member], latecomers: Sequence[Member] = ()
    ) -> None:
        everybody = [*members, *latecomers]
        self._early = len(members)
        self._goes_on = True
        self._waits: list[list[float]] = [[] for _ in everybody]
        # When each one's current wait began, 0.0 if it does not wait.
        self._since = [0.0] * len(everybody)
        self._given_up = [0] * len(everybody)
        self._errors: list[BaseException] = []
        self._start = threading.Barrier(len(members))
        self._threads = [
            threading.Thread(target=self._work, args=(n, member), daemon=True)
            for n, member in enumerate(everybody)
        ]

    def run(self, seconds: float, settle: float = 0.2) -> Outcome:
        """Let all of them work; measure for `seconds` once they have settled."""
        try:
            outcome = self._measure(seconds, settle)
        finally:
            self._stop()
        if self._errors:
            raise self._errors[0]
        return outcome

    def _measure(self, seconds: float, settle: float) -> Outcome:
        for thread in self._threads[: self._early]:
            thread.start()
        time.sleep(settle)
        for thread in self._threads[self._early :]:
            thread.start()
        began, before = time.perf_counter(), [len(w) for w in self._waits]
        given_up = list(self._given_up)
        time.sleep(seconds)
        ended, after = time.perf_counter(), [len(w) for w in self._waits]
        pending = [ended - since if since else 0.0 for since in self._since]
        waits = [
            waits[first:last]
            for waits, first, last in zip(self._waits, before, after, strict=True)
        ]
        gave_up = [b - a for a, b in zip(given_up, self._given_up, strict=True)]
        return Outcome(ended - began, waits, pending, gave_up)

    def _stop(self) -> None:
        self._goes_on = False
        self._start.abort()  # for those that an interrupt found at the start
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self, me: int, member: Member) -> None:
        try:
            if me < self._early:
                self._start.wait()
            self._cycle(me, member)
        except threading.BrokenBarrierError:
            pass  # it ended before it began
        except BaseException as error:
            self._goes_on = False
            self._errors.append(error)

    def _cycle(self, me: int, member: Member) -> None:
        connect, hold, pause = member.connect, member.hold, member.pause
        waits, since, gives_up = self._waits[me], self._since, member.gives_up
        clock, sleep = time.perf_counter, time.sleep
        while self._goes_on:
            if pause:
                sleep(pause)
            since[me] = began = clock()
            try:
                connection = connect()
            except gives_up:
                self._given_up[me] += 1
                continue
            waits.append(clock() - began)
            since[me] = 0.0
            if hold and self._goes_on:
                sleep(hold)
            connection.close()
