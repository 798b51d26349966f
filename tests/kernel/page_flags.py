"""What /proc/self/pagemap says of a page: Documentation/admin-guide/mm/pagemap.rst."""

from __future__ import annotations

import struct

from tests.support.page_contents import PAGE

_PAGEMAP_WP = 1 << 57  # Documentation/admin-guide/mm/pagemap.rst
_PAGEMAP_EXCLUSIVE = 1 << 56


def _pagemap(address: int) -> int:
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        [entry] = struct.unpack("=Q", pagemap.read(8))
    return int(entry)


def write_protected(address: int) -> bool:
    """Whether the page of this process carries the uffd-wp bit, or a marker that does."""
    return bool(_pagemap(address) & _PAGEMAP_WP)


def exclusive(address: int) -> bool:
    """Whether the page is mapped by this process alone."""
    return bool(_pagemap(address) & _PAGEMAP_EXCLUSIVE)
