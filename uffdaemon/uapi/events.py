"""Messages of a userfaultfd as typed events.

Parsing is total: 32 bytes always become an event; unknown ones become an `UnknownEvent`.  Source:
``struct uffd_msg`` in ``include/uapi/linux/userfaultfd.h``, ioctl_userfaultfd(2), userfaultfd(2).
"""

from __future__ import annotations

import struct
from enum import Enum, IntFlag
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias, assert_never

MESSAGE: Final = struct.Struct("=B7xQQQ")
"""``struct uffd_msg``: event, and three 8-byte words whose meaning depends on it."""

PAGEFAULT: Final = 0x12
FORK: Final = 0x13
REMAP: Final = 0x14
REMOVE: Final = 0x15
UNMAP: Final = 0x16

_LOW_WORD: Final = 0xFFFF_FFFF


class FaultFlags(IntFlag):
    """``UFFD_PAGEFAULT_FLAG_*``."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


class FaultKind(Enum):
    """Why a thread faulted.  The values are the names in `Statistics.as_dict`."""

    MISSING = "missing"
    """The page is missing."""
    MINOR = "minor"
    """The page is in the page cache, but not mapped."""
    WP = "write_protect"
    """The page is write-protected through userfaultfd."""
    UNKNOWN = "unknown"
    """A reason of a newer kernel, such as RWP of Linux 7.3."""

    if TYPE_CHECKING:

        def __hash__(self) -> int: ...

    else:
        __hash__ = object.__hash__  # half of every dictionary look-up on the way of a fault


class PageFault(NamedTuple):
    """A thread faulted and waits: UFFD_EVENT_PAGEFAULT of userfaultfd(2)."""

    address: int
    """Bytes; page-aligned unless EXACT_ADDRESS was negotiated."""
    kind: FaultKind
    write: bool
    thread: int
    """The thread's id in its own pid namespace; 0 if THREAD_ID was not negotiated."""


class ForkEvent(NamedTuple):
    """The process forked.  `fd` is the userfaultfd of the child's memory, owned by the reader.

    UFFD_EVENT_FORK of userfaultfd(2).
    """

    fd: int


class RemapEvent(NamedTuple):
    """mremap(2) moved `length` bytes from address `source` to `target`: UFFD_EVENT_REMAP."""

    source: int
    target: int
    length: int
    """Bytes."""


class RemoveEvent(NamedTuple):
    """madvise(2) with MADV_DONTNEED or MADV_REMOVE discarded the pages from `start` to `end`.

    UFFD_EVENT_REMOVE of userfaultfd(2).  Addresses in bytes; `end` is the first one after it.
    """

    start: int
    end: int


class UnmapEvent(NamedTuple):
    """munmap(2) unmapped the range from `start` to `end`: UFFD_EVENT_UNMAP of userfaultfd(2).

    Addresses in bytes; `end` is the first one after the range.
    """

    start: int
    end: int


class UnknownEvent(NamedTuple):
    """A message that this library does not know, unchanged."""

    message: bytes


Change: TypeAlias = ForkEvent | RemapEvent | RemoveEvent | UnmapEvent | UnknownEvent
"""All events but faults."""

Event: TypeAlias = PageFault | Change

KIND_OF_FLAGS: Final = tuple(
    FaultKind.WP if flags & 2 else FaultKind.MINOR if flags & 4 else FaultKind.MISSING
    for flags in range(8)
)
"""Indexed by the fault flags up to MINOR.  WP is tested first: the kernel sets one of the two."""

_FLAGS_OF_KIND: Final = {
    FaultKind.MISSING: 0,
    FaultKind.MINOR: int(FaultFlags.MINOR),
    FaultKind.WP: int(FaultFlags.WP),
    FaultKind.UNKNOWN: int(FaultFlags.RWP),
}


def parse(data: bytes | bytearray | memoryview, length: int | None = None) -> list[Event]:
    """Parse the first `length` bytes (default: all) of what was read into events, in order.

    Bytes after the last whole message become one `UnknownEvent`; the kernel never sends them.
    """
    end = len(data) if length is None else length
    whole = end - end % MESSAGE.size
    events = [
        _event(bytes(data[at : at + MESSAGE.size]), *MESSAGE.unpack_from(data, at))
        for at in range(0, whole, MESSAGE.size)
    ]
    if whole != end:
        events.append(UnknownEvent(bytes(data[whole:end])))
    return events


def _event(message: bytes, code: int, first: int, second: int, third: int) -> Event:
    if code == PAGEFAULT:
        kind = KIND_OF_FLAGS[first] if first < len(KIND_OF_FLAGS) else FaultKind.UNKNOWN
        return PageFault(second, kind, bool(first & 1), third & _LOW_WORD)
    if code == FORK:
        return ForkEvent(first & _LOW_WORD)
    if code == REMAP:
        return RemapEvent(first, second, third)
    if code == REMOVE:
        return RemoveEvent(first, second)
    if code == UNMAP:
        return UnmapEvent(first, second)
    return UnknownEvent(message)


def message(event: Event) -> bytes:
    """The bytes that the kernel would send for `event`: `parse` read backwards, for tests."""
    match event:
        case PageFault(address, kind, write, thread):
            return MESSAGE.pack(PAGEFAULT, _FLAGS_OF_KIND[kind] | write, address, thread)
        case ForkEvent(fd):
            return MESSAGE.pack(FORK, fd, 0, 0)
        case RemapEvent(source, target, length):
            return MESSAGE.pack(REMAP, source, target, length)
        case RemoveEvent(start, end):
            return MESSAGE.pack(REMOVE, start, end, 0)
        case UnmapEvent(start, end):
            return MESSAGE.pack(UNMAP, start, end, 0)
        case UnknownEvent(raw):
            return raw
        case _:
            assert_never(event)
