"""How much of a file is in the page cache, and of a process's memory in RAM."""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import c_char, c_int, c_size_t, c_ubyte, c_void_p
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["cached_pages", "drop_from_cache", "present_pages"]

_PAGE: Final = mmap.PAGESIZE
_WINDOW: Final = 1 << 30  # bytes of a file looked at, at a time
_ENTRY: Final = 8  # bytes of /proc/PID/pagemap for one page
_PRESENT: Final = 0x80  # bit 63, seen in an entry's last byte
_BIT_0: Final = bytes(byte & 1 for byte in range(256))
_BIT_7: Final = bytes(byte >> 7 for byte in range(256))


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget the file's pages: fsync(2), then posix_fadvise(2) DONTNEED.

    Pages that are dirty or mapped stay, and so do those of a tmpfs: ask `cached_pages` after it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_pages(path: Path) -> int:
    """How many pages of the file are in the page cache, by mincore(2) on a mapping of it."""
    library = ctypes.CDLL(None, use_errno=True)
    mincore = library.mincore
    mincore.argtypes = [c_void_p, c_size_t, c_void_p]
    mincore.restype = c_int
    size = path.stat().st_size
    cached = 0
    with path.open("rb") as file:
        for offset in range(0, size, _WINDOW):
            length = min(_WINDOW, size - offset)
            # Private and writable, because ctypes takes no address of a read-only buffer.
            # Nothing is read through the mapping: mincore asks the page cache behind it.
            with mmap.mmap(file.fileno(), length, flags=mmap.MAP_PRIVATE, offset=offset) as mapping:
                found = (c_ubyte * -(-length // _PAGE))()
                first = c_char.from_buffer(mapping)
                status = int(mincore(ctypes.addressof(first), length, found))
                del first  # or the mapping could not be closed
                if status != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number), str(path))
                cached += bytes(found).translate(_BIT_0).count(1)
    return cached


def present_pages(start: int, length: int) -> int:
    """How many pages of this process's own memory are in RAM, by /proc/self/pagemap (proc(5))."""
    count = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        end = (start + length) // _PAGE * _ENTRY
        position = start // _PAGE * _ENTRY
        while position < end:
            entries = os.pread(pagemap.fileno(), min(end - position, 1 << 20), position)
            if not entries:
                break
            count += entries[_ENTRY - 1 :: _ENTRY].translate(_BIT_7).count(1)
            position += len(entries)
    return count
