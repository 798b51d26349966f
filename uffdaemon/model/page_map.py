"""What is known of each page of a region, in two bits a page.

A page is *present* once something was placed there through this library, and *removed* once its
owner discarded it.  Removed is for ever: the source's data must never come back, not even when the
page was filled with zeros since and was dropped again (the kernel empties a range only after its
REMOVE event was read, so a page placed in between vanishes without another event).

What is written here is used to plan, never to skip asking the kernel: it may have taken a page away
without telling (EVENT_REMOVE not negotiated).

The bitmaps are flat, so that C can set bits in them, and large ones are anonymous memory that the
kernel brings into being where bits are set: an untouched region costs nothing.
"""

from __future__ import annotations

import mmap
from typing import Final, Protocol

_SMALL: Final = 4096
_STRIDE: Final = 8192  # pages looked at in one go


class Change(Protocol):
    """Changes a bitmap such that no other thread's change is lost."""

    def __call__(self, buffer: bytearray | mmap.mmap, first: int, end: int, *, value: bool) -> None:
        """Set or clear the bits `first` to `end`, exclusive."""


class Bitmap:
    """A set of page numbers below `pages`, one bit each."""

    __slots__ = ("_change", "buffer", "pages")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._change: Change | None = None
        size = (pages + 7) >> 3
        self.buffer: bytearray | mmap.mmap = (
            bytearray(size)
            if size <= _SMALL
            else mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )

    def share(self, change: Change) -> None:
        """Have bits changed by `change` from now on, since another thread changes some as well."""
        self._change = change

    def __contains__(self, page: int) -> bool:
        return self.buffer[page >> 3] >> (page & 7) & 1 == 1

    def add(self, page: int) -> None:
        """Put one page into the set."""
        if self._change is not None:
            self._change(self.buffer, page, page + 1, value=True)
            return
        self.buffer[page >> 3] |= 1 << (page & 7)

    def add_range(self, first: int, end: int) -> None:
        """Put the pages from `first` up to, not including, `end` into the set."""
        if end == first + 1:
            self.add(first)
            return
        if self._change is not None:
            self._change(self.buffer, first, end, value=True)
            return
        while first < end:
            stop = min(end, first + _STRIDE)
            self._store(first, stop, self._load(first, stop) | _mask(first, stop))
            first = stop

    def discard_range(self, first: int, end: int) -> None:
        """Take the pages from `first` up to, not including, `end` out of the set."""
        if self._change is not None:
            self._change(self.buffer, first, end, value=False)
            return
        while first < end:
            stop = min(end, first + _STRIDE)
            bits = self._load(first, stop)
            # Zeros are not written where zeros are: that would bring memory into being.
            if bits & _mask(first, stop):
                self._store(first, stop, bits & ~_mask(first, stop))
            first = stop

    def _load(self, first: int, end: int) -> int:
        """The bytes that hold the pages, as one integer: bit 0 is ``first & ~7``."""
        return int.from_bytes(self.buffer[first >> 3 : (end + 7) >> 3], "little")

    def _store(self, first: int, end: int, bits: int) -> None:
        low, high = first >> 3, (end + 7) >> 3
        self.buffer[low:high] = bits.to_bytes(high - low, "little")

    def bits(self, first: int, end: int) -> int:
        """The pages `first` to `end` as an integer: bit 0 is `first`."""
        return (self._load(first, end) & _mask(first, end)) >> (first & 7)

    def count(self) -> int:
        """How many pages are in the set.  Looks at all of them."""
        return int.from_bytes(self.buffer[:], "little").bit_count()

    def next_absent(self, page: int, end: int) -> int | None:
        """The first page at or after `page`, below `end`, that is not in the set."""
        while page < end:
            stop = min(end, page + _STRIDE)
            absent = ~self.bits(page, stop) & ((1 << (stop - page)) - 1)
            if absent:
                return page + (absent & -absent).bit_length() - 1
            page = stop
        return None

    def runs(self) -> list[tuple[int, int]]:
        """The pages of the set as runs, (first, end) each, in order."""
        found: list[tuple[int, int]] = []
        for base in range(0, self.pages, _STRIDE):
            bits = self.bits(base, min(base + _STRIDE, self.pages))
            while bits:
                low = (bits & -bits).bit_length() - 1
                length = ((bits >> low) + 1 & ~(bits >> low)).bit_length() - 1
                first, end = base + low, base + low + length
                if found and found[-1][1] == first:
                    first = found.pop()[0]
                found.append((first, end))
                bits &= ~(((1 << length) - 1) << low)
        return found


def _mask(first: int, end: int) -> int:
    """Ones for the pages, where bit 0 is ``first & ~7``."""
    return ((1 << (end - first)) - 1) << (first & 7)


class PageMap:
    """The states of the pages of one region, by page number from its start."""

    __slots__ = ("any_removed", "pages", "present", "removed")

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.present = Bitmap(pages)
        self.removed = Bitmap(pages)
        self.any_removed = False

    def copy(self) -> PageMap:
        """The same states, to go their own way from now on."""
        twin = PageMap(self.pages)
        twin.any_removed = self.any_removed
        for ours, theirs in ((self.present, twin.present), (self.removed, twin.removed)):
            for first, end in ours.runs():
                theirs.add_range(first, end)
        return twin

    def remove(self, first: int, end: int) -> None:
        """The owner discarded these pages: they are absent, and the source's data is void."""
        self.present.discard_range(first, end)
        self.removed.add_range(first, end)
        self.any_removed = True

    def fillable(self, page: int, low: int, high: int) -> tuple[int, int]:
        """The longest run of pages around `page`, within `low` to `high`, that can be filled in
        one piece: neither present nor removed.  `page` itself is always in it."""
        taken = self.present.bits(low, high)
        if self.any_removed:
            taken |= self.removed.bits(low, high)
        at = page - low
        first = (taken & ((1 << at) - 1)).bit_length()
        above = taken >> at >> 1
        end = at + (above & -above).bit_length() if above else high - low
        return low + first, low + end

    def next_fillable(self, page: int, end: int) -> int | None:
        """The first page at or after `page`, below `end`, that is neither present nor removed."""
        at: int | None = page
        while at is not None:
            at = self.present.next_absent(at, end)
            if at is None or not self.any_removed or at not in self.removed:
                return at
            at = self.removed.next_absent(at, end)
        return None

    def filled(self) -> int:
        """How many pages need nothing any more: present or removed.  Looks at all of them."""
        if not self.any_removed:
            return self.present.count()
        both = int.from_bytes(self.present.buffer[:], "little")
        return (both | int.from_bytes(self.removed.buffer[:], "little")).bit_count()
