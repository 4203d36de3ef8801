"""The pool's options, validated. One bad value, one clear error."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from sqlalchemy import exc

__all__ = [
    "MAX_TAG_LENGTH",
    "BadOption",
    "PoolOptions",
    "describe_changes",
    "hide_passwords",
    "naming",
    "read_switch",
    "validate_tag",
    "validate_timeout",
]

#: Bounds of the options that are times, in seconds. With a shorter one a waiting caller
#: would do nothing but look at the clock; a longer one than some thirty years is a
#: mistake, and too long for what an operating system can wait.
SHORTEST_TIME, LONGEST_TIME = 0.001, 1e9

#: Longest tag. Tags stand in log lines, error messages and monitors' columns.
MAX_TAG_LENGTH = 128


_PASSWORD = re.compile(r"(://[^/\s:@]*):\S*@|\b((?:ssl)?password=)[^&\s'\"]+")


def hide_passwords(text: str) -> str:
    """Return `text` with three asterisks for each password in a URL."""
    return _PASSWORD.sub(lambda m: f"{m[1]}:***@" if m[1] else f"{m[2]}***", text)


class BadOption(exc.ArgumentError):
    """A value that is not allowed, with what its message was made of."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        shown = hide_passwords(repr(value))  # it may be a URL
        super().__init__(f"{name}={shown} is not allowed: {allowed}")
        self.name = name
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.name, self.value, self.allowed)


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Have a bad value's error name it as the user did.

    :param names: from the options' names to those, an environment variable's say.
    """
    try:
        yield
    except BadOption as bad:
        if bad.name not in names:
            raise
        raise BadOption(names[bad.name], bad.value, bad.allowed) from None


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise BadOption(name, value, allowed)


def _integer(name: str, value: object, least: int, allowed: str) -> int:
    number = None
    if isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            pass
    elif not isinstance(value, bool):
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    if number is None or number < least:
        _refuse(name, value, allowed)
    return number


def _seconds(
    name: str, value: object, least: float = SHORTEST_TIME, or_none: str = ""
) -> float:
    """Return a time in seconds.

    :param or_none: what None would mean, where it is allowed.
    """
    allowed = f"seconds, at least {least:g} and at most {LONGEST_TIME:.0f}"
    number = math.nan
    if not isinstance(value, bool):
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            pass
    if not least <= number <= LONGEST_TIME:  # nor is NaN
        _refuse(name, value, f"{allowed}, or None {or_none}" if or_none else allowed)
    return number


_WORDS = {"true": True, "yes": True, "on": True, "1": True}
_WORDS |= {"false": False, "no": False, "off": False, "0": False}


def read_switch(name: str, value: object) -> bool:
    """Return a yes or no, which may come as a word."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    _refuse(name, value, "true or false")


def _plain(text: str) -> str:
    """Return the text of a member of an Enum, say, which shows itself as another."""
    return str.__str__(text)


def validate_timeout(value: object, name: str) -> float:
    """Return the seconds that a checkout may wait."""
    return _seconds(name, value, least=0)


def validate_tag(value: object, name: str = "tag") -> str:
    """Return `value` as plain text if it may be a tag, else raise ``ArgumentError``.

    :param name: what to call it in the error, the option's name as a rule.
    """
    if isinstance(value, str):
        value = _plain(value)
    if (
        isinstance(value, str)
        and 0 < len(value) <= MAX_TAG_LENGTH
        and value.isprintable()
    ):
        return value
    shown = value
    if isinstance(value, str) and len(value) > MAX_TAG_LENGTH:
        shown = value[:32] + "..."
    _refuse(
        name,
        shown,
        f"a tag is a non-empty string of at most {MAX_TAG_LENGTH} printable characters",
    )


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """The options of one pool, every value checked and every default filled in.

    Build it with :meth:`parse`.
    """

    pool_size: int
    max_overflow: int
    timeout: float | None
    soft_limit: int
    max_limit: int
    idle_timeout: float
    reallocation_interval: float
    max_waiting: int | None
    tag_option: str
    default_tag: str
    min_idle: int
    idle_connection_ttl: float | None
    leak_threshold: float | None
    deadlock_timeout: float | None
    server_tag: bool
    ledger: str | None
    #: The limits that were not given, and so follow the capacity.
    defaulted: frozenset[str]

    def __repr__(self) -> str:
        # With the ledger's URL, if that is one, but not with its password.
        values = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self))
        return hide_passwords(f"{type(self).__name__}({', '.join(values)})")

    @property
    def capacity(self) -> int:
        """Most slots in use: ``pool_size + max_overflow``."""
        return self.pool_size + self.max_overflow

    @classmethod
    def parse(
        cls,
        *,
        pool_size: Any = 20,
        max_overflow: Any = 0,
        timeout: Any = 30.0,
        soft_limit: Any = None,
        max_limit: Any = None,
        idle_timeout: Any = 60.0,
        reallocation_interval: Any = 30.0,
        max_waiting: Any = None,
        tag_option: Any = "scraper",
        default_tag: Any = "unknown",
        min_idle: Any = 0,
        idle_connection_ttl: Any = None,
        leak_threshold: Any = None,
        deadlock_timeout: Any = 1.0,
        server_tag: Any = False,
        ledger: Any = None,
    ) -> PoolOptions:
        """Check the values as users give them; numbers may come as strings.

        :raises sqlalchemy.exc.ArgumentError: naming the option, the value and
          what is allowed.
        """
        size = _integer(
            "pool_size",
            pool_size,
            1,
            "a whole number of at least 1 (0, which is no limit in QueuePool, "
            "would leave nothing to share)",
        )
        overflow = _integer(
            "max_overflow",
            max_overflow,
            0,
            "a whole number of at least 0 (-1, which is no limit in QueuePool, "
            "would leave nothing to share)",
        )
        limits = (("soft_limit", soft_limit), ("max_limit", max_limit))
        soft, most = _limits(soft_limit, max_limit, size + overflow)
        if timeout is not None:
            timeout = _seconds("timeout", timeout, 0, "to wait without limit")
        idle = _seconds("idle_timeout", idle_timeout)
        interval = _seconds("reallocation_interval", reallocation_interval)
        if max_waiting is not None:
            max_waiting = _integer(
                "max_waiting",
                max_waiting,
                0,
                "a whole number of at least 0, or None for no limit",
            )
        within = f"a whole number from 0 to pool_size, {size}"
        least_idle = _integer("min_idle", min_idle, 0, within)
        if least_idle > size:
            _refuse("min_idle", min_idle, within)
        if idle_connection_ttl is not None:
            idle_connection_ttl = _seconds(
                "idle_connection_ttl",
                idle_connection_ttl,
                or_none="to keep unused connections open",
            )
        if leak_threshold is not None:
            leak_threshold = _seconds(
                "leak_threshold",
                leak_threshold,
                or_none="to look for no leaks",
            )
        if deadlock_timeout is not None:
            deadlock_timeout = _seconds(
                "deadlock_timeout",
                deadlock_timeout,
                or_none="to look for no deadlocks",
            )
        if ledger is not None and not isinstance(ledger, str):
            _refuse("ledger", ledger, "'host', a path, or None for no ledger")
        if not isinstance(tag_option, str) or not tag_option.isidentifier():
            _refuse("tag_option", tag_option, "the name of an execution option")
        tag_option = _plain(tag_option)
        return cls(
            pool_size=size,
            max_overflow=overflow,
            timeout=timeout,
            soft_limit=soft,
            max_limit=most,
            idle_timeout=idle,
            reallocation_interval=interval,
            max_waiting=max_waiting,
            tag_option=tag_option,
            default_tag=validate_tag(default_tag, "default_tag"),
            min_idle=least_idle,
            idle_connection_ttl=idle_connection_ttl,
            leak_threshold=leak_threshold,
            deadlock_timeout=deadlock_timeout,
            server_tag=read_switch("server_tag", server_tag),
            ledger=ledger,
            defaulted=frozenset(name for name, value in limits if value is None),
        )

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the options."""
        return [field.name for field in fields(cls) if field.name != "defaulted"]

    def changed(self, changes: Mapping[str, Any]) -> PoolOptions:
        """Return these options with some changed; limits not given follow along.

        :raises sqlalchemy.exc.ArgumentError: for a bad value, or for an option
          that does not exist or cannot be changed in a living pool.
        """
        changeable = [name for name in self.names() if name not in _FIXED]
        for name, value in changes.items():
            if name not in changeable:
                _refuse(name, value, f"what can be changed is {', '.join(changeable)}")
        values = {
            name: getattr(self, name)
            for name in self.names()
            if name not in self.defaulted
        }
        return self.parse(**{**values, **changes})


#: What engines and connections were told when they were made.
_FIXED = frozenset(
    {"tag_option", "default_tag", "leak_threshold", "server_tag", "ledger"}
)


def describe_changes(before: PoolOptions, now: PoolOptions) -> str:
    """Return ``soft_limit 10 -> 8, max_limit 15 -> 12``: what differs."""
    pairs = [(n, getattr(before, n), getattr(now, n)) for n in PoolOptions.names()]
    changes = ", ".join(f"{name} {a} -> {b}" for name, a, b in pairs if a != b)
    return hide_passwords(changes)


def _limits(soft_limit: Any, max_limit: Any, capacity: int) -> tuple[int, int]:
    """Return (soft_limit, max_limit), defaults filled in."""
    if max_limit is None:
        most = -(-capacity * 3 // 4)
        origin = f" (by default three quarters of the capacity, {capacity})"
    else:
        within = f"a whole number from 1 to the capacity, {capacity}"
        most, origin = _integer("max_limit", max_limit, 1, within), ""
        if most > capacity:
            _refuse("max_limit", max_limit, within)
    within = f"a whole number from 1 to max_limit, {most}{origin}"
    if soft_limit is None:
        soft = -(-capacity // 2)
        if soft > most:
            _refuse(
                "max_limit",
                max_limit,
                f"soft_limit, by default half the capacity, is {soft}; it must not "
                f"be above max_limit, so give soft_limit as well",
            )
        return soft, most
    soft = _integer("soft_limit", soft_limit, 1, within)
    if soft > most:
        _refuse("soft_limit", soft_limit, within)
    return soft, most
