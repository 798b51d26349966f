"""The pages that memory has before it is guarded: their faults never come, so no policy fills them.

The kernel is asked: PAGEMAP_SCAN, which skips holes, and for memory files SEEK_DATA.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, get_args

from uffdaemon import errors, native
from uffdaemon.arguments import check_choice
from uffdaemon.kernel.memory import Advice
from uffdaemon.kernel.page_scan import scan_pages
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.features import RegisterMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from uffdaemon.guard.guarded_region import GuardedRegion
    from uffdaemon.kernel.memory import Memory

Present: TypeAlias = Literal["refuse", "keep", "discard"]
"""What `Daemon.guard` does about pages that are present already."""

_PIECE: Final = 1 << 18  # pages that mincore(2) looks at in one go


class Found(NamedTuple):
    """The pages of some memory that a missing fault would not report."""

    runs: list[tuple[int, int]]
    """Their offsets, (start, end) in bytes, in order."""
    unmapped: int
    """Bytes of hugetlb pages that only the memory file has: the kernel does not tell which."""


def settle_present(region: GuardedRegion, register: RegisterMode, present: Present) -> None:
    """Find the pages that are present, before the region is registered, and do as `present` says.

    Memory that a daemon guarded until it ended keeps its pages.  Memory registered for minor or
    write-protect faults only is meant to have pages.  Raises `PagesPresent`, and `MemoryRefused`
    if pages cannot be discarded.
    """
    memory = region.memory
    check_choice("present", present, get_args(Present))
    if memory.resumable:
        if present == "discard":
            raise errors.PlacementRefused(
                f"{region.label} has been guarded, and is registered still: remove its region, or "
                "map new memory, instead of present='discard'"
            )
    elif not register & RegisterMode.MISSING:
        return
    # With MINOR, what is only in the memory file is reported, as a minor fault.
    file = memory.fd >= 0 and not register & RegisterMode.MINOR
    found = find_present(memory, file=file)
    if not found.runs and not found.unmapped:
        return
    if present == "discard":
        _discard(memory, found, file=file)
    elif present == "keep" or memory.resumable:
        size = memory.page_size
        for start, end in found.runs:
            region.pages.present.add_range(start // size, end // size)
    else:
        raise errors.PagesPresent(region.label, found.runs, found.unmapped, memory.page_size)


def find_present(memory: Memory, *, file: bool) -> Found:
    """The pages that are mapped or swapped out and, with `file`, those that its memory file has."""
    runs = list(_mapped(memory.start, memory.length))
    unmapped = 0
    if file and memory.type.huge:
        mapped = sum(end - start for start, end in runs)
        unmapped = max(os.fstat(memory.fd).st_blocks * 512 - mapped, 0)
    elif file:
        runs += _in_file(memory.fd, memory.length)
    return Found(_merged(runs, memory.page_size), unmapped)


def _mapped(start: int, length: int) -> Iterator[tuple[int, int]]:
    try:
        for run in scan_pages(start, length):
            yield run.start - start, run.end - start
    except errors.MemoryRefused as error:
        if error.number not in (errno.ENOTTY, errno.EINVAL):
            raise
    else:
        return
    # Before Linux 6.7.  Pages that are swapped out cannot be seen.
    for at in range(0, length, _PIECE * PAGE_SIZE):
        pages = min(_PIECE, (length - at) // PAGE_SIZE)
        states = native.in_memory(start + at, pages, PAGE_SIZE)
        page = states.find(1)
        while page >= 0:
            end = states.find(0, page)
            end = pages if end < 0 else end
            yield at + page * PAGE_SIZE, at + end * PAGE_SIZE
            page = states.find(1, end)


def _in_file(fd: int, length: int) -> Iterator[tuple[int, int]]:
    # Opened anew: the position of a duplicated descriptor is shared.
    file = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = 0
        with suppress(OSError):  # ENXIO: no data from here on
            while at < length:
                start = os.lseek(file, at, os.SEEK_DATA)
                at = os.lseek(file, start, os.SEEK_HOLE)
                yield start, min(at, length)
    finally:
        os.close(file)


def _merged(runs: Iterable[tuple[int, int]], page_size: int) -> list[tuple[int, int]]:
    """The runs in order, as whole pages, each once."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(runs):
        start, end = first // page_size * page_size, -(-last // page_size) * page_size
        if merged and start <= merged[-1][1]:
            start, last_end = merged.pop()
            end = max(end, last_end)
        merged.append((start, end))
    return merged


def _discard(memory: Memory, found: Found, *, file: bool) -> None:
    """Clear the pages.  The memory is not registered: no event is reported."""
    if not file:
        advice = Advice.REMOVE if memory.type.shared else Advice.DONTNEED
        for start, end in found.runs:
            _advise(memory, advice, start, end - start)
        return
    if memory.type.shared:
        with suppress(errors.MemoryRefused):  # EINVAL: the memory is locked
            memory.advise(Advice.REMOVE)
            return
    # Private copies of its pages go as well.
    os.ftruncate(memory.fd, 0)
    os.ftruncate(memory.fd, memory.length)


def _advise(memory: Memory, advice: Advice, offset: int, length: int) -> None:
    try:
        memory.advise(advice, offset, length)
    except errors.MemoryRefused as error:
        if error.number != errno.EINVAL or advice is not Advice.DONTNEED:
            raise
        memory.advise(Advice.DONTNEED_LOCKED, offset, length)
