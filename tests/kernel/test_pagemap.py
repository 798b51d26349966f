"""PAGEMAP_SCAN: which pages are there, and which were written."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from tests.kernel.conformance import map_area
from tests.support.calls import Barrier, in_child
from tests.support.conformance_table import ALL
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE
from uffdaemon import Advice, Memory, MemoryType
from uffdaemon.errors import InvalidRange, MemoryRefused
from uffdaemon.lowlevel import (
    Features,
    PageCategory,
    PageRange,
    RegisterMode,
    Userfaultfd,
    scan_pages,
)
from uffdaemon.ranges import HUGE_PAGE_SIZE

WP_ASYNC = Features.PAGEFAULT_FLAG_WP | Features.WP_ASYNC | Features.WP_HUGETLBFS_SHMEM


@pytest.mark.parametrize("kind", ALL)
@kernel_test()
def test_only_pages_that_are_there_are_found(kind: MemoryType) -> None:
    with map_area(kind, 6) as memory:
        page = memory.page_size
        assert scan_pages(memory.start, memory.length) == []
        memory.touch(page, 2 * page, write=True)
        memory.touch(5 * page, page, write=True)
        found = scan_pages(memory.start, memory.length, reported=PageCategory.PRESENT)
        assert found == [
            PageRange(memory.start + page, 2 * page, PageCategory.PRESENT),
            PageRange(memory.start + 5 * page, page, PageCategory.PRESENT),
        ]
        # Only the range that was asked for.
        [part] = scan_pages(memory.start + page, page, reported=PageCategory.PRESENT)
        assert (part.start, part.length) == (memory.start + page, page)


@kernel_test()
def test_categories_tell_zero_pages_file_pages_and_huge_pages(transparent_huge_pages: None) -> None:
    with (
        Memory.map(PAGE) as zero,
        Memory.map(PAGE, MemoryType.SHMEM) as file,
        Memory.map(HUGE_PAGE_SIZE, transparent_huge=True) as huge,
    ):
        zero.touch()
        file.touch(write=True)
        huge.touch(write=True)
        marks = PageCategory.PFNZERO | PageCategory.FILE | PageCategory.HUGE
        found = [
            run.categories
            for memory in (zero, file, huge)
            for run in scan_pages(memory.start, memory.length, reported=marks)
        ]
        assert found == [PageCategory.PFNZERO, PageCategory.FILE, PageCategory.HUGE]
        assert scan_pages(zero.start, PAGE, excluded=PageCategory.PFNZERO) == []
        required = PageCategory.PRESENT | PageCategory.FILE
        assert scan_pages(zero.start, PAGE, required=required) == []
        [run] = scan_pages(file.start, PAGE, required=required)
        assert run.length == PAGE
        any_of = PageCategory.FILE | PageCategory.PFNZERO
        [run] = scan_pages(zero.start, PAGE, any_of=any_of)
        assert run.categories & any_of == PageCategory.PFNZERO


@kernel_test()
def test_a_range_of_more_runs_than_one_call_returns_is_scanned_whole() -> None:
    pages = 5000
    with Memory.map(pages * PAGE) as memory:
        for at in range(0, memory.length, 2 * PAGE):
            memory.touch(at, PAGE, write=True)
        found = scan_pages(memory.start, memory.length)
        assert [run.start for run in found] == list(range(memory.start, memory.end, 2 * PAGE))
        assert {run.length for run in found} == {PAGE}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ALL)
@kernel_test(features=WP_ASYNC)
def test_what_was_written_is_found_once_and_needs_no_handler(kind: MemoryType) -> None:
    with Userfaultfd.open(WP_ASYNC) as uffd, map_area(kind, 8) as memory:
        page = memory.page_size
        memory.touch(write=True)
        uffd.register(memory.start, memory.length, RegisterMode.WP)
        uffd.write_protect(memory.start, memory.length)

        def written() -> list[PageRange]:
            return scan_pages(
                memory.start,
                memory.length,
                required=PageCategory.WRITTEN,
                reported=PageCategory.WRITTEN,
                write_protect=True,
            )

        assert written() == []
        memory.touch()
        assert written() == []
        memory.touch(2 * page, 2 * page, write=True)
        memory.touch(7 * page, page, write=True)
        dirty = [
            PageRange(memory.start + 2 * page, 2 * page, PageCategory.WRITTEN),
            PageRange(memory.start + 7 * page, page, PageCategory.WRITTEN),
        ]
        assert written() == dirty
        # Protected again in the same step.
        assert written() == []
        memory.touch(3 * page, page, write=True)
        assert written() == [PageRange(memory.start + 3 * page, page, PageCategory.WRITTEN)]
        assert uffd.read_events() == []


@kernel_test(features=WP_ASYNC)
def test_protecting_takes_a_range_with_async_write_protection() -> None:
    with Memory.map(PAGE) as memory:
        memory.touch(write=True)
        with pytest.raises(MemoryRefused, match="PAGEMAP_SCAN") as caught:
            scan_pages(memory.start, PAGE, required=PageCategory.WRITTEN, write_protect=True)
        assert caught.value.errno == errno.EPERM
        assert caught.value.address == memory.start


@kernel_test()
def test_the_memory_of_another_process_can_be_scanned() -> None:
    ready = Barrier()
    with Memory.map(4 * PAGE) as memory:

        def touch() -> None:
            memory.touch(PAGE, PAGE, write=True)
            ready.cross()
            signal.pause()

        child = in_child(touch)
        ready.wait()
        assert scan_pages(memory.start, memory.length) == []
        [run] = scan_pages(memory.start, memory.length, pid=child.pid)
        assert (run.start, run.length) == (memory.start + PAGE, PAGE)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        with pytest.raises(MemoryRefused) as caught:
            scan_pages(memory.start, memory.length, pid=child.pid)
        assert caught.value.errno in (errno.ENOENT, errno.ESRCH)


@kernel_test()
def test_advice_shows_in_the_scan() -> None:
    with Memory.map(4 * PAGE) as memory:
        memory.advise(Advice.POPULATE_READ, 0, PAGE)
        memory.advise(Advice.POPULATE_WRITE, PAGE, 2 * PAGE)
        marks = PageCategory.PRESENT | PageCategory.PFNZERO
        assert scan_pages(memory.start, memory.length, reported=marks) == [
            PageRange(memory.start, PAGE, marks),
            PageRange(memory.start + PAGE, 2 * PAGE, PageCategory.PRESENT),
        ]
        memory.advise(Advice.DONTNEED)
        assert scan_pages(memory.start, memory.length) == []


@kernel_test()
def test_bad_ranges_are_named() -> None:
    with pytest.raises(InvalidRange, match="the range to scan"):
        scan_pages(1, PAGE)
    with pytest.raises(InvalidRange, match="is empty"):
        scan_pages(PAGE, 0)


def test_a_range_of_pages_reads_well() -> None:
    found = PageRange(0x1000, 0x3000, PageCategory.PRESENT | PageCategory.HUGE)
    assert found.end == 0x4000
    assert repr(found) == "<PageRange 0x1000-0x4000: 12288 bytes, PRESENT|HUGE>"
    assert repr(found._replace(categories=PageCategory(0))).endswith("12288 bytes, none>")
