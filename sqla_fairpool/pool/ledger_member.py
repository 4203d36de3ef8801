"""A pool as the member of a ledger: its share of the slots of all processes.

The ledger's keeper lives in a thread of its own and talks to the store. What it
decides arrives here as two numbers: how many connections there may be in this
process, and the ceiling of each tag in it. What it asks for is how many there are, and
who wants more. A checkout never waits for the keeper while there is a slot for it.

Rules of this file:

* A connection counts from before it is opened until its session has ended. So a
  detached one keeps a slot out of use, until it is closed or has no user any more.
* The keeper's thread closes connections of threads. Those of tasks are closed in their
  loop; if that does not run, their sockets are.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from sqlalchemy import exc
from sqlalchemy.util import greenlet_spawn

from ..diagnosis.capture import Others
from ..errors import CheckoutTimeout
from ..ledger.inspector import others
from ..ledger.keeper import Keeper
from ..ledger.rows import Session, TagDemand, Terms
from ..ledger.store import LedgerError
from ..scheduling.counters import Histogram
from ..stats import LedgerStats
from .core import PoolCore
from .physical import PhysicalConnection
from .transitions import Transitions
from .waiters import Waiter

#: Seconds that a new connection waits for the ledger to know it: a transaction takes a
#: millisecond, but waits for a stopped process, or for many that are far away.
_CONFIRMED_WITHIN = 5.0

#: Seconds after which the ledger is asked again if it did not confirm.
_PAUSE = 0.02

#: Seconds after which a loop is taken to be blocked, or not to run.
_LOOP_ANSWERS_WITHIN = 1.0


class LedgerMember:
    """What a keeper may do to a pool, and the other way round.

    The keeper's thread calls what stands below "for the keeper", the pool the rest.

    :param default_tag: under which connections count that belong to no tag.
    """

    def __init__(self, waiter_class: type[Waiter], default_tag: str) -> None:
        self._new_waiter = waiter_class
        self._default_tag = default_tag
        self._core: Callable[[], PoolCore | None] = lambda: None
        self.keeper: Keeper | None = None
        #: Why no caller here may have a connection: what an operator has to mend.
        self.refusal: exc.SQLAlchemyError | None = None
        # The loop in which connections are closed, the last one that opened any.
        self._loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
        #: Others may take this process for dead though it lives.
        self.can_lose_slots = False
        #: The server of the pool's connections, once one was opened.
        self.server_name: str | None = None
        # Those of `lost`, until they are buried.
        self._lost: Sequence[PhysicalConnection] = ()
        # The ledger's rows, and who we are there.
        self._rows: tuple[Mapping[str, str], str] = {}, ""
        # The last order to a loop to close connections, and when it was given.
        self._closing: concurrent.futures.Future[Any] | None = None
        self._ordered_at = 0.0

    def serve(self, core: PoolCore) -> None:
        """Be the member that a pool's slots come from."""
        # Weak: a pool without a user ends, and its keeper with it.
        self._core = weakref.ref(core, self._pool_is_gone)

    def _pool_is_gone(self, ref: object) -> None:
        if self.keeper is not None:
            self.keeper.ring()

    # -- for the pool ---------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """Why there can be no other share than this, None if there can."""
        return None if self.keeper is None else self.keeper.trouble

    @property
    def handovers(self) -> Histogram:
        """How long it took until slots were handed over."""
        return Histogram() if self.keeper is None else self.keeper.member.handovers

    def stats(self) -> LedgerStats:
        """Return the ledger's figures as of the last look at it."""
        return (
            LedgerStats(transactions=0, away_time=0.0)
            if self.keeper is None
            else self.keeper.stats()
        )

    def ring(self, tag: str | None = None) -> None:
        """Have the keeper look. Called without the lock.

        :param tag: under which a caller waits; None for another reason.
        """
        if self.keeper is not None:
            self.keeper.ring(tag)
        elif self.refusal is None:
            self.refuse(
                LedgerError(
                    "the pool has no database URL from which a default ledger would "
                    "follow: name a path as the ledger"
                )
            )

    def note_loop(self) -> None:
        """Remember where connections of tasks can be closed."""
        with contextlib.suppress(RuntimeError):  # threads
            self._loop = weakref.ref(asyncio.get_running_loop())

    def after_fork(self) -> None:
        """Begin anew in a forked child."""
        self._rows = {}, ""
        if self.keeper is not None:
            self.keeper.after_fork()

    def before_opening(self) -> None:
        """Raise if a store that can lose slots does not confirm that they are ours."""
        if self.can_lose_slots and not self._confirmed():
            raise self.refusal or self.unconfirmed()

    def after_opening(self, physical: PhysicalConnection) -> None:
        """Have the ledger know a new session before it is used, or raise.

        Else its slot would be given on if this process died. A store that cannot lose a
        member's sign of life may be away: what is owned is used.
        """
        if physical.session is not None or self.can_lose_slots:
            answer = self._confirmed()
            if not answer and (answer is False or self.can_lose_slots):
                raise self.refusal or self.unconfirmed()

    def _confirmed(self) -> bool | None:
        """Have the store hear of this pool as it is now, and wait for that.

        For a moment there may be a session more than there are slots: one whose end is
        not known yet. So a "no" is asked again while there is time. None if the ledger
        cannot say, or takes too long.
        """
        deadline = time.monotonic() + _CONFIRMED_WITHIN
        while not (answer := self._confirms(deadline)) and self.refusal is None:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._new_waiter(None).wait(min(_PAUSE, left))
        hindered = self.keeper is not None and self.keeper.is_hindered
        return None if answer is False and hindered else answer

    def _confirms(self, deadline: float) -> bool | None:
        if self.keeper is None:
            return True
        answers: list[bool] = []
        waiter = self._new_waiter(None)

        def done(answer: bool) -> None:
            answers.append(answer)
            waiter.wake()

        self.keeper.post(done)
        while not answers and (left := deadline - time.monotonic()) > 0:
            waiter.wait(left)
        return answers[0] if answers else None

    def unconfirmed(self, why: str | None = None) -> CheckoutTimeout:
        """Return what is raised where the slots of this process may be lost."""
        why = why or self.trouble or f"no answer within {_CONFIRMED_WITHIN:g}s"
        return CheckoutTimeout(
            f"no connection is opened while the ledger does not confirm that this "
            f"process owns its slots: {why}",
            self._default_tag,
            _CONFIRMED_WITHIN,
        )

    def others(self) -> Others:
        """Return what the ledger told of other processes when it was last read."""
        return others(*self._rows)

    def lead(self, terms: Mapping[str, Any]) -> None:
        """Have other limits in force, for all members of the ledger; soon."""
        if self.keeper is not None:
            self.keeper.set_terms(Terms(**terms))

    # -- for the keeper -------------------------------------------------------------

    def adopt(self, terms: Terms) -> None:
        """Have the ledger's limits in force here."""
        core = self._core()
        if core is not None:
            core.lock.run(core.housekeeping.adopt, asdict(terms))

    def demand(self) -> tuple[int, Mapping[str, TagDemand]]:
        """Return how many connections are open, and what is wanted by tag."""
        core = self._core_or_close()
        if core is None:
            return 0, {}
        core.slots.existing.end_abandoned()
        self._log(core, core.housekeeping.look_around)  # who is idle?
        return core.lock.run(self._demand, core)

    def _core_or_close(self) -> PoolCore | None:
        """Return the pool; have the keeper end if that has no user any more."""
        core = self._core()
        if core is None and self.keeper is not None:
            self.keeper.close()
        return core

    @staticmethod
    def _log(core: PoolCore, function: Callable[..., None], *args: Any) -> None:
        """Run a function in a section, and write what it has to say to the log."""

        def run(now: float) -> Collection[Callable[[], object]]:
            with core.state.event_log.apart() as lines:
                function(*args, now)
            return lines

        for write in core.lock.run(run):
            write()

    def _demand(
        self, core: PoolCore, now: float
    ) -> tuple[int, Mapping[str, TagDemand]]:
        tags = {}
        paused = core.scheduler.tags.paused
        for state in core.scheduler.tag_states.values():
            peak, state.peak = state.peak, state.in_use
            if peak or state.waiting or state.active:
                waiting = state.waiting if paused(state.tag) is None else 0
                used = round(core.scheduler.usage.seconds(state, now), 3)
                tags[state.tag] = TagDemand(peak, waiting, state.active, used=used)
        detached = core.slots.existing.detached()
        if detached:
            default = tags.get(self._default_tag, TagDemand(0, 0, False))
            in_use = default.in_use + detached
            tags[self._default_tag] = default._replace(in_use=in_use)
        core.state.recount(now)
        return core.slots.there(), tags

    def _change(self, transition: Callable[..., None], *args: Any) -> None:
        """Change the state of the pool, if it is in use still."""
        core = self._core()
        if core is not None:
            core.lock.run(transition, core.state, *args)

    def allot(
        self,
        slots: int,
        ceilings: Mapping[str, int],
        other: int,
        reserves: Mapping[str, int] = MappingProxyType({}),
        elsewhere: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    ) -> None:
        """Set how many connections there may be, and what each tag may have."""
        self.refusal = None
        orders = slots, ceilings, other, reserves, elsewhere
        self._change(Transitions.allot, *orders)

    def sessions(self) -> Collection[Session]:
        """Return the server sessions that exist, as far as they are known."""
        core = self._core()
        return () if core is None else core.slots.existing.sessions()

    def server(self) -> str | None:
        """Return the identity of the pool's server, None if it is not known yet."""
        return self.server_name

    def lost(self) -> Sequence[Session | None]:
        """Return the sessions of which this process will not learn when they end."""
        core = self._core()
        self._lost = () if core is None else core.slots.existing.lost_ones()
        return [physical.session for physical in self._lost]

    def buried(self, lost: Sequence[Session | None]) -> None:
        """Forget the first that :meth:`lost` has returned: they are in quarantine."""
        buried, self._lost = self._lost[: len(lost)], ()
        self._change(Transitions.bury, buried)

    def close_surplus(self) -> None:
        """Close idle connections that are too many."""
        core = self._core_or_close()
        if core is None:
            return
        loop = self._loop() if self._loop is not None else None
        if self._loop is None:
            core.lock.visit()  # threads
        elif loop is None or loop.is_closed():
            core.housekeeping.hang_up_surplus()
        elif self._closing is None or self._closing.done():
            if not (core.lock.deferred or core.lock.inbox):
                return  # a loop that ends now would be left with a task
            coroutine = greenlet_spawn(core.lock.visit)
            self._ordered_at = time.monotonic()
            try:
                self._closing = asyncio.run_coroutine_threadsafe(coroutine, loop)
            except RuntimeError:  # closed in between
                coroutine.close()
        elif time.monotonic() - self._ordered_at > _LOOP_ANSWERS_WITHIN:
            core.housekeeping.hang_up_surplus()  # it is blocked, or does not run

    def read(self, rows: Mapping[str, str], member: str) -> None:
        """Note what the ledger says; log what was waiting for that."""
        self._rows = rows, member
        core = self._core()
        if core is not None and core.state.awaits_the_ledger:
            self._log(core, core.state.read, self.others())
            core.housekeeping.plan_visit()

    def freeze(self) -> None:
        """Let those connections be used that there are, and no other be opened."""
        self._change(Transitions.freeze)

    def pause(self, pauses: Mapping[str, str]) -> None:
        """Serve no checkout of the tags that the ledger has paused."""
        core = self._core()
        if core is not None:
            core.lock.run(core.pausing.obey, pauses)
            core.logger.info("Pool paused by its ledger: %s", pauses or "no more")

    def press(self, pressed: bool) -> None:
        """Call :meth:`ring` when a connection falls idle, or do not any more."""
        self._change(Transitions.press, pressed)

    def refuse(self, error: exc.SQLAlchemyError) -> None:
        """Raise an error in all callers that wait or come, until slots are allotted."""
        self.refusal = error
        self._change(Transitions.wake_all)
