"""A SQLAlchemy connection pool that shares its connections fairly among tags."""

from .diagnosis import Diagnosis, Holding
from .errors import CheckoutTimeout, SelfDeadlock, TooManyWaiting
from .pool import AsyncAdaptedFairQueuePool, FairQueuePool
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
    "TagStats",
    "TooManyWaiting",
    "set_tag",
    "tag",
]
