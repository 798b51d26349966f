"""`PageMap` against two sets of page numbers."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from uffdaemon.model.page_map import PageMap, PageSet

SMALL = 4096 * 4 - 32
STRIDE = 8192
EDGES = (0, 1, 7, 8, 9, 31, 32, 63, 64, STRIDE, 2 * STRIDE, SMALL)
SIZES = sorted({max(edge + by, 1) for edge in EDGES for by in (-1, 0, 1)} | {SMALL + STRIDE + 5})


def runs_of(pages: set[int]) -> list[tuple[int, int]]:
    starts = sorted(page for page in pages if page - 1 not in pages)
    ends = sorted(page + 1 for page in pages if page + 1 not in pages)
    return list(zip(starts, ends, strict=True))


class PagesAreTwoSets(RuleBasedStateMachine):
    pages: PageMap
    present: set[int]
    removed: set[int]

    @initialize(size=st.sampled_from(SIZES))
    def begin(self, size: int) -> None:
        self.pages = PageMap(size)
        self.present = set()
        self.removed = set()

    def near_edges(self, data: st.DataObject, most: int) -> int:
        """A number up to `most`, most often near a border of bytes, strides or the whole."""
        edge = data.draw(st.sampled_from((*EDGES, self.pages.pages)))
        by = data.draw(st.one_of(st.integers(-2, 2), st.integers(-200, 200)))
        return min(max(edge + by, 0), most)

    def page(self, data: st.DataObject) -> int:
        return self.near_edges(data, self.pages.pages - 1)

    def span(self, data: st.DataObject) -> tuple[int, int]:
        some = (self.near_edges(data, self.pages.pages), self.near_edges(data, self.pages.pages))
        return min(some), max(some)

    # -- changes -------------------------------------------------------------------------------

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        page = self.page(data)
        self.pages.present.add(page)
        self.present.add(page)

    @rule(data=st.data())
    def add_range(self, data: st.DataObject) -> None:
        first, end = self.span(data)
        self.pages.present.add_range(first, end)
        self.present.update(range(first, end))

    @rule(data=st.data())
    def discard_range(self, data: st.DataObject) -> None:
        first, end = self.span(data)
        self.pages.present.discard_range(first, end)
        self.present.difference_update(range(first, end))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        first, end = self.span(data)
        self.pages.remove(first, end)
        self.present.difference_update(range(first, end))
        self.removed.update(range(first, end))

    @rule(original=st.booleans())
    def copy(self, original: bool) -> None:
        """Go on with a copy; the other one is spoilt, which must not be seen."""
        twin = self.pages.copy()
        kept, spoilt = (self.pages, twin) if original else (twin, self.pages)
        spoilt.present.add_range(0, spoilt.pages)
        spoilt.remove(0, spoilt.pages // 2)
        self.pages = kept

    # -- questions -----------------------------------------------------------------------------

    @rule(data=st.data())
    def bits(self, data: st.DataObject) -> None:
        first, end = self.span(data)
        for bitmap, model in self.both():
            expected = sum(1 << (page - first) for page in model if first <= page < end)
            assert bitmap.bits(first, end) == expected

    @rule(data=st.data())
    def membership(self, data: st.DataObject) -> None:
        page = self.page(data)
        for bitmap, model in self.both():
            assert (page in bitmap) == (page in model)

    @rule(data=st.data())
    def next_absent(self, data: st.DataObject) -> None:
        first, end = self.span(data)
        for bitmap, model in self.both():
            found = next((page for page in range(first, end) if page not in model), None)
            assert bitmap.next_absent(first, end) == found

    @rule(data=st.data())
    def next_fillable(self, data: st.DataObject) -> None:
        first, end = self.span(data)
        taken = self.present | self.removed
        found = next((page for page in range(first, end) if page not in taken), None)
        assert self.pages.next_fillable(first, end) == found

    @rule(data=st.data())
    def fillable(self, data: st.DataObject) -> None:
        page = self.page(data)
        some = (self.near_edges(data, page), page)
        low, high = min(some), max(page + 1, self.near_edges(data, self.pages.pages))
        first, end = self.pages.fillable(page, low, high)
        taken = self.present | self.removed
        assert low <= first <= page < end <= high
        assert not taken & (set(range(first, end)) - {page})
        assert first == low or first - 1 in taken
        assert end == high or end in taken

    @invariant()
    def all_is_the_same(self) -> None:
        if not hasattr(self, "pages"):
            return
        for bitmap, model in self.both():
            assert bitmap.count() == len(model)
            assert bitmap.runs() == runs_of(model)
        assert self.pages.filled() == len(self.present | self.removed)
        assert self.pages.any_removed or not self.removed

    def both(self) -> list[tuple[PageSet, set[int]]]:
        return [(self.pages.present, self.present), (self.pages.removed, self.removed)]


TestPagesAreTwoSets = PagesAreTwoSets.TestCase
TestPagesAreTwoSets.settings = settings(max_examples=60, stateful_step_count=25)
