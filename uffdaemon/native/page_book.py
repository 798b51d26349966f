"""The page book in C: the state of each page of a region, two bits a page.

A book is reference-counted: it lives as long as Python or a rule in force has it.  It is changed
here, and by C when rules resolve faults and when events are read; every change is atomic.
"""

from __future__ import annotations

import os
from typing import Any, Final

from uffdaemon.native._native import ffi, lib

_HEAD: Final = int(ffi.sizeof("struct uffdaemon_pages_storage"))


class PageBook:
    """The states of `pages` pages, all absent at first.

    `file` is the descriptor of a memory file that holds the states, so that other processes can map
    them.  It is empty, or has the states of as many pages, which are kept.  The descriptor is
    duplicated.  With ``shared``, the book makes such a file.  With `offset`, the states are in a
    part of `file`, which has `size_of` bytes for them there, and whose descriptor is not kept.
    Raises MemoryError and OSError.
    """

    __slots__ = ("_book", "buffer", "offset", "pages")

    def __init__(
        self,
        pages: int,
        *,
        file: int | None = None,
        shared: bool = False,
        pointer: Any = None,  # noqa: ANN401  # cffi's: a book to be taken over, with a reference
        offset: int = -1,
    ) -> None:
        if pointer is not None:
            book = pointer
        elif file is not None and offset >= 0:
            book = _map_part(file, offset, pages)
        elif file is not None:
            book = _map(file, pages)
        elif shared:
            book = _make_file(pages)
        else:
            book = lib.uffdaemon_pages_new(pages)
        if book == ffi.NULL:
            raise MemoryError
        self.pages: int = pages
        self.offset: int = offset
        """Where the states are in a file that holds more; -1: not in one."""
        self._book: Any = ffi.gc(book, lib.uffdaemon_pages_put)
        states = ffi.cast("char *", book.storage) + _HEAD
        self.buffer: Any = ffi.buffer(states, (pages + 3) >> 2)
        """The states, read-only: page n is in byte n // 4, from bit n % 4 * 2 on."""

    def copy(self) -> PageBook:
        """An independent copy, in storage of the same kind."""
        return PageBook(self.pages, pointer=lib.uffdaemon_pages_copy(self._book))

    def copy_into(self, book: PageBook) -> None:
        """Copy all states into a new book of as many pages."""
        lib.uffdaemon_pages_copy_into(book.pointer, self._book)

    @property
    def address(self) -> int:
        """The address of the C object."""
        return int(ffi.cast("uintptr_t", self._book))

    @property
    def pointer(self) -> Any:  # noqa: ANN401  # cffi's
        """The C object, for cffi."""
        return self._book

    def fileno(self) -> int:
        """The memory file, which the book owns; -1 if there is none."""
        return int(self._book.fd)

    def close_file(self) -> None:
        """Close the memory file and keep the states: no other process will map them."""
        lib.uffdaemon_pages_close_file(self._book)

    @property
    def any_discarded(self) -> bool:
        """Whether any page was ever discarded."""
        return bool(self._book.storage.any_discarded)

    # Pages `first` to `end`, exclusive.

    def fill(self, first: int, end: int) -> None:
        """Mark pages as present."""
        lib.uffdaemon_pages_fill(self._book, first, end)

    def empty(self, first: int, end: int) -> None:
        """Mark pages as not present; what a fault there gets stays the same."""
        lib.uffdaemon_pages_empty(self._book, first, end)

    def discard(self, first: int, end: int) -> None:
        """Mark pages as discarded by their owner."""
        lib.uffdaemon_pages_discard(self._book, first, end)

    def make_void(self, first: int, end: int) -> None:
        """Mark as discarded the pages that have never been discarded: for an event that C may have
        applied already."""
        lib.uffdaemon_pages_void(self._book, first, end)


class Snapshot:
    """The books of all regions of a userfaultfd as they were when a FORK event was read."""

    __slots__ = ("_snapshot",)

    def __init__(self, address: int) -> None:
        pointer = ffi.cast("struct uffdaemon_snapshot *", address)
        self._snapshot: Any = ffi.gc(pointer, lib.uffdaemon_snapshot_free)

    def take(self, book: PageBook) -> PageBook | None:
        """The copy of one book, once; None: it had no rules, or memory was short."""
        taken = lib.uffdaemon_snapshot_take(self._snapshot, book.pointer)
        return None if taken == ffi.NULL else PageBook(book.pages, pointer=taken)


def _map(file: int, pages: int) -> Any:  # noqa: ANN401  # cffi's
    number = ffi.new("int *")
    made = lib.uffdaemon_pages_map(file, pages, number)
    if made == ffi.NULL:
        raise OSError(int(number[0]), os.strerror(int(number[0])))
    return made


def _map_part(file: int, offset: int, pages: int) -> Any:  # noqa: ANN401  # cffi's
    number = ffi.new("int *")
    made = lib.uffdaemon_pages_map_part(file, offset, pages, number)
    if made == ffi.NULL:
        raise OSError(int(number[0]), os.strerror(int(number[0])))
    return made


def size_of(pages: int) -> int:
    """The bytes that the states of `pages` pages take in a file."""
    return int(lib.uffdaemon_pages_size(pages))


def _make_file(pages: int) -> Any:  # noqa: ANN401  # cffi's
    made = os.memfd_create("uffdaemon pages")
    try:
        return _map(made, pages)
    finally:
        os.close(made)
