"""Moves: batches against a loop in C of the same ioctls; sixteen neighbours asked for one by one.

Pages go back and forth between two ranges, once by each side.  With "another thread running", the
process has a thread on the other core, which has to be told of each change by an interrupt: that
is what a small MOVE costs there, and why neighbours should share an ioctl.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.rows import Row, compare, script
from benchmarks.turns import PAGE, TurnFailed, placements
from benchmarks.yardsticks import another_thread_running, move_each, pinned
from uffdaemon import Memory
from uffdaemon.lowlevel import Features, PageCategory, Userfaultfd, scan_pages
from uffdaemon.moves import move, move_many
from uffdaemon.ranges import HUGE_PAGE_SIZE

SIXTEEN = 16 * PAGE
UNITS = {
    "4 KiB": (PAGE, 2048),
    "64 KiB": (SIXTEEN, 512),
    "2 MiB, transparent huge": (HUGE_PAGE_SIZE, 256),
}
"""Bytes of a move, and how many are timed together.  Between two of them is as large a gap."""
TARGET = 1.05
NEIGHBOURS_TARGET = 1.2


@dataclass(frozen=True)
class Field:
    """Two ranges between which units go back and forth."""

    uffd: Userfaultfd
    left: Memory
    right: Memory
    unit: int
    count: int

    def triples(self, *, back: bool, unit: int | None = None) -> array[int]:
        """What brings everything over, in pieces of `unit` bytes."""
        source, target = (self.right, self.left) if back else (self.left, self.right)
        size = unit or self.unit
        return array(
            "Q",
            [
                number
                for at in range(0, 2 * self.unit * self.count, 2 * self.unit)
                for part in range(0, self.unit, size)
                for number in (target.start + at + part, source.start + at + part, size)
            ],
        )


@contextmanager
def field(unit: int, count: int) -> Iterator[Field]:
    huge = unit == HUGE_PAGE_SIZE
    length = 2 * unit * count
    with (
        Userfaultfd.open(Features.MOVE) as uffd,
        Memory.map(length, transparent_huge=huge, dont_fork=True) as left,
        Memory.map(length, transparent_huge=huge, dont_fork=True) as right,
    ):
        for at in range(0, length, 2 * unit):
            left.touch(at, unit, write=True)
        for memory in (left, right):
            uffd.register(memory.start, length)
        # Twice over, so that both have all the page tables that they are going to have.
        made = Field(uffd, left, right, unit, count)
        for back in (False, True):
            move_many(uffd, made.triples(back=back))
        yield made
        whole = sum(
            found.length
            for found in scan_pages(left.start, length, required=PageCategory.HUGE)
            if huge
        )
        if huge and whole != unit * count:
            raise TurnFailed(f"only {whole} bytes of {unit * count} are still huge pages")


def in_c(field: Field, triples: array[int]) -> float:
    return move_each(field.uffd.fileno(), triples) / field.count / 1000


def batched(field: Field, triples: array[int]) -> float:
    begun = time.perf_counter_ns()
    move_many(field.uffd, triples)
    return (time.perf_counter_ns() - begun) / field.count / 1000


def one_by_one(field: Field, triples: array[int]) -> float:
    begun = time.perf_counter_ns()
    for at in range(0, len(triples), 3):
        move(field.uffd, triples[at], triples[at + 1], triples[at + 2])
    return (time.perf_counter_ns() - begun) / field.count / 1000


def sixteen_at_a_time(field: Field, triples: array[int]) -> float:
    parts = [triples[at : at + 48] for at in range(0, len(triples), 48)]
    begun = time.perf_counter_ns()
    for part in parts:
        move_many(field.uffd, part)
    return (time.perf_counter_ns() - begun) / field.count / 1000


Way = Callable[[Field, "array[int]"], float]
"""Brings everything over; µs for each unit."""


def alternate(
    field: Field, ways: dict[str, tuple[Way, int]], rounds: int
) -> dict[str, list[float]]:
    """Let the ways (each with its piece, in bytes) take turns, there and back."""
    result: dict[str, list[float]] = {name: [] for name in ways}
    there, back = (
        {piece: field.triples(back=back, unit=piece) for _, piece in ways.values()}
        for back in (False, True)
    )
    for _ in range(rounds):
        for name, (way, piece) in ways.items():
            taken = [way(field, there[piece]), way(field, back[piece])]
            result[name].append(statistics.fmean(taken))
    return result


@contextmanager
def surroundings(*, running: bool) -> Iterator[str]:
    """Pin this thread, and have another one running or not; yields on which cores."""
    cores = placements().get("different cores")
    with ExitStack() as stack:
        if cores is None:
            if running:
                raise TurnFailed("another thread that runs takes another core")
            yield "any core"
            return
        stack.enter_context(pinned(cores.client))
        if running:
            stack.enter_context(another_thread_running(cores.handler))
        yield f"mover {cores.client}" + (f", other {cores.handler}" if running else "")


def _batches(rounds: int, *, running: bool) -> Iterator[Row]:
    around = "another thread running" if running else "quiet"
    for name, (unit, count) in UNITS.items():
        ways: dict[str, tuple[Way, int]] = {
            "C": (in_c, unit),
            "many": (batched, unit),
            "each": (one_by_one, unit),
        }
        with field(unit, count) as made, surroundings(running=running) as cores:
            seen = alternate(made, ways, rounds)
        for way, target in (("many", TARGET), ("each", None)):
            yield compare(
                f"{'move_many' if way == 'many' else 'move'}, {name}, {around}",
                seen[way],
                seen["C"],
                against="C loop of MOVE",
                cores=cores,
                target=target,
            )


def _neighbours(rounds: int) -> Iterator[Row]:
    ways: dict[str, tuple[Way, int]] = {
        "C": (in_c, SIXTEEN),
        "C, one by one": (in_c, PAGE),
        "batch": (batched, PAGE),
        "sixteen": (sixteen_at_a_time, PAGE),
    }
    with field(SIXTEEN, 512) as made, surroundings(running=True) as cores:
        seen = alternate(made, ways, rounds)
    for way, name, target in (
        ("batch", "16 neighbours of 4 KiB, 512 times in one call", NEIGHBOURS_TARGET),
        ("sixteen", "16 neighbours of 4 KiB in one call", NEIGHBOURS_TARGET),
        ("C, one by one", "16 MOVEs of 4 KiB in C", None),
    ):
        yield compare(
            f"{name}, another thread running",
            seen[way],
            seen["C"],
            against="one MOVE of 64 KiB in C",
            cores=cores,
            target=target,
        )


def measure(rounds: int) -> list[Row]:
    """Rows for batches, quiet and not, and for neighbours."""
    rows = list(_batches(rounds, running=False))
    if "different cores" in placements():
        rows += _batches(rounds, running=True)
        rows += _neighbours(rounds)
    return rows


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
