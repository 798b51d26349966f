"""Watching ranges, and what is wrong with those that cannot be watched."""

from __future__ import annotations

import errno

import pytest

from tests.support.calls import in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_fault
from tests.support.page_contents import PAGE
from uffdaemon import Memory, MemoryType
from uffdaemon.errors import InvalidRange, RangeBusy, RegistrationRefused
from uffdaemon.lowlevel import Features, IoctlSet, RegisterMode, Userfaultfd
from uffdaemon.ranges import HUGE_PAGE_SIZE


@kernel_test()
def test_an_unaligned_range_is_named_before_the_kernel_is_asked() -> None:
    with Userfaultfd.open() as uffd, Memory.map(4 * PAGE) as memory:
        for call in (uffd.register, uffd.unregister):
            with pytest.raises(
                InvalidRange, match=f"{memory.start + 1:#x}.*start is not a multiple"
            ):
                call(memory.start + 1, PAGE)
            with pytest.raises(InvalidRange, match="100 bytes: length is not a multiple"):
                call(memory.start, 100)
            with pytest.raises(InvalidRange, match="is empty"):
                call(memory.start, 0)
            with pytest.raises(InvalidRange, match="leaves the address space"):
                call((1 << 64) - PAGE, 2 * PAGE)


@kernel_test()
def test_memory_that_is_not_there_is_refused_with_its_range() -> None:
    with Userfaultfd.open() as uffd, Memory.map(4 * PAGE) as memory:
        memory.unmap(0, memory.length)
        with pytest.raises(RegistrationRefused, match="not mapped") as caught:
            uffd.register(memory.start, memory.length)
        assert (caught.value.address, caught.value.length) == (memory.start, memory.length)


@kernel_test()
def test_a_range_of_another_userfaultfd_is_busy() -> None:
    with (
        Userfaultfd.open() as first,
        Userfaultfd.open() as second,
        Memory.map(4 * PAGE) as memory,
    ):
        first.register(memory.start + PAGE, PAGE)
        with pytest.raises(RangeBusy, match="another userfaultfd") as caught:
            second.register(memory.start, memory.length)
        assert caught.value.errno == errno.EBUSY
        assert (caught.value.address, caught.value.length) == (memory.start, memory.length)
        # Nothing of it was taken, and what does not overlap can be.
        second.register(memory.start + 2 * PAGE, 2 * PAGE)
        # One's own may be registered again, in another mode.
        ioctls = first.register(memory.start + PAGE, PAGE, RegisterMode.MISSING)
        assert ioctls & IoctlSet.COPY
        first.unregister(memory.start + PAGE, PAGE)
        second.register(memory.start, 2 * PAGE)


@kernel_test()
def test_a_part_of_a_huge_page_cannot_be_watched(huge_pages: None) -> None:
    with Userfaultfd.open() as uffd, Memory.map(HUGE_PAGE_SIZE, MemoryType.HUGETLB) as memory:
        with pytest.raises(RegistrationRefused, match="not aligned to its huge pages") as caught:
            uffd.register(memory.start, PAGE)
        assert caught.value.errno == errno.EINVAL


@kernel_test()
def test_anonymous_memory_has_no_minor_faults() -> None:
    with Userfaultfd.open() as uffd, Memory.map(PAGE) as memory:
        with pytest.raises(RegistrationRefused) as caught:
            uffd.register(memory.start, PAGE, RegisterMode.MINOR)
        assert caught.value.errno == errno.EINVAL


@kernel_test()
def test_unregistering_wakes_who_waits_and_zeros_are_what_they_see() -> None:
    with Userfaultfd.open() as uffd, Memory.map(2 * PAGE) as memory:
        uffd.register(memory.start, memory.length)
        reader = in_thread(memory.read, 0, PAGE)
        assert next_fault(uffd).address == memory.start
        assert reader.running
        uffd.unregister(memory.start, memory.length)
        assert reader.result() == bytes(PAGE)
        assert memory.read(PAGE, 1) == b"\0"
        assert uffd.read_events() == []


@kernel_test(features=Features.PAGEFAULT_FLAG_WP)
def test_a_range_in_two_modes_answers_to_both() -> None:
    with Userfaultfd.open(Features.PAGEFAULT_FLAG_WP) as uffd, Memory.map(PAGE) as memory:
        ioctls = uffd.register(memory.start, PAGE, RegisterMode.MISSING | RegisterMode.WP)
        wanted = IoctlSet.COPY | IoctlSet.ZEROPAGE | IoctlSet.WRITEPROTECT | IoctlSet.WAKE
        assert ioctls & wanted == wanted


@kernel_test()
def test_when_the_last_descriptor_closes_the_kernel_answers_with_zeros() -> None:
    # Why nobody may drop the last descriptor of a range that is not complete.
    with Memory.map(2 * PAGE) as memory:
        uffd = Userfaultfd.open()
        uffd.register(memory.start, memory.length)
        reader = in_thread(memory.read, 0, PAGE)
        next_fault(uffd)
        uffd.close()
        assert reader.result() == bytes(PAGE)
        assert memory.read(PAGE, 1) == b"\0"
