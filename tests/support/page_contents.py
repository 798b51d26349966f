"""Page contents that differ from page to page."""

from __future__ import annotations

import hashlib

from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE

PAGE, HUGE = PAGE_SIZE, HUGE_PAGE_SIZE


def content(pages: int, page_size: int = PAGE, seed: int = 0) -> bytes:
    """Bytes in which no page is like another, and none is zeros."""
    return b"".join(
        hashlib.blake2b(b"%d %d" % (seed, page)).digest() * (page_size // 64)
        for page in range(pages)
    )
