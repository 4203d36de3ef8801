"""What tags have used lately: connection-seconds that decay.

One connection that was held for `dt` seconds and came back `t` seconds ago counts as
about ``dt * 2 ** (-t / half_life)``; more exactly, each moment of holding decays from
then on. A connection that is held counts as it is held.

Nothing is recomputed as time passes. All figures are kept as they would be at the
*landmark*, a moment in the past, and there they only change when a tag gets a slot or
returns one: ``2 ** (t / half_life)`` of now brings them to the present. (*Forward
decay*: Cormode, Shkapenyuk, Srivastava and Xu, ICDE 2009.) The power is taken now and
then, and what is in between lies on a straight line: a thousand lines to a half-life,
by which no moment counts for 0.04 % more or less than by the power itself.

Part of the scheduler: called under the same lock, with the time as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from .ticket import TagState, Ticket

#: Half-lives after which the landmark is moved: two to the power of it, times the
#: longest half-life, is well below the largest float, 2 ** 1024.
_LANDMARK_LIFE = 900.0

#: Straight lines to a half-life, in the place of the curve.
_LINES = 1024
_GROWTH: float = 2.0 ** (1 / _LINES) - 1.0


class Usage:
    """The usage of each tag.

    :param tag_states: what is known of each tag.
    """

    __slots__ = (
        "_half_life_since",
        "_heard",
        "_mean_life",
        "_tag_states",
        "base",
        "half_life",
        "landmark",
        "level",
        "moved",
        "rise",
        "since",
        "until",
    )

    def __init__(
        self, half_life: float, now: float, tag_states: Mapping[str, TagState]
    ) -> None:
        self._tag_states = tag_states
        self.half_life = half_life
        # The integral of the decay: what one connection that is always held comes to.
        self._mean_life = half_life / math.log(2)
        self._half_life_since = now
        self.landmark = now
        # The scale is `base` at `since`, and `rise` more each second `until` then.
        self._begin_line(now, self._mean_life)
        #: What the tag that was served last had used, per weight: of those that waited
        #: and held nothing, and have no reserve.
        self.level = 0.0
        #: Called when the landmark has moved.
        self.moved: Callable[[], None] = lambda: None
        # By tag and process: what that has said, and how much it is at the landmark.
        self._heard: dict[str, dict[str, tuple[float, float]]] = {}

    def scale(self, now: float) -> float:
        """Return what one slot that is held without end comes to, at the landmark."""
        if self.since <= now < self.until:
            return self.base + (now - self.since) * self.rise
        half_lives = (now - self.landmark) / self.half_life
        if half_lives > _LANDMARK_LIFE:
            self.rebase(now, self.half_life)
            return self.base
        scale: float = self._mean_life * 2.0**half_lives
        if now >= self.until:
            self._begin_line(now, scale)
        return scale

    def _begin_line(self, now: float, scale: float) -> None:
        """Let the scale rise evenly from now on, to where the curve is at the end."""
        length = self.half_life / _LINES
        self.base, self.since = scale, now
        self.rise = scale * _GROWTH / length
        self.until = now + length

    def rebase(self, now: float, half_life: float) -> None:
        """Move the landmark to now, and let usage decay by `half_life`. O(tags)."""
        to_now = 2.0 ** ((self.landmark - now) / self.half_life)
        before, after = self._mean_life, half_life / math.log(2)
        for tag_state in self._tag_states.values():
            charged = tag_state.charged * to_now
            tag_state.charged = charged + tag_state.in_use * (before - after)
            tag_state.lift *= to_now
            tag_state.elsewhere *= to_now
        for tag, heard in self._heard.items():
            self._heard[tag] = {k: (said, n * to_now) for k, (said, n) in heard.items()}
        self.level *= to_now
        if half_life != self.half_life:
            self._half_life_since = now
        self.landmark, self.half_life, self._mean_life = now, half_life, after
        self._begin_line(now, after)
        self.moved()

    def seconds(self, tag_state: TagState, now: float) -> float:
        """Return the decayed connection-seconds of a tag."""
        scale = self.scale(now)
        seconds = tag_state.charged / scale * self._mean_life
        return max(seconds + tag_state.in_use * self._mean_life, 0.0)

    def hear(self, said: Mapping[str, Mapping[str, float]], now: float) -> None:
        """Count what tags have used in other processes. O(tags).

        What a process has said before decays from when it was heard first.

        :param said: decayed connection-seconds by tag and process.
        """
        scale, before = self.scale(now) / self._mean_life, self._heard
        self._heard = {}
        for tag in before.keys() | said.keys():
            old, heard = before.get(tag, {}), {}
            for process, seconds in said.get(tag, {}).items():
                known = old.get(process, (-1.0, 0.0))
                is_new = known[0] != seconds
                heard[process] = (seconds, seconds * scale) if is_new else known
            if heard:
                self._heard[tag] = heard
            tag_state = self._tag_states.get(tag)
            if tag_state is not None:
                elsewhere = sum(counted for _, counted in heard.values())
                tag_state.lift += elsewhere - tag_state.elsewhere
                tag_state.elsewhere = elsewhere

    def join_line(self, tag_state: TagState, now: float) -> None:
        """Take from a tag that begins to wait the lead it has from being quiet.

        It counts as having used as much per weight as the tag served last.
        """
        in_use = tag_state.in_use * self.scale(now)
        used = tag_state.charged + tag_state.lift + in_use
        lead = self.level * tag_state.weight - used
        if lead > 0.0:
            tag_state.lift += lead

    def was_unused(
        self,
        ticket: Ticket,
        tag_state: TagState,
        now: float,
        scale: float,
        more: float = 0.0,
    ) -> None:
        """Take back what was charged for a slot while its connection was kept warm.

        Its checkouts, :attr:`.Ticket.held` in all, are taken to have been spread evenly
        over the time from when the slot was granted.

        :param tag_state: of the tag that it was charged to.
        :param more: seconds of a checkout that is not in that sum.
        """
        since = ticket.granted_at
        unused = now - since - ticket.held - more
        if unused > 0:
            # What was charged with another half-life stays.
            charged = scale - self.scale(max(since, self._half_life_since))
            tag_state.charged -= charged * unused / (now - since)

    def forgive(self, tag_state: TagState, scale: float) -> None:
        """Bound what counts of a tag that has returned its last slot.

        More than one connection held all the time, or as many as its weight, does not
        put it further behind: else a tag that had all connections while no other
        wanted them would wait for many half-lives.
        """
        used = tag_state.charged + tag_state.lift
        if used > scale and used > scale * tag_state.weight:
            most = scale * max(tag_state.weight, 1.0)
            tag_state.lift = most - tag_state.charged
