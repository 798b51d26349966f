"""Memory of the five types: mapping, access that lets go of the GIL, advice."""

from __future__ import annotations

import errno
import os
import re
import signal
from pathlib import Path

import pytest

from tests.kernel.conformance import map_area
from tests.kernel.page_flags import exclusive
from tests.support.calls import Call, in_child, in_thread
from tests.support.conformance_table import ALL, SHARED
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_events, next_fault
from tests.support.page_contents import PAGE
from uffdaemon import Advice, Memory, MemoryType, native
from uffdaemon.errors import InvalidRange, MemoryRefused
from uffdaemon.lowlevel import Features, PageCategory, Userfaultfd, scan_pages
from uffdaemon.ranges import HUGE_PAGE_SIZE
from uffdaemon.uapi.events import PageFault


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ALL)
@kernel_test()
def test_memory_of_every_type_is_mapped_used_and_unmapped(kind: MemoryType) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with map_area(kind, 3) as memory:
        page = memory.page_size
        assert page == (HUGE_PAGE_SIZE if kind.huge else PAGE)
        assert memory.start % page == 0
        assert memory.end == memory.start + memory.length == memory.start + 3 * page
        assert (memory.fd >= 0) is (kind is not MemoryType.ANONYMOUS)
        assert memory.read(0, memory.length) == bytes(memory.length)
        memory.write(page - 2, b"over the edge")
        assert memory.read(page - 2, 13) == b"over the edge"
        memory.touch(write=True)
        assert memory.read(page - 2, 13) == b"over the edge"
        start = memory.start
        maps = Path("/proc/self/maps").read_text()
        assert f"{start:x}-" in maps
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert f"{start:x}-{start + 3 * page:x}" not in Path("/proc/self/maps").read_text()
    memory.close()


@pytest.mark.parametrize("kind", ALL)
@kernel_test()
def test_what_cannot_be_is_refused_by_name(kind: MemoryType) -> None:
    for length in (0, -PAGE, 100):
        with pytest.raises(InvalidRange, match="not a positive multiple"):
            Memory.map(length, kind)
    with map_area(kind, 2) as memory:
        for offset, length in ((-1, 1), (0, memory.length + 1), (memory.length, 1), (0, -1)):
            with pytest.raises(InvalidRange, match="at offset"):
                memory.read(offset, length)
        with pytest.raises(InvalidRange, match="at offset"):
            memory.write(memory.length - 1, b"xx")
        assert memory.read(memory.length, 0) == b""
    for call in (lambda: memory.read(0, 1), lambda: memory.advise(Advice.DONTNEED), memory.remap):
        with pytest.raises(InvalidRange, match="has been unmapped"):
            call()


@pytest.mark.parametrize("kind", ALL)
@kernel_test()
def test_only_shared_memory_has_an_alias(kind: MemoryType) -> None:
    with map_area(kind, 2) as memory:
        if kind not in SHARED:
            with pytest.raises(InvalidRange, match=f"{kind.value} memory cannot be mapped twice"):
                memory.alias()
            return
        with memory.alias() as alias:
            assert alias.start != memory.start
            alias.write(memory.page_size, b"both")
            assert memory.read(memory.page_size, 4) == b"both"
        assert memory.read(memory.page_size, 4) == b"both"


@kernel_test()
def test_huge_pages_that_are_not_there_are_refused_with_the_line_that_mends_it() -> None:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    if not pool.exists():
        pytest.skip("this kernel has no huge pages of 2 MiB")
    pages = 1 << 20
    total = int(pool.read_text())
    with pytest.raises(MemoryRefused) as caught:
        Memory.map(pages * HUGE_PAGE_SIZE, MemoryType.HUGETLB)
    line = re.search(rf"as root: echo (\d+) > {pool}", caught.value.advice)
    assert line is not None
    assert total < int(line[1]) <= total + pages
    assert caught.value.errno == errno.ENOMEM
    assert caught.value.length == pages * HUGE_PAGE_SIZE


@kernel_test()
def test_a_waiting_access_stops_its_own_thread_alone() -> None:
    with Userfaultfd.open() as uffd, Memory.map(3 * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        calls: list[Call[bytes] | Call[None]] = [
            in_thread(memory.read, 0, 1),
            in_thread(memory.write, PAGE, b"w"),
            in_thread(memory.touch, 2 * PAGE, PAGE, write=True),
        ]
        found: set[int] = set()
        while len(found) < 3:
            found |= {event.address for event in next_events(uffd) if isinstance(event, PageFault)}
        assert found == set(range(memory.start, memory.end, PAGE))
        assert all(call.running for call in calls)
        uffd.zeropage(memory.start, memory.length)
        for call in calls:
            call.result()
        assert memory.read(PAGE, 1) == b"w"


@kernel_test()
def test_populating_asks_the_handler_for_what_is_missing() -> None:
    with Userfaultfd.open() as uffd, Memory.map(2 * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        populating = in_thread(memory.advise, Advice.POPULATE_WRITE)
        for at in (0, PAGE):
            assert next_fault(uffd).address == memory.start + at
            uffd.copy(memory.start + at, b"p" * PAGE)
        populating.result()
        assert memory.read(0, 2 * PAGE) == b"p" * 2 * PAGE


@kernel_test()
def test_dont_fork_memory_is_not_there_in_a_child() -> None:
    with Memory.map(PAGE, dont_fork=True) as memory:
        memory.touch(write=True)
        assert _ends_touching(memory) == signal.SIGSEGV
        memory.advise(Advice.DOFORK)
        assert _ends_touching(memory) == 0


def _ends_touching(memory: Memory) -> int:
    def touch() -> None:
        import faulthandler

        faulthandler.disable()
        memory.touch()

    return in_child(touch).wait()


@pytest.mark.usefixtures("transparent_huge_pages")
@pytest.mark.parametrize("how", ["transparent_huge", "HUGEPAGE", "COLLAPSE"])
@kernel_test()
def test_huge_pages_are_transparent(how: str) -> None:
    with Memory.map(2 * HUGE_PAGE_SIZE, transparent_huge=how == "transparent_huge") as memory:
        if how == "HUGEPAGE":
            memory.advise(Advice.HUGEPAGE)
        memory.touch(write=True)
        if how == "COLLAPSE":
            memory.advise(Advice.COLLAPSE)
        found = scan_pages(memory.start, memory.length, required=PageCategory.HUGE)
        # Memory that is not aligned holds one whole huge page at least.
        whole = memory.length if how == "transparent_huge" else HUGE_PAGE_SIZE
        assert sum(run.length for run in found) >= whole
        memory.write(0, b"h" * memory.length)
        assert memory.read(0, memory.length) == b"h" * memory.length
        if how == "transparent_huge":
            assert memory.start % HUGE_PAGE_SIZE == 0


@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test()
def test_pages_stay_small_where_huge_ones_are_not_wanted() -> None:
    with Memory.map(HUGE_PAGE_SIZE, transparent_huge=True) as memory:
        memory.advise(Advice.NOHUGEPAGE)
        memory.touch(write=True)
        assert scan_pages(memory.start, memory.length, required=PageCategory.HUGE) == []


@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test(features=Features.PAGEFAULT_FLAG_WP)
def test_a_range_under_a_handler_can_be_collapsed() -> None:
    with (
        Userfaultfd.open() as uffd,
        Memory.map(HUGE_PAGE_SIZE, transparent_huge=True) as memory,
    ):
        uffd.register(memory.start, memory.length)
        for at in range(0, memory.length, 64 * PAGE):
            uffd.copy(memory.start + at, b"c" * 64 * PAGE)
        memory.advise(Advice.COLLAPSE)
        [run] = scan_pages(memory.start, memory.length)
        assert run.categories & PageCategory.HUGE
        assert memory.read(0, memory.length) == b"c" * memory.length
        assert uffd.read_events() == []


@pytest.mark.usefixtures("ksm")
@kernel_test()
def test_mergeable_memory_is_merged_and_can_be_had_back() -> None:
    with Memory.map(8 * PAGE) as memory:
        memory.write(0, b"s" * memory.length)
        memory.advise(Advice.MERGEABLE)
        merged = Path("/proc/self/ksm_merging_pages")
        while not int(merged.read_text()):
            os.sched_yield()
        memory.advise(Advice.UNMERGEABLE)
        assert all(exclusive(address) for address in range(memory.start, memory.end, PAGE))
        assert memory.read(0, memory.length) == b"s" * memory.length


@kernel_test()
def test_advice_that_the_memory_cannot_take_is_refused_by_name() -> None:
    with Memory.map(2 * PAGE) as memory:
        with pytest.raises(MemoryRefused, match="madvise REMOVE") as caught:
            memory.advise(Advice.REMOVE, PAGE)
        assert caught.value.errno == errno.EINVAL
        assert (caught.value.address, caught.value.length) == (memory.start + PAGE, PAGE)


@pytest.mark.parametrize("kind", ALL)
@kernel_test()
def test_remapping_changes_the_address_and_keeps_the_content(kind: MemoryType) -> None:
    with map_area(kind, 2) as memory:
        memory.write(memory.page_size, b"kept")
        start = memory.start
        memory.remap()
        assert memory.start != start
        assert memory.start % memory.page_size == 0
        assert memory.read(memory.page_size, 4) == b"kept"


@kernel_test()
def test_closing_memory_closes_the_userfaultfd_that_guards_it() -> None:
    uffd = Userfaultfd.open(Features.EVENT_UNMAP)
    memory = Memory.map(PAGE)
    memory.userfaultfd = uffd
    uffd.register(memory.start, PAGE)
    # Nobody reads the unmap event, and nobody has to.
    memory.close()
    assert uffd.closed


@kernel_test()
def test_closing_leaves_alone_what_is_mapped_where_a_part_was_unmapped() -> None:
    memory = Memory.map(3 * PAGE)
    hole = memory.start + PAGE
    memory.unmap(PAGE, PAGE)
    number, start = native.map_memory(-1, PAGE, 0, PAGE)
    assert number == 0
    assert native.remap_memory(start, PAGE, hole) == 0
    native.write_memory(hole, b"other memory")
    memory.close()
    assert native.read_memory(hole, 12) == b"other memory"
    assert native.unmap_memory(hole, PAGE) == 0
