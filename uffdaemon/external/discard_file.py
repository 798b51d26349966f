"""The memory file in which the discarded pages of a region are noted, for worker after worker."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uffdaemon.model.page_map import PageMap


def share(pages: PageMap, fd: int) -> None:
    """Have the discarded pages noted in a memory file, and those that are in it already."""
    pages.removed.buffer = mmap.mmap(fd, os.fstat(fd).st_size)
    pages.any_removed = _has_data(fd)


def file_size(pages: int) -> int:
    """Bytes of that file: never none, since it has to be mapped."""
    return pages // 8 + 1


def _has_data(fd: int) -> bool:
    """Whether anything was ever written to a memory file."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    return True
