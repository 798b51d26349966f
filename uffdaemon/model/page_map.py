"""The state of each page of a region: a view of the page book in C, two bits a page.

A page is *present* once this library has filled it, and *removed* once its owner has discarded it.
Removed is permanent: the contents of the source must never come back, even if the page was filled
with zeros since and is missing again (the kernel empties a range only after its REMOVE event was
read, so a page filled in between vanishes without another event).  A page that is both is dirty:
its contents are not those of the source.

The map is a hint for planning.  It never replaces asking the kernel, which may have dropped a page
without an event (EVENT_REMOVE not negotiated).
"""

from __future__ import annotations

from typing import Final

from uffdaemon.native.page_book import PageBook

_STRIDE: Final = 8192  # pages looked at in one go


def _ones(pages: int) -> int:
    """The lower bit of each of `pages` pages."""
    return ((1 << 2 * pages) - 1) // 3


_ONES: Final = _ones(_STRIDE)


def _states(book: PageBook, first: int, end: int) -> int:
    """The states of pages, two bits each: those of `first` are the lowest."""
    states = int.from_bytes(book.buffer[first >> 2 : (end + 3) >> 2], "little")
    return states >> (first & 3) * 2 & ((1 << (end - first) * 2) - 1)


def _free_run(taken: int, page: int, low: int, high: int) -> tuple[int, int]:
    """The longest run of pages around `page`, within `low` to `high`, whose two bits in `taken` are
    0; `page` itself is always in it."""
    at = (page - low) * 2
    first = ((taken & ((1 << at) - 1)).bit_length() + 1) // 2
    above = taken >> at >> 2
    end = page - low + ((above & -above).bit_length() + 1) // 2 if above else high - low
    return low + first, low + end


class PageSet:
    """The numbers of the pages that have one of the two bits set."""

    __slots__ = ("_book", "_shift", "pages")

    def __init__(self, book: PageBook, shift: int) -> None:
        self.pages: int = book.pages
        self._book = book
        self._shift = shift

    def __contains__(self, page: int) -> bool:
        byte: int = self._book.buffer[page >> 2][0]
        return byte >> (page & 3) * 2 + self._shift & 1 == 1

    def _spread(self, first: int, end: int) -> int:
        """A bit for each page, at twice its distance from `first`."""
        return _states(self._book, first, end) >> self._shift & _ONES

    def bits(self, first: int, end: int) -> int:
        """The pages `first` to `end` as an integer: bit 0 is `first`."""
        found = 0
        for base in range(first, end, _STRIDE):
            stop = min(base + _STRIDE, end)
            digits = f"{self._spread(base, stop):0{(stop - base) * 2}b}"
            found |= int(digits[1::2], 2) << base - first
        return found

    def count(self) -> int:
        """How many pages are in the set.  Takes time proportional to the number of pages."""
        return sum(
            self._spread(base, min(base + _STRIDE, self.pages)).bit_count()
            for base in range(0, self.pages, _STRIDE)
        )

    def next_absent(self, page: int, end: int) -> int | None:
        """The first page at or after `page`, below `end`, that is not in the set."""
        while page < end:
            stop = min(end, page + _STRIDE)
            absent = ~self._spread(page, stop) & _ones(stop - page)
            if absent:
                return page + ((absent & -absent).bit_length() - 1) // 2
            page = stop
        return None

    def runs(self) -> list[tuple[int, int]]:
        """The pages of the set as runs, (first, end) each, in order."""
        found: list[tuple[int, int]] = []
        for base in range(0, self.pages, _STRIDE):
            bits = self._spread(base, min(base + _STRIDE, self.pages)) * 3
            while bits:
                low = (bits & -bits).bit_length() - 1
                length = ((bits >> low) + 1 & ~(bits >> low)).bit_length() - 1
                first, end = base + low // 2, base + (low + length) // 2
                if found and found[-1][1] == first:
                    first = found.pop()[0]
                found.append((first, end))
                bits &= ~(((1 << length) - 1) << low)
        return found


class PresentPages(PageSet):
    """The pages that are present.  Changing this set does not change what a fault gets."""

    __slots__ = ()

    def add(self, page: int) -> None:
        """Put one page into the set."""
        self._book.fill(page, page + 1)

    def add_range(self, first: int, end: int) -> None:
        """Put the pages from `first` up to, not including, `end` into the set."""
        if first < end:
            self._book.fill(first, end)

    def discard_range(self, first: int, end: int) -> None:
        """Take the pages from `first` up to, not including, `end` out of the set."""
        if first < end:
            self._book.empty(first, end)


class PageMap:
    """The states of the pages of one region, by page number from its start.

    With ``shared``, they are kept in a memory file, whose descriptor is ``book.fileno()``.  Another
    process that has it passes it as `file`.  A `book` of as many pages is used as it is.  Raises
    MemoryError and OSError.
    """

    __slots__ = ("book", "pages", "present", "removed")

    def __init__(
        self,
        pages: int,
        *,
        shared: bool = False,
        file: int | None = None,
        book: PageBook | None = None,
    ) -> None:
        self.book: PageBook = PageBook(pages, shared=shared, file=file) if book is None else book
        self.pages: int = pages
        self.present: PresentPages = PresentPages(self.book, 0)
        self.removed: PageSet = PageSet(self.book, 1)

    def copy(self) -> PageMap:
        """An independent copy."""
        return PageMap(self.pages, book=self.book.copy())

    @property
    def any_removed(self) -> bool:
        """Whether any page was ever removed."""
        return self.book.any_discarded

    def remove(self, first: int, end: int) -> None:
        """The owner discarded these pages: they are absent, and marked as removed."""
        if first < end:
            self.book.discard(first, end)

    def fillable(self, page: int, low: int, high: int) -> tuple[int, int]:
        """The longest run of pages around `page`, within `low` to `high`, that can be filled in
        one piece: neither present nor removed.  `page` itself is always in it."""
        return _free_run(_states(self.book, low, high), page, low, high)

    def refillable(self, page: int, low: int, high: int, *, discarded: bool) -> tuple[int, int]:
        """The same for a page that is missing whatever the map says.  If it was present, the run
        has pages that are present, which may be missing as well; with `discarded`, also pages that
        were removed.  Without, a page that was removed is alone."""
        states = _states(self.book, low, high)
        own = states >> (page - low) * 2
        ones = _ones(high - low)
        taken = 0 if own & 1 else states & ones
        if not discarded:
            if own & 2:
                return page, page + 1
            taken |= states >> 1 & ones
        return _free_run(taken, page, low, high)

    def next_fillable(self, page: int, end: int) -> int | None:
        """The first page at or after `page`, below `end`, that is neither present nor removed."""
        while page < end:
            stop = min(end, page + _STRIDE)
            states = _states(self.book, page, stop)
            absent = ~(states | states >> 1) & _ones(stop - page)
            if absent:
                return page + ((absent & -absent).bit_length() - 1) // 2
            page = stop
        return None

    @property
    def complete(self) -> bool:
        """Whether no page is absent.  Takes time in proportion to the pages before the first that
        is."""
        return self.next_fillable(0, self.pages) is None

    def filled(self) -> int:
        """How many pages are present or removed.  Takes time in proportion to all pages."""
        count = 0
        for base in range(0, self.pages, _STRIDE):
            states = _states(self.book, base, min(base + _STRIDE, self.pages))
            count += ((states | states >> 1) & _ONES).bit_count()
        return count
