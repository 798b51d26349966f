"""One change at a time; test_regions_model.py has any number in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.pure.fakes import PAGE, START, a_region
from uffdaemon.actions import Wake
from uffdaemon.errors import InvalidRange
from uffdaemon.model.region import Fault, Region
from uffdaemon.model.region_table import RegionTable, Segment, nowhere, outside_every_region
from uffdaemon.uapi.events import FaultKind, PageFault

if TYPE_CHECKING:
    from uffdaemon.model.page_map import PageMap


def table_of(*regions: Region) -> RegionTable:
    table = RegionTable()
    for region in regions:
        table.add(region)
    return table


def at(page: int) -> int:
    return START + page * PAGE


def test_an_address_belongs_to_the_region_around_it() -> None:
    low, high = a_region(pages=2), a_region(pages=2, start=at(4))
    table = table_of(high, low)
    assert [table.find(at(page)) for page in range(-1, 7)] == [
        None, low, low, None, None, high, high, None,
    ]  # fmt: skip
    assert table.find(at(2) - 1) is low
    assert table.find(at(2)) is None
    assert [segment.region for segment in table] == [low, high]
    assert len(table) == 2
    assert RegionTable().find(START) is None


@pytest.mark.parametrize(
    ("first", "pages"), [(0, 4), (0, 1), (3, 1), (1, 2), (-1, 2), (3, 9), (-5, 20)]
)
def test_an_overlap_names_both(first: int, pages: int) -> None:
    table = table_of(a_region(pages=4, name="heap"))
    other = a_region(pages=pages, start=at(first), name="image")
    with pytest.raises(InvalidRange) as caught:
        table.add(other)
    for part in ("image", f"{other.start:#x}-{other.end:#x}", "heap", f"{at(0):#x}-{at(4):#x}"):
        assert part in str(caught.value)
    assert len(table) == 1


def test_a_table_is_made_anew_of_its_segments() -> None:
    table = table_of(a_region(pages=4), a_region(pages=4, start=at(8)))
    table.remap(at(1), at(20), 2 * PAGE)
    twin = RegionTable.of(reversed(list(table)))
    assert list(twin) == list(table)
    assert twin.find(at(20)) is table.find(at(20))


def test_neighbours_do_not_overlap() -> None:
    table = table_of(a_region(pages=4), a_region(pages=4, start=at(-4)), a_region(start=at(4)))
    assert len(table) == 3


def test_a_hole_in_the_middle_leaves_two_segments_of_one_region() -> None:
    region = a_region(pages=8)
    table = table_of(region)
    assert table.unmap(at(3), at(5)) == [Segment(at(3), at(5), region)]
    assert list(table) == [Segment(at(0), at(3), region), Segment(at(5), at(8), region)]
    assert [segment.offset for segment in table] == [0, 5 * PAGE]
    assert table.unmap(at(3), at(5)) == []
    assert table.clip(at(2), at(6)) == [
        Segment(at(2), at(3), region),
        Segment(at(5), at(6), region),
    ]
    assert table.remove(region) == [Segment(at(0), at(3), region), Segment(at(5), at(8), region)]
    assert len(table) == 0


def test_what_was_moved_is_the_same_region_from_another_start() -> None:
    region, other = a_region(pages=8), a_region(pages=2, start=at(100))
    table = table_of(region, other)
    [moved] = table.remap(at(6), at(50), 2 * PAGE)
    assert (moved.start, moved.end, moved.offset) == (at(50), at(52), 6 * PAGE)
    assert moved.region.pages is region.pages
    assert moved.region.policy is region.policy
    assert region.start == START
    assert table.find(at(50)) is moved.region
    assert table.find(at(6)) is None
    assert (
        table.segments(region)
        == table.segments(moved.region)
        == [
            Segment(at(0), at(6), region),
            moved,
        ]
    )
    assert table.remove(moved.region) != []
    assert [segment.region for segment in table] == [other]


def test_a_move_onto_another_region_takes_its_place() -> None:
    region, other = a_region(pages=2), a_region(pages=4, start=at(10))
    table = table_of(region, other)
    [moved] = table.remap(at(0), at(11), 2 * PAGE)
    found = [table.find(at(page)) for page in range(10, 15)]
    assert found == [other, moved.region, moved.region, other, None]


def test_a_move_to_a_lower_address_than_the_parts_offset() -> None:
    region = a_region(pages=64)
    table = table_of(region)
    [moved] = table.remap(at(63), 16 * PAGE, PAGE)
    assert moved.region.start == -47 * PAGE
    assert moved.offset == 63 * PAGE
    assert table.find(16 * PAGE) is moved.region


def test_a_move_of_nothing_that_is_ours_still_unmaps_its_target() -> None:
    table = table_of(a_region(pages=4))
    assert table.remap(at(100), at(1), PAGE) == []
    assert [(segment.start, segment.end) for segment in table] == [(at(0), at(1)), (at(2), at(4))]


def test_a_child_starts_with_the_pages_of_the_snapshot() -> None:
    region = a_region(pages=8)
    region.pages.present.add(1)
    region.pages.remove(4, 5)
    then = region.pages.copy()
    region.pages.present.add(2)
    region.pages.remove(1, 2)
    asked: list[PageMap] = []

    def copy_of(pages: PageMap) -> PageMap:
        asked.append(pages)
        return then

    table = table_of(region)
    table.remap(at(6), at(20), 2 * PAGE)
    child = table.fork(copy_of).find(at(0))
    assert child is not None
    assert asked == [region.pages]
    assert (child.pages.present.runs(), child.pages.removed.runs()) == ([(1, 2)], [(4, 5)])
    assert region.pages.present.runs() == [(2, 3)]


def test_a_child_has_the_same_pages_until_either_changes() -> None:
    region = a_region(pages=8)
    region.pages.present.add(1)
    table = table_of(region)
    table.remap(at(4), at(20), 4 * PAGE)
    child = table.fork()
    assert [(one.start, one.end) for one in child] == [(one.start, one.end) for one in table]
    low, high = child.find(at(0)), child.find(at(20))
    assert low is not None
    assert high is not None
    assert low is not region
    assert low.pages is high.pages is not region.pages
    assert 1 in low.pages.present
    region.pages.present.add(2)
    low.pages.remove(0, 8)
    assert 2 not in low.pages.present
    assert 1 in region.pages.present
    child.unmap(at(0), at(4))
    assert table.find(at(0)) is region


def test_what_is_around_an_address_ends_where_something_else_was_moved_in() -> None:
    region, other = a_region(pages=8), a_region(pages=2, start=at(100))
    table = table_of(region, other)
    assert table.around(at(3), at(0), 8 * PAGE) == (at(0), 8 * PAGE)
    assert table.around(at(3), at(2), 2 * PAGE) == (at(2), 2 * PAGE)
    table.remap(at(100), at(4), 2 * PAGE)
    assert table.around(at(3), at(0), 8 * PAGE) == (at(0), 4 * PAGE)
    assert table.around(at(5), at(0), 8 * PAGE) == (at(4), 2 * PAGE)
    assert table.around(at(6), at(0), 8 * PAGE) == (at(6), 2 * PAGE)
    assert table.around(at(50), at(50), PAGE) == (at(50), PAGE)


def test_who_faults_outside_of_every_region_is_to_look_again() -> None:
    event = PageFault(START + PAGE + 5, FaultKind.MISSING, write=False, thread=7)
    found = nowhere(event)
    assert (found.start, found.length) == (START + PAGE, PAGE)
    assert found.label == "outside of every region"
    fault = Fault(found.start, event.kind, event.write, event.thread, event.address, found, 0)
    assert found.policy is outside_every_region
    assert found.policy(fault) == Wake()


def test_a_default_decides_about_pages_of_the_memory_below() -> None:
    table = RegionTable()
    assert table.page_size_below(START) == PAGE
    huge = 512 * PAGE
    table.add(Region(huge, huge, outside_every_region, page_size=huge))
    assert table.page_size_below(0) == table.page_size_below(2 * huge) == huge
    event = PageFault(2 * huge + 5, FaultKind.MISSING, write=False, thread=7)

    def default(fault: Fault) -> Wake:
        del fault
        return Wake()

    found = nowhere(event, default, "userfaultfd 3", huge)
    assert (found.start, found.length, found.policy) == (2 * huge, huge, default)
    assert found.label == "outside of every region of userfaultfd 3"
