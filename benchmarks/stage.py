"""What a measurement is given: how long it may take, a database, and an audience."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .database import BenchError, Database
from .figures import interleave
from .report import Findings, Section

__all__ = ["Audience", "Part", "Scenario", "Stage"]

_T = TypeVar("_T")
_Name = TypeVar("_Name", bound=Hashable)


class Audience(Protocol):
    """Who watches the run."""

    def section(self, title: str) -> None:
        """A scenario begins."""

    def step(self, text: str, done: float) -> None:
        """A measurement begins; of the scenario this part, 0 to 1, is done."""

    def found(self, section: Section) -> None:
        """A scenario has ended."""


class _Nobody:
    def section(self, title: str) -> None:
        pass

    def step(self, text: str, done: float) -> None:
        pass

    def found(self, section: Section) -> None:
        pass


class Stage:
    """One run of the benchmarks.

    :param short: measure a part of it, and in fewer rounds.
    :param place: a database; None if only what needs none is to be run.
    """

    def __init__(
        self,
        *,
        short: bool = False,
        place: Database | None = None,
        audience: Audience | None = None,
    ) -> None:
        self.short = short
        self.audience: Audience = audience or _Nobody()
        self._place = place
        self._part, self._parts = 0, 1
        self._call, self._calls = 0, 1

    @property
    def place(self) -> Database:
        """The database.

        :raises BenchError: if there is none.
        """
        if self._place is None:
            raise BenchError("this measurement needs a database")
        return self._place

    def pick(self, full: _T, short: _T) -> _T:
        """Return what fits the form of the run."""
        return short if self.short else full

    def part(self, number: int, parts: int) -> None:
        """Part `number`, from 0, of so many begins."""
        self._part, self._parts = number, parts
        self.expect(1)

    def expect(self, calls: int) -> None:
        """The part is going to call :meth:`interleave` so many times."""
        self._call, self._calls = 0, calls

    def interleave(
        self, what: str, contenders: Mapping[_Name, Callable[[], _T]], rounds: int
    ) -> dict[_Name, list[_T]]:
        """Run the contenders in turn, as :func:`.interleave`; tell the audience."""
        turns = rounds * len(contenders)
        turn = 0
        call = min(self._call, self._calls - 1)
        self._call += 1

        def told(name: _Name, run: Callable[[], _T]) -> Callable[[], _T]:
            def run_and_tell() -> _T:
                nonlocal turn
                part = (call + turn / turns) / self._calls
                done = (self._part + part) / self._parts
                number = turn // len(contenders) + 1
                self.audience.step(f"{what}: {name}, {number} of {rounds}", done)
                turn += 1
                return run()

            return run_and_tell

        watched = {name: told(name, run) for name, run in contenders.items()}
        return interleave(watched, rounds)


#: A measurement. It may be slow, and cleans up after itself.
Part = Callable[[Stage], Findings]


@dataclass(frozen=True)
class Scenario:
    """Measurements that are told of in one section of the report."""

    name: str
    title: str
    #: What is done, in a paragraph.
    text: str
    parts: tuple[Part, ...]
    #: Names of the targets that its figures are compared with.
    targets: tuple[str, ...] = ()
    #: Sessions of a database that it needs at a time; 0 for no database.
    sessions: int = 0
