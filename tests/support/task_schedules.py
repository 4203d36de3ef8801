"""An event loop that runs its ready callbacks in any order: one seed is one order.

Real loops keep to first in, first out, so it tries more than may happen. A task may be
cancelled before each callback, also when what it waits for has come in the same moment.
Time passes only while nothing is ready: a wake-up that is lost is a time-out, or a loop
in which all tasks wait.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque


class ScheduledLoop(asyncio.SelectorEventLoop):
    """See the head of this file.

    :param cancellations: the chance that a task is cancelled before a callback.
    """

    def __init__(self, seed, cancellations=0.0):
        super().__init__()
        self.random = random.Random(seed)
        self.cancellations = cancellations
        self.now = 1000.0
        #: Tasks that may be cancelled.
        self.victims = []

    def time(self):
        return self.now

    def _run_once(self):
        if self.random.random() < self.cancellations:
            victims = [task for task in self.victims if not task.done()]
            if victims:
                self.random.choice(victims).cancel()
        if not self._ready:
            timers = [
                timer.when() for timer in self._scheduled if not timer.cancelled()
            ]
            assert timers, "all tasks wait"
            self.now = max(self.now, min(timers))
        ready = [*self._ready]
        self.random.shuffle(ready)
        self._ready = deque(ready[:1])
        super()._run_once()
        self._ready.extend(ready[1:])

    def play(self, *coroutines):
        """Run tasks to their ends, and all that they leave; return the outcomes."""

        async def finish():
            self.victims = [self.create_task(one) for one in coroutines]
            outcomes = await asyncio.gather(*self.victims, return_exceptions=True)
            me = asyncio.current_task()
            while others := asyncio.all_tasks() - {me}:
                await asyncio.wait(others)
            return outcomes

        return self.run_until_complete(finish())
