"""A SQLAlchemy connection pool that shares its connections fairly among tags.

Each name is imported when it is first used: `tag` in a script needs no pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from .diagnosis.report import Diagnosis, Holding
    from .errors import CheckoutTimeout, SelfDeadlock, TooManyWaiting
    from .pool.fair_queue_pool import AsyncAdaptedFairQueuePool, FairQueuePool
    from .scheduling.ticket import TagLimits
    from .stats import PoolStats, Summary, TagStats
    from .tagging import set_tag, tag

    __version__: str
else:
    _HOMES = {
        **dict.fromkeys(("Diagnosis", "Holding"), "diagnosis.report"),
        **dict.fromkeys(("CheckoutTimeout", "SelfDeadlock"), "errors"),
        "TooManyWaiting": "errors",
        "AsyncAdaptedFairQueuePool": "pool.fair_queue_pool",
        "FairQueuePool": "pool.fair_queue_pool",
        "TagLimits": "scheduling.ticket",
        **dict.fromkeys(("PoolStats", "Summary", "TagStats"), "stats"),
        **dict.fromkeys(("set_tag", "tag"), "tagging"),
    }

    def __getattr__(name):
        if name in _HOMES:
            from importlib import import_module

            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif name == "__version__":
            from importlib.metadata import version  # takes milliseconds, and few ask

            value = version("sqla-fairpool")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
