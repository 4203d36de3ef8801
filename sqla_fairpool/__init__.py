"""A SQLAlchemy connection pool that shares its connections fairly among tags."""

from .errors import CheckoutTimeout, TooManyWaiting
from .pool import AsyncAdaptedFairQueuePool, FairQueuePool
from .stats import PoolStats, Summary, TagStats
from .tagging import set_tag, tag

__all__ = [
    "AsyncAdaptedFairQueuePool",
    "CheckoutTimeout",
    "FairQueuePool",
    "PoolStats",
    "Summary",
    "TagStats",
    "TooManyWaiting",
    "set_tag",
    "tag",
]
