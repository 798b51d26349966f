"""What stands in the way of moves, forced: sharing, merging, pins, swapping, locks, guards."""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from typing import TYPE_CHECKING, Final, Self

import pytest

from tests.support.calls import Barrier, Call, in_child, in_thread
from tests.support.page_contents import PAGE
from tests.support.requirements import unavailable
from uffdaemon import Advice, Memory
from uffdaemon.kernel.page_probe import look
from uffdaemon.lowlevel import Features, PageCategory, RegisterMode, scan_pages

if TYPE_CHECKING:
    from types import TracebackType

PROTECTED: Final = (
    Features.MOVE
    | Features.PAGEFAULT_FLAG_WP
    | Features.WP_HUGETLBFS_SHMEM
    | Features.WP_UNPOPULATED
    | Features.POISON
)
BOTH_MODES: Final = RegisterMode.MISSING | RegisterMode.WP
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A function of the C library that must not fail."""
    sized = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(getattr(_LIBC, name)(*sized))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


class Sharer:
    """A child that shares `memory` until it is asked what it sees there, and then ends."""

    def __init__(self, memory: Memory) -> None:
        self._asked = Barrier()
        self._child = in_child(self._run, memory)

    def _run(self, memory: Memory) -> bytes:
        self._asked.wait()
        return memory.read(0, memory.length)

    def sees(self) -> bytes:
        self._asked.cross()
        return self._child.result()


class Pins:
    """Pages that are pinned for I/O, as registered buffers of an io_uring."""

    _SETUP, _REGISTER = 425, 427
    _BUFFERS, _NO_BUFFERS = 0, 1

    def __init__(self, *addresses: int) -> None:
        self._ring = -1
        if not addresses:
            return
        try:
            self._ring = call("syscall", self._SETUP, 1, ctypes.create_string_buffer(120))
        except OSError as refused:
            pytest.skip(f"no io_uring here: {refused.strerror}")
        buffers = b"".join(struct.pack("=QQ", start, PAGE) for start in addresses)
        call("syscall", self._REGISTER, self._ring, self._BUFFERS, buffers, len(addresses))

    def end(self) -> None:
        """Let go of the pages; again is nothing."""
        if self._ring >= 0:
            # Closing alone would let go of them some time later.
            call("syscall", self._REGISTER, self._ring, self._NO_BUFFERS, None, 0)
            os.close(self._ring)
            self._ring = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()


class DirectRead:
    """An O_DIRECT read into the page at `start` that is under way until `end`: its file is one of
    FUSE, for which a child answers that far and no further.

    The child would share the page: `make_own` is called for the source, which nobody shares then.
    """

    _INIT, _OPEN, _READ, _FORGET = 26, 14, 15, 2  # linux/fuse.h
    _NEWNS, _REC_PRIVATE, _DETACH = 0x20000, 0x44000, 2

    def __init__(self, source: Memory, start: int, data: bytes) -> None:
        self._mounted, self._asked, self._go = Barrier(), Barrier(), Barrier()
        try:
            self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            call("unshare", self._NEWNS)  # nobody else is to see the mount
        except PermissionError as refused:
            unavailable(f"no mount: {refused}", "mounting takes root")
        except OSError as refused:
            pytest.skip(f"no FUSE here: {refused}")
        call("mount", None, b"/", None, self._REC_PRIVATE, None)
        in_child(self._serve, data)
        with tempfile.NamedTemporaryFile() as place:
            options = f"fd={self._device},rootmode=100600,user_id=0,group_id=0"
            call("mount", b"none", place.name.encode(), b"fuse", 0, options.encode())
            self._mounted.cross()
            os.close(self._device)  # when the child ends, so does all that waits for it
            self._file = os.open(place.name, os.O_RDONLY | os.O_DIRECT)
            call("umount2", place.name.encode(), self._DETACH)
        make_own(source)
        target = (ctypes.c_char * PAGE).from_address(start)
        self._reading: Call[int] = in_thread(os.preadv, self._file, [target], 0)
        self._asked.wait()

    def end(self) -> None:
        """Let the data arrive; again is nothing."""
        self._go.cross()
        assert self._reading.result() == PAGE

    def _serve(self, data: bytes) -> None:
        self._mounted.wait()
        while True:
            request = os.read(self._device, 1 << 16)
            opcode, unique = struct.unpack_from("=IQ", request, 4)
            answer = b""
            if opcode == self._INIT:
                answer = struct.pack("=II16xII32x", 7, 31, PAGE, 1)
            elif opcode == self._OPEN:
                answer = struct.pack("=QII", 1, 1, 0)  # FOPEN_DIRECT_IO
            elif opcode == self._READ:
                self._asked.cross()
                self._go.wait()
                answer = data
            if opcode != self._FORGET:
                os.write(self._device, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)


def make_own(memory: Memory) -> None:
    """Have nobody share the pages that are there; holes stay holes."""
    for page in scan_pages(memory.start, memory.length, required=PageCategory.PRESENT):
        call("madvise", page.start, page.length, Advice.POPULATE_WRITE)


def merge(start: int) -> None:
    """Have KSM merge the page at `start` with a twin of the same content."""
    twin = Memory.map(PAGE, dont_fork=True)
    twin.write(0, ctypes.string_at(start, PAGE))
    twin.advise(Advice.MERGEABLE)
    call("madvise", start, PAGE, Advice.MERGEABLE)
    while not look(start, PAGE)[0].merged:
        os.sched_yield()  # ksmd tells nobody; the deadline is the limit


def swap_out(start: int, length: int = PAGE) -> None:
    """Have pages swapped out."""
    while scan_pages(start, length, required=PageCategory.PRESENT):
        call("madvise", start, length, 21)  # MADV_PAGEOUT


def lock(start: int, length: int = PAGE) -> None:
    """mlock2(2), which leaves holes holes."""
    call("mlock2", start, length, 1)  # MLOCK_ONFAULT


def protect(start: int, length: int, access: int) -> None:
    """mprotect(2)."""
    call("mprotect", start, length, access)


def guard(start: int) -> None:
    """Put a guard in the place of a page: a marker, like poison."""
    try:
        call("madvise", start, PAGE, 102)  # MADV_GUARD_INSTALL
    except OSError:
        pytest.skip("this kernel has no MADV_GUARD_INSTALL")
