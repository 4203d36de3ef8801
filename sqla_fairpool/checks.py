"""The checks of values that users give: options, tags, times; and what errors say.

Rules of this file: a bad value is one error, which says the option, the value and what
is allowed. No password is shown. What is raised anywhere is of a class below
:class:`Documented`; its message stays on one line, and ends with the address of its
page in the documentation, which stands here and nowhere else.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar, TypeAlias, cast

from sqlalchemy import exc

from .scheduling.ticket import TIMES, TagLimits

#: Where the pages of the errors are.
PAGES = "https://github.com/sqla-fairpool/sqla-fairpool/blob/main/docs/reference/errors"

#: Bounds of times, in seconds. With a shorter one a waiting caller would do nothing but
#: look at the clock; a longer one, some thirty years, no operating system can wait.
SHORTEST_TIME, LONGEST_TIME = 0.001, 1e9

#: The longest time limit that PostgreSQL takes: 2**31 milliseconds.
_LONGEST_LIMIT = 2_147_483

#: Longest tag. Tags stand in log lines, error messages and monitors' columns.
MAX_TAG_LENGTH = 128

# In a URL, in libpq's `key = 'value'`, in a dict that is shown.
_PASSWORD = re.compile(
    r"(://[^/\s:@]*):\S*@|(password(?:\s*=\s*|['\"]\s*:\s*))"
    r"(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[^&\s'\"]+)",
    re.IGNORECASE,
)


def hide_passwords(text: str) -> str:
    """Return `text` with three asterisks for each password in it."""
    return _PASSWORD.sub(lambda m: f"{m[1]}:***@" if m[1] else f"{m[2]}***", text)


class Documented(Exception):  # noqa: N818  (a part of errors, none by itself)
    """An error that has a page. Its ``args[0]`` is the message without the address."""

    #: Name of the page.
    page: ClassVar[str]

    def __str__(self) -> str:
        address = f"{PAGES}/{self.page}.md"
        return f"{super().__str__()} (Background on this error at: {address})"


class BadArgument(Documented, exc.ArgumentError):
    """What the user gave cannot be used."""

    page = "argumenterror"


class BadState(Documented, exc.InvalidRequestError):
    """What was asked for is not possible now."""

    page = "invalidrequesterror"


class BadOption(BadArgument):
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


def refuse_timeout(arguments: Mapping[str, Any]) -> None:
    """Refuse the pool's own name for what ``create_engine`` calls otherwise."""
    if "timeout" in arguments:
        raise BadOption(
            "timeout", arguments["timeout"], "the argument's name is pool_timeout"
        )


# -- checks: from an option's name, a value and the options above it -------------------

Known: TypeAlias = Mapping[str, Any]
Check: TypeAlias = Callable[[str, Any, Known], Any]


def _between(
    name: str,
    value: Any,
    read: Callable[[Any], Any],
    least: float,
    most: float,
    of: str,
) -> Any:
    try:
        number = math.nan if isinstance(value, bool) else read(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most:  # nor is NaN
        raise BadOption(name, value, of)
    return number


def _integer(name: str, value: Any, least: int, most: float, bounds: str) -> Any:
    read = int if isinstance(value, str) else operator.index
    return _between(name, value, read, least, most, f"a whole number {bounds}")


def whole(least: int, why: str = "") -> Check:
    """Return a check for a whole number."""
    bounds = f"of at least {least}{why}"
    return lambda name, value, known: _integer(name, value, least, math.inf, bounds)


def seconds(least: float, most: float = LONGEST_TIME, of: str = "seconds") -> Check:
    allowed = f"{of}, at least {least:g} and at most {most:.0f}"
    return lambda name, value, known: _between(name, value, float, least, most, allowed)


any_time = seconds(SHORTEST_TIME)


def read_max_limit(name: str, value: Any, known: Known) -> Any:
    capacity = known["pool_size"] + known["max_overflow"]
    value = -(-capacity * 3 // 4) if value is None else value
    return _integer(name, value, 1, capacity, f"from 1 to the capacity, {capacity}")


def read_soft_limit(name: str, value: Any, known: Known) -> Any:
    most, capacity = known["max_limit"], known["pool_size"] + known["max_overflow"]
    half, bounds = -(-capacity // 2), f"from 1 to max_limit, {most}"
    if value is None and half > most:
        allowed = f"soft_limit, by default half the capacity, is {half}; it must not "
        allowed += "be above max_limit, so give soft_limit as well"
        raise BadOption("max_limit", most, allowed)
    if most == read_max_limit(name, None, known):
        bounds += f" (by default three quarters of the capacity, {capacity})"
    return _integer(name, half if value is None else value, 1, most, bounds)


def read_min_idle(name: str, value: Any, known: Known) -> Any:
    size = known["pool_size"]
    return _integer(name, value, 0, size, f"from 0 to pool_size, {size}")


def plain_text(allowed: str, is_allowed: Callable[[str], bool]) -> Check:
    def check(name: str, value: Any, known: Known) -> str:
        if isinstance(value, str):
            # A member of an Enum, say, shows itself as another text than it is.
            text = str.__str__(value)
            if is_allowed(text):
                return text
            value = text if len(text) <= MAX_TAG_LENGTH else text[:32] + "..."
        raise BadOption(name, value, allowed)

    return check


def _is_tag(text: str) -> bool:
    return 0 < len(text) <= MAX_TAG_LENGTH and text.isprintable()


read_tag = plain_text(
    f"a tag is a non-empty string of at most {MAX_TAG_LENGTH} printable characters",
    _is_tag,
)


def read_switch(name: str, value: Any, known: Known) -> bool:
    """Return a yes or no, which may come as a word."""
    word = str(value).lower() if isinstance(value, (bool, str)) else ""
    if word not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise BadOption(name, value, "true or false")
    return word in ("true", "yes", "on", "1")


def validate_timeout(value: object, name: str) -> float:
    """Return the seconds that a checkout may wait."""
    return cast(float, seconds(0)(name, value, {}))


def validate_tag(value: object, name: str = "tag") -> str:
    """Return `value` as plain text if it may be a tag, else raise ``ArgumentError``.

    :param name: what to call it in the error, the option's name as a rule.
    """
    if type(value) is str and 0 < len(value) <= MAX_TAG_LENGTH and value.isprintable():
        return value
    return cast(str, read_tag(name, value, {}))


def read_tags(name: str, value: Any, known: Known) -> Mapping[str, TagLimits]:
    """Return the limits by tag, which may come as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            allowed = f'JSON, like {{"api": {{"weight": 3}}}} ({error})'
            raise BadOption(name, value, allowed) from None
    if not isinstance(value, Mapping):
        raise BadOption(name, value, "TagLimits, or a dict of its fields, by tag")
    limits = {
        read_tag(name, key, known): _read_limits(name, key, given, known)
        for key, given in value.items()
    }
    capacity = known["pool_size"] + known["max_overflow"]
    reserved = {key: one.reserved for key, one in limits.items() if one.reserved}
    if sum(reserved.values()) >= capacity:
        allowed = f"what is reserved is at most the capacity less one, {capacity - 1}"
        raise BadOption(name, reserved, f"{allowed}, for all tags together")
    return limits


def _read_limits(name: str, key: str, given: Any, known: Known) -> TagLimits:
    """Return the limits of one tag."""
    raw = given
    if isinstance(given, TagLimits):
        raw = {one.name: getattr(given, one.name) for one in fields(TagLimits)}

    def refuse(allowed: str) -> BadOption:
        return BadOption(name, {key: raw}, allowed)

    names = [one.name for one in fields(TagLimits)]
    if not isinstance(raw, Mapping) or not set(raw) <= set(names):
        raise refuse(f"a tag may have {', '.join(names)}")
    values = dict(raw)
    capacity = known["pool_size"] + known["max_overflow"]
    reserved = values.get("reserved", 0)
    try:
        values["weight"] = _weight(values.get("weight", 1.0))
        values["reserved"] = _integer("", reserved, 0, capacity - 1, "")
        if values.get("max") is not None:
            least = max(values["reserved"], 1)
            values["max"] = _integer("", values["max"], least, capacity, "")
    except (BadOption, TypeError, ValueError, OverflowError):
        raise refuse(
            "weight is a number above 0, reserved a whole number from 0 to the "
            f"capacity less one, {capacity - 1}, and max one from 1, or from what is "
            f"reserved, to the capacity, {capacity}"
        ) from None
    for time in TIMES:
        if values.get(time) is not None:
            bounds = f"{time} is seconds, at least 0.001 and at most {_LONGEST_LIMIT}"
            try:
                own = seconds(SHORTEST_TIME, _LONGEST_LIMIT)("", values[time], {})
            except BadOption:
                raise refuse(f"{bounds}, or None for none") from None
            values[time] = own
    if values["reserved"] and key.endswith("*"):
        raise refuse("connections are reserved for one tag, and not for all of a *")
    return TagLimits(**values)


def _weight(value: Any) -> float:
    weight = math.nan if isinstance(value, bool) else float(value)
    if not 0 < weight < math.inf:  # nor is NaN
        raise ValueError
    return weight
