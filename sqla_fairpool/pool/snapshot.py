"""Reads a pool's figures: copied in one hold of the lock, computed after it.

:func:`snapshot` has a row for each tag that the pool remembers. :func:`metrics`, for
exporters, has one for each tag with counters of its own, which are kept for as long as
the pool lives, and one for all other tags together.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from operator import attrgetter
from typing import Any, TypeAlias

from ..checks import BadArgument
from ..scheduling import policy
from ..scheduling.counters import BOUNDS, OTHER, Counters
from ..scheduling.tags import ALL
from ..scheduling.ticket import TagLimits
from ..stats import PoolStats, Summary, TagStats, quick
from .core import PoolCore

#: Durations kept between two exports; a minute's worth of a very busy tag.
_DURATIONS_KEPT = 100_000

#: What durations of a tag are counted by size.
_HISTOGRAMS = ("wait", "hold", "create")


# What is copied of a tag, in one call so that the lock is held as short as possible.
_figures = attrgetter(
    *("tag", "active", "in_use", "last_activity", "checkouts", "timeouts"),
    *("wait_total", "wait_max", "hold_total", "hold_max"),
)

#: Those figures; its line's length, and since when the first in it waits; its usage,
#: what it has of its own, and its ceiling.
_Copied: TypeAlias = tuple[tuple[Any, ...], int, float | None, float, TagLimits, int]

#: How long its checkouts would have waited by the rules, and how many been refused.
_Would: TypeAlias = tuple[Summary | None, int | None]

#: Kinds of durations, their tags, and the seconds.
_Durations: TypeAlias = list[tuple[str, str, Iterable[float]]]

_NO_COUNTERS = Counters()

# Of a checkout that is out, what its tag has not booked yet.
_unbooked = attrgetter("since", "again", "held", "held_max")


def snapshot(core: PoolCore, name: str = "") -> PoolStats:
    """Return the pool's figures, with a row for each tag. O(tags log tags)."""
    pool, copied, unbooked, now = core.lock.run(_copy, core, name)
    # Else: the default tag, when all its callers named another one later.
    copied = [c for c in copied if c[1] or any(c[0][1:3]) or any(c[0][4:6])]
    copied.sort(key=lambda copy: copy[0][0])
    wanted = [
        policy.Party(active, in_use, waiting, limit, own.weight, own.reserved)
        for (_, active, in_use, *_), waiting, _, _, own, limit in copied
    ]
    others = core.scheduler.rules.tags.limits.reserved - sum(t.reserved for t in wanted)
    shares = policy.shares_of_tags(wanted, pool.capacity - others)
    would = _would(core)
    rows = [
        _row(tag, share, now, unbooked.get(tag[0][0], ()), would[tag[0][0]])
        for tag, share in zip(copied, shares, strict=True)
    ]
    return replace(pool, tags=tuple(rows))


def _copy(
    core: PoolCore, name: str, now: float
) -> tuple[PoolStats, list[_Copied], Mapping[str, list[Any]], float]:
    """Copy what :func:`snapshot` works with. Caller is in a section."""
    unbooked: dict[str, list[Any]] = defaultdict(list)
    scheduler = core.scheduler
    seconds, rules = scheduler.usage.seconds, scheduler.rules
    copied = []
    for tag, state in scheduler.tag_states.items():
        waiters = state.waiters
        line = (len(waiters), next(iter(waiters)).since) if waiters else (0, None)
        own = rules.tag_states.get(tag) or rules.tags.new_state(tag, _NO_COUNTERS)
        by_rules = own.limits, rules.ceiling(own)
        copied.append((_figures(state), *line, seconds(state, now), *by_rules))
    for checkout in core.connections.granted():
        unbooked[checkout.tag_state.tag].append(_unbooked(checkout))
    return _pool(core, name, now), copied, unbooked, now


def _pool(core: PoolCore, name: str, now: float) -> PoolStats:
    """Return the figures without the tags. Caller holds the lock."""
    options, scheduler = core.options, core.scheduler
    records, idle = core.state.count_idle()
    pause = scheduler.tags.pauses.get(ALL)
    return PoolStats(
        size=options.pool_size,
        capacity=options.capacity,
        checked_out=scheduler.in_use,
        available=max(options.capacity - scheduler.in_use - scheduler.kept_free, 0),
        overflow=max(scheduler.in_use + records - options.pool_size, 0),
        idle=idle,
        waiting=scheduler.waiting,
        utilization=scheduler.in_use / options.capacity,
        strategy=policy.strategy(
            scheduler.tags.active, options.soft_limit, options.max_limit
        ),
        tags=(),
        name=name,
        min_idle=options.min_idle,
        enforce=options.enforce,
        paused_for=None if pause is None else max(now - pause.at, 0.0),
        paused_by="" if pause is None else pause.by,
        paused_tags=tuple(sorted(scheduler.tags.pauses.keys() - {ALL})),
        closures=dict(core.closures),
    )


_tag_stats, _summary = quick(TagStats), quick(Summary)


def _row(
    copied: _Copied, share: int, now: float, unbooked: Sequence[Any], would: _Would
) -> TagStats:
    figures, waiting, waiting_since, usage, own, limit = copied
    tag, active, in_use, last_activity, checkouts, timeouts = figures[:6]
    wait_total, wait_max, hold_total, hold_max = figures[6:]
    out_since = None
    for since, again, held, held_max in unbooked:
        checkouts += again
        hold_total += held
        hold_max = max(hold_max, held_max)
        out_since = since if out_since is None else min(out_since, since)
    return _tag_stats(
        *(tag, active, in_use, limit, share, waiting),
        *(own.weight, own.max, own.reserved, usage),
        None if last_activity is None else max(now - last_activity, 0.0),
        None if waiting_since is None else max(now - waiting_since, 0.0),
        None if out_since is None else max(now - out_since, 0.0),
        *(checkouts, timeouts),
        _summary(checkouts, wait_total, wait_max),
        _summary(checkouts - in_use, hold_total, hold_max),
        *(None, None, None),
        *would,
    )


# Likewise, of a tag's counters.
_COUNTED = ("timeouts", "refusals", "deadlocks", "create_failures")
_counts = attrgetter("checkouts", "at_once", *_COUNTED)


def metrics(core: PoolCore, name: str) -> PoolStats:
    pool, counters, live = core.lock.run(_copy_metrics, core, name)
    rows, would = [], _would(core)
    for tag, (counted, (wait, hold, create)) in sorted(counters.items()):
        active, connections, limit, waiting, unbooked, usage = live[tag]
        own = core.scheduler.rules.tags.limits.of(tag)
        checkouts, at_once, *others = counted
        row = TagStats(
            name=tag,
            active=bool(active),
            connections=connections,
            limit=core.options.max_limit if limit is None else limit,
            waiting=waiting,
            weight=own.weight,
            max=own.max,
            reserved=own.reserved,
            usage=usage,
            checkouts=checkouts + unbooked,
            wait_time=Summary.of(BOUNDS, *wait, at_once=at_once + unbooked),
            hold_time=Summary.of(BOUNDS, *hold),
            create_time=Summary.of(BOUNDS, *create),
            would_wait=would[tag][0],
            would_refuse=would[tag][1],
            **dict(zip(_COUNTED, others, strict=True)),
        )
        rows.append(row)
    ledger = None if core.member is None else core.member.stats()
    return replace(pool, tags=tuple(rows), ledger=ledger)


def _would(core: PoolCore) -> Mapping[str, _Would]:
    """Return by tag what the rules would have done, in a dry run."""
    if core.options.enforce:
        return defaultdict(lambda: (None, None))
    by_tag = core.scheduler.rules.tags.counters.by_tag
    counted = core.lock.run(
        lambda now: {tag: (_histograms(c)[0], c.refusals) for tag, c in by_tag.items()}
    )
    none = Summary.of(BOUNDS, [0] * (len(BOUNDS) + 1), 0.0, 0.0), 0
    would = {tag: (Summary.of(BOUNDS, *wait), n) for tag, (wait, n) in counted.items()}
    return defaultdict(lambda: none, would)


def _copy_metrics(
    core: PoolCore, name: str, now: float
) -> tuple[PoolStats, dict[str, tuple[Any, Any]], dict[str, list[Any]]]:
    """Copy what :func:`metrics` works with. Caller is in a section.

    The last is of the tags with counters: active, connections, limit, line, not booked,
    and usage.
    """
    scheduler = core.scheduler
    by_tag = scheduler.tags.counters.by_tag
    counters = {tag: (_counts(c), _histograms(c)) for tag, c in by_tag.items()}
    live: dict[str, list[Any]] = {tag: [0, 0, None, 0, 0, 0.0] for tag in by_tag}
    for tag_state in scheduler.tag_states.values():
        figures = live[tag_state.tag if tag_state.tag in live else OTHER]
        figures[0] |= tag_state.active
        figures[1] += tag_state.in_use
        figures[2] = max(figures[2] or 0, scheduler.ceiling(tag_state))
        figures[3] += tag_state.waiting
        figures[5] += scheduler.usage.seconds(tag_state, now)
    for checkout in core.connections.granted():
        tag = checkout.tag_state.tag
        live[tag if tag in live else OTHER][4] += checkout.again
    return _pool(core, name, now), counters, live


def _histograms(counters: Counters) -> list[tuple[list[int], float, float]]:
    """Copy them: durations by size, their sum, the longest."""
    histograms = (getattr(counters, name) for name in _HISTOGRAMS)
    return [(h.counts[:], h.total, h.max) for h in histograms]


class Source:
    """A pool that exporters read from, for as long as it is in use."""

    def __init__(self, core: PoolCore, name: str) -> None:
        # Not the pool, because engine.dispose() makes another one.
        self.core = weakref.ref(core)
        self.name = name
        # Checkouts by tag that had not to wait, as far as they were taken.
        self._at_once: dict[str, int] = {}
        # What counts without a tag is exported before it is counted the first time.
        default_tag = core.options.default_tag
        core.lock.run(lambda now: core.scheduler.tags.counters.of(default_tag))

    def read(self) -> PoolStats | None:
        """Return its figures as :func:`metrics` does, None if it is gone."""
        core = self.core()
        return None if core is None else metrics(core, self.name)

    def keep_durations(self) -> None:
        """Have each duration kept from now on, until it is taken."""
        if (core := self.core()) is not None:
            core.lock.run(self._keep_durations, core)

    def _keep_durations(self, core: PoolCore, now: float) -> None:
        counters_by_tag = core.scheduler.tags.counters
        counters_by_tag.on_new.append(_keep_durations)
        for tag, counters in counters_by_tag.by_tag.items():
            _keep_durations(tag, counters)
            self._at_once[tag] = counters.at_once
        if core.member is not None:
            core.member.handovers.raw = deque(maxlen=_DURATIONS_KEPT)

    def take_durations(self) -> _Durations:
        """Return what was kept: ``wait``, ``hold`` or ``create``, the tag, seconds."""
        core = self.core()
        return [] if core is None else core.lock.run(self._take_durations, core)

    def _take_durations(self, core: PoolCore, now: float) -> _Durations:
        taken: _Durations = []
        for tag, counters in core.scheduler.tags.counters.by_tag.items():
            more = counters.at_once - self._at_once.get(tag, 0)
            self._at_once[tag] = counters.at_once
            taken.append(("wait", tag, repeat(0.0, min(more, _DURATIONS_KEPT))))
            for name in _HISTOGRAMS:
                taken.append((name, tag, getattr(counters, name).raw or ()))
            _keep_durations(tag, counters)
        return taken

    def take_handovers(self) -> Iterator[float]:
        """Return how long slots took that were handed over, likewise."""
        core = self.core()
        if core is None or core.member is None:
            return
        kept = core.member.handovers.raw
        while kept:  # another thread adds to it
            yield kept.popleft()


def metrics_source(engine: Any) -> Source:
    """Return what exporters read from: the figures of an engine's pool.

    :param engine: an engine, an asyncio engine, or a pool.
    :raises sqlalchemy.exc.ArgumentError: if its pool is not a fair one.
    """
    pool = getattr(engine, "pool", engine)
    core = getattr(pool, "_core", None)
    if not isinstance(core, PoolCore):
        why = "has no FairQueuePool, so there are no figures of it"
        raise BadArgument(f"{engine!r} {why}")
    return Source(core, pool.metrics_name)


def _keep_durations(tag: str, counters: Counters) -> None:
    for name in _HISTOGRAMS:
        getattr(counters, name).raw = deque(maxlen=_DURATIONS_KEPT)
