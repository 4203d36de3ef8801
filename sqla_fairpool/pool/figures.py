"""What a pool tells of itself: SQLAlchemy's figures, and ours.

What makes up ours is imported when it is first asked for.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..checks import validate_tag
from ..options import PoolOptions
from .checkout import Generation
from .core import PoolCore

if TYPE_CHECKING:
    from ..scheduling.explanation import Explanation
    from ..stats import PoolStats


class Figures:
    """The part of a pool that changes nothing."""

    _core: PoolCore
    _orig_logging_name: str | None
    generation: Generation

    @property
    def options(self) -> PoolOptions:
        """The options in force, checked, with the defaults filled in."""
        return self._core.options

    def size(self) -> int:
        """Return the number of connections kept open, ``pool_size``."""
        return self.options.pool_size

    def timeout(self) -> float | None:
        """Return how many seconds a checkout waits."""
        return self.options.timeout

    def checkedin(self) -> int:
        """Return the number of records in the pool, invalidated ones included."""
        if self._core.housekeeping.owner is self.generation:
            self._core.lock.visit()
            return len(self._core.connections.idle)
        return 0  # not in use yet, or not any more

    def checkedout(self) -> int:
        """Return the number of connections out or being opened."""
        self._core.lock.visit()
        return self._core.scheduler.in_use

    def overflow(self) -> int:
        """Return the connections there are beyond ``pool_size``; below 0 if fewer."""
        return self.checkedout() + self.checkedin() - self.size()

    def status(self) -> str:
        """Return the pool's figures in a sentence."""
        return (
            f"Pool size: {self.size()}  Connections in pool: {self.checkedin()} "
            f"Current Overflow: {self.overflow()} Current Checked out connections: "
            f"{self.checkedout()} Waiting: {self._core.scheduler.waiting}"
        )

    def explain(self, tag: str) -> Explanation:
        """Return why a tag has what it has now, as data; ``print`` shows it as text.

        Its ceiling and from which rule it comes, its fair share, its place in the line
        of tags and who is before it, and what has to happen for it to get one more.
        """
        from ..scheduling.explanation import explain, facts_of

        core, tag = self._core, validate_tag(tag)
        return explain(core.lock.run(partial(facts_of, core.scheduler.rules), tag))

    def stats(self) -> PoolStats:
        """Return a snapshot of the pool and a row for each tag. O(tags log tags)."""
        from .snapshot import snapshot

        return snapshot(self._core, self.metrics_name)

    def metrics(self) -> PoolStats:
        """Return the figures for monitoring: counters that never fall, histograms.

        A row for each of the first hundred tags, also when the pool has forgotten it
        since, and one named ``other`` for all others together. O(tags log tags).

        :mod:`sqla_fairpool.prometheus` and :mod:`sqla_fairpool.opentelemetry` export
        them.
        """
        from .snapshot import metrics

        return metrics(self._core, self.metrics_name)

    @property
    def metrics_name(self) -> str:
        """What tells this pool from others: ``pool_logging_name``, or a number."""
        return self._orig_logging_name or f"pool-{self._core.number}"

    def __repr__(self) -> str:
        core = self._core
        scheduler = core.scheduler
        return (
            f"<{type(self).__name__} in_use={self.checkedout()}/"
            f"{self.options.capacity} idle={len(core.connections.idle)} "
            f"waiting={scheduler.waiting} active_tags={scheduler.tags.active}>"
        )
