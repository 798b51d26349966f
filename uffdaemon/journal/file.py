"""The memory file of a journal: a directory of areas, and parts that are handed out."""

from __future__ import annotations

import mmap
import os
import struct
from typing import Final

from uffdaemon import errors
from uffdaemon.ranges import PAGE_SIZE

_MAGIC: Final = b"uffd journal 1\0\0"
_HEAD: Final = struct.Struct("=16sQ")
_DIRECTORY: Final = 1 << 16
"""Bytes before the directory, so that pages of any size hold the head alone."""
_ENTRIES: Final = 1 << 16
_ENTRY: Final = struct.Struct("=Q")


class JournalFile:
    """A memory file that is handed out in parts, which are whole pages.

    Everything is written with pwrite(2), so that a process that is killed leaves no part of an
    entry.  One process writes at a time.  Raises OSError.
    """

    def __init__(self, fd: int | None = None) -> None:
        """Make a file, or duplicate the descriptor of one.  Raises `JournalError` and OSError."""
        if fd is None:
            self._fd = os.memfd_create("uffdaemon journal")
            os.ftruncate(self._fd, _DIRECTORY + _ENTRIES * _ENTRY.size)
            os.pwrite(self._fd, _HEAD.pack(_MAGIC, PAGE_SIZE), 0)
        else:
            head = os.pread(fd, _HEAD.size, 0)
            if head != _HEAD.pack(_MAGIC, PAGE_SIZE):
                raise errors.JournalError(f"descriptor {fd} is not a journal of this version")
            self._fd = os.dup(fd)
        self._entries = self._read_entries()

    def fileno(self) -> int:
        """The descriptor; -1 after `close`."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor.  What was mapped stays mapped."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _read_entries(self) -> dict[int, int]:
        packed = os.pread(self._fd, _ENTRIES * _ENTRY.size, _DIRECTORY)
        return {
            number: offset for number, (offset,) in enumerate(_ENTRY.iter_unpack(packed)) if offset
        }

    @property
    def areas(self) -> list[int]:
        """The offsets of all areas."""
        return list(self._entries.values())

    def enter(self, offset: int) -> None:
        """Enter an area, which has been written.  Raises `JournalError` if there are too many."""
        number = next((n for n in range(_ENTRIES) if n not in self._entries), None)
        if number is None:
            raise errors.JournalError(f"a journal has at most {_ENTRIES} userfaultfds")
        self._write_entry(number, offset)
        self._entries[number] = offset

    def strike(self, offset: int) -> None:
        """Remove the entry of an area."""
        for number in [n for n, known in self._entries.items() if known == offset]:
            self._write_entry(number, 0)
            del self._entries[number]

    def _write_entry(self, number: int, offset: int) -> None:
        self.write(_DIRECTORY + number * _ENTRY.size, _ENTRY.pack(offset))

    def allocate(self, size: int) -> int:
        """The offset of a new part of `size` bytes: zeros, which take memory once written."""
        offset = os.fstat(self._fd).st_size
        os.ftruncate(self._fd, offset + _whole_pages(size))
        return offset

    def free(self, offset: int, size: int) -> None:
        """Give the memory of a part back; its offset is not used again."""
        with mmap.mmap(self._fd, _whole_pages(size), offset=offset) as mapped:
            mapped.madvise(mmap.MADV_REMOVE)

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes."""
        return os.pread(self._fd, size, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes.  Raises OSError (ENOSPC: the memory is exhausted)."""
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written


def _whole_pages(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE
