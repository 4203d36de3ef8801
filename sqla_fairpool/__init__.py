"""A SQLAlchemy connection pool that shares its connections fairly among tags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .diagnosis import Diagnosis, Holding
from .errors import CheckoutTimeout, SelfDeadlock, TooManyWaiting
from .pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool
from .scheduling.ticket import TagLimits
from .stats import PoolStats, Summary, TagStats
from .tagging import set_tag, tag

__all__ = [
    "AsyncAdaptedFairQueuePool",
    "CheckoutTimeout",
    "Diagnosis",
    "FairQueuePool",
    "Holding",
    "PoolStats",
    "SelfDeadlock",
    "Summary",
    "TagLimits",
    "TagStats",
    "TooManyWaiting",
    "set_tag",
    "tag",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name):
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version  # takes milliseconds, and few ask

        return version("sqla-fairpool")
