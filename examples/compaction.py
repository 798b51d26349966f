"""Compact a heap while its mutators run.

    python compaction.py [--pages N] [--threads N] [--rounds N] [--json FILE] [--plot FILE] ...

C threads, the mutators, work on small objects all the time (moving_heap/heap.c).  Their pages lie
scattered among garbage.  The compactor moves them together into another range, and unmaps the old
one:

1. To-space is empty and guarded: a mutator that touches it waits for the daemon in this program.
2. One atomic store switches the mutators to the new addresses.  Each sees it at its next operation;
   none stops.  Until the last one has, faults in to-space wait.
3. From then on no mutator uses an old address.  The compactor moves the live pages in batches.  A
   mutator that touches a page that has not been moved yet has it moved at once.
4. From-space holds nothing but garbage, and is unmapped.

Runs of pages are cut into pieces.  Each piece is moved by the compactor or for a fault, whichever
claims it first.

The same is done by copying, and with the world stopped, for comparison.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from array import array
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from moving_heap.figures import BUCKETS, Figures, draw, percentile, print_table
from uffdaemon import (
    Advice,
    ByKind,
    Daemon,
    Fault,
    Memory,
    Outcome,
    Unprotect,
    actions,
    open_daemon,
)
from uffdaemon.actions import Action, Perform
from uffdaemon.lowlevel import Features, RegisterMode, Userfaultfd
from uffdaemon.moves import copy_exactly, move_many

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
    from typing import Self

PAGE: Final = mmap.PAGESIZE
PIECE: Final = 16
"""Pages moved for one fault: enough to amortise the fixed cost of a move."""
BATCH: Final = 1024
"""Pages that the compactor moves in one call; a fault on one of them waits for the call."""

# -- the heap and its mutators, in C -----------------------------------------------------------


def compile_heap(folder: str) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.exit("compaction: the mutators are written in C, and there is no compiler (cc, gcc)")
    source = Path(__file__).with_name("moving_heap") / "heap.c"
    target = Path(folder, "heap.so")
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(target), str(source)], check=True)
    library = ctypes.CDLL(str(target))
    for name in ("heap_wrong", "heap_latencies", "heap_operations"):
        getattr(library, name).restype = ctypes.c_uint64
    library.heap_new.restype = ctypes.c_void_p
    return library


def in_c(numbers: array[int]) -> ctypes.c_void_p:
    """The address of the numbers; the caller keeps them alive."""
    return ctypes.c_void_p(numbers.buffer_info()[0])


class Heap:
    """The heap: objects, the addresses of their pages, and the threads that work on them."""

    def __init__(self, library: ctypes.CDLL, addresses: array[int], threads: int) -> None:
        self._library = library
        self._addresses = [addresses]
        interval = ctypes.c_uint64(5000)  # nanoseconds
        made = library.heap_new(in_c(addresses), ctypes.c_uint64(len(addresses)), threads, interval)
        if not made:
            raise MemoryError
        self._heap = ctypes.c_void_p(made)

    def call(self, name: str, *arguments: object) -> int:
        """Call a function of heap.h.  ctypes releases the GIL meanwhile."""
        result: Any = getattr(self._library, f"heap_{name}")(self._heap, *arguments)
        return int(result or 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.call("free")

    def flip(self, addresses: array[int]) -> None:
        """Switch the mutators to new addresses."""
        self._addresses.append(addresses)
        self.call("flip", in_c(addresses))

    @asynccontextmanager
    async def mutators_running(self) -> AsyncGenerator[None]:
        if self.call("start"):
            raise RuntimeError("the mutators could not be started")
        try:
            yield
        except BaseException:  # noqa: BLE001  # Ctrl-C too
            # Mutators may wait for pages that will never come, and could not be joined.
            traceback.print_exc()
            os._exit(1)
        finally:
            # In a worker thread: mutators may wait for pages, which trio's thread has to move.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.call, "stop")

    def latencies(self) -> tuple[list[int], float]:
        """How many operations fell into each bucket, and the worst latency in µs."""
        histogram = array("Q", bytes(8 * BUCKETS))
        worst = self.call("latencies", in_c(histogram))
        return list(histogram), worst / 1000


# -- pieces, and ways to carry them ------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Piece:
    """Live pages that are adjacent in from-space and in to-space."""

    dst: int
    src: int
    length: int
    arrived: trio.Event | None = None
    """None: nobody has claimed it yet."""


def scatter(pages: int, run: int) -> tuple[list[int], int]:
    """Scatter `pages` live pages in runs of `run` on average, with as much garbage between them.

    Returns the numbers of the live pages, and how many pages there are in all.
    """
    drawn = random.Random(pages * run)
    live: list[int] = []
    at = 0
    while len(live) < pages:
        length = min(drawn.randint(1, 2 * run - 1), pages - len(live))
        live += range(at, at + length)
        at += length + drawn.randint(1, 2 * run - 1)
    return live, at


def joined(pieces: Iterable[Piece]) -> Iterator[tuple[int, int, int]]:
    """(dst, src, bytes), with adjacent pieces joined."""
    dst = src = length = 0
    for piece in pieces:
        if length and (dst + length, src + length) == (piece.dst, piece.src):
            length += piece.length
            continue
        if length:
            yield dst, src, length
        dst, src, length = piece.dst, piece.src, piece.length
    if length:
        yield dst, src, length


def by_move(uffd: Userfaultfd, _: Memory, pieces: list[Piece]) -> None:
    move_many(uffd, joined(pieces))


def by_copy(uffd: Userfaultfd, from_space: Memory, pieces: list[Piece]) -> None:
    """Loses no write here, because no mutator writes to from-space any more."""
    for dst, src, length in joined(pieces):
        uffd.copy(dst, src, length)
        from_space.advise(Advice.DONTNEED, src - from_space.start, length)


def by_exact_copy(uffd: Userfaultfd, _: Memory, pieces: list[Piece]) -> None:
    """For a heap whose mutators may still write to from-space."""
    for dst, src, length in joined(pieces):
        copy_exactly(uffd, dst, src, length)


@dataclass(frozen=True)
class Way:
    """One way to carry pieces."""

    carry: Callable[[Userfaultfd, Memory, list[Piece]], None]
    outcome: Outcome
    register: RegisterMode = RegisterMode.MISSING
    at_once: bool = True
    """Whether trio's thread may carry a single piece, because that never waits."""


WAYS: Final = {
    "move": Way(by_move, Outcome.MOVED),
    "copy": Way(by_copy, Outcome.COPIED),
    "exact copy": Way(
        by_exact_copy,
        Outcome.EXACTLY_COPIED,
        RegisterMode.MISSING | RegisterMode.WP,
        at_once=False,
    ),
}
STOPPED: Final = "stop the world"
ORDER: Final = (*WAYS, STOPPED)

# -- the compaction ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Spaces:
    """The two ranges, and which page goes where."""

    from_space: Memory
    to_space: Memory
    live: list[int]
    """The numbers of the live pages in from-space, in order: page n of to-space is ``live[n]``."""

    def pieces(self, pages: int) -> list[Piece]:
        """The live pages in pieces of at most `pages` pages."""
        pieces: list[Piece] = []
        for number, page in enumerate(self.live):
            dst, src = self.to_space.start + number * PAGE, self.from_space.start + page * PAGE
            last = pieces[-1] if pieces else None
            if last is None or last.src + last.length != src or last.length == pages * PAGE:
                pieces.append(Piece(dst, src, PAGE))
            else:
                last.length += PAGE
        return pieces

    def new_addresses(self) -> array[int]:
        return array("Q", range(self.to_space.start, self.to_space.end, PAGE))


class Compaction:
    """One compaction while the mutators run: who claims which piece, and resolves faults."""

    def __init__(self, heap: Heap, spaces: Spaces, way: Way, daemon: Daemon) -> None:
        self.heap = heap
        self.spaces = spaces
        self.way = way
        self.pieces = spaces.pieces(PIECE)
        self.piece_of = [piece for piece in self.pieces for _ in range(piece.length // PAGE)]
        self.passed = trio.Event()  # set when no mutator uses from-space any more
        self.cpu = 0.0  # seconds, of worker threads
        daemon.guard(
            spaces.to_space,
            ByKind(missing=self.policy, write_protect=Unprotect()),
            features=Features.MOVE | Features.PAGEFAULT_FLAG_WP | Features.THREAD_ID,
            register=way.register,
            on_failure=actions.Poison(),  # a heap that lacks pages must not go on
        )
        uffd = spaces.to_space.userfaultfd
        assert uffd is not None
        self.uffd = uffd
        if RegisterMode.WP in way.register:
            uffd.register(spaces.from_space.start, spaces.from_space.length, way.register)

    async def run(self) -> None:
        """The compactor."""
        self.heap.flip(self.spaces.new_addresses())
        await trio.to_thread.run_sync(self.heap.call, "wait_passed")
        self.passed.set()
        for at in range(0, len(self.pieces), BATCH // PIECE):
            batch = self.pieces[at : at + BATCH // PIECE]
            await self.carry([piece for piece in batch if piece.arrived is None])
        for piece in self.pieces:
            assert piece.arrived is not None
            await piece.arrived.wait()

    def policy(self, _: Fault) -> Action:
        """A mutator touched a page before the compactor moved it."""
        return Perform(self.resolve)

    async def resolve(self, _: Userfaultfd, fault: Fault) -> Outcome:
        # Another mutator may still write to this page at its old address.  It switches at its next
        # operation, and waits for nothing before that, so this wait ends.
        await self.passed.wait()
        piece = self.piece_of[fault.page]
        if piece.arrived is None:
            await self.carry([piece])
        else:
            await piece.arrived.wait()
        return self.way.outcome

    async def carry(self, pieces: list[Piece]) -> None:
        """Claim and carry pieces that are not claimed yet."""
        arrived = trio.Event()
        for piece in pieces:
            piece.arrived = arrived  # claimed in trio's thread only, so no lock is needed
        if len(pieces) == 1 and self.way.at_once:
            self.way.carry(self.uffd, self.spaces.from_space, pieces)
        else:
            with trio.CancelScope(shield=True):  # a claimed piece must arrive
                self.cpu += await trio.to_thread.run_sync(self.timed, pieces)
        arrived.set()

    def timed(self, pieces: list[Piece]) -> float:
        began = time.thread_time()
        self.way.carry(self.uffd, self.spaces.from_space, pieces)
        return time.thread_time() - began


def stop_the_world(heap: Heap, spaces: Spaces) -> float:
    """The same without a userfaultfd.  Returns the CPU time in seconds."""
    began = time.thread_time()
    heap.call("pause")
    for dst, src, length in joined(spaces.pieces(PIECE)):
        ctypes.memmove(dst, src, length)
    heap.flip(spaces.new_addresses())
    heap.call("resume")
    return time.thread_time() - began


# -- measuring ---------------------------------------------------------------------------------


def resident() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Rss in smaps_rollup")


async def measure(library: ctypes.CDLL, way: str, options: argparse.Namespace) -> Figures:
    """Make a heap, compact it once in this way, and check that no write was lost."""
    live, total = scatter(options.pages, options.run)
    async with AsyncExitStack() as stack:
        # Memory first: the daemon has to end before the memory is unmapped.
        to_space = stack.enter_context(Memory.map(len(live) * PAGE, dont_fork=True))
        from_space = stack.enter_context(Memory.map(total * PAGE, dont_fork=True))
        for space in (to_space, from_space):
            space.advise(Advice.NOHUGEPAGE)  # only whole huge pages move as fast
        from_space.touch(write=True)  # garbage takes memory too
        old = array("Q", (from_space.start + page * PAGE for page in live))
        heap = stack.enter_context(Heap(library, old, options.threads))
        spaces = Spaces(from_space, to_space, live)
        daemon = await stack.enter_async_context(open_daemon())
        async with heap.mutators_running():
            await trio.sleep(0.05)
            before = resident()
            heap.call("record", 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, options.window)
                began, cpu = time.perf_counter(), time.thread_time()
                if way == STOPPED:
                    cpu -= await trio.to_thread.run_sync(stop_the_world, heap, spaces)
                else:
                    compaction = Compaction(heap, spaces, WAYS[way], daemon)
                    await compaction.run()
                    cpu -= compaction.cpu
                from_space.close()
                seconds, cpu = time.perf_counter() - began, time.thread_time() - cpu
            heap.call("record", 0)
            after = resident()
        wrong = await trio.to_thread.run_sync(heap.call, "wrong")
        histogram, worst = heap.latencies()
        return Figures(
            way,
            seconds,
            cpu,
            min(percentile(histogram, 0.5), worst),
            min(percentile(histogram, 0.99), worst),
            worst,
            sum(daemon.statistics().faults.values()),
            before,
            after,
            heap.call("operations"),
            wrong,
            histogram,
        )


def main() -> int:
    """Compact in each way, in turn; the exit status is 1 if a write was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--pages", type=int, default=16384, help="live pages (default: 16384, 64 MiB)")
    add("--run", type=int, default=64, help="average run of adjacent live pages (default: 64)")
    add("--threads", type=int, default=2, choices=(1, 2, 3, 4), help="mutators (default: 2)")
    add("--window", type=float, default=0.5, help="seconds to measure (default: 0.5)")
    add("--rounds", type=int, default=1, help="rounds through all ways (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    options = parser.parse_args()
    for path in (options.json, options.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path.parent} is not a directory")
    with tempfile.TemporaryDirectory() as folder:
        library = compile_heap(folder)
        rounds = [
            [trio.run(measure, library, way, options) for way in ORDER]
            for _ in range(options.rounds)
        ]
    print_table(ORDER, rounds)
    if options.json is not None:
        flat = [asdict(figures) for one in rounds for figures in one]
        options.json.write_text(json.dumps(flat) + "\n")
    if options.plot is not None:
        draw(ORDER, rounds, options.plot)
    lost = sum(figures.wrong for one in rounds for figures in one)
    print(f"{lost} objects were lost or damaged" if lost else "nothing was lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
