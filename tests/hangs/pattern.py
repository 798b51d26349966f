"""What an access pattern is: ordinary Python that touches guarded memory, and what is known of it.

Every pattern touches its pages for the first time by the one access that its name says; only then
does it look at what came of that by other means.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from tests.support.page_contents import content
from uffdaemon import Memory, MemoryType
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = PAGE_SIZE
_WRITABLE = 0x200  # PyBUF_WRITE of Include/cpython/object.h

_view_of_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of_memory.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_view_of_memory.restype = ctypes.py_object

HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
"""Free-threaded CPython runs without one."""

Gil: TypeAlias = Literal["held", "released"]


@dataclass(frozen=True)
class Guarded:
    """What a pattern is given: memory whose pages are all missing."""

    buffer: memoryview
    """Of bytes, and writable."""
    data: bytes
    """What the memory is to hold."""
    address: int
    mapping: mmap.mmap
    """The same memory, as `mmap` sees it."""

    @property
    def length(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Pattern:
    """One way to touch memory."""

    run: Callable[[Guarded], None]
    gil: Gil
    """Whether the GIL, where there is one, is held while the pattern waits for a page.  If so, a
    handler that needs the GIL never answers."""
    system_call: bool
    """Whether it is the kernel that touches a page on the pattern's behalf, in a system call."""
    writes: bool
    """Whether the memory is another one afterwards."""
    make_data: Callable[[], bytes]
    """What the memory is to hold: whole pages."""

    @property
    def name(self) -> str:
        return self.run.__name__


PATTERNS: dict[str, Pattern] = {}
"""By name; `tests.hangs.patterns` fills it."""


def pages(count: int) -> Callable[[], bytes]:
    """Bytes of which no two pages are alike."""
    return cache(lambda: content(count))


def numbers(count: int, dtype: str = "f8") -> Callable[[], bytes]:
    """Numbers of which no two neighbours are alike, padded with zeros to whole pages."""

    def make() -> bytes:
        values = (np.arange(count) * 7919 % 1009 + 1).astype(dtype)
        return padded(values.tobytes())

    return cache(make)


def text(line: bytes, count: int) -> Callable[[], bytes]:
    """`line` over and over again, padded with spaces to whole pages."""
    return cache(lambda: padded(line * count, b" "))


def padded(data: bytes, fill: bytes = b"\0") -> bytes:
    """The bytes, filled up to whole pages."""
    return data + fill * (-len(data) % PAGE)


_FOUR_PAGES = pages(4)


def pattern(
    gil: Gil,
    data: Callable[[], bytes] = _FOUR_PAGES,
    *,
    system_call: bool = False,
    writes: bool = False,
) -> Callable[[Callable[[Guarded], None]], Callable[[Guarded], None]]:
    """Enter a function into the table, with what was measured of it."""

    def enter(run: Callable[[Guarded], None]) -> Callable[[Guarded], None]:
        assert run.__name__ not in PATTERNS
        PATTERNS[run.__name__] = Pattern(run, gil, system_call, writes, data)
        return run

    return enter


def view_of(address: int, length: int) -> memoryview:
    """A plain view of memory, whoever guards it; it must not outlive the mapping."""
    view: memoryview = _view_of_memory(address, length, _WRITABLE)
    return view


_mapped: list[mmap.mmap] = []


def map_memory(length: int) -> tuple[mmap.mmap, Memory]:
    """Anonymous memory that Python's own `mmap` has mapped; it stays until the process ends."""
    mapping = mmap.mmap(-1, length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _mapped.append(mapping)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    return mapping, Memory(start, length, MemoryType.ANONYMOUS, PAGE, -1)


def run_and_check(pattern: Pattern, guarded: Guarded) -> None:
    """Run it, and see that the memory is what it is to be."""
    print(pattern.name, flush=True)  # the last line names the one that hangs or crashes
    pattern.run(guarded)
    assert (bytes(guarded.buffer) != guarded.data) == pattern.writes
