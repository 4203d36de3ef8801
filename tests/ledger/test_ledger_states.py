"""Every state of a small world: the book, and the members' side of the protocol.

Breadth first from the empty ledger over all transitions. The transactions are those of
the package; of a member's process is kept what the protocol rests on: what its pool may
open, its sessions, what is wanted, its sign of life. Left out: stalled members, terms
that change, rows that are deleted (see ``test_ledger_model.py``).

A round of a keeper is a look at the pool, a transaction, and what is told to the pool.
Between the look and the transaction the pool may do something; the answer may be lost,
which is also what a process sees that is killed before it obeys. What other processes
do in between changes nothing in this one, so it is done before or after.

States that differ in names only are one: sessions, numbers, and places in a line by
their order. Members are not exchanged, for a tie is broken by their names.

Faults are told by letters: a process is (k)illed; an (a)nswer of a commit is lost; the
end of a (c)onnection is not known, or (u) nor which session it was; a (s)ign of life is
lost though its process lives. The environment may ask for another world:
``WORLD=members,slots,wanted,faults``.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import chain
from typing import NamedTuple

import pytest

from sqla_fairpool.ledger import rows as ledger_rows
from sqla_fairpool.ledger.book import Book
from sqla_fairpool.ledger.demand import State as Seen
from sqla_fairpool.ledger.rows import (
    Gone,
    Member,
    Meta,
    Session,
    TagDemand,
    Terms,
    dump,
    member_key,
)
from sqla_fairpool.ledger.transaction import settle
from sqla_fairpool.ledger.watch import Present, still_there, unaccounted
from sqla_fairpool.scheduling import policy

TAGS = "xy"


class Size:
    """The world that is explored."""

    def set(self, members, slots, wanted, faults):
        self.members, self.slots = int(members), int(slots)
        self.wanted, self.faults = int(wanted), faults
        self.terms = Terms(self.slots, max(self.slots - 1, 1), self.slots, 60.0, 30.0)
        rows_of.cache_clear()
        transact.cache_clear()


SIZE = Size()

#: What a session is to its process: in the pool; its end is not known; nor which it is;
#: the process has forgotten it.
USED, LOST, UNKNOWN, LEFT = range(4)


class Atom(NamedTuple):
    """A session."""

    pool: int
    at_server: bool
    posted: bool  # it is in its member's row


class Row(NamedTuple):
    owned: int
    in_use: int
    waiting: int
    place: int


class Buried(NamedTuple):
    """A quarantine."""

    mine: bool  # its number is the one that the living process has
    slots: int
    why: str
    atoms: tuple[Atom, ...]


class Process(NamedTuple):
    alive: bool = True
    signed: bool = True
    suspected: bool = False  # somebody found its sign missing, and its row as it is now
    wants: int = 0
    allowed: int = 0
    unheard: bool = False  # a commit was not answered, and something was lost before
    joined: bool = False  # it knows its number
    row: Row | None = None
    atoms: tuple[Atom, ...] = ()
    gone: tuple[Buried, ...] = ()

    @property
    def open(self):
        return sum(atom.pool != LEFT for atom in self.all_atoms)

    @property
    def used(self):
        return sum(atom.pool == USED for atom in self.all_atoms)

    @property
    def all_atoms(self):
        return [*self.atoms, *(atom for gone in self.gone for atom in gone.atoms)]

    @property
    def sessions(self):
        return sum(atom.at_server for atom in self.all_atoms)


class World(NamedTuple):
    processes: tuple[Process, ...]
    places: tuple[int, ...] = (0,) * len(TAGS)  # of the tags, in their line


def tag_of(index):
    return TAGS[index % len(TAGS)]


def key_of(index):
    return f"k{index}"


# -- as rows, and back -----------------------------------------------------------------

NEXT = 1000


def name_sessions(world):
    """Name the sessions by their order: for each process, in no quarantine and in
    each."""
    number, names = 0, []
    for process in world.processes:
        groups = []
        for atoms in (process.atoms, *(gone.atoms for gone in process.gone)):
            groups.append([Session(number + i, 1) for i in range(len(atoms))])
            number += len(atoms)
        names.append(groups)
    return names


def number_of(index, place=None):
    """The number of a process, or of a quarantine of its that is not its own."""
    return index + 1 if place is None else 100 * (index + 1) + place


@cache
def rows_of(bones, places):
    """Return the rows of a world of which the bones are these."""
    rows = {"meta": Meta(SIZE.terms, NEXT, NEXT).text}
    rows["tags"] = dump({t: p for t, p in zip(TAGS, places, strict=True) if p})
    for index, (joined, row, posted, gone) in enumerate(bones):
        if row is not None:
            number = number_of(index, None if joined else 99)
            line = TagDemand(row.in_use, row.waiting, True, row.place)
            tags = {tag_of(index): line} if row.in_use + row.waiting else {}
            member = Member(number, {}, row.owned, tags=tags, sessions=posted)
            rows[member_key(key_of(index))] = member.text
        for place, (mine, slots, why, sessions) in enumerate(gone):
            number = number_of(index, None if mine else place)
            text = Gone(slots, why, {}, key_of(index), number, sessions).text
            rows[f"gone/{number}"] = text
    return rows


def bones_of(world, names):
    """Return what of a world is in rows."""
    return tuple(
        (
            process.joined,
            process.row,
            tuple(s for a, s in zip(process.atoms, groups[0], strict=True) if a.posted),
            tuple(
                (gone.mine, gone.slots, gone.why, tuple(sessions))
                for gone, sessions in zip(process.gone, groups[1:], strict=True)
            ),
        )
        for process, groups in zip(world.processes, names, strict=True)
    )


@cache
def transact(bones, places, action, index, *arguments):
    """Do a transaction; return its answer, and what the rows are afterwards."""
    rows = dict(rows_of(bones, places))
    answer = action(Book(rows), index, *arguments)
    book = Book(rows)  # as the next one reads them
    assert book.owned + book.quarantined + book.left == SIZE.slots
    found = []
    for i in range(SIZE.members):
        member = book.members.get(key_of(i))
        row = None
        if member is not None:
            line = member.tags.get(tag_of(i), TagDemand())
            row = Row(member.owned, line.in_use, line.waiting, line.place)
        gone = [
            (number == number_of(i), one.slots, one.why, frozenset(one.sessions))
            for number, one in book.gone.items()
            if one.member == key_of(i)
        ]
        found.append((row, frozenset(member.sessions if member else ()), gone))
    ranks = _ranks(book.places.values())
    return answer, found, tuple(ranks[book.places.get(tag, 0)] for tag in TAGS)


def _ranks(places):
    return {0: 0} | {p: n for n, p in enumerate(sorted({*places} - {0}), 1)}


def after(world, names, action, index, *arguments):
    """Do a transaction in a world; return its answer and the world."""
    bones = bones_of(world, names)
    answer, found, places = transact(bones, world.places, action, index, *arguments)
    processes = []
    for process, groups, (row, posted, gone) in zip(
        world.processes, names, found, strict=True
    ):
        atoms = {
            session: atom._replace(posted=session in posted)
            for atom, session in zip(process.all_atoms, chain(*groups), strict=True)
        }
        in_quarantine = frozenset().union(*(one for *_, one in gone))
        assert not in_quarantine & posted
        processes.append(
            process._replace(
                row=row,
                atoms=tuple(a for s, a in atoms.items() if s not in in_quarantine),
                gone=tuple(
                    Buried(*one, tuple(atoms[s] for s in sessions))
                    for *one, sessions in gone
                ),
            )
        )
    return answer, World(tuple(processes), places)


# -- transactions ----------------------------------------------------------------------


def do_settle(book, index, seen, wants, allowed, joined, sign, turn):
    """Join, if need be, and settle, as `Membership` does it."""
    key, tag = key_of(index), tag_of(index)
    before = {key: book.texts[key]} if key in book.texts else {}
    new = key not in book.members
    if not joined or new:
        number = number_of(index) if joined else None
        book.join(key, {}, SIZE.terms, number)
        book.confirm([key])
    in_use = min(wants, len(seen.sessions))
    line = TagDemand(in_use, wants - in_use, wants > 0)
    told = settle(
        book,
        key,
        seen,
        {tag: line} if wants else {},
        allowed,
        ready=[tag] if turn else (),
        keep=joined and not new,
        sign=sign or new,
    )
    if sign:  # who has found it dead before finds another row
        assert not book.reap(before)
    return min(told.row.owned, told.target), told.buried


def do_leave(book, index, open_, sessions):
    book.leave(key_of(index), open_, sessions)
    book.tell()


def do_reap(book, index):
    key = key_of(index)
    assert book.reap({key: book.texts[key]})
    book.tell()


def do_release(book, index, number, sessions):
    present = Present("", sessions, sessions)
    gone = book.gone[number]
    suspects = unaccounted(sessions, book.accounted)
    left = still_there(gone, present, suspects)
    other = left._replace(gone=gone.__class__(gone.slots, "", {}, "", -1), slots=0)
    book.release({number: other})  # another quarantine that had this number
    assert book.gone[number] == gone
    if left.is_less:
        book.release({number: left})
    book.tell()


# -- what may happen -------------------------------------------------------------------


def put(world, index, process):
    processes = list(world.processes)
    processes[index] = process
    return world._replace(processes=tuple(processes))


def changed(process, which, **changes):
    """Yield the processes with one of its sessions changed, of those of a kind."""
    for group, atoms in enumerate([process.atoms, *(g.atoms for g in process.gone)]):
        for place, atom in enumerate(atoms):
            if which(atom) and atom not in atoms[:place]:
                new = (*atoms[:place], atom._replace(**changes), *atoms[place + 1 :])
                if not group:
                    yield process._replace(atoms=new)
                else:
                    gone = list(process.gone)
                    gone[group - 1] = gone[group - 1]._replace(atoms=new)
                    yield process._replace(gone=tuple(gone))


def opened(process):
    if (
        process.signed
        and process.open < process.allowed
        and process.used < process.wants
    ):
        yield process._replace(atoms=(*process.atoms, Atom(USED, True, False)))


def closed(process):
    if process.used > min(process.allowed, process.wants):
        yield from changed(
            process, lambda a: a.pool == USED, pool=LEFT, at_server=False
        )


def lost(process):
    for fault, how in (("c", LOST), ("u", UNKNOWN)):
        if fault in SIZE.faults:
            yield from changed(process, lambda a: a.pool == USED, pool=how)


def ended(process):
    """The server ends sessions that no pool has in its hands."""
    yield from changed(
        process, lambda a: a.pool != USED and a.at_server, at_server=False
    )


def dead(process):
    def forget(atoms):
        return tuple(atom._replace(pool=LEFT) for atom in atoms)

    gone = tuple(g._replace(mine=False, atoms=forget(g.atoms)) for g in process.gone)
    return Process(
        alive=False,
        signed=False,
        row=process.row,
        atoms=forget(process.atoms),
        gone=gone,
    )


def look(process, named):
    """Return what a keeper sees in the pool."""
    there, known, unknown = (
        [session for session, atom in named.items() if atom.pool == pool]
        for pool in (USED, LOST, UNKNOWN)
    )
    lost = (*known, *[None] * len(unknown))
    return Seen(process.open, (), frozenset(there), lost, None)


def rounds(world, index, turn=False):
    """Yield the worlds after a round, and if it was one in which nothing went wrong."""
    old = world.processes[index]
    if old.unheard:
        old = old._replace(allowed=0, unheard=False)
    between = [old, *closed(old), *lost(old)]
    for process in (one for one in opened(old)):
        between += [process, *opened(process)]
    for process in between:
        now = put(world, index, process)
        names = name_sessions(now)
        pairs = zip(names[index], groups_of(old), strict=True)
        sessions = chain(*(group[: len(atoms)] for group, atoms in pairs))
        named = dict(zip(sessions, old.all_atoms, strict=True))
        arguments = (
            index,
            look(old, named),
            old.wants,
            old.allowed,
            old.joined,
            old.suspected,
            turn,
        )
        (slots, buried), then = after(now, names, do_settle, *arguments)
        unheard = any(atom.pool in (LOST, UNKNOWN) for atom in old.all_atoms)
        done = then.processes[index]._replace(suspected=False, unheard=unheard)
        if "a" in SIZE.faults:
            yield put(then, index, done), False
        forgotten = {
            session
            for session, atom in named.items()
            if session in buried or (atom.pool == UNKNOWN and None in buried)
        }
        obeyed = now_without(process, names[index], forgotten)
        _, then = after(put(now, index, obeyed), names, do_settle, *arguments)
        done = then.processes[index]._replace(
            suspected=False, allowed=slots, joined=True
        )
        yield put(then, index, done), process is old


def groups_of(process):
    return [process.atoms, *(gone.atoms for gone in process.gone)]


def now_without(process, names, forgotten):
    """Return a process that has forgotten sessions."""
    atoms, *in_quarantine = (
        tuple(
            a._replace(pool=LEFT) if s in forgotten else a
            for a, s in zip(group, sessions, strict=True)
        )
        for group, sessions in zip(groups_of(process), names, strict=True)
    )
    gone = zip(process.gone, in_quarantine, strict=True)
    return process._replace(
        atoms=atoms, gone=tuple(g._replace(atoms=a) for g, a in gone)
    )


def steps(world):
    """Yield what may come next: the world, and if it is one of the steps that happen
    when nothing goes wrong and nothing else is wanted."""
    for index, process in enumerate(world.processes):
        key_steps = [(one, True) for one in (*ended(process), *closed(process))]
        if process.alive:
            key_steps += [(one, True) for one in opened(process)]
            key_steps += [(one, False) for one in lost(process)]
            if "k" in SIZE.faults:
                key_steps.append((dead(process), False))
            wants = SIZE.wanted - process.wants
            key_steps.append((process._replace(wants=wants), False))
            needs = max(process.open, process.wants)
            if process.allowed > needs:
                key_steps.append((process._replace(allowed=needs), True))
            if not process.signed:
                back = process._replace(signed=True, allowed=0)
                key_steps.append((back, True))
                if process.row is not None and not process.suspected:
                    key_steps.append((process._replace(suspected=True), True))
            elif process.row is not None and "s" in SIZE.faults:
                key_steps.append((process._replace(signed=False), False))
        yield from ((put(world, index, one), good) for one, good in key_steps)
        yield from transactions(world, index, process)


def transactions(world, index, process):
    names = name_sessions(world)
    if process.alive and process.signed:
        if process.row is not None or process.joined or process.wants:
            yield from rounds(world, index)
        if process.row is not None and process.wants:
            yield from rounds(world, index, turn=True)
        if process.row is not None:
            named = dict(zip(chain(*names[index]), process.all_atoms, strict=True))
            mine = frozenset(s for s, a in named.items() if a.pool in (USED, LOST))
            _, then = after(world, names, do_leave, index, process.open, mine)
            yield put(then, index, dead(then.processes[index])), False
    if process.row is not None and (process.suspected or not process.alive):
        _, then = after(world, names, do_reap, index)
        reaped = then.processes[index]._replace(suspected=False)
        yield put(then, index, reaped), True
    there = frozenset(
        session
        for one, groups in zip(world.processes, names, strict=True)
        for atom, session in zip(one.all_atoms, chain(*groups), strict=True)
        if atom.at_server
    )
    for place, gone in enumerate(process.gone):
        number = number_of(index, None if gone.mine else place)
        yield after(world, names, do_release, index, number, there)[1], True


def tidy(world):
    """Return the world under the names that it shares with all that are like it."""
    processes = []
    for index, process in enumerate(world.processes):
        row = process.row
        if row is not None and row.place:
            line = [p.row for p in world.processes[index % len(TAGS) :: len(TAGS)]]
            ranks = _ranks(row.place for row in line if row is not None)
            row = row._replace(place=ranks[row.place])
        if row is not None and row.waiting > 1:  # how many makes no difference
            row = row._replace(in_use=row.in_use + row.waiting - 1, waiting=1)
        # Sessions that have ended count in the row of lost ones only.
        gone = (
            g._replace(
                atoms=tuple(
                    sorted(
                        a for a in g.atoms if g.why == ledger_rows.LOST or is_there(a)
                    )
                )
            )
            for g in process.gone
        )
        process = process._replace(
            row=row,
            atoms=tuple(sorted(filter(is_there, process.atoms))),
            gone=tuple(sorted(gone)),
        )
        if process == Process(alive=False, signed=False):
            process = Process()  # there is nothing left of it: another one may come
        processes.append(process)
    return World(tuple(processes), world.places)


def is_there(atom):
    return atom.at_server or atom.pool != LEFT


# -- what is promised ------------------------------------------------------------------


def check(world):
    """Check that each session has a slot, and that no slot is there twice."""
    assert sum(process.sessions for process in world.processes) <= SIZE.slots
    kept = 0
    for process in world.processes:
        owned = process.row.owned if process.row else 0
        slots = owned + sum(gone.slots for gone in process.gone)
        assert process.sessions <= slots
        if process.signed:
            mine = sum(gone.slots for gone in process.gone if gone.mine)
            unheard = sum(atom.pool in (LOST, UNKNOWN) for atom in process.all_atoms)
            assert process.allowed <= owned + mine + unheard
        kept += slots
    assert kept <= SIZE.slots


def is_right(world):
    """Tell if the connections are where they are to be, and nothing is left over."""
    lines = {}
    for index, process in enumerate(world.processes):
        tidied = process.alive and process.signed and not process.gone
        if not tidied or process.open != process.used:
            return False
        lines.setdefault(tag_of(index), []).append((process.used, process.wants))
    used = [sum(n for n, _ in line) for line in lines.values()]
    active = [any(wants for _, wants in line) for line in lines.values()]
    wanted = []
    for line in lines.values():
        others = sum(active) - any(wants for _, wants in line)
        most = policy.ceiling(others, SIZE.terms.soft_limit, SIZE.terms.max_limit)
        wanted.append(min(most, sum(wants for _, wants in line)))
    shares = zip(used, lines.values(), strict=True)
    return is_max_min([*zip(used, wanted, strict=True)], SIZE.slots) and all(
        is_max_min(line, share) for share, line in shares
    )


def is_max_min(shares, there):
    """Tell if `there` is divided, and none could give one to another that has less."""
    return (
        sum(share for share, _ in shares) == min(there, sum(want for _, want in shares))
        and all(share <= want for share, want in shares)
        and all(
            other - 1 <= share
            for share, want in shares
            if share < want
            for other, _ in shares
        )
    )


def explore():
    """Return all states, and those from which there is no way to the right shares."""
    start = World((Process(),) * SIZE.members)
    found, numbers, before, parents = [start], {start: 0}, [[]], [0]
    right = []
    for number, world in enumerate(found):  # grows meanwhile
        try:
            check(world)
        except AssertionError as error:
            error.add_note("\n".join(map(str, way_to(number, found, parents))))
            raise
        if is_right(world):
            right.append(number)
        for then, good in steps(world):
            then = tidy(then)
            other = numbers.setdefault(then, len(found))
            if other == len(found):
                found.append(then)
                before.append([])
                parents.append(number)
            if good:
                before[other].append(number)
    reached = set(right)
    while right:
        right = {n for other in right for n in before[other]} - reached
        reached |= right
    return found, [world for n, world in enumerate(found) if n not in reached]


def way_to(number, found, parents):
    """Return how a state was reached, the last step first."""
    way = [found[number]]
    while number:
        number = parents[number]
        way.append(found[number])
    return way


WORLDS = ["1,2,2,kacus", "2,2,2,ka"]


@pytest.mark.slow
@pytest.mark.parametrize("size", os.environ.get("WORLD", " ".join(WORLDS)).split())
def test_every_state_keeps_the_bound_and_has_a_way_to_the_right_shares(size):
    SIZE.set(*size.split(","))
    found, stuck = explore()
    print(f"{size}: {len(found)} states")
    assert not stuck, stuck[0]
    assert len(found) > 100
