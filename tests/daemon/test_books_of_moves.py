"""What a daemon knows of pages that were moved without it, or that were not there to be moved."""

from __future__ import annotations

import os

import pytest
import trio

from tests.support.calls import in_thread
from tests.support.daemons import the_open_fault
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import Memory, Outcome, actions, errors, open_daemon
from uffdaemon.lowlevel import Features, Userfaultfd
from uffdaemon.moves import Moved, Staging


@kernel_test(features=Features.MOVE)
async def test_pages_filled_by_staging_are_present_after_book() -> None:
    data = content(8)
    memory = Memory.map(len(data))
    fd = os.memfd_create("image")
    os.write(fd, data)
    async with open_daemon() as daemon:
        region = daemon.guard(memory, lambda _: actions.Hold("nobody knows"))
        reader = in_thread(memory.read, PAGE, PAGE)
        while not daemon.open_faults():
            await trio.lowlevel.checkpoint()
        assert "nobody knows" in the_open_fault(daemon).reason
        uffd = memory.userfaultfd
        assert uffd is not None
        with Staging(len(data), transparent_huge=False) as staging:
            moved = staging.fill(uffd, memory.start, fd, 0, len(data))
        assert await trio.to_thread.run_sync(reader.result) == data[PAGE : 2 * PAGE]
        assert region.pages.filled() == 0
        daemon.book(uffd, moved)
        assert region.pages.filled() == 8
        assert daemon.open_faults() == []
        daemon.remove_region(region)
    os.close(fd)


@kernel_test(features=Features.MOVE)
async def test_holes_that_were_left_holes_are_still_missing() -> None:
    source, memory = Memory.map(4 * PAGE, dont_fork=True), Memory.map(4 * PAGE)
    for page in (0, 3):
        source.write(page * PAGE, b"s" * PAGE)
    async with open_daemon() as daemon:
        region = daemon.guard(memory, lambda _: actions.Zero(), features=Features.MOVE)
        uffd = memory.userfaultfd
        assert uffd is not None
        moved = await daemon.move(
            uffd, memory.start, source.start, memory.length, allow_source_holes=True
        )
        assert moved.bytes(Outcome.MOVED) == memory.length
        assert [page in region.pages.present for page in range(4)] == [True, False, False, True]
        with pytest.raises(errors.RegionIncomplete):
            daemon.remove_region(region)


@kernel_test(features=Features.MOVE)
async def test_book_refuses_memory_that_is_not_served() -> None:
    with Userfaultfd.open(Features.MOVE) as uffd:
        async with open_daemon() as daemon:
            with pytest.raises(errors.NotServed):
                daemon.book(uffd, Moved(()))
