"""The memory that this library has mapped, and callbacks for when it is unmapped."""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


_owned: list[tuple[int, int]] = []
"""(start, end) of what this library has mapped; sorted, without overlaps."""
_lock = threading.Lock()
before_unmapping: list[Callable[[int, int], None]] = []
"""Called with the start and end of memory that is about to be unmapped, from any thread."""


def own(start: int, end: int) -> None:
    """Record that the library has mapped a range."""
    with _lock:
        insort(_owned, (start, end))


def disown(start: int, end: int) -> list[tuple[int, int]]:
    """Record that a range is about to be unmapped, and call `before_unmapping`.

    Returns the parts, (start, end) each, that the library had mapped.  What lies between them is
    other memory by now.
    """
    with _lock:
        gone = [(max(a, start), min(b, end)) for a, b in _owned if a < end and start < b]
        kept = [
            part
            for low, high in _owned
            for part in ((low, min(high, start)), (max(low, end), high))
            if part[0] < part[1]
        ]
        _owned[:] = kept
    for call in before_unmapping.copy():
        call(start, end)
    return gone


def check_own(start: int, length: int) -> bool:
    """Whether all of a range lies in memory that this library has mapped."""
    with _lock:
        at = bisect_right(_owned, (start, sys.maxsize)) - 1
        reached = start
        while 0 <= at < len(_owned) and _owned[at][0] <= reached < start + length:
            reached = max(reached, _owned[at][1])
            at += 1
    return reached >= start + length


def owned_around(address: int) -> tuple[int, int]:
    """(start, end) of the memory of this library that holds the address; (0, 0) if none does."""
    with _lock:
        at = bisect_right(_owned, (address, sys.maxsize)) - 1
        if at >= 0 and address < _owned[at][1]:
            return _owned[at]
    return 0, 0
