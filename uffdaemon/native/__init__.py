"""The only way to call the C extension: integers and buffers in, integers out.

Nothing here decides anything.  If C returns ``-errno``, so does the function; the modules above
turn it into an error that names the request.  The GIL is released around every call.  Imports
nothing of this library.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any, Final, TypeVar

from uffdaemon.native._native import ffi, lib

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from typing_extensions import Buffer

MESSAGE_SIZE: Final = 32
"""Bytes in one ``struct uffd_msg``."""

OPERATION: Final = struct.Struct("=IIQQQQQQQ")
"""``struct uffdaemon_operation``: code, error, dst, src, length, mode, page_size, done, present."""

OPERATION_RESULT: Final = struct.Struct("=I40xQQ")
"""The result of an operation, at ``OPERATION_RESULT_OFFSET``: error, done, present."""
OPERATION_RESULT_OFFSET: Final = 4

NOTHING: Final = -errno.EAGAIN
"""What `MessageArray.read` returns if no message is pending."""

MAP_SHARED: Final = 1
MAP_HUGETLB: Final = 2


_T = TypeVar("_T")


def take_spare(spares: list[_T], make: Callable[[], _T]) -> _T:
    """A spare object, or a new one.  Return it with ``append``.

    Pops without checking first: another thread may take the last one in between.
    """
    try:
        return spares.pop()
    except IndexError:
        return make()


class OperationArray:
    """Room for `capacity` operations that C and ``OPERATION`` share.

    ``buffer`` is packed before and unpacked after ``execute``.  Not to be shared by threads.
    """

    __slots__ = ("_execute", "buffer", "capacity", "pointer")

    def __init__(self, capacity: int) -> None:
        self.capacity: int = capacity
        self.buffer: bytearray = bytearray(OPERATION.size * capacity)
        self.pointer: Any = ffi.from_buffer("struct uffdaemon_operation[]", self.buffer)
        self._execute: Callable[[int, Any, int], None] = lib.uffdaemon_execute

    def execute(self, fd: int, count: int) -> None:
        """Carry out the first `count` operations on the userfaultfd `fd`."""
        self._execute(fd, self.pointer, count)


class MessageArray:
    """Room for `capacity` messages, read from a userfaultfd."""

    __slots__ = ("_pointer", "_read", "buffer", "size")

    def __init__(self, capacity: int) -> None:
        self.size: int = MESSAGE_SIZE * capacity
        self.buffer: bytearray = bytearray(self.size)
        self._pointer: Any = ffi.from_buffer(self.buffer)
        self._read: Callable[[int, Any, int, int], int] = lib.uffdaemon_read

    def read(self, fd: int, rereads: int) -> int:
        """Return the bytes read (0: end of file), or ``-errno``; ``-EAGAIN`` when none came.

        While nothing is pending, the processor is yielded and the read repeated `rereads` times.
        """
        return self._read(fd, self._pointer, self.size, rereads)


class PinnedBuffer:
    """Keeps a bytes-like object in place and knows its address (bytes)."""

    __slots__ = ("_keep", "address", "length")

    def __init__(self, data: Buffer, *, writable: bool = False) -> None:
        self._keep: Any = ffi.from_buffer(data, require_writable=writable)
        self.address: int = int(ffi.cast("uintptr_t", self._keep))
        self.length: int = len(self._keep)

    def release(self) -> None:
        """Release the object; the address must not be used any more."""
        ffi.release(self._keep)


STAGE_PROTECT, STAGE_COPY, STAGE_RELEASE, STAGE_UNPROTECT = 1, 2, 3, 4
"""The stage at which `copy_and_release` stopped."""


_NUMBERS: Final = ffi.typeof("uint64_t[]")
OUTSIDE: Final = (1 << 64) - 1
"""What `move_many` returns if a source lies outside `sources`."""
UNALIGNED: Final = OUTSIDE - 1
"""What it returns if a triple is empty, or not whole pages."""


_COUNTS: Final = 1024
_counts: Final[list[Any]] = []
"""Arrays that are not in use, by their length."""


def move_many(
    fd: int, moves: array[int], mode: int, sources: tuple[int, int]
) -> tuple[int, list[int]]:
    """MOVE triples of 64-bit (dst, src, length).

    Returns how many bytes were not moved, and if any, how many bytes of each triple were.  Instead
    of that number it returns `OUTSIDE` if not all sources lie between the addresses of `sources`,
    or `UNALIGNED`; nothing has been moved then.
    """
    count = len(moves) // 3
    few = count <= _COUNTS
    counts = take_spare(_counts, _room_for_counts) if few else ffi.new(_NUMBERS, count)
    triples = ffi.from_buffer(_NUMBERS, moves)
    left: int = lib.uffdaemon_move_many(fd, triples, counts, count, mode, *sources)
    done: list[int] = [] if left in (0, OUTSIDE, UNALIGNED) else ffi.unpack(counts, count)
    if few:
        _counts.append(counts)
    return left, done


def _room_for_counts() -> Any:  # noqa: ANN401  # cffi's
    return ffi.new(_NUMBERS, _COUNTS)


def move(fd: int, dst: int, src: int, length: int, mode: int) -> int:
    """MOVE one range; returns how many bytes were moved."""
    done: int = lib.uffdaemon_move(fd, dst, src, length, mode)
    return done


EXACT, OTHER_PROCESS, SHARED = 1, 2, 4


def copy_and_release(
    fds: tuple[int, int], dst: int, src: int, length: int, *, flags: int, advice: int
) -> tuple[int, int, int]:
    """`fds` are the userfaultfds of the destination and of the source.  Return (bytes copied and
    released, errno that stopped it or 0, ``STAGE_*`` where)."""
    copy = ffi.new("struct uffdaemon_copy *", [dst, src, length, flags, advice])
    lib.uffdaemon_copy_and_release(*fds, copy)
    return int(copy.done), int(copy.error), int(copy.stage)


def view_memory(start: int, length: int) -> memoryview:
    """A writable view of plain memory of this process; it must not outlive the mapping."""
    return memoryview(ffi.buffer(ffi.cast("char *", start), length))


def export_memory(start: int, length: int, returned: Callable[[], None]) -> memoryview:
    """Like `view_memory`; `returned` is called when the last view is gone."""

    def gone(_: object) -> None:
        returned()

    pointer = ffi.gc(ffi.cast("char *", start), gone)
    return memoryview(ffi.buffer(pointer, length))


def open_syscall(*, user_mode_only: bool) -> int:
    return int(lib.uffdaemon_open_syscall(user_mode_only))


def open_device(*, user_mode_only: bool) -> int:
    return int(lib.uffdaemon_open_device(user_mode_only))


def handshake(fd: int, features: int) -> tuple[int, int, int]:
    """Return (0 or -errno, features the kernel has, ioctls)."""
    both = ffi.new("uint64_t[2]", [features, 0])
    result = lib.uffdaemon_handshake(fd, both, both + 1)
    return int(result), int(both[0]), int(both[1])


def register(fd: int, start: int, length: int, mode: int) -> tuple[int, int]:
    """Return (0 or -errno, ioctls that the range supports)."""
    ioctls = ffi.new("uint64_t *")
    result = lib.uffdaemon_register(fd, start, length, mode, ioctls)
    return int(result), int(ioctls[0])


def unregister(fd: int, start: int, length: int) -> int:
    return int(lib.uffdaemon_unregister(fd, start, length))


def pidfd_open(pid: int) -> int:
    return int(lib.uffdaemon_pidfd_open(pid))


def pidfd_getfd(pidfd: int, target: int) -> int:
    return int(lib.uffdaemon_pidfd_getfd(pidfd, target))


def memfd_create(name: str, huge_page_size: int) -> int:
    return int(lib.uffdaemon_memfd_create(name.encode(), huge_page_size))


def map_memory(fd: int, length: int, kind: int, alignment: int) -> tuple[int, int]:
    """Return (0 or -errno, start)."""
    start = ffi.new("uint64_t *")
    result = lib.uffdaemon_map(fd, length, kind, alignment, start)
    return int(result), int(start[0])


def unmap_memory(start: int, length: int) -> int:
    return int(lib.uffdaemon_unmap(start, length))


def protect_memory(start: int, length: int) -> int:
    """mprotect(2) with PROT_NONE; no event is sent."""
    return int(lib.uffdaemon_protect(start, length))


def remap_memory(start: int, length: int, target: int) -> int:
    return int(lib.uffdaemon_remap(start, length, target))


def in_memory(start: int, pages: int, page_size: int) -> bytes:
    """mincore(2): a byte for each page, odd where it is in memory, mapped or not; b"" if the range
    is not mapped."""
    vector = bytearray(pages)
    buffer = ffi.from_buffer("unsigned char[]", vector)
    return b"" if lib.uffdaemon_mincore(start, pages * page_size, buffer) else bytes(vector)


def advise(start: int, length: int, advice: int) -> int:
    return int(lib.uffdaemon_advise(start, length, advice))


def touch(start: int, length: int, step: int, *, write: bool) -> None:
    lib.uffdaemon_touch(start, length, step, write)


def read_memory(start: int, length: int) -> bytes:
    """Copy `length` bytes at `start` out of this process's memory, without the GIL."""
    copied = bytearray(length)
    lib.uffdaemon_copy_memory(ffi.from_buffer(copied), ffi.cast("void *", start), length)
    return bytes(copied)


def read_memory_into(start: int, buffer: Buffer) -> None:
    """Copy as many bytes as `buffer` holds, out of this process's memory, without the GIL."""
    copied = ffi.from_buffer(buffer, require_writable=True)
    lib.uffdaemon_copy_memory(copied, ffi.cast("void *", start), len(copied))


def write_memory(start: int, data: Buffer) -> None:
    """Copy `data` to `start` in this process's memory, without the GIL."""
    source = ffi.from_buffer(data)
    lib.uffdaemon_copy_memory(ffi.cast("void *", start), source, len(source))


def scan(
    pagemap: int,
    start: int,
    end: int,
    *,
    flags: int,
    inverted: int,
    mask: int,
    anyof: int,
    returned: int,
    capacity: int,
) -> tuple[int, int, list[tuple[int, int, int]]]:
    """PAGEMAP_SCAN once: (0 or -errno, where it ended, [(start, end, categories)])."""
    vector = ffi.new("struct page_region[]", capacity)
    argument = ffi.new("struct pm_scan_arg *")
    argument.size = ffi.sizeof("struct pm_scan_arg")
    argument.flags = flags
    argument.start = start
    argument.end = end
    argument.vec = int(ffi.cast("uintptr_t", vector))
    argument.vec_len = capacity
    argument.category_inverted = inverted
    argument.category_mask = mask
    argument.category_anyof_mask = anyof
    argument.return_mask = returned
    count = int(lib.uffdaemon_scan(pagemap, argument))
    if count < 0:
        return count, start, []
    found = [
        (int(vector[i].start), int(vector[i].end), int(vector[i].categories)) for i in range(count)
    ]
    return 0, int(argument.walk_end), found
