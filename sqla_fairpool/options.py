"""The pool's options: one table.

The table is the fields of :class:`PoolOptions`. Derived from it are the check of the
constructor and of ``reconfigure``, the keys in URLs (:mod:`.plugin`), the variables of
the environment and the launcher's flags (:mod:`.launch`), and the
documents' tables. Each value goes through a check of :mod:`.checks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from .checks import (
    BadOption,
    Check,
    Known,
    any_time,
    hide_passwords,
    plain_text,
    read_max_limit,
    read_min_idle,
    read_soft_limit,
    read_switch,
    read_tag,
    read_tags,
    seconds,
    whole,
)
from .scheduling.ticket import TIMES, LimitsByTag, TagLimits


@dataclass(frozen=True, slots=True)
class Option:
    """A row of the table."""

    default: Any
    check: Check
    #: In a sentence, as the documents have it.
    meaning: str
    #: The environment's variable. The launcher has flags for the same options.
    variable: str = ""
    #: What None is for, where it is allowed.
    none: str = ""
    #: A living pool cannot change it: its engines and connections know it already.
    is_fixed: bool = False

    def read(self, name: str, value: Any, known: Known) -> Any:
        """Return the value, checked.

        :param known: the values of the options above it, on which bounds depend.
        """
        if not self.none:
            return self.check(name, value, known)
        try:
            return None if value is None else self.check(name, value, known)
        except BadOption as bad:
            allowed = f"{bad.allowed}, or None {self.none}"
            raise BadOption(bad.name, bad.value, allowed) from None

    def from_text(self, text: str) -> str | None:
        """Return what a text in a URL, in the environment or of a flag stands for."""
        return None if self.none and text.lower() == "none" else text


def _option(*columns: Any, **more: Any) -> Any:
    return field(metadata={"option": Option(*columns, **more)})


#: What the members of a ledger share.
TERMS = (
    *("capacity", "soft_limit", "max_limit"),
    *("idle_timeout", "reallocation_interval", "tags"),
)


def _of_ledgers(limits: Any) -> dict[str, Any]:
    """Return what the members of a ledger share of a tag's limits."""
    return {name: own for name, own in asdict(limits).items() if name not in TIMES}


_NO_LIMIT = ", which is no limit in QueuePool, would leave nothing to share)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """The options of one pool, checked, defaults filled in; built by :meth:`parse`."""

    pool_size: int = _option(
        20, whole(1, f" (0{_NO_LIMIT}"), "connections kept open", "DYNAMIC_POOL_SIZE"
    )
    max_overflow: int = _option(
        0,
        whole(0, f" (-1{_NO_LIMIT}"),
        "further connections while they are needed, closed when they come back; "
        "`pool_size + max_overflow` is the capacity",
    )
    timeout: float | None = _option(
        30.0,
        seconds(0),
        "seconds a checkout waits; `pool_timeout` in `create_engine`",
        none="to wait without limit",
    )
    max_limit: int = _option(
        None,
        read_max_limit,
        "most connections of a tag that is alone; 3/4 of the capacity, rounded up",
        "SCRAPER_MAX_LIMIT",
    )
    soft_limit: int = _option(
        None,
        read_soft_limit,
        "most of each tag while two or more are active; half the capacity, rounded up",
        "SCRAPER_SOFT_LIMIT",
    )
    idle_timeout: float = _option(
        60.0,
        any_time,
        "seconds without activity after which a tag is idle",
        "IDLE_TIMEOUT",
    )
    reallocation_interval: float = _option(
        30.0,
        any_time,
        "seconds between two looks for idle tags",
        "REALLOCATION_INTERVAL",
    )
    tags: Mapping[str, TagLimits] | None = _option(
        None,
        read_tags,
        "limits of a tag's own, by its name or by the beginning of names and `*`: "
        "`weight`, `max`, `reserved`, and `statement_timeout`, "
        "`idle_in_transaction_timeout`, `lock_timeout` of PostgreSQL; as JSON in texts",
        "FAIRPOOL_TAGS",
        none="for tags that are all alike",
    )
    usage_half_life: float = _option(
        10.0,
        any_time,
        "seconds after which what a tag has used counts half; who has used least "
        "lately is next of those that hold equally much",
    )
    enforce: bool = _option(
        True,
        read_switch,
        "keep the rules; false for a dry run: callers are served in order of arrival, "
        "and who would have waited or been refused is counted",
        is_fixed=True,
    )
    max_waiting: int | None = _option(
        None,
        whole(0),
        "most callers that may wait; one more is refused at once",
        none="for no limit",
    )
    tag_option: str = _option(
        "scraper",
        plain_text("the name of an execution option", str.isidentifier),
        "the execution option that carries the tag",
        is_fixed=True,
    )
    default_tag: str = _option(
        "unknown", read_tag, "the tag of a checkout that has none", is_fixed=True
    )
    min_idle: int = _option(
        0,
        read_min_idle,
        "connections opened in the background after the first, or by "
        "`pool.warm_up()`, and left open by `idle_connection_ttl`",
    )
    idle_connection_ttl: float | None = _option(
        None,
        any_time,
        "seconds after which an unused connection in the pool is closed, by the next "
        "call that uses the pool",
        none="to keep unused connections open",
    )
    leak_threshold: float | None = _option(
        None,
        any_time,
        "seconds after which a connection that is out is reported in the log",
        none="to look for no leaks",
        is_fixed=True,
    )
    deadlock_timeout: float | None = _option(
        1.0,
        any_time,
        "seconds after which a checkout that waits for its own caller is refused",
        none="to look for no deadlocks",
    )
    failover_guard: bool = _option(
        True,
        read_switch,
        "replace all connections when their server takes no writes any more",
    )
    reconnect_backoff: float = _option(
        2.0,
        seconds(0, 5),
        "longest pause between attempts to connect after a disconnect",
    )
    recycle_jitter: float = _option(
        0.1,
        seconds(0, 1, "a part of pool_recycle"),
        "connections live for `pool_recycle` less up to this part of it",
    )
    server_tag: bool = _option(
        False,
        read_switch,
        "tell PostgreSQL the tag as `application_name`",
        is_fixed=True,
    )
    ledger: str | None = _option(
        None,
        plain_text("'host', a path", lambda text: True),
        "one budget for all processes that name the same ledger: `host`, a path, a URL",
        "FAIRPOOL_LEDGER",
        none="for no ledger",
        is_fixed=True,
    )
    on_other_terms: str = _option(
        "adopt",
        plain_text("adopt or lead", lambda text: text in ("adopt", "lead")),
        "where the ledger has other limits: `adopt` these, or `lead`, so that those of "
        "the newest process are in force",
        is_fixed=True,
    )
    #: The limits that were not given, and so follow the capacity.
    defaulted: frozenset[str] = field()

    def __repr__(self) -> str:
        # With the ledger's URL, if that is one, but not with its password.
        values = ", ".join(f"{one}={getattr(self, one)!r}" for one in self.__slots__)
        return hide_passwords(f"{type(self).__name__}({values})")

    @property
    def capacity(self) -> int:
        """Most slots in use: ``pool_size + max_overflow``."""
        return self.pool_size + self.max_overflow

    @classmethod
    def parse(cls, **given: Any) -> PoolOptions:
        """Check the values as users give them; numbers may come as strings.

        :raises sqlalchemy.exc.ArgumentError: naming the option, the value and
          what is allowed.
        """
        limits = ("soft_limit", "max_limit")
        defaulted = frozenset(name for name in limits if given.get(name) is None)
        known: dict[str, Any] = {}
        for name, option in OPTIONS.items():
            known[name] = option.read(name, given.pop(name, option.default), known)
        if known["ledger"] is not None and not known["enforce"]:
            raise BadOption("enforce", False, "with a ledger the rules are in force")
        return cls(**known, **given, defaulted=defaulted)

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> PoolOptions:
        """Check the options that are among the arguments for an engine."""
        return cls.parse(**{k: v for k, v in arguments.items() if k in OPTIONS})

    def rules(self) -> dict[str, Any]:
        """Return what the scheduler goes by."""
        names = (*TERMS[:-1], "max_waiting", "usage_half_life")
        rules = {name: getattr(self, name) for name in names}
        return {**rules, "limits": self.tags or {}}

    @property
    def terms(self) -> dict[str, Any]:
        """The limits that the members of a ledger share, those of tags as JSON."""
        tags = json.dumps(self.tags, default=_of_ledgers, sort_keys=True)
        terms = {name: getattr(self, name) for name in TERMS}
        return {**terms, "tags": tags if self.tags else ""}

    @classmethod
    def of_terms(cls, terms: Mapping[str, Any]) -> PoolOptions:
        """Return options with the limits of a ledger, and defaults else.

        Limits that are the defaults for that capacity follow it when it is changed.
        """
        defaults = cls.parse(pool_size=terms["capacity"])
        limits = ("soft_limit", "max_limit")
        follow = [name for name in limits if terms[name] == getattr(defaults, name)]
        return replace(defaults.with_terms(terms), defaulted=frozenset(follow))

    def with_terms(self, terms: Mapping[str, Any]) -> PoolOptions:
        """Return these options with the limits of a ledger."""
        limits = dict(terms)
        capacity = limits.pop("capacity")
        overflow = min(self.max_overflow, capacity - 1)
        size = capacity - overflow
        limits["min_idle"] = min(self.min_idle, size)
        sizes = {"pool_size": size, "max_overflow": overflow}
        tags = read_tags("tags", terms["tags"] or {}, sizes)
        limits["tags"] = {**tags, **self._with_times(tags)} or None
        return replace(self, **sizes, **limits)

    def _with_times(self, tags: Mapping[str, TagLimits]) -> dict[str, TagLimits]:
        """Return the limits of tags that have time limits here, else as in `tags`."""
        of = LimitsByTag(tags).of
        own = (self.tags or {}).items()
        return {tag: replace(of(tag), **one.times) for tag, one in own if one.times}

    @property
    def tells_server(self) -> bool:
        """PostgreSQL is told something at a checkout. O(tags)."""
        return self.server_tag or any(one.times for one in (self.tags or {}).values())

    def changed(self, changes: Mapping[str, Any]) -> PoolOptions:
        """Return these options with some changed; limits not given follow along.

        :raises sqlalchemy.exc.ArgumentError: for a bad value, or for an option
          that does not exist or cannot be changed in a living pool.
        """
        changeable = [name for name, one in OPTIONS.items() if not one.is_fixed]
        for name, value in changes.items():
            if name not in changeable:
                allowed = f"what can be changed is {', '.join(changeable)}"
                raise BadOption(name, value, allowed)
        kept = {n: getattr(self, n) for n in OPTIONS if n not in self.defaulted}
        return self.parse(**{**kept, **changes})


#: The table: what there is to know of each option, by its name. A bound of an option
#: may follow from options above it.
OPTIONS: Mapping[str, Option] = {
    one.name: one.metadata["option"]
    for one in fields(PoolOptions)
    if "option" in one.metadata
}


def describe_changes(before: PoolOptions, now: PoolOptions) -> str:
    """Return ``soft_limit 10 -> 8, max_limit 15 -> 12``: what differs."""
    pairs = [(name, getattr(before, name), getattr(now, name)) for name in OPTIONS]
    changes = ", ".join(f"{name} {a} -> {b}" for name, a, b in pairs if a != b)
    return hide_passwords(changes)
