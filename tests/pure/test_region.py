from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.fakes import HUGE, PAGE, START
from uffdaemon.actions import Hold, Poison
from uffdaemon.errors import InvalidRange
from uffdaemon.model.region import Fault, Region, Retry
from uffdaemon.policy import ZeroPage

END = 1 << 64


@given(
    st.integers(0, 18).map(lambda shift: PAGE << shift), st.integers(0, 1 << 20), st.integers(1, 64)
)
def test_a_region_of_whole_pages_is_one(page_size: int, first: int, pages: int) -> None:
    start, length = first * page_size, pages * page_size
    region = Region(start, length, ZeroPage(), page_size=page_size)
    assert region.end == start + length
    assert region.pages.pages == pages
    assert start in region
    assert region.end - 1 in region
    assert region.end not in region
    assert start - 1 not in region
    assert region.label == f"{start:#x}-{region.end:#x}"


@pytest.mark.parametrize(
    ("start", "length", "page_size", "what"),
    [
        (START, 0, PAGE, "is empty: length 0 bytes"),
        (START, -PAGE, PAGE, f"is empty: length -{PAGE} bytes"),
        (-PAGE, PAGE, PAGE, "leaves the address space"),
        (END - PAGE, 2 * PAGE, PAGE, "leaves the address space"),
        (START + 1, PAGE, PAGE, f"start is not a multiple of the page size, {PAGE} bytes"),
        (START, PAGE + 1, PAGE, f"length is not a multiple of the page size, {PAGE} bytes"),
        (START + PAGE, HUGE, HUGE, f"start is not a multiple of the page size, {HUGE} bytes"),
        (START, PAGE, HUGE, f"length is not a multiple of the page size, {HUGE} bytes"),
        (START, PAGE, 0, "page size 0 is not a power of two"),
        (START, PAGE, 2048, "page size 2048 is not a power of two"),
        (START, PAGE, 3 * PAGE, f"page size {3 * PAGE} is not a power of two"),
        (START, PAGE, -PAGE, f"page size -{PAGE} is not a power of two"),
    ],
)
def test_what_is_no_region_is_refused(start: int, length: int, page_size: int, what: str) -> None:
    with pytest.raises(InvalidRange, match=what):
        Region(start, length, ZeroPage(), page_size=page_size)


def test_the_last_page_of_the_address_space_can_be_one() -> None:
    assert Region(END - PAGE, PAGE, ZeroPage()).end == END


def test_regions_compare_by_identity() -> None:
    one, other = (Region(START, PAGE, ZeroPage(), name="heap") for _ in range(2))
    assert one != other
    assert len({one, other}) == 2
    assert one.label == "heap"
    assert one.on_failure == Hold()
    assert one.pages is not other.pages
    assert "pages" not in repr(one).replace("page_size", "")
    assert one.after_remove == "zero"
    assert Retry().attempts > 1


@given(st.integers(1, 10_000), st.floats(0.001, 10), st.floats(0.001, 100))
def test_the_wait_between_attempts_doubles_up_to_its_cap(
    failures: int, first: float, most: float
) -> None:
    retry = Retry(first_delay=first, max_delay=most)
    delay = retry.delay(failures)
    assert 0 < delay <= most
    assert delay == most or delay >= first
    assert retry.delay(failures + 1) == min(delay * 2, most) or delay == most
    assert retry.delay(1) == min(first, most)


def test_a_region_reads_well() -> None:
    plain = Region(START, PAGE, ZeroPage())
    assert repr(plain) == f"<Region: {PAGE} bytes at {START:#x}, policy ZeroPage()>"
    image = Region(
        START,
        2 * HUGE,
        ZeroPage(),
        page_size=HUGE,
        name="image",
        on_failure=Poison(),
        after_remove="policy",
    )
    assert repr(image) == (
        f"<Region 'image': {2 * HUGE} bytes at {START:#x} in pages of {HUGE} bytes, "
        "policy ZeroPage(), on_failure Poison(extent=1), after_remove 'policy'>"
    )

    def ask(_: Fault, __: Exception) -> None: ...

    asked = Region(START, PAGE, ZeroPage(), on_failure=ask)
    assert repr(asked).endswith(f"on_failure {ask.__qualname__}>")
