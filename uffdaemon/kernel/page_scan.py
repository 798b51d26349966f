"""PAGEMAP_SCAN (Linux 6.7): which pages of a range are present, written, swapped, huge or zero.

Source: ``Documentation/admin-guide/mm/pagemap.rst``.
"""

from __future__ import annotations

import errno
import os
from enum import KEEP, IntFlag
from typing import NamedTuple

from uffdaemon import errors, native
from uffdaemon.ranges import PAGE_SIZE, check_range

_WP_MATCHING = 1
_CHECK_WPASYNC = 2
_CAPACITY = 1024


class PageCategory(IntFlag, boundary=KEEP):
    """``PAGE_IS_*`` of ``include/uapi/linux/fs.h``."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8


class PageRange(NamedTuple):
    """Adjacent pages in the same categories, from address `start` (bytes) on."""

    start: int
    length: int
    """Bytes."""
    categories: PageCategory

    @property
    def end(self) -> int:
        """The first address after the last page."""
        return self.start + self.length

    def __repr__(self) -> str:
        names = "|".join(category.name or "" for category in self.categories) or "none"
        return f"<PageRange {self.start:#x}-{self.end:#x}: {self.length} bytes, {names}>"


_ALL = PageCategory((1 << 9) - 1)
_NONE = PageCategory(0)


def scan_pages(
    start: int,
    length: int,
    *,
    required: PageCategory = _NONE,
    any_of: PageCategory = _NONE,
    excluded: PageCategory = _NONE,
    reported: PageCategory = _ALL,
    write_protect: bool = False,
    pid: int | None = None,
) -> list[PageRange]:
    """Scan a range (bytes) for pages in certain categories, and return them as runs.

    It finds pages that are in all of `required`, in at least one of `any_of` and in none of
    `excluded`; by default those that are present, swapped or guards.  The runs have the categories
    in `reported`.  With `write_protect`, the pages found are write-protected again in the same step
    (only own memory, registered with WP_ASYNC).  `pid` scans another process.

    Raises `InvalidRange`, and `MemoryRefused` (ENOTTY: no PAGEMAP_SCAN in this kernel; EPERM;
    ENOENT: no such process).  Source: ``Documentation/admin-guide/mm/pagemap.rst``.
    """
    check_range(start, length, PAGE_SIZE, "the range to scan")
    # Without categories the kernel returns every page; here it means those in any category.
    if not (required | any_of | excluded):
        any_of = PageCategory.PRESENT | PageCategory.SWAPPED | PageCategory.GUARD
    flags = _WP_MATCHING | _CHECK_WPASYNC if write_protect else 0
    found: list[PageRange] = []
    path = f"/proc/{'self' if pid is None else pid}/pagemap"
    try:
        pagemap = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or errno.EIO
        raise errors.MemoryRefused(number, "PAGEMAP_SCAN", reason=f"opening {path}") from error
    try:
        at, end = start, start + length
        while at < end:
            number, at, ranges = native.scan(
                pagemap,
                at,
                end,
                flags=flags,
                inverted=int(excluded),
                mask=int(required | excluded),
                anyof=int(any_of),
                returned=int(reported),
                capacity=_CAPACITY,
            )
            if number < 0:
                raise errors.MemoryRefused(-number, "PAGEMAP_SCAN", address=at, length=end - at)
            found += (PageRange(s, e - s, PageCategory(c)) for s, e, c in ranges)
    finally:
        os.close(pagemap)
    return found
