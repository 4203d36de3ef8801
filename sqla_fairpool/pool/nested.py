"""Checkouts by a signal handler in the middle of a section of the same thread.

The handler is lent an idle connection, or one more is opened. It ends before the
section goes on, and no other thread can enter meanwhile: a loan that is over by then
leaves no trace, and one that is not is accounted for before the section ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ..diagnosis import TaskHere
from ..scheduling.counters import Counters
from ..scheduling.ticket import GRANTED, NO_LIMITS, SafeCeiling, TagState
from .checkout import Checkout, Opener, Record
from .lock import refuse_inner_call
from .transitions import Transitions


@dataclass(eq=False)
class _Loan:
    """A checkout that is not accounted for."""

    checkout: Checkout
    tag: str
    record: Record | None = None
    #: The record's checkout before; None if it was made for this one.
    former: Checkout | None = None


class NestedCheckouts:
    """The loans of a pool that are not back."""

    def __init__(self, state: Transitions) -> None:
        self._state = state
        self.loans: list[_Loan] = []

    def lend(self, checkout: Checkout, tag: str, opener: Opener) -> Record:
        """Check out in the middle of a section; raise if there is nothing to lend."""
        state = self._state
        if isinstance(state.here, TaskHere):
            refuse_inner_call("nothing can be awaited there")
        if state.scheduler.tags.paused(tag) is not None:
            refuse_inner_call("the pool is paused")
        checkout.holder, checkout.since = state.here.caller, state.lock.clock()
        # Not one of the scheduler's, which may be about to change.
        checkout.tag_state = TagState(
            tag, NO_LIMITS, 0, False, Counters(), SafeCeiling(0)
        )
        loan = _Loan(checkout, tag)
        # First of all: another handler may come on top of this one.
        self.loans.append(loan)
        state.lock.inbox.append(self.admit)
        try:
            record = loan.record = state.connections.pop() or state.warm.pop_any()
            if record is not None:
                loan.former = record.fair.checkout
            else:
                # The section may have one in its hands, which is counted nowhere.
                there = state.slots.there() + len(self.loans)
                if there >= state.slots.allotted or not state.slots.can_open_in_section:
                    refuse_inner_call("no connection is idle")
                record = loan.record = cast(Record, opener._create_connection())
            record.fair.checkout = checkout
            return record
        except BaseException:
            self._end(loan)
            raise

    def of(self, checkout: Checkout) -> _Loan | None:
        """Return a checkout's loan, None if it is none."""
        return next((loan for loan in self.loans if loan.checkout is checkout), None)

    def end(self, checkout: Checkout) -> bool:
        """Take back what was lent, as if nothing had been; tell if it was lent."""
        if (loan := self.of(checkout)) is not None:
            self._end(loan)
        return loan is not None

    def _end(self, loan: _Loan) -> None:
        state, record, former = self._state, loan.record, loan.former
        if record is not None and former is None:
            record.fair.close_reason = "overflow"
            record.close()
        elif record is not None and former is not None:
            record.fair.checkout = former
            if former.state is GRANTED:
                state.warm.put(former.tag_state.tag, record)
            else:
                state.connections.put_back(record)
        self.loans.remove(loan)  # last: until here its connection counts
        state.lock.inbox.append(state.recount)

    def admit(self, now: float) -> None:
        """Account for what was lent, and was not back when the handler had ended."""
        state = self._state
        while self.loans:
            loan = self.loans.pop()
            checkout, record, former = loan.checkout, loan.record, loan.former
            assert record is not None
            if former is not None and former.state is GRANTED:
                # It was warm, so it has a slot: for the handler's tag, if it may.
                former.warm, former.holder = False, checkout.holder
                checkout = record.fair.checkout = former
                state.deliver(state.scheduler.move(checkout, loan.tag, now) or ())
            else:
                state.scheduler.admit(checkout, loan.tag, now)
            state.grant(checkout, None)
            record.fair.physical.opening = False
            state.connections.all.add(record)
        state.recount(now)
