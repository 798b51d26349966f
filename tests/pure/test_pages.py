"""Single examples, borders and memory; test_pages_model.py has the comparison with a set."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uffdaemon.model.page_map import PageMap, PresentPages

GIB = (1 << 30) // 4096
SMALL = 4096 * 4 - 32  # pages: the most whose states are not mapped by themselves
STRIDE = 8192
BORDERS = [0, 1, 7, 8, 9, STRIDE - 1, STRIDE, STRIDE + 1, 2 * STRIDE, SMALL - 1, SMALL, SMALL + 1]


def pages_present(pages: int) -> PresentPages:
    return PageMap(pages).present


def resident() -> int:
    """Bytes of anonymous memory that this process has, by the kernel's exact count."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if "Anonymous:" in line)


@pytest.mark.parametrize("pages", [*BORDERS[1:], SMALL + STRIDE + 3])
def test_all_and_nothing(pages: int) -> None:
    bitmap = pages_present(pages)
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
    bitmap = pages_present(SMALL + STRIDE)
    bitmap.add_range(border - 1, border + 1)
    assert border - 1 in bitmap
    assert border in bitmap
    assert border + 1 not in bitmap
    assert bitmap.runs() == [(border - 1, border + 1)]
    assert bitmap.next_absent(border - 1, bitmap.pages) == border + 1
    assert bitmap.next_absent(border - 1, border + 1) is None
    bitmap.discard_range(border - 1, border)
    assert bitmap.runs() == [(border, border + 1)]


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_the_states_of_pages_are_the_bits_that_c_looks_at(kind: str) -> None:
    pages = PageMap(24, shared=kind == "shared")
    pages.present.add(0)
    pages.present.add_range(5, 7)
    pages.remove(6, 9)
    pages.present.add(8)
    assert bytes(pages.book.buffer) == bytes([0b01, 0b10_10_01_00, 0b11, 0, 0, 0])


def test_a_memory_file_is_another_process_s_view() -> None:
    ours = PageMap(100, shared=True)
    ours.present.add(7)
    assert ours.book.fileno() >= 0
    theirs = PageMap(100, file=ours.book.fileno())
    assert theirs.present.runs() == [(7, 8)]
    theirs.remove(7, 9)
    assert (ours.present.runs(), ours.removed.runs()) == ([], [(7, 9)])
    assert ours.any_removed
    twin = theirs.copy()
    assert twin.removed.runs() == [(7, 9)]
    assert twin.book.fileno() not in (-1, theirs.book.fileno())
    twin.remove(0, 1)
    assert 0 not in ours.removed
    with pytest.raises(OSError, match="Invalid argument"):
        PageMap(101, file=ours.book.fileno())
    assert PageMap(8).book.fileno() == -1
    ours.book.close_file()
    assert ours.book.fileno() == -1
    assert ours.removed.runs() == [(7, 9)]


def test_an_event_that_was_applied_is_not_applied_again() -> None:
    pages = PageMap(10)
    pages.remove(2, 4)
    pages.present.add(2)  # zeros, since
    pages.present.add(5)
    pages.book.make_void(2, 6)
    assert pages.present.runs() == [(2, 3)]
    assert pages.removed.runs() == [(2, 6)]


def test_a_region_is_complete_once_no_page_is_absent() -> None:
    pages = PageMap(70)
    pages.present.add_range(0, 69)
    assert not pages.complete
    pages.remove(69, 70)
    assert pages.complete


@given(st.integers(0, 40), st.integers(-40, 40))
def test_an_empty_range_changes_nothing(first: int, length: int) -> None:
    bitmap = pages_present(40)
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
    assert len(pages.book.buffer) == 2 * 64 * GIB // 8
    assert twin.filled() == 0


def test_a_region_costs_two_bits_a_page_and_little_more() -> None:
    count = 64 * GIB
    before = resident()
    tracemalloc.start()
    pages = PageMap(count)
    pages.present.add_range(0, count)
    pages.remove(0, count)
    pages.present.add_range(0, count)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert resident() - before + taken <= count * 2 // 8 + (64 << 10)
    assert pages.filled() == count


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


def test_refillable_has_what_may_have_gone_with_the_page() -> None:
    pages = PageMap(32)
    pages.present.add_range(8, 16)
    pages.remove(12, 14)
    # A page that is absent: the same as `fillable`, and pages removed if contents are due there.
    assert pages.refillable(4, 0, 32, discarded=False) == pages.fillable(4, 0, 32) == (0, 8)
    assert pages.refillable(20, 0, 32, discarded=False) == (16, 32)
    # One that was present: its neighbours, too.
    assert pages.refillable(9, 0, 32, discarded=False) == (0, 12)
    assert pages.refillable(9, 6, 11, discarded=False) == (6, 11)
    assert pages.refillable(9, 0, 32, discarded=True) == (0, 32)
    # One that was removed: alone, or with all that is not present.
    assert pages.refillable(12, 0, 32, discarded=False) == (12, 13)
    assert pages.refillable(12, 0, 32, discarded=True) == (12, 14)
    pages.present.add(12)  # filled again, and gone again
    assert pages.refillable(12, 0, 32, discarded=False) == (12, 13)
    assert pages.refillable(12, 0, 32, discarded=True) == (0, 32)


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
