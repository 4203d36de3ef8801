"""Is there anything to be said? What the store has to hear of, and when.

The store is written when something changed that could move a slot, and else left
alone: how long a line is does not matter while it gets less than it wants. A rise is
posted at once. A fall is posted when others go short, after it has lasted for a moment
(`linger`): a slot that is used again and again does not travel in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .allocation import Line
from .local import TagDemand
from .transaction import Orders

__all__ = ["Needs", "Pace", "turn_length"]

_NOTHING = TagDemand(0, 0, False)


@dataclass(frozen=True, slots=True)
class Pace:
    """The keeper's times, in seconds. None of them keeps a promise of safety.

    :param beat: between two looks of one that goes short.
    :param slow: between two looks of one that does not.
    :param turn: how long one keeps its place in a line while others get nothing.
    :param linger: how long a slot is unused before it is given to somebody who waits.
      The time that a loop needs between two checkouts, as a rule; a part of what a
      slot needs from one process to another.
    :param patience: how long one may fail to answer before it is taken to be stopped.
    :param grace: how long slots of the dead are in quarantine at least.
    :param reclaim_after: how long, where the server cannot be asked.
    :param retry: longest time between two tries to reach the store.
    """

    beat: float = 1.0
    slow: float = 10.0
    turn: float = 1.0
    linger: float = 0.01
    patience: float = 3.0
    grace: float = 0.5
    reclaim_after: float = 10.0
    retry: float = 5.0


#: Slots that change hands per second, because others are to have a turn. Each costs
#: three transactions with the whole board, milliseconds where there are a thousand
#: members: where more are asked, turns last longer.
_TURNS = 50.0


def turn_length(pace: Pace, asked: int) -> float:
    """Return how long a turn is when so many are asked to yield."""
    return max(pace.turn, asked / _TURNS)


class Needs:
    """What one process wants, beside what the board knows of that."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        # Since when: less is wanted than claimed; nobody waits any more of those who
        # are posted; each tag has had its slot.
        self._slack_since: float | None = None
        self._gone_since: float | None = None
        self._had_since: dict[str, float] = {}
        self._turn = pace.turn
        # When the pool was asked last, and is to be asked again.
        self._asked_at = float("-inf")
        self._ask_at = float("-inf")

    def rung(self, now: float) -> None:
        """The pool has rung. If something fell idle, see later if it stays so."""
        self._ask_at = now + self._pace.linger

    def matter(
        self, orders: Orders, demand: Mapping[str, TagDemand], now: float
    ) -> bool:
        """Tell if the store has to hear of what is wanted here."""
        since, self._asked_at = self._asked_at, now
        self._slack_since = _since(
            self._slack_since, slack_of(orders, demand) > 0, since
        )
        active = {tag for tag, want in demand.items() if want.active}
        return (
            active != {tag for tag, line in orders.lines.items() if line.active}
            or any(self._rises(orders, tag, want) for tag, want in demand.items())
            or any(tag in orders.asked for tag in self.ready(now))
            or self._fall(orders, demand, now)
        )

    @staticmethod
    def _rises(orders: Orders, tag: str, want: TagDemand) -> bool:
        """Tell if more is wanted than posted, and what was posted is the limit."""
        if not want.waiting:
            return False
        line, claim = orders.lines.get(tag, Line()), orders.claims.get(tag, 0)
        if claim:
            return want.wants > line.wants and claim >= line.wants
        return not line.waiting

    def _fall(
        self, orders: Orders, demand: Mapping[str, TagDemand], now: float
    ) -> bool:
        """Tell if less has been wanted for a while than others could use."""
        gone = any(
            line.waiting
            and orders.claims[tag] < line.wants
            and not demand.get(tag, _NOTHING).waiting
            for tag, line in orders.lines.items()
        )
        self._gone_since = _since(self._gone_since, gone, now)
        return (orders.pressed and self._is_slack(now)) or _over(
            self._gone_since, self._pace.beat, now
        )

    # What is in use is the most since the pool was asked last: so a fall began then.
    def _is_slack(self, now: float) -> bool:
        return _over(self._slack_since, self._pace.linger, now)

    def steady(
        self, orders: Orders, demand: Mapping[str, TagDemand], now: float
    ) -> Mapping[str, TagDemand]:
        """Return the demand as it is to be posted, for whatever reason it is.

        What has only just fallen is posted as it was.
        """
        if self._is_slack(now):
            return demand
        steady = dict(demand)
        for tag, claim in orders.claims.items():
            want = demand.get(tag, _NOTHING)
            if want.wants < claim:
                steady[tag] = want._replace(in_use=claim - want.waiting)
        return steady

    def spare(self, orders: Orders, demand: Mapping[str, TagDemand], now: float) -> int:
        """Return how many slots are unused that others go short of."""
        if not (orders.pressed and self._is_slack(now)):
            return 0
        wanted = sum(want.wants for want in demand.values())
        slack = slack_of(orders, demand)
        return max(min(orders.unmet, slack, orders.owned - wanted), 0)

    def ready(self, now: float) -> list[str]:
        """Return the tags whose turn is over."""
        return [t for t, s in self._had_since.items() if _over(s, self._turn, now)]

    def told(self, before: Orders | None, orders: Orders, now: float) -> None:
        """Take note of new orders."""
        self._slack_since = self._gone_since = None
        self._turn = turn_length(self._pace, orders.turns)
        old = {t: line.place for t, line in before.lines.items()} if before else {}
        self._had_since = {
            tag: self._had_since.get(tag, now)
            if old.get(tag) == orders.lines[tag].place
            else now  # a new place, a new turn
            for tag, claim in orders.claims.items()
            if claim and orders.owned
        }

    def times(self, orders: Orders, now: float) -> Iterator[float]:
        """Yield the times at which something may have to be said."""
        if orders.lines:
            yield now + self._pace.beat
        if orders.pressed:
            if self._slack_since is not None:
                yield self._slack_since + self._pace.linger
            if self._ask_at > now:
                yield self._ask_at
        for tag in orders.asked:
            yield self._had_since.get(tag, now) + self._turn


def slack_of(orders: Orders, demand: Mapping[str, TagDemand]) -> int:
    """Return how many slots are claimed here and not wanted."""
    return sum(
        max(claim - demand.get(tag, _NOTHING).wants, 0)
        for tag, claim in orders.claims.items()
    )


def _since(since: float | None, is_so: bool, now: float) -> float | None:
    """Return since when it is so, None if it is not."""
    if not is_so:
        return None
    return now if since is None else since


def _over(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since >= seconds
