"""Filling memory from a file in the page cache: through staging and MOVE, against reading and COPY.

`Staging.fill` reads into transparent huge pages, and moves them to where they are due; a process
that faults there never sees half a page.  Beside it, in C: pread straight into transparent huge
pages, which nobody may look at meanwhile, and loops of UFFDIO_COPY from the mapped file in pieces
of 4 KiB, 64 KiB and 2 MiB, of which the best is shown.  How far apart reading and copying are is a
matter of the machine's memory bandwidth (0.37 and 0.94 have been seen), so only the first has a
target.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from ctypes import addressof, c_char
from typing import TYPE_CHECKING

from benchmarks.rows import Row, compare, script
from benchmarks.turns import TurnFailed, placements
from benchmarks.yardsticks import call, library, pinned
from uffdaemon import Memory
from uffdaemon.lowlevel import Features, PageCategory, Userfaultfd, scan_pages
from uffdaemon.moves import Staging
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTH = 256 << 20
PIECE = 4 * HUGE_PAGE_SIZE
COPIES = {"4 KiB": 4096, "64 KiB": 64 << 10, "2 MiB": HUGE_PAGE_SIZE}
READ_TARGET = 1 / 0.95


@contextmanager
def image() -> Iterator[tuple[int, int]]:
    """A file that is in the page cache as a whole: its descriptor, and where it is mapped."""
    block = bytes(range(1, 252)) * (1 << 12)
    with tempfile.TemporaryFile() as file:
        written = 0
        while written < LENGTH:
            written += os.write(file.fileno(), block[: LENGTH - written])
        with mmap.mmap(file.fileno(), LENGTH, mmap.MAP_PRIVATE) as mapped:
            start = c_char.from_buffer(mapped)
            for at in range(0, LENGTH, mmap.PAGESIZE):
                mapped[at]
            yield file.fileno(), addressof(start)
            del start  # the mapping cannot be closed while its address is used


@contextmanager
def guarded() -> Iterator[tuple[Memory, Userfaultfd]]:
    """Empty memory, for huge pages, that is watched."""
    with target() as memory:
        memory.userfaultfd = uffd = Userfaultfd.open(Features.MOVE)
        uffd.register(memory.start, LENGTH)
        yield memory, uffd


def target() -> Memory:
    """Empty memory, for huge pages."""
    return Memory.map(LENGTH, transparent_huge=True)


def check(memory: Memory) -> None:
    """Raises `TurnFailed` unless the image has arrived, as a look at a few places tells."""
    for at in range(0, LENGTH, LENGTH // 64):
        if memory.read(at, 8) != bytes((at + n) % 251 + 1 for n in range(8)):
            raise TurnFailed(f"the image has not arrived at {at:#x}")


def through_staging(file: int) -> float:
    with Staging(PIECE) as staging, guarded() as (memory, uffd):
        staging.memory.touch(write=True)  # it is used again and again
        begun = time.perf_counter_ns()
        moved = staging.fill(uffd, memory.start, file, 0, LENGTH, piece=PIECE)
        taken = time.perf_counter_ns() - begun
        huge = scan_pages(memory.start, LENGTH, required=PageCategory.HUGE)
        if not moved.complete or sum(found.length for found in huge) != LENGTH:
            raise TurnFailed(f"not all of it has arrived in huge pages: {moved}")
        check(memory)
        return taken / 1e6


def by_reading(file: int) -> float:
    with target() as memory:
        taken = call("fill_by_read", file, memory.start, LENGTH, PIECE)
        check(memory)
        return taken / 1e6


def by_copying(mapped: int, piece: int) -> float:
    with guarded() as (memory, uffd):
        taken = call("fill_by_copy", uffd.fileno(), memory.start, mapped, LENGTH, piece)
        check(memory)
        return taken / 1e6


def measure(rounds: int) -> list[Row]:
    """A row against reading, and one against the best of the copies."""
    library()  # compiled before anything is timed
    cores = next(iter(placements().values()))
    ours, read = list[float](), list[float]()
    copies: dict[str, list[float]] = {name: [] for name in COPIES}
    with image() as (file, mapped), pinned(cores.client):
        through_staging(file)  # the host finds its memory
        for number in range(rounds):
            for name, piece in COPIES.items():
                copies[name].append(by_copying(mapped, piece))
            # COPY leaves small pages behind, of which huge ones have to be made again: whoever
            # comes next pays.  The two that are close to each other come first in turns.
            by_reading(file)
            if number % 2:
                read.append(by_reading(file))
            ours.append(through_staging(file))
            if not number % 2:
                read.append(by_reading(file))
    best = min(copies, key=lambda name: statistics.median(copies[name]))
    where = f"core {cores.client}"
    speeds = {"staging": ours, "pread": read, **{f"COPY of {k}": v for k, v in copies.items()}}
    note = "; ".join(
        f"{name} {LENGTH / 1e6 / statistics.median(taken):.2f} GB/s"
        for name, taken in speeds.items()
    )
    name = f"filling {LENGTH >> 20} MiB through staging"
    return [
        compare(
            name,
            ours,
            read,
            against="pread into huge pages",
            cores=where,
            target=READ_TARGET,
            unit="ms",
            note=note,
        ),
        compare(
            name,
            ours,
            copies[best],
            against=f"COPY of {best} in C, the best",
            cores=where,
            unit="ms",
        ),
    ]


def main() -> None:
    script(measure, __doc__)


if __name__ == "__main__":
    main()
