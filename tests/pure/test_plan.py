"""Where an action works, and what operation that makes; test_merge.py has what becomes of many."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.fakes import HUGE, MISSING, PAGE, START, WP, FakeSource, a_fault, a_region
from uffdaemon.actions import (
    Continue,
    Copy,
    Extent,
    Fallback,
    Fill,
    Move,
    Poison,
    Span,
    Unprotect,
    Zero,
)
from uffdaemon.errors import InvalidRange
from uffdaemon.model.batch import operation, target
from uffdaemon.uapi.outcomes import CONTINUE_WRITE_PROTECT, COPY_WRITE_PROTECT, Code, Operation

PAGES = 24
ADDRESSES = 1 << 64
PAGE_SIZES = st.sampled_from((PAGE, HUGE))
NUMBERS = st.sets(st.integers(0, PAGES - 1))


def spans(page: int, page_size: int) -> st.SearchStrategy[Span]:
    """Spans that hold the page."""
    return st.tuples(st.integers(0, page), st.integers(page + 1, PAGES)).map(
        lambda ends: Span(ends[0] * page_size, (ends[1] - ends[0]) * page_size)
    )


def fills(extent: Extent, page_size: int) -> st.SearchStrategy[Fill]:
    places = st.integers(-2 * PAGES, 2 * PAGES).map(lambda page: page * page_size)
    copies = st.builds(
        lambda pages, spare, offset: Copy(
            FakeSource(pages * page_size + spare), offset + spare * 2, extent
        ),
        st.integers(0, 2 * PAGES),
        st.sampled_from((0, 1, 100)),
        places,
    )
    return st.one_of(
        copies,
        st.just(Zero(extent)),
        st.just(Move(0x20_0000_0000, extent)),
        st.just(Continue(extent)),
        st.just(Poison(extent)),
        st.just(Unprotect(extent)),
    )


def held_by(action: Copy, page_size: int) -> set[int]:
    """The pages of the region that the source has all bytes of."""
    size, offset = action.source.size, action.offset
    return {
        page
        for page in range(PAGES)
        if offset + page * page_size >= 0 and offset + (page + 1) * page_size <= size
    }


# -- target ------------------------------------------------------------------------------------


@given(st.data(), PAGE_SIZES, st.integers(0, PAGES - 1), NUMBERS, NUMBERS)
def test_a_target_is_the_most_that_may_be_filled(
    data: st.DataObject, page_size: int, page: int, present: set[int], removed: set[int]
) -> None:
    region = a_region(pages=PAGES, page_size=page_size)
    for each in present:
        region.pages.present.add(each)
    for each in removed:
        region.pages.remove(each, each + 1)
    extent = data.draw(st.integers(1, 40) | spans(page, page_size))
    action = data.draw(fills(extent, page_size))
    start, length = target(a_fault(region, page), action)

    assert start % page_size == 0
    assert length % page_size == 0
    first, end = (start - region.start) // page_size, (start + length - region.start) // page_size
    assert 0 <= first <= page < end <= PAGES
    filled = range(first, end)

    if isinstance(extent, Span):
        wanted = range(extent.offset // page_size, (extent.offset + extent.length) // page_size)
    else:
        aligned = page - page % extent
        wanted = range(aligned, min(aligned + extent, PAGES))
    allowed = set(wanted)
    there = present - removed
    if isinstance(action, Move | Poison):
        allowed -= there | removed
    elif not isinstance(action, Unprotect):
        # A page that was present may have gone with its neighbours; zeros come alone.
        allowed -= (set() if page in there else there) | removed
        if page in removed:
            allowed.clear()
    if isinstance(action, Copy):
        allowed &= held_by(action, page_size)
        if page not in held_by(action, page_size):
            wanted = range(page, page + 1)
    assert set(filled) <= allowed | {page}
    if extent != 1:
        # As far as one piece goes, nothing is left out.
        assert first == wanted.start or first - 1 not in allowed
        assert end == wanted.stop or end not in allowed


@given(st.data(), st.integers(0, PAGES - 1))
def test_one_page_is_the_faults_own_whatever_is_known_of_it(data: st.DataObject, page: int) -> None:
    region = a_region(pages=PAGES)
    region.pages.remove(0, PAGES)
    action = data.draw(fills(1, PAGE))
    assert target(a_fault(region, page), action) == (START + page * PAGE, PAGE)


@pytest.mark.parametrize(
    ("page", "extent", "expected"),
    [
        (5, 1, (5, 6)),
        (5, 2, (4, 6)),
        (5, 3, (3, 6)),
        (5, 4, (4, 8)),
        (4, 4, (4, 8)),
        (7, 4, (4, 8)),
        (5, 16, (2, 10)),  # the source has pages 2 to 9
        (2, 16, (2, 10)),
        (9, 16, (2, 10)),
        (1, 16, (1, 2)),
        (10, 16, (10, 11)),
        (20, 16, (20, 21)),
        (5, Span(0, PAGES * PAGE), (2, 10)),
        (5, Span(5 * PAGE, 2 * PAGE), (5, 7)),
    ],
)
@pytest.mark.parametrize("spare", [0, 100])
def test_copies_stay_within_the_whole_pages_that_the_source_has(
    page: int, extent: Extent, expected: tuple[int, int], spare: int
) -> None:
    action = Copy(FakeSource(8 * PAGE + spare), -2 * PAGE, extent)
    first, end = expected
    found = target(a_fault(a_region(pages=PAGES), page), action)
    assert found == (START + first * PAGE, (end - first) * PAGE)


@pytest.mark.parametrize(
    ("span", "what"),
    [
        (Span(1, 4 * PAGE), "not made of pages"),
        (Span(0, 4 * PAGE + 1), "not made of pages"),
        (Span(0, 0), "not made of pages"),
        (Span(4 * PAGE, -2 * PAGE), "not made of pages"),
        (Span(-PAGE, 8 * PAGE), "leaves heap"),
        (Span(0, (PAGES + 1) * PAGE), "leaves heap"),
        (Span(PAGES * PAGE, PAGE), "leaves heap"),
        (Span(0, 3 * PAGE), f"does not hold the fault at {3 * PAGE:#x}"),
        (Span(4 * PAGE, PAGE), f"does not hold the fault at {3 * PAGE:#x}"),
    ],
)
def test_spans_that_cannot_be_are_refused(span: Span, what: str) -> None:
    region = a_region(pages=PAGES, name="heap")
    with pytest.raises(InvalidRange, match=what):
        target(a_fault(region, 3), Zero(span))


@pytest.mark.parametrize("extent", [0, -1, None, 2.5, "2", Span(cast("int", 0.0), 4096), [1]])
@pytest.mark.parametrize("make", [Zero, Unprotect])
def test_extents_that_are_none_never_get_as_far_as_the_kernel(
    extent: object, make: type[Zero]
) -> None:
    action = make(cast("Extent", extent))
    with pytest.raises(InvalidRange):
        target(a_fault(a_region(), 0), action)


# -- operation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (Copy(FakeSource(0)), Operation(Code.COPY, START, 8192, 0x9000, 0, PAGE)),
        (
            Copy(FakeSource(0), write_protect=True),
            Operation(Code.COPY, START, 8192, 0x9000, COPY_WRITE_PROTECT, PAGE),
        ),
        (Zero(), Operation(Code.ZEROPAGE, START, 8192, 0, 0, PAGE)),
        (Move(0x9000), Operation(Code.MOVE, START, 8192, 0x9000, 0, 0)),
        (Move(0x9000, fallback=Fallback()), Operation(Code.MOVE, START, 8192, 0x9000, 0, 0)),
        (Continue(), Operation(Code.CONTINUE, START, 8192, 0, 0, PAGE)),
        (
            Continue(write_protect=True),
            Operation(Code.CONTINUE, START, 8192, 0, CONTINUE_WRITE_PROTECT, PAGE),
        ),
        (Poison(), Operation(Code.POISON, START, 8192, 0, 0, PAGE)),
        (Unprotect(), Operation(Code.WRITEPROTECT, START, 8192, 0, 0, 0)),
    ],
    ids=repr,
)
def test_each_action_has_its_operation(action: Fill, expected: Operation) -> None:
    assert operation(action, a_region(), START, 8192, 0x9000) == expected


def test_pages_found_present_are_stepped_over_by_their_size() -> None:
    region = a_region(page_size=HUGE)
    assert operation(Continue(), region, START, HUGE).page_size == HUGE


@pytest.mark.parametrize("src", [-1, -PAGE, ADDRESSES - PAGE + 1, ADDRESSES, None, 4096.0, "4096"])
def test_what_is_no_address_never_gets_as_far_as_the_kernel(src: object) -> None:
    with pytest.raises(InvalidRange):
        operation(Move(0), a_region(), START, PAGE, cast("int", src))


def test_the_last_page_of_the_address_space_is_an_address() -> None:
    assert operation(Move(0), a_region(), START, PAGE, ADDRESSES - PAGE).src == ADDRESSES - PAGE


def test_what_is_present_is_filled_no_more_but_may_be_unprotected() -> None:
    region = a_region(pages=8)
    region.pages.present.add_range(0, 3)
    region.pages.present.add(6)
    fault = a_fault(region, 4)
    assert target(fault, Continue(8)) == (START + 3 * PAGE, 3 * PAGE)
    assert target(fault, Unprotect(8)) == (START, 8 * PAGE)


def test_kinds_do_not_matter_to_a_target() -> None:
    region = a_region(pages=8)
    found = {target(a_fault(region, 3, kind), Zero(4)) for kind in (MISSING, WP)}
    assert found == {(START, 4 * PAGE)}
