"""The rules: ceilings, who is next, fair shares.

Pure functions over plain numbers. No clock, no thread, no connection: *why* a tag got
a connection stands in this file and nowhere else.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

#: What :func:`rank` returns.
Rank: TypeAlias = tuple[bool, float, float, int]


def ceiling(other_active_tags: int, soft_limit: int, max_limit: int) -> int:
    """Return the most slots a tag may hold.

    A tag that is alone may have `max_limit`; the rest of the capacity stays
    free, so that a newcomer starts at once. As soon as any other tag is active
    it is `soft_limit` for each.

    :param other_active_tags: how many tags are active beside the one asked for.
    """
    return soft_limit if other_active_tags else max_limit


def own_ceiling(rule: int, most: int | None, reserved: int, room: int) -> int:
    """Return the ceiling of a tag with limits of its own.

    Its own maximum replaces the rule for all; nothing that is reserved for others is
    counted in; what is reserved for itself it gets in any case.

    :param rule: what :func:`ceiling` says.
    :param most: its own maximum, None without.
    :param reserved: slots reserved for it.
    :param room: the capacity, less what is reserved for others.
    """
    return max(min(rule if most is None else most, room), reserved)


def strategy(active_tags: int, soft_limit: int, max_limit: int) -> str:
    """Return in words which ceiling is in force."""
    if active_tags == 0:
        return f"nobody active: the first may have {max_limit}"
    if active_tags == 1:
        return f"1 active: at most {max_limit}"
    return f"{active_tags} active: equal shares, at most {soft_limit} each"


def rank(
    in_use: int, weight: float, charged: float, head: int, reserved: int = 0
) -> Rank:
    """Return the sort key that decides who is next: **the smallest is**.

    Of the tags that wait below their ceiling, a free slot goes to one that holds less
    than is reserved for it; then to the one that holds least per weight; of those that
    hold equally little to the one that has used the fewest connection-seconds per
    weight lately; on a tie to the one whose head, the longest waiting request, came
    first.

    The key does not change as time passes, though usage does: it decays, and grows by
    what is held. Of a tag that holds `n` slots, usage at the landmark is ``charged + n
    * s``, where the scale `s` rises with time and `charged` changes only when `n` does
    (a slot that is granted takes `s` of then from it, and adds `s` of then when it
    comes back). Usage per weight is thus ``charged / weight + n / weight * s``; among
    tags with the same ``n / weight`` the second term is the same at every moment, so
    that the first one alone has their order, and decay multiplies all of them alike.

    :param in_use: slots the tag holds now.
    :param weight: its relative entitlement, 1.0 being neutral.
    :param charged: its usage at the landmark, without what it holds (:mod:`.usage`).
    :param head: arrival number of its longest waiting request.
    :param reserved: slots that are kept for it.
    """
    return in_use >= reserved, in_use / weight, charged / weight, head


def fair_shares(
    demands: Sequence[int],
    capacity: int,
    weights: Sequence[float] | None = None,
    floors: Sequence[int] | None = None,
) -> list[int]:
    """Divide `capacity` whole slots by max-min fairness.

    The answer is defined by three statements, which the tests check:

    * no party gets more than it demands;
    * nothing is left over while a party wants more: the shares add up to
      ``min(capacity, sum(demands))`` exactly;
    * no slot could move to a party that is worse off: where `i` got less than
      it wants, every `j` had, before its last slot, no more per weight than
      `i` has, ``(share[j] - 1) / weight[j] <= share[i] / weight[i]``.

    What cannot be divided evenly goes to the first in the sequence: 20 over
    three unlimited demands is ``[7, 7, 6]``. A caller who wants the remainder
    to go elsewhere orders the demands accordingly. Max-min fairness and its
    filling procedure: Bertsekas and Gallager, *Data Networks*, section 6.5.

    :param demands: slots each party wants; cap a demand at its ceiling to have
      the ceiling respected.
    :param weights: relative entitlements, all 1.0 if not given.
    :param floors: what each party has already and keeps, whatever it demands; only
      the rest of the capacity is divided, to those that have least. The statements
      above hold for what is given beyond the floors.

    Costs O(n + capacity * log n); without weights O(n * log capacity).
    """
    shares = [0] * len(demands) if floors is None else list(floors)
    if weights is None:
        weights = [1.0] * len(demands)
        shares = _fill(shares, demands, capacity)
    # Handing out slot by slot to the one that `rank` puts first *is* the definition.
    line = [
        rank(share, weights[i], 0.0, i)
        for i, share in enumerate(shares)
        if demands[i] > share
    ]
    heapq.heapify(line)
    for _ in range(capacity - sum(shares)):
        if not line:
            break
        i = line[0][-1]
        shares[i] += 1
        if shares[i] < demands[i]:
            heapq.heapreplace(line, rank(shares[i], weights[i], 0.0, i))
        else:
            heapq.heappop(line)
    return shares


def standing_shares(
    in_use: Sequence[int],
    demands: Sequence[int],
    capacity: int,
    weights: Sequence[float] | None = None,
    reserved: Sequence[int] | None = None,
) -> list[int]:
    """Return the fair shares as they stand: the remainder is with those who hold it.

    Seven, six and seven in use of 20, and all want more, is what is fair.

    With slots that are reserved these statements define the answer:

    * no party gets more than it demands;
    * no slot that is reserved is another party's, and none is left over that a party
      wants: the sum of ``max(share[i], reserved[i])`` is the capacity, or what it is
      when all get what they demand, whichever is less;
    * where `i` got less than it wants, it has its reserve, and every `j` that has more
      than its own had, before its last slot, no more per weight than `i` has.

    :param in_use: slots each party holds now.
    :param demands: as for :func:`fair_shares`; so are the weights.
    :param reserved: slots that are kept for each party, no more than the capacity.
    """
    order = sorted(range(len(demands)), key=lambda i: -in_use[i])
    wanted = [demands[i] for i in order]
    shares = fair_shares(
        wanted,
        capacity,
        weights and [weights[i] for i in order],
        reserved and [reserved[i] for i in order],
    )
    if reserved:
        shares = [*map(min, shares, wanted)]  # what it does not want is kept, not used
    share_of = dict(zip(order, shares, strict=True))
    return [share_of[i] for i in range(len(demands))]


class Party(NamedTuple):
    """A tag among others that share a capacity."""

    active: bool
    in_use: int
    waiting: int
    ceiling: int
    weight: float = 1.0
    reserved: int = 0


def shares_of_tags(tags: Sequence[Party], capacity: int) -> list[int]:
    """Return the :func:`standing_shares` of all tags that share a capacity.

    :param capacity: without what is reserved for tags that are not among these.
    """
    # An idle tag does not count, whatever it still holds.
    demands = [
        min(tag.in_use + tag.waiting, tag.ceiling) if tag.active else 0 for tag in tags
    ]
    weights, reserved = [tag.weight for tag in tags], [tag.reserved for tag in tags]
    return standing_shares(
        [tag.in_use for tag in tags],
        demands,
        capacity,
        weights if set(weights) - {1.0} else None,
        reserved if any(reserved) else None,
    )


def jain(amounts: Sequence[float]) -> float:
    """Return Jain's fairness index of what each party got.

    1.0 when all got the same, ``1 / n`` when one of `n` got everything:
    ``sum(x)^2 / (n * sum(x^2))``. 0.0 when nobody got anything, which nobody
    should read as fair. (Jain, Chiu and Hawe, DEC-TR-301, 1984.)
    """
    if not amounts:
        raise ValueError("the fairness of nobody is not defined")
    squares = sum(x * x for x in amounts)
    return sum(amounts) ** 2 / (len(amounts) * squares) if squares else 0.0


def _fill(shares: Sequence[int], demands: Sequence[int], capacity: int) -> list[int]:
    """Return the shares when the last whole round of handing out is over.

    What slot by slot comes to, while all who want more have the same: a level that
    rises like water.
    """
    low, high = 0, min(max(demands, default=0), max(capacity, 0))
    while low < high:
        level = (low + high + 1) // 2
        if sum(map(max, shares, [min(d, level) for d in demands])) <= capacity:
            low = level
        else:
            high = level - 1
    return [max(share, min(d, low)) for share, d in zip(shares, demands, strict=True)]
