"""A SQLAlchemy connection pool that shares its connections fairly among tags."""

from .errors import CheckoutTimeout, TooManyWaiting
from .pool import FairQueuePool
from .stats import PoolStats, Summary, TagStats
from .tagging import tag

__all__ = [
    "CheckoutTimeout",
    "FairQueuePool",
    "PoolStats",
    "Summary",
    "TagStats",
    "TooManyWaiting",
    "tag",
]
