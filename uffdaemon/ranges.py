"""Page sizes and page-aligned ranges of addresses, and the errors for those that are neither."""

from __future__ import annotations

import mmap
from typing import Final

from uffdaemon.errors import InvalidRange

PAGE_SIZE: Final = mmap.PAGESIZE
"""Bytes of the kernel's smallest page: 4 KiB, and on arm64 16 or 64 KiB as well; sysconf(3)."""

HUGE_PAGE_SIZE: Final = PAGE_SIZE * PAGE_SIZE // 8
"""Bytes of a transparent huge page, and of hugetlb memory unless it says otherwise: a page table
full of entries of 8 bytes.  2 MiB where pages have 4 KiB; 32 and 512 MiB with the larger ones."""


def check_page_size(page_size: int) -> None:
    """Raise `InvalidRange` unless `page_size` (bytes) is one that memory can have."""
    if page_size < PAGE_SIZE or page_size & (page_size - 1):
        raise InvalidRange(f"page size {page_size} is not a power of two of at least {PAGE_SIZE}")


def check_range(start: int, length: int, page_size: int, what: str) -> None:
    """Raise `InvalidRange`, naming `what`, if the range is empty, unaligned or past 2**64."""
    if length <= 0:
        raise InvalidRange(f"{what} is empty: length {length} bytes")
    if start < 0 or start + length > 1 << 64:
        raise InvalidRange(f"{what} {start:#x}, {length} bytes, leaves the address space")
    for value, name in ((start, "start"), (length, "length")):
        if value % page_size:
            raise InvalidRange(
                f"{what} {start:#x}, {length} bytes: {name} is not a multiple of the page size, "
                f"{page_size} bytes"
            )
