"""Threads that all want a connection, and what each of them got."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .figures import jain, percentile

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


@dataclass(frozen=True)
class Outcome:
    """What happened between the start and the end of the measurement."""

    seconds: float
    #: For each thread, how long each checkout waited that was served meanwhile.
    waits: list[list[float]]
    #: For each thread, how long it had been waiting when the time was over.
    pending: list[float]

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
        self._errors: list[BaseException] = []
        self._start = threading.Barrier(len(members))
        self._threads = [
            threading.Thread(target=self._work, args=(n, member))
            for n, member in enumerate(everybody)
        ]

    def run(self, seconds: float, settle: float = 0.2) -> Outcome:
        """Let all of them work; measure for `seconds` once they have settled."""
        for thread in self._threads[: self._early]:
            thread.start()
        time.sleep(settle)
        for thread in self._threads[self._early :]:
            thread.start()
        began, before = time.perf_counter(), [len(w) for w in self._waits]
        time.sleep(seconds)
        ended, after = time.perf_counter(), [len(w) for w in self._waits]
        pending = [ended - since if since else 0.0 for since in self._since]
        self._goes_on = False
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        waits = [
            waits[first:last]
            for waits, first, last in zip(self._waits, before, after, strict=True)
        ]
        return Outcome(ended - began, waits, pending)

    def _work(self, me: int, member: Member) -> None:
        try:
            if me < self._early:
                self._start.wait()
            self._cycle(me, member)
        except BaseException as error:
            self._goes_on = False
            self._errors.append(error)

    def _cycle(self, me: int, member: Member) -> None:
        connect, hold, pause = member.connect, member.hold, member.pause
        waits, since = self._waits[me], self._since
        clock, sleep = time.perf_counter, time.sleep
        while self._goes_on:
            if pause:
                sleep(pause)
            since[me] = began = clock()
            connection = connect()
            waits.append(clock() - began)
            since[me] = 0.0
            if hold and self._goes_on:
                sleep(hold)
            connection.close()
