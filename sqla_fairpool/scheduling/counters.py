"""What is counted for monitoring: histograms and counters by tag.

Plain additions on numbers that only rise, under the pool's lock; nothing here is
called on the common path of a checkout, whose times are booked in bulk.

A tag that the pool forgets keeps its counters, so that none of them falls. How many
there are is bounded: the first :data:`MAX_COUNTED_TAGS` tags have counters of their
own, all others share theirs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence

#: Upper bounds of the buckets, in seconds, inclusive: Prometheus' defaults without
#: the finest of them, prolonged to the five minutes that a report may hold a
#: connection.
BOUNDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)

#: Tags with counters of their own. Some ten series each, so a thousand for a
#: monitoring system to store, which none has trouble with.
MAX_COUNTED_TAGS = 100

#: The name of the counters that the other tags share. No tag is called so: it is no
#: identifier that a user would choose, and one who does shares it.
OTHER = "other"


class Histogram:
    """Durations by size. Seconds."""

    __slots__ = ("counts", "max", "raw", "total")

    def __init__(self) -> None:
        #: Durations up to each bound, and above the last; not cumulated.
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0
        self.max = 0.0
        #: Each duration, for an exporter that wants them one by one and has put an
        #: empty one here. If it does not fetch them, the oldest are dropped.
        self.raw: deque[float] | None = None

    @property
    def count(self) -> int:
        """Durations in all."""
        return sum(self.counts)

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds
        if seconds > self.max:
            self.max = seconds
        if self.raw is not None:
            self.raw.append(seconds)

    def add_all(
        self, count: int, total: float, longest: float, longer: Sequence[float]
    ) -> None:
        """Count many, of which those in `longer` are above the first bound."""
        counts = self.counts
        counts[0] += count
        self.total += total
        if longest > self.max:
            self.max = longest
        for seconds in longer:
            counts[0] -= 1
            counts[bisect_left(BOUNDS, seconds)] += 1
        if self.raw is not None:
            self.raw.extend(longer)
            shorter = count - len(longer)
            # Which of these took how long is not known; for any purpose, alike.
            mean = (total - sum(longer)) / max(shorter, 1)
            self.raw.extend([mean] * shorter)


class Counters:
    """What is counted for one tag, since the pool was made."""

    __slots__ = (
        "at_once",
        "checkouts",
        "create",
        "create_failures",
        "deadlocks",
        "hold",
        "refusals",
        "timeouts",
        "wait",
    )

    #: How long those that had to wait and were granted waited.
    wait: Histogram
    #: How long connections were kept, counted when they came back.
    hold: Histogram
    #: How long it took to open a connection that was needed under the tag.
    create: Histogram

    def __init__(self) -> None:
        #: Checkouts granted. Of the default tag, those that came back: until
        #: then it may turn out that they are another tag's.
        self.checkouts = 0
        #: Those that had not to wait.
        self.at_once = 0
        self.create_failures = 0
        #: Checkouts that gave up: time-outs, `max_waiting`, self-deadlocks.
        self.timeouts = 0
        self.refusals = 0
        self.deadlocks = 0

    def __getattr__(self, name: str) -> Histogram:
        # Made when it is first used: most tags need one of them.
        if name not in ("wait", "hold", "create"):
            raise AttributeError(name)
        setattr(self, name, histogram := Histogram())
        return histogram


class CountersByTag:
    """The counters of each tag, for as many tags as may have their own."""

    def __init__(self) -> None:
        self.by_tag: dict[str, Counters] = {}
        #: Called with each tag that gets its own, and these, under the pool's lock.
        self.on_new: list[Callable[[str, Counters], None]] = []
        self._other: Counters | None = None

    def of(self, tag: str) -> Counters:
        """Return the counters that count for `tag`."""
        counters = self.by_tag.get(tag)
        if counters is not None:
            return counters
        if len(self.by_tag) < MAX_COUNTED_TAGS:
            return self._new(tag)
        if self._other is None:
            self._other = self.by_tag.get(OTHER) or self._new(OTHER)
        return self._other

    def _new(self, tag: str) -> Counters:
        counters = self.by_tag[tag] = Counters()
        for tell in self.on_new:
            tell(tag, counters)
        return counters
