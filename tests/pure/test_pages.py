"""Single examples, borders and memory; test_pages_model.py has the comparison with a set."""

from __future__ import annotations

import mmap
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdaemon.model.page_map import Bitmap, PageMap

GIB = (1 << 30) // 4096
SMALL = 4096 * 8  # pages: the most whose bitmap is an ordinary bytearray
STRIDE = 8192
BORDERS = [0, 1, 7, 8, 9, STRIDE - 1, STRIDE, STRIDE + 1, 2 * STRIDE, SMALL - 1, SMALL, SMALL + 1]


def resident() -> int:
    """Bytes of anonymous memory that this process has, by the kernel's exact count."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if "Anonymous:" in line)


@pytest.mark.parametrize("pages", [*BORDERS[1:], SMALL + STRIDE + 3])
def test_all_and_nothing(pages: int) -> None:
    bitmap = Bitmap(pages)
    assert bitmap.runs() == []
    assert bitmap.next_absent(0, pages) == 0
    bitmap.add_range(0, pages)
    assert bitmap.runs() == [(0, pages)]
    assert bitmap.count() == pages
    assert bitmap.next_absent(0, pages) is None
    assert bitmap.bits(0, pages) == (1 << pages) - 1
    bitmap.discard_range(0, pages)
    assert bitmap.count() == 0


@pytest.mark.parametrize("border", [border for border in BORDERS if border])
def test_runs_across_a_border_are_whole(border: int) -> None:
    bitmap = Bitmap(SMALL + STRIDE)
    bitmap.add_range(border - 1, border + 1)
    assert border - 1 in bitmap
    assert border in bitmap
    assert border + 1 not in bitmap
    assert bitmap.runs() == [(border - 1, border + 1)]
    assert bitmap.next_absent(border - 1, bitmap.pages) == border + 1
    assert bitmap.next_absent(border - 1, border + 1) is None
    bitmap.discard_range(border - 1, border)
    assert bitmap.runs() == [(border, border + 1)]


def test_one_page_more_than_a_bytearrays_is_a_map_of_its_own() -> None:
    assert isinstance(Bitmap(SMALL).buffer, bytearray)
    assert isinstance(Bitmap(SMALL + 1).buffer, mmap.mmap)


def test_the_pages_of_a_range_are_the_bits_that_c_looks_at() -> None:
    bitmap = Bitmap(24)
    bitmap.add(0)
    bitmap.add(9)
    bitmap.add_range(15, 18)
    assert bytes(bitmap.buffer) == bytes([0b1, 0b1000_0010, 0b11])


@given(st.integers(0, 40), st.integers(-40, 40))
def test_an_empty_range_changes_nothing(first: int, length: int) -> None:
    bitmap = Bitmap(40)
    bitmap.add_range(3, 20)
    if length <= 0:
        bitmap.add_range(first, first + length)
        bitmap.discard_range(first, first + length)
        assert bitmap.next_absent(first, first + length) is None
    assert bitmap.runs() == [(3, 20)]


def test_an_untouched_large_region_costs_nothing() -> None:
    tracemalloc.start()
    before = resident()
    pages = PageMap(64 * GIB)
    pages.present.discard_range(0, pages.pages)
    assert pages.next_fillable(pages.pages - 1, pages.pages) == pages.pages - 1
    twin = pages.copy()
    grown = resident() - before
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 64 << 10
    assert grown < 1 << 20
    assert len(pages.present.buffer) + len(pages.removed.buffer) == 2 * 64 * GIB // 8
    assert twin.filled() == 0


def test_a_touched_page_costs_no_more_than_what_the_kernel_maps_for_it() -> None:
    pages = PageMap(1024 * GIB)
    before = resident()
    pages.present.add(500 * GIB)
    twin = pages.copy()
    # A huge page each, where those are given unasked; 64 MiB each are mapped.
    assert resident() - before < (2 << 20) * 2 + (1 << 20)
    assert twin.present.runs() == [(500 * GIB, 500 * GIB + 1)]


def test_a_copy_goes_its_own_way() -> None:
    pages = PageMap(10)
    pages.present.add_range(2, 5)
    pages.remove(4, 6)
    twin = pages.copy()
    assert (twin.present.runs(), twin.removed.runs()) == ([(2, 4)], [(4, 6)])
    assert twin.any_removed
    twin.present.add(9)
    pages.remove(0, 1)
    assert 9 not in pages.present
    assert 0 not in twin.removed
    assert not PageMap(10).copy().any_removed


def test_what_is_filled_counts_once() -> None:
    pages = PageMap(20)
    pages.present.add_range(0, 6)
    assert pages.filled() == 6
    pages.remove(4, 8)
    pages.present.add_range(7, 9)  # zeros, where the owner had discarded
    assert pages.filled() == 9


def test_fillable_stops_at_the_next_page_that_needs_nothing() -> None:
    pages = PageMap(32)
    pages.present.add(4)
    pages.remove(20, 21)
    assert pages.fillable(10, 0, 32) == (5, 20)
    assert pages.fillable(10, 8, 16) == (8, 16)
    assert pages.fillable(4, 0, 32) == (0, 20)
    assert pages.fillable(20, 0, 32) == (5, 32)
    pages.present.add_range(0, 32)
    assert pages.fillable(10, 0, 32) == (10, 11)


def test_next_fillable_steps_over_both() -> None:
    pages = PageMap(STRIDE * 3)
    pages.present.add_range(0, STRIDE)
    assert pages.next_fillable(0, pages.pages) == STRIDE
    pages.remove(STRIDE, STRIDE + 5)
    pages.present.add_range(STRIDE + 5, 2 * STRIDE)
    pages.remove(2 * STRIDE, 2 * STRIDE + 1)
    assert pages.next_fillable(0, pages.pages) == 2 * STRIDE + 1
    assert pages.next_fillable(0, 2 * STRIDE + 1) is None
    pages.remove(2 * STRIDE, pages.pages)
    assert pages.next_fillable(0, pages.pages) is None


def test_bits_that_others_change_as_well_are_changed_as_they_say() -> None:
    changes: list[tuple[int, int, bool]] = []
    bitmap = Bitmap(100)

    def change(buffer: bytearray | mmap.mmap, first: int, end: int, *, value: bool) -> None:
        assert buffer is bitmap.buffer
        changes.append((first, end, value))

    bitmap.share(change)
    bitmap.add(3)
    bitmap.add_range(4, 20)
    bitmap.discard_range(5, 7)
    assert changes == [(3, 4, True), (4, 20, True), (5, 7, False)]
    assert bitmap.count() == 0
