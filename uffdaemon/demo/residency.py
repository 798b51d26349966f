"""How much of a file is in the page cache, and how much of this process's memory is in RAM."""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import c_char, c_int, c_size_t, c_ubyte, c_void_p
from typing import TYPE_CHECKING, Final

from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["cached_pages", "drop_from_cache", "present_pages"]

_WINDOW: Final = 1 << 30  # bytes of a file that one mincore() covers
_ENTRY: Final = 8  # bytes of /proc/PID/pagemap for one page
_PRESENT: Final = 0x80  # bit 63, in the entry's last byte
_BIT_0: Final = bytes(byte & 1 for byte in range(256))
_BIT_7: Final = bytes(byte >> 7 for byte in range(256))


def drop_from_cache(path: Path) -> None:
    """Drop the file's pages from the page cache: fsync(2), then posix_fadvise(2) DONTNEED.

    Pages that are dirty or mapped stay, and so do those of a tmpfs: check with `cached_pages`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_pages(path: Path) -> int:
    """The number of the file's pages that are in the page cache, by mincore(2) on a mapping."""
    library = ctypes.CDLL(None, use_errno=True)
    mincore = library.mincore
    mincore.argtypes = [c_void_p, c_size_t, c_void_p]
    mincore.restype = c_int
    size = path.stat().st_size
    cached = 0
    with path.open("rb") as file:
        for offset in range(0, size, _WINDOW):
            length = min(_WINDOW, size - offset)
            # ctypes needs a writable buffer, hence a private mapping.  It is never touched:
            # mincore() looks at the page cache behind it.
            with mmap.mmap(file.fileno(), length, flags=mmap.MAP_PRIVATE, offset=offset) as mapping:
                found = (c_ubyte * -(-length // PAGE_SIZE))()
                first = c_char.from_buffer(mapping)
                status = int(mincore(ctypes.addressof(first), length, found))
                del first  # the mapping cannot be closed while it is exported
                if status != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number), str(path))
                cached += bytes(found).translate(_BIT_0).count(1)
    return cached


def present_pages(start: int, length: int) -> int:
    """The number of pages of this range that are in RAM, by /proc/self/pagemap (proc(5))."""
    count = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        end = (start + length) // PAGE_SIZE * _ENTRY
        position = start // PAGE_SIZE * _ENTRY
        while position < end:
            entries = os.pread(pagemap.fileno(), min(end - position, 1 << 20), position)
            if not entries:
                break
            count += entries[_ENTRY - 1 :: _ENTRY].translate(_BIT_7).count(1)
            position += len(entries)
    return count
