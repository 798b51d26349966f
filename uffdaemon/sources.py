"""Sources of page contents: bytes in memory, a file, an async callable.

A source in memory (bytes, a mapped file) is copied from in place.  A source that has to be fetched
is read in a task, and only the faults that need it wait.
"""

from __future__ import annotations

import mmap
import os
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import trio

from uffdaemon import native
from uffdaemon.arguments import check_callable, check_count
from uffdaemon.errors import SourceTooShort
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

Fetch: TypeAlias = "Callable[[int, int], Awaitable[Buffer]]"
"""Takes (offset, length) in bytes and returns exactly `length` bytes."""


def _check(name: str, offset: int, length: int, size: int) -> None:
    if offset < 0 or offset + length > size:
        raise SourceTooShort(f"{name} has {size} bytes; {length} at {offset:#x} were asked for")


class BytesSource:
    """A bytes-like object, used in place.  A bytearray cannot be resized while a source uses it.

    Raises TypeError for anything else, and BufferError if it is not contiguous.
    """

    def __init__(self, data: Buffer) -> None:
        self._pinned = native.PinnedBuffer(data)
        self.size: int = self._pinned.length

    def __repr__(self) -> str:
        return f"BytesSource({self.size} bytes)"

    def address(self, offset: int, length: int) -> int | None:
        """The address of the bytes at `offset`.  Raises `SourceTooShort`."""
        if offset < 0 or offset + length > self.size:
            _check(repr(self), offset, length, self.size)
        return self._pinned.address + offset

    async def fetch(self, offset: int, length: int) -> Buffer:
        """Never called, because `address` never returns None."""
        raise NotImplementedError


_users_lock = threading.Lock()


@lru_cache
def zeros(page_size: int) -> BytesSource:
    """One page of zeros (`page_size` bytes), for memory that has no zero page: hugetlb."""
    return BytesSource(mmap.mmap(-1, page_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class FileSource:
    """A file, from byte `offset` on, `length` bytes long (by default to the file's end).

    ``how="map"`` maps the file: the fastest if it is in the page cache, but a page that is not
    there makes the thread that resolves faults wait for the disk.  ``how="read"`` uses pread(2) in
    worker threads, a few at a time.  If the file shrinks later, faults in the lost part fail; they
    never read as zeros.

    A last page that the file fills in part only is an error, unless ``zero_tail=True``: then zeros
    follow, as with mmap(2).  Raises OSError if the file cannot be opened or mapped,
    `SourceTooShort` if it is shorter than `offset` and `length` say, and ValueError if `offset` is
    not a multiple of the page size.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        how: Literal["map", "read"] = "map",
        offset: int = 0,
        length: int | None = None,
        zero_tail: bool = False,
    ) -> None:
        if how not in ("map", "read"):
            raise ValueError(f"how is 'map' or 'read', not {how!r}")
        self.path: str = os.fspath(path)
        self.how = how
        self._offset = offset
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._map: mmap.mmap | None = None
        self._pinned: native.PinnedBuffer | None = None
        self._users = 0
        """Daemons that have its address in a rule, and reads that are under way."""
        try:
            in_file = os.fstat(self._fd).st_size - offset
            used = in_file if length is None else length
            _check(repr(self), offset, used, max(in_file + offset, 0))
            if offset % mmap.ALLOCATIONGRANULARITY:
                raise ValueError(
                    f"offset {offset} is not a multiple of {mmap.ALLOCATIONGRANULARITY}"
                )
            self._data_size = used
            tail = -used % PAGE_SIZE if zero_tail else 0
            self.size: int = used + tail
            if how == "map" and used:
                self._map = mmap.mmap(self._fd, used, prot=mmap.PROT_READ, offset=offset)
                self._pinned = native.PinnedBuffer(self._map)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"FileSource({self.path!r})"

    def address(self, offset: int, length: int) -> int | None:
        """The address of the mapped bytes; None with ``how="read"``.  Raises `SourceTooShort`."""
        if self._fd < 0:
            raise ValueError(f"{self!r} has been closed")
        if offset < 0 or offset + length > self.size:
            _check(repr(self), offset, length, self.size)
        # The bytes after the end in a mapping's last page are zeros: mmap(2).
        return None if self._pinned is None else self._pinned.address + offset

    def acquire(self) -> None:
        """Somebody uses its address, or its descriptor; it cannot be closed."""
        with _users_lock:
            self._users += 1

    def release(self) -> None:
        """Undo `acquire`."""
        with _users_lock:
            self._users -= 1

    async def fetch(self, offset: int, length: int) -> Buffer:
        """Read in a worker thread.  Raises `SourceTooShort` and OSError."""
        if self._fd < 0:
            raise ValueError(f"{self!r} has been closed")
        self.acquire()
        return await trio.to_thread.run_sync(self._read, offset, length, abandon_on_cancel=True)

    def _read(self, offset: int, length: int) -> Buffer:
        try:
            return self._read_all(offset, length)
        finally:
            self.release()

    def _read_all(self, offset: int, length: int) -> Buffer:
        data = bytearray(length)
        wanted = min(length, self._data_size - offset)
        at = 0
        with memoryview(data) as view:
            while at < wanted:
                with view[at:wanted] as rest:
                    count = os.preadv(self._fd, [rest], self._offset + offset + at)
                if count == 0:
                    raise SourceTooShort(f"{self!r} ended at {offset + at:#x} of {self.size:#x}")
                at += count
        return data

    def close(self) -> None:
        """Unmap and close the file.

        Raises BufferError while a daemon serves a region from it, which would then be filled with
        whatever is mapped there next: remove the region, or end the daemon, first.
        """
        if self._users:
            raise BufferError(f"{self!r} cannot be closed: a daemon serves a region from it")
        if self._pinned is not None:
            self._pinned.release()
            self._pinned = None
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._users:
            error.add_note(f"{self!r} stays open: a daemon serves a region from it")
        else:
            self.close()


class AsyncSource:
    """A coroutine function ``fetch(offset, length)`` that returns exactly `length` bytes.

    `size` is the source's length in bytes.  Faults on the same extent share one call.  If `fetch`
    raises, it is called again as the region's `Retry` says; then the faults fail with
    `SourceFailed`.  Raises TypeError, and ValueError for a negative size.
    """

    def __init__(self, fetch: Fetch, size: int) -> None:
        check_callable("fetch", fetch, "an offset and a length")
        check_count("size", size)
        self._fetch = fetch
        self.size = size

    def __repr__(self) -> str:
        return f"AsyncSource({getattr(self._fetch, '__qualname__', self._fetch)})"

    def address(self, offset: int, length: int) -> int | None:
        """None: the bytes have to be fetched.  Raises `SourceTooShort`."""
        _check(repr(self), offset, length, self.size)
        return None

    async def fetch(self, offset: int, length: int) -> Buffer:
        """The bytes that `fetch` returns.  Raises what it raises."""
        return await self._fetch(offset, length)
