"""Memory of this process: the five types, advice about it, and access that cannot hang Python.

A Python thread that touches a missing page while it holds the GIL stops the interpreter that might
resolve its fault.  `read`, `write` and `touch` release the GIL and block only the calling thread.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from enum import Enum, IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from uffdaemon import errors, native
from uffdaemon.arguments import check_type
from uffdaemon.kernel.own_memory import disown, own
from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

    from uffdaemon.kernel.userfaultfd import Userfaultfd


class MemoryType(Enum):
    """The type of memory behind a mapping; userfaultfd treats each a little differently."""

    ANONYMOUS = "anon"
    SHMEM = "shmem"
    SHMEM_PRIVATE = "shmem-private"
    HUGETLB = "hugetlb"
    HUGETLB_PRIVATE = "hugetlb-private"

    @property
    def huge(self) -> bool:
        """Whether it is made of hugetlb pages."""
        return self in (MemoryType.HUGETLB, MemoryType.HUGETLB_PRIVATE)

    @property
    def shared(self) -> bool:
        """Whether a second mapping shows the same pages."""
        return self in (MemoryType.SHMEM, MemoryType.HUGETLB)


class Advice(IntEnum):
    """``MADV_*`` of ``include/uapi/asm-generic/mman-common.h``; see madvise(2)."""

    DONTNEED = 4
    REMOVE = 9
    DONTFORK = 10
    DOFORK = 11
    MERGEABLE = 12
    UNMERGEABLE = 13
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    POPULATE_READ = 22
    POPULATE_WRITE = 23
    DONTNEED_LOCKED = 24
    COLLAPSE = 25


_left_lock = threading.Lock()
_left: list[Memory] = []
"""Memory that an error left mapped because buffers of it were alive."""


class Present(Protocol):
    """The pages that are known to be present."""

    def next_absent(self, page: int, end: int) -> int | None:
        """The first page from `page` up to `end` that is not present."""
        ...


class Pages(Protocol):
    """What `Memory` needs to know about the pages of a guarded region."""

    @property
    def present(self) -> Present:
        """The pages that are present."""
        ...


class Memory:
    """A mapping of `length` bytes at `start`, unmapped by `close`.

    Addresses, offsets and lengths are in bytes.

    The end of a ``with`` block closes it.  Where an error ends the block while a buffer is alive,
    the error propagates, and the memory stays mapped until it is closed, or until other memory is
    mapped after the buffer has been released.
    """

    def __init__(self, start: int, length: int, kind: MemoryType, page_size: int, fd: int) -> None:
        self.start: int = start
        self.length = length
        own(start, start + length)
        self.type = kind
        self.page_size = page_size
        """Bytes; the unit of faults, registration and advice."""
        self.fd: int = fd
        """The memory file behind it, -1 for anonymous memory."""
        self._exports = 0
        self.kept_from_children = False
        """Whether children do not inherit it (MADV_DONTFORK): nothing would serve it there."""
        self.resumable = False
        """Whether a daemon guarded it until that daemon ended: its pages are those of a policy."""
        self._thread = 0
        self._guarded: Pages | None = None
        self.userfaultfd: Userfaultfd | None = None
        """A userfaultfd that guards this memory; `close` closes it, once no access is possible."""

    def __repr__(self) -> str:
        return f"<Memory {self.type.value} {self.start:#x}, {self.length} bytes>"

    @classmethod
    def map(
        cls,
        length: int,
        kind: MemoryType = MemoryType.ANONYMOUS,
        *,
        transparent_huge: bool = False,
        dont_fork: bool = False,
        huge_page_size: int = HUGE_PAGE_SIZE,
    ) -> Self:
        """Map `length` bytes (a multiple of the page size) of new, empty memory.

        `transparent_huge` asks for huge pages, and aligns to one; `dont_fork` keeps children from
        sharing it, so that its pages can always be moved.  `huge_page_size` (bytes) is that of
        hugetlb memory, by default 2 MiB where pages have 4 KiB.  Raises `InvalidRange` and
        `MemoryRefused` (ENOMEM for hugetlb: none are reserved).
        """
        check_type("length", length, int)
        check_type("kind", kind, MemoryType, "such as MemoryType.SHMEM")
        _close_left()
        page_size = huge_page_size if kind.huge else PAGE_SIZE
        if length <= 0 or length % page_size:
            raise errors.InvalidRange(
                f"{length} bytes is not a positive multiple of the page size, {page_size} bytes"
            )
        fd = -1
        if kind is not MemoryType.ANONYMOUS:
            fd = native.memfd_create("uffdaemon", page_size if kind.huge else 0)
            if fd < 0:
                raise errors.MemoryRefused(-fd, "memfd_create", length=length)
        try:
            if fd >= 0:
                os.ftruncate(fd, length)
            memory = cls(
                _map(fd, length, kind, page_size, transparent_huge=transparent_huge),
                length,
                kind,
                page_size,
                fd,
            )
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        try:
            if transparent_huge:
                memory.advise(Advice.HUGEPAGE)
            if dont_fork:
                memory.advise(Advice.DONTFORK)
        except BaseException:
            memory.close()
            raise
        return memory

    def alias(self) -> Memory:
        """Map the same memory file once more: a way to fill the page cache of guarded memory.

        It makes no transparent huge page, whose other 511 pages would be zeros; pwrite(2) may.
        Raises `InvalidRange` for memory that is not shared, `MemoryRefused`, and OSError.
        """
        if not self.type.shared:
            raise errors.InvalidRange(f"{self.type.value} memory cannot be mapped twice")
        fd = os.dup(self.fd)
        try:
            start = _map(fd, self.length, self.type, self.page_size, transparent_huge=False)
        except BaseException:
            os.close(fd)
            raise
        made = Memory(start, self.length, self.type, self.page_size, fd)
        with suppress(errors.MemoryRefused):  # EINVAL: this kernel has no huge pages
            made.advise(Advice.NOHUGEPAGE)
        return made

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.start + self.length

    def _range(self, offset: int, length: int | None) -> tuple[int, int]:
        if self.start == 0:
            raise errors.InvalidRange("this memory has been unmapped")
        length = self.length - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > self.length:
            raise errors.InvalidRange(
                f"{length} bytes at offset {offset} of memory of {self.length} bytes"
            )
        return self.start + offset, length

    def refuse_in_thread(self, thread: int, pages: Pages) -> None:
        """Refuse accesses to missing pages in the thread that has to resolve their faults."""
        self._thread, self._guarded = thread, pages

    def allow_in_thread(self) -> None:
        """No thread of this process resolves its faults any more."""
        self._guarded = None

    def _access(self, offset: int, length: int | None) -> tuple[int, int]:
        """The range to access.  Raises `PlacementRefused` where this thread would wait for
        itself."""
        start, length = self._range(offset, length)
        if self._guarded is not None and threading.get_ident() == self._thread and length:
            first, end = offset // self.page_size, (offset + length - 1) // self.page_size + 1
            if self._guarded.present.next_absent(first, end) is not None:
                raise errors.PlacementRefused(
                    "pages are missing there, and this thread runs trio, which resolves their "
                    "faults: it would wait forever.  Use a worker thread: "
                    "await trio.to_thread.run_sync(...)"
                )
        return start, length

    def export(self, offset: int = 0, length: int | None = None) -> memoryview:
        """A writable view of the memory itself, for plain Python accesses.

        As long as it, or anything made from it, is alive, the memory stays where it is: `close`,
        `unmap` and `remap` raise BufferError.  `GuardedRegion.buffer` refuses where it is not safe.
        Raises `InvalidRange`.
        """
        start, length = self._range(offset, length)
        self._exports += 1
        return native.export_memory(start, length, self._returned)

    @property
    def exported(self) -> bool:
        """Whether a view of it is alive."""
        return self._exports > 0

    def _returned(self) -> None:
        self._exports -= 1

    def _check_exports(self, what: str) -> None:
        if self._exports:
            raise BufferError(
                f"{self!r} cannot be {what}: {self._exports} buffers of it are alive; delete them, "
                "and arrays made from them, first"
            )

    def read(self, offset: int, length: int) -> bytes:
        """Copy bytes out.  Blocks this thread, and no other, while pages are missing.

        Raises `InvalidRange`, and `PlacementRefused` in a thread that would wait for itself.
        """
        return native.read_memory(*self._access(offset, length))

    def read_into(self, offset: int, buffer: Buffer) -> int:
        """Copy bytes out into a writable buffer, as many as it holds; returns how many.

        Blocks, and raises, like `read`.
        """
        with memoryview(buffer) as view:
            start, length = self._access(offset, view.nbytes)
            native.read_memory_into(start, view)
        return length

    def write(self, offset: int, data: Buffer) -> None:
        """Copy bytes in.  Blocks, and raises, like `read`."""
        with memoryview(data) as view:
            start, _ = self._access(offset, view.nbytes)
            native.write_memory(start, view)

    def touch(self, offset: int = 0, length: int | None = None, *, write: bool = False) -> None:
        """Access one byte a page, for reading or (changing nothing) for writing.

        Blocks, and raises, like `read`.
        """
        start, length = self._access(offset, length)
        native.touch(start, length, self.page_size, write=write)

    def advise(self, advice: Advice, offset: int = 0, length: int | None = None) -> None:
        """madvise(2).  Blocks until the handler has read the event, where events are on.

        Raises `InvalidRange`, and `MemoryRefused`: EINVAL where the kernel or the memory's type has
        no such advice.
        """
        start, length = self._range(offset, length)
        number = native.advise(start, length, advice)
        if number < 0:
            raise errors.MemoryRefused(
                -number, f"madvise {advice.name}", address=start, length=length
            )

    def remap(self) -> None:
        """mremap(2) to another address of the same length; `start` changes.

        Raises BufferError while it is exported, `InvalidRange` and `MemoryRefused`.
        """
        self._check_exports("moved")
        old, length = self._range(0, None)
        disown(old, old + length)
        number, target = native.map_memory(-1, length, 0, self.page_size)
        if number == 0:
            number = native.remap_memory(old, length, target)
            if number < 0:
                native.unmap_memory(target, length)
        if number < 0:
            own(old, old + length)
            raise errors.MemoryRefused(-number, "mremap", address=old, length=length)
        own(target, target + length)
        self.start = target

    def unmap(self, offset: int, length: int) -> None:
        """munmap(2) a part; what is left can be used as before.  Raises what `remap` raises."""
        self._check_exports("unmapped")
        start, length = self._range(offset, length)
        disown(start, start + length)
        number = native.unmap_memory(start, length)
        if number < 0:
            own(start, start + length)
            raise errors.MemoryRefused(-number, "munmap", address=start, length=length)

    def close(self) -> None:
        """Unmap, then close the memory file and the userfaultfd that guarded it.  Threads that
        still use the memory get SIGSEGV.  Raises BufferError while it is exported."""
        self._check_exports("closed")
        if self.start:
            start, self.start = self.start, 0
            parts = disown(start, start + self.length)
            # With EVENT_UNMAP, munmap would wait until its event is read, and possibly nothing
            # reads it.  Without access nothing can be seen between closing and unmapping.
            for first, end in parts:
                native.protect_memory(first, end - first)
            if self.userfaultfd is not None:
                self.userfaultfd.guards = None
                self.userfaultfd.close()
            for first, end in parts:
                native.unmap_memory(first, end - first)
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not self.exported:
            self.close()
            return
        # The traceback still holds the arrays: do not replace the exception.
        error.add_note(f"{self!r} stays mapped: {self._exports} buffers of it are alive")
        with _left_lock:
            _left.append(self)


def _close_left() -> None:
    """Close memory that an error left mapped and that nothing uses any more."""
    with _left_lock:
        unused = [memory for memory in _left if not memory.exported]
        for memory in unused:
            _left.remove(memory)
    for memory in unused:
        memory.close()


def _map(fd: int, length: int, kind: MemoryType, page_size: int, *, transparent_huge: bool) -> int:
    flags = (native.MAP_SHARED if kind.shared else 0) | (native.MAP_HUGETLB if kind.huge else 0)
    alignment = HUGE_PAGE_SIZE if transparent_huge else page_size
    number, start = native.map_memory(fd, length, flags, alignment)
    if number < 0:
        advice = ""
        if kind.huge and -number == errno.ENOMEM:
            advice = _huge_page_advice(length // page_size, page_size)
        raise errors.MemoryRefused(-number, f"mmap {kind.value}", length=length, advice=advice)
    return start


def _huge_page_advice(wanted: int, page_size: int) -> str:
    """The command that reserves the huge pages that are lacking; it never shrinks the pool."""
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size // 1024}kB")
    try:
        total = int((pool / "nr_hugepages").read_text("ascii"))
        free = int((pool / "free_hugepages").read_text("ascii"))
    except (OSError, ValueError):
        return ""
    return f"as root: echo {total + max(wanted - free, 1)} > {pool}/nr_hugepages"
