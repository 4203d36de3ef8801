"""A SQLAlchemy connection pool that shares its connections fairly among tags."""

from .diagnosis.report import Diagnosis, Holding
from .errors import CheckoutTimeout, SelfDeadlock, TooManyWaiting
from .pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool
from .scheduling.limits import TagLimits
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
