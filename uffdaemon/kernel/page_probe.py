"""Facts about pages and mappings of this process, for moving pages: from pagemap, maps, mincore.

Source: ``Documentation/admin-guide/mm/pagemap.rst``, proc_pid_maps(5).
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from uffdaemon import native
from uffdaemon.kernel.page_scan import PageCategory
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.outcomes import Code, Operation
from uffdaemon.uapi.page_facts import PageFacts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffdaemon.kernel.userfaultfd import Userfaultfd

_PRESENT = 1 << 63
_SWAPPED = 1 << 62
_EXCLUSIVE = 1 << 56
_FRAME = (1 << 55) - 1
_MARKER = 31
"""The swap type of entries that are markers (``SWP_PTE_MARKER``); seen with CAP_SYS_ADMIN."""
_KPF_KSM = 1 << 21
_HUGE_OR_ZERO = PageCategory.HUGE | PageCategory.PFNZERO


def look(start: int, length: int) -> list[PageFacts]:
    """The facts of each page from `start`.

    Without CAP_SYS_ADMIN a merged page looks like one that is shared, and a marker like a page
    that is swapped out.
    """
    count = length // PAGE_SIZE
    # Opened each time: after a fork, an old descriptor would show the parent's memory.
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        read = os.pread(pagemap, count * 8, start // PAGE_SIZE * 8)
        entries = [entry for (entry,) in struct.iter_unpack("=Q", read)]
        entries += [0] * (count - len(entries))
        huge, zero = set[int](), set[int]()
        if any(entry & _PRESENT for entry in entries):
            for first, end, categories in _scan(pagemap, start, length):
                pages = range((first - start) // PAGE_SIZE, (end - start) // PAGE_SIZE)
                huge.update(pages if categories & PageCategory.HUGE else ())
                zero.update(pages if categories & PageCategory.PFNZERO else ())
    finally:
        os.close(pagemap)
    merged = _merged(entries, zero)
    cached = _cached(start, entries)
    return [
        PageFacts(
            there=bool(entry & (_PRESENT | _SWAPPED)) or page in cached,
            exclusive=bool(entry & _EXCLUSIVE),
            merged=page in merged,
            zero=page in zero,
            huge=page in huge,
            marker=bool(entry & _SWAPPED) and entry & 0x1F == _MARKER,
            present=bool(entry & _PRESENT) and page not in zero,
        )
        for page, entry in enumerate(entries)
    ]


def _cached(start: int, entries: list[int]) -> set[int]:
    """Which pages of a shared file are in the page cache without being mapped here.  Pages that are
    swapped out cannot be seen."""
    holes = [page for page, entry in enumerate(entries) if not entry & (_PRESENT | _SWAPPED)]
    if not holes:
        return set()
    resident = native.in_memory(start, len(entries), PAGE_SIZE)
    found = {page for page in holes if resident and resident[page] & 1}
    if not found:
        return found
    shared: set[int] = set()
    for mapping in mappings(start, len(entries) * PAGE_SIZE):
        if mapping.shared:
            low, high = ((edge - start) // PAGE_SIZE for edge in (mapping.start, mapping.end))
            shared.update(range(max(low, 0), min(high, len(entries))))
    return found & shared


def _scan(pagemap: int, start: int, length: int) -> Iterator[tuple[int, int, int]]:
    at, end = start, start + length
    while at < end:
        number, at, ranges = native.scan(
            pagemap,
            at,
            end,
            flags=0,
            inverted=0,
            mask=0,
            anyof=int(_HUGE_OR_ZERO),
            returned=int(_HUGE_OR_ZERO),
            capacity=1024,
        )
        if number < 0:
            return  # before Linux 6.7 there is no MOVE either
        yield from ranges


def _merged(entries: list[int], zero: set[int]) -> set[int]:
    """Which pages KSM has merged; none without the right to see frame numbers (CAP_SYS_ADMIN)."""
    frames = {
        page: entry & _FRAME
        for page, entry in enumerate(entries)
        if entry & _PRESENT and not entry & _EXCLUSIVE and entry & _FRAME and page not in zero
    }
    if not frames:
        return set()
    try:
        flags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return set()
    try:
        return {
            page
            for page, frame in frames.items()
            if int.from_bytes(os.pread(flags, 8, frame * 8), "little") & _KPF_KSM
        }
    finally:
        os.close(flags)


class Mapping(NamedTuple):
    """One line of /proc/self/maps."""

    start: int
    end: int
    access: str
    """``rwxp``; the last letter is ``s`` for shared memory."""
    file: bool
    """Whether there is a file, a memory file included, behind it."""

    @property
    def shared(self) -> bool:
        """Whether its pages are shared by all mappings of a file."""
        return self.access.endswith("s")

    @property
    def movable(self) -> bool:
        """Whether it is private, anonymous and writable."""
        return self.access.endswith("p") and self.access[1] == "w" and not self.file


def mappings(start: int, length: int) -> list[Mapping]:
    """The mappings that a range of this process touches, in order."""
    found: list[Mapping] = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            span, access, _, _, inode, *_ = line.split(maxsplit=5)
            low, high = (int(part, 16) for part in span.split("-"))
            if low >= start + length:
                break
            if high > start:
                found.append(Mapping(low, high, access, inode.strip() != "0"))
    return found


def divide(dst: int, src: int, length: int) -> list[int]:
    """The lengths of the parts in which neither side leaves its mapping."""
    cuts = {length}
    for start in (dst, src):
        for mapping in mappings(start, length):
            cuts.update(
                edge - start for edge in (mapping.start, mapping.end) if 0 < edge - start < length
            )
    ends = sorted(cuts)
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def registered(uffd: Userfaultfd, start: int) -> bool:
    """Whether the page at `start` is registered with `uffd`, tested without changing anything.
    Assumed for huge pages, and for all but private anonymous memory."""
    mapped = mappings(start, PAGE_SIZE)
    return bool(mapped) and is_registered(uffd, mapped[0], start)


def is_registered(uffd: Userfaultfd, mapping: Mapping, start: int) -> bool:
    """The same for a page whose mapping is known."""
    if mapping.file:
        return True  # not tested: CONTINUE might map a page
    # CONTINUE is EINVAL for registered anonymous memory, ENOENT for any other.
    [result] = uffd.execute([Operation(Code.CONTINUE, start, PAGE_SIZE)])
    if result.error == errno.ENOENT:
        return False
    if not mapping.movable or not uffd.same_process or look(start, PAGE_SIZE)[0].huge:
        return True  # a huge page would be split
    # MOVE onto itself moves nothing: EEXIST or ENOENT if registered with this userfaultfd, EINVAL
    # if with another one.
    [result] = uffd.execute([Operation(Code.MOVE, start, PAGE_SIZE, start)])
    return result.error != errno.EINVAL
