"""One run: a mover that answers faults and moves of its own accord, while threads write."""

from __future__ import annotations

import os
import struct
import sys
import time
import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from tests.soak.threads import COLD, DIRECT, DIRECT_BLOCKS, HOT, PAGES, PATTERN, RING, Threads
from uffdaemon import Advice, FaultKind, Memory
from uffdaemon.errors import AlreadyMoved, MoveRefused, PageNotExclusive
from uffdaemon.lowlevel import Features, PageCategory, RegisterMode, Userfaultfd, scan_pages
from uffdaemon.moves import Cause, Fallback, Moved, copy_exactly, move
from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE
from uffdaemon.uapi.events import PageFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = PAGE_SIZE
DISTURBANCES = ("fork", "ksm", "direct", "ring", "pageout", "split")
EXACT_CANNOT = ("direct", "ring")
"""A copy, however exact, loses what I/O has not delivered yet; only MOVE can tell a pin."""
_LADDER = Fallback(patience=20.0)
_DISK = "/var/tmp"  # noqa: S108  # O_DIRECT takes a disk; the file has no name

Mover: TypeAlias = "Callable[[Bouncing, int, int, int], None]"


@dataclass
class Report:
    """What came of a run."""

    mover: str
    writers: int
    disturbances: tuple[str, ...]
    moves: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    """Moves by outcome and cause; refusals that were tried again count as ``busy``."""
    lost: int = 0
    stale: int = 0
    wrong: int = 0
    left: int = 0
    """Sources that were not empty after a move."""
    writes: int = 0
    reads: int = 0
    happened: dict[str, int] = field(default_factory=dict[str, int])
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, stale, wrong or left behind."""
        return not (self.lost or self.stale or self.wrong or self.left)


class Bouncing:
    """Pages that are at one of two places each."""

    def __init__(self, uffd: Userfaultfd, slots: tuple[Memory, Memory], spacing: int) -> None:
        self.uffd = uffd
        self.slots = slots
        self.spacing = spacing
        self.place = [0] * PAGES
        self.rest = 0
        """Where the pages are, in a huge slot, that nobody uses."""
        self.report: Report

    def address(self, slot: int, page: int) -> int:
        """Where the page is when it is at `slot`."""
        return self.slots[slot].start + page * self.spacing

    def page_of(self, address: int) -> tuple[int, int]:
        """(slot, page) of an address."""
        slot = 0 if self.slots[0].start <= address < self.slots[0].end else 1
        return slot, (address - self.slots[slot].start) // self.spacing

    def bounce(self, mover: Mover, page: int, target: int) -> None:
        """Bring a page to `target`, or wake whoever did not see yet that it is there."""
        dst = self.address(target, page)
        if self.place[page] == target:
            self.uffd.wake(dst, PAGE)
            return
        src = self.address(1 - target, page)
        mover(self, dst, src, page)
        self.place[page] = target
        self.report.moves += 1
        if scan_pages(src, PAGE, any_of=PageCategory.PRESENT | PageCategory.SWAPPED):
            self.report.left += 1

    def move(self, dst: int, src: int, length: int, fallback: Fallback | None = None) -> Moved:
        """`move` for pages that are known to be there: they may be swapped out at this moment, of
        which the kernel says that they were in the way of themselves."""
        try:
            return move(self.uffd, dst, src, length, fallback=fallback)
        except AlreadyMoved as error:
            if any(run.cause is not Cause.ALREADY_MOVED for run in error.moved.refused):
                raise
            return error.moved


# -- movers ------------------------------------------------------------------------------------


def strict(bouncing: Bouncing, dst: int, src: int, page: int) -> None:
    """MOVE or nothing; what is busy is cured by hand and tried again."""
    while True:
        try:
            moved = bouncing.move(dst, src, PAGE)
        except PageNotExclusive as error:
            bouncing.report.outcomes[f"busy: {error.cause.value}"] += 1
            slot, page = bouncing.page_of(src)
            bouncing.slots[slot].advise(Advice.POPULATE_WRITE, page * bouncing.spacing, PAGE)
            os.sched_yield()
            continue
        bouncing.report.outcomes[_name(moved)] += 1
        return


def ladder(bouncing: Bouncing, dst: int, src: int, page: int) -> None:
    """All rungs that lose nothing."""
    bouncing.report.outcomes[_name(bouncing.move(dst, src, PAGE, _LADDER))] += 1


def _name(moved: Moved) -> str:
    [run] = moved.runs
    if run.cause is Cause.ALREADY_MOVED:
        return "moved, and said to have been in its own way"
    return run.outcome.value + (f": {run.cause.value}" if run.cause else "")


def exact(bouncing: Bouncing, dst: int, src: int, page: int) -> None:
    """The exact copy."""
    [run] = copy_exactly(bouncing.uffd, dst, src, PAGE).runs
    bouncing.report.outcomes[run.outcome.value] += 1


def naive(bouncing: Bouncing, dst: int, src: int, page: int) -> None:
    """COPY, then MADV_DONTNEED: must be seen to lose."""
    bouncing.uffd.copy(dst, src, PAGE)
    slot, page = bouncing.page_of(src)
    bouncing.slots[slot].advise(Advice.DONTNEED, page * bouncing.spacing, PAGE)
    bouncing.uffd.wake(src, PAGE)
    bouncing.report.outcomes["copied and released"] += 1


def lopsided(bouncing: Bouncing, dst: int, src: int, page: int) -> None:
    """The exact copy without protecting the destination: loses nothing, and shows the past."""
    bouncing.uffd.write_protect(src, PAGE)
    bouncing.uffd.copy(dst, src, PAGE)
    slot, page = bouncing.page_of(src)
    bouncing.slots[slot].advise(Advice.DONTNEED, page * bouncing.spacing, PAGE)
    bouncing.uffd.wake(src, PAGE)
    bouncing.report.outcomes["copied lopsidedly"] += 1


MOVERS: dict[str, Mover] = {
    "strict": strict,
    "ladder": ladder,
    "exact": exact,
    "naive": naive,
    "lopsided": lopsided,
}
PROTECTING = ("exact", "lopsided")


# -- a run -------------------------------------------------------------------------------------


def soak(
    library: Path,
    name: str,
    writers: int,
    moves: int,
    disturbances: tuple[str, ...] = (),
) -> Report:
    """Let `writers` threads write while pages bounce `moves` times by the mover `name`."""
    report = Report(name, writers, disturbances)
    with ExitStack() as stack:
        bouncing = stack.enter_context(_pages(name, huge="split" in disturbances))
        bouncing.report = report
        slots = (bouncing.slots[0].start, bouncing.slots[1].start)
        threads = Threads(library, slots, bouncing.spacing)
        threads.shared.file = stack.enter_context(_file())
        if "ksm" in disturbances:
            stack.enter_context(_alike(bouncing))
        for number in range(writers):
            threads.start("write", number)
        threads.start("check")
        for disturbance in disturbances:
            if disturbance not in ("ksm", "split"):
                threads.start(disturbance)
        began = time.perf_counter()
        try:
            _run(bouncing, MOVERS[name], threads, moves, split="split" in disturbances)
        except BaseException as error:  # noqa: BLE001  # the threads' memory must stay mapped
            traceback.print_exc()
            if isinstance(error, MoveRefused):
                print(error.moved, bouncing.place, bouncing.rest, file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
        report.seconds = time.perf_counter() - began
        _count(bouncing, threads)
    return report


def _run(bouncing: Bouncing, mover: Mover, threads: Threads, moves: int, *, split: bool) -> None:
    report, turn, due = bouncing.report, 0, 0
    while True:
        faults = bouncing.uffd.read_events(20)
        for fault in faults:
            assert isinstance(fault, PageFault)
            # Write-protect faults are answered by the end of the copy that they come from.
            if fault.kind is FaultKind.MISSING:
                slot, page = bouncing.page_of(fault.address)
                bouncing.bounce(mover, page, slot)
        if report.moves >= moves:
            threads.stop()
            if not faults and not threads.running:
                return
            continue
        if not faults:
            turn += 1
            page = turn % PAGES
            bouncing.bounce(mover, page, 1 - bouncing.place[page])
        if split and report.moves >= due:
            _as_one(bouncing)
            due = report.moves + 50


def _as_one(bouncing: Bouncing) -> None:
    """Move all of a slot, as one huge page if the kernel makes one of it."""
    at = bouncing.rest
    source, target = bouncing.slots[at], bouncing.slots[1 - at]
    for page in range(PAGES):
        if bouncing.place[page] != at:
            src, dst = bouncing.address(1 - at, page), bouncing.address(at, page)
            bouncing.move(dst, src, PAGE, _LADDER)
            bouncing.place[page] = at
    with suppress(OSError):  # what is pinned or swapped out is not collapsed
        source.advise(Advice.COLLAPSE, 0, HUGE_PAGE_SIZE)
    whole = bool(scan_pages(source.start, PAGE, required=PageCategory.HUGE))
    bouncing.move(target.start, source.start, HUGE_PAGE_SIZE, _LADDER)
    bouncing.place = [1 - at] * PAGES
    bouncing.rest = 1 - at
    # Where a page table is left at the empty place, it is split on the way.
    arrived = bool(scan_pages(target.start, PAGE, required=PageCategory.HUGE))
    what = "huge page, moved whole" if arrived else "huge page, split" if whole else "small pages"
    bouncing.report.outcomes[f"2 MiB: {what}"] += 1
    bouncing.report.moves += 1


def _count(bouncing: Bouncing, threads: Threads) -> None:
    report, shared = bouncing.report, threads.shared
    for number, writer in enumerate(shared.writers):
        slot = bouncing.slots[bouncing.place[HOT]]
        [word] = struct.unpack("=Q", slot.read(64 * number, 8))
        report.lost += writer.lost + (writer.count - word)
        report.stale += writer.stale
        report.writes += writer.count
        report.reads += writer.reads
    report.wrong = shared.wrong
    report.happened = {
        name: getattr(shared, f"{name}s") for name in ("fork", "direct", "ring", "pageout")
    } | {"check": shared.checks}
    assert not threads.refused, threads.refused


@contextmanager
def _pages(name: str, *, huge: bool) -> Iterator[Bouncing]:
    protecting = name in PROTECTING
    features = Features.MOVE
    mode = RegisterMode.MISSING
    if protecting:
        features |= Features.PAGEFAULT_FLAG_WP
        mode |= RegisterMode.WP
    length = HUGE_PAGE_SIZE if huge else PAGES * PAGE
    # Not one after the other in one huge page: then a fault for one would split all.
    spacing = HUGE_PAGE_SIZE // 8 if huge else PAGE
    uffd = Userfaultfd.open(features)
    with (
        Memory.map(length, transparent_huge=huge) as left,
        Memory.map(length, transparent_huge=huge) as right,
    ):
        for page in range(length // PAGE):
            # Zeros would become the zero page in a split, which is not made huge again.
            left.write(page * PAGE, b"\1" * PAGE if huge else b"")
        for page in (COLD, COLD + 1, RING):
            left.write(page * spacing, struct.pack("=Q", PATTERN + (page == RING)) * (PAGE // 8))
        left.write(HOT * spacing, bytes(PAGE))
        left.write(DIRECT * spacing, b"\1" * PAGE)
        left.userfaultfd = uffd
        for memory in (left, right):
            uffd.register(memory.start, memory.length, mode)
        bouncing = Bouncing(uffd, (left, right), spacing)
        yield bouncing


@contextmanager
def _alike(bouncing: Bouncing) -> Iterator[None]:
    """Give KSM something to merge the cold pages with."""
    with Memory.map(64 * PAGE) as many:
        many.write(0, struct.pack("=Q", PATTERN) * (many.length // 8))
        for memory in (many, *bouncing.slots):
            memory.advise(Advice.MERGEABLE)
        yield


@contextmanager
def _file() -> Iterator[int]:
    """Blocks that say which one they are, to be read past the page cache."""
    fd = os.open(_DISK, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        for block in range(DIRECT_BLOCKS):
            os.pwrite(fd, struct.pack("=Q", block + 1) * (PAGE // 8), block * PAGE)
        os.fsync(fd)
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
        try:
            yield direct
        finally:
            os.close(direct)
    finally:
        os.close(fd)
