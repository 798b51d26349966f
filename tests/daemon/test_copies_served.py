"""Exact copies, and moves, beside a daemon that serves both sides."""

from __future__ import annotations

import threading

import pytest
import trio

from tests.support.calls import in_thread
from tests.support.daemons import the_open_fault
from tests.support.kernel_tests import kernel_test
from tests.support.obstacles import BOTH_MODES, PROTECTED
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    BytesSource,
    CopyFrom,
    FaultKind,
    FirstOf,
    Memory,
    MemoryType,
    MoveOrCopy,
    Outcome,
    Region,
    StrictMove,
    Unprotect,
    ZeroPage,
    actions,
    errors,
    native,
    open_daemon,
)
from uffdaemon.lowlevel import Features, Userfaultfd
from uffdaemon.moves import Fallback, copy_exactly


@kernel_test(features=PROTECTED)
async def test_a_marker_at_the_destination_is_reported_and_not_retried() -> None:
    uffd = Userfaultfd.open(PROTECTED)
    source, memory = Memory.map(PAGE, dont_fork=True), Memory.map(PAGE)
    source.write(0, b"s" * PAGE)
    async with open_daemon() as daemon:
        policy = FirstOf(StrictMove(source), Unprotect())
        daemon.add_region(uffd, Region(memory.start, PAGE, policy), register=BOTH_MODES)
        uffd.write_protect(memory.start, PAGE)
        reader = in_thread(memory.read, 0, 1)
        while not daemon.statistics().failures:
            await trio.lowlevel.checkpoint()
        assert "a marker is at the destination" in the_open_fault(daemon).reason
        assert daemon.statistics().failures == {"DestinationNotEmpty": 1}
        uffd.write_protect(memory.start, PAGE, protect=False)
        assert await trio.to_thread.run_sync(reader.result) == b"s"


@kernel_test(features=PROTECTED)
async def test_an_unprotecting_window_does_not_reach_into_a_copy() -> None:
    uffd = Userfaultfd.open(PROTECTED)
    source, target = Memory.map(2 * PAGE), Memory.map(2 * PAGE)
    source.write(0, content(2))
    begun, go_on = threading.Event(), threading.Event()
    copied = native.copy_and_release

    def slowly(*arguments: object, **options: object) -> tuple[int, int, int]:
        begun.set()
        assert go_on.wait()
        return copied(*arguments, **options)  # type: ignore[arg-type]

    def policy(fault: object) -> actions.Action:
        return actions.Unprotect(2)

    async with open_daemon() as daemon:
        region = Region(source.start, source.length, policy)
        daemon.add_region(uffd, region, register=BOTH_MODES)
        uffd.register(target.start, target.length, BOTH_MODES)
        uffd.write_protect(source.start, 2 * PAGE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "copy_and_release", slowly)
            copying = in_thread(copy_exactly, uffd, target.start, source.start + PAGE, PAGE)
            await trio.to_thread.run_sync(begun.wait)
            writer = in_thread(source.write, 0, b"w")
            while not daemon.open_faults():
                await trio.lowlevel.checkpoint()
            assert the_open_fault(daemon).reason == "its page is being copied exactly"
            go_on.set()
            await trio.to_thread.run_sync(copying.result)
        await trio.to_thread.run_sync(writer.result)
        assert daemon.statistics().faults[FaultKind.WP, Outcome.UNPROTECTED] == 1
    assert target.read(0, PAGE) == content(2)[PAGE:]


@kernel_test(features=PROTECTED)
async def test_a_daemon_ends_while_copies_wait_for_their_events_to_be_read() -> None:
    pages = 512
    for _ in range(10):
        uffd = Userfaultfd.open(PROTECTED | Features.EVENT_REMOVE)
        source, target = Memory.map(pages * PAGE, MemoryType.SHMEM), Memory.map(pages * PAGE)
        source.write(0, b"x" * source.length)
        uffd.register(source.start, source.length, BOTH_MODES)
        async with open_daemon(shutdown_timeout=0.5) as daemon:
            policy = FirstOf(MoveOrCopy(source), Unprotect())
            daemon.add_region(
                uffd, Region(target.start, target.length, policy), register=BOTH_MODES
            )
            for first in range(0, pages, pages // 4):
                in_thread(target.touch, first * PAGE, pages // 4 * PAGE)
            while sum(daemon.statistics().faults.values()) < pages // 8:
                await trio.lowlevel.checkpoint()
        # Those that were left waiting are still there, and so is their memory.


@pytest.mark.parametrize("by", ["call", "policy"])
@kernel_test(features=Features.MOVE)
async def test_another_userfaultfd_of_the_daemon_hears_that_its_page_has_gone(by: str) -> None:
    source, memory = Memory.map(2 * PAGE, dont_fork=True), Memory.map(2 * PAGE)
    async with open_daemon() as daemon:
        policy = ZeroPage() if by == "call" else StrictMove(source)
        guarded = daemon.guard(memory, policy, features=Features.MOVE)
        await trio.lowlevel.checkpoint()
        region = daemon.guard(
            source,
            CopyFrom(BytesSource(content(2))),
            placement="in_process",
            features=Features.MOVE,
        )
        await trio.to_thread.run_sync(source.touch)
        assert region.pages.filled() == 2
        if by == "call":
            uffd = memory.userfaultfd
            assert uffd is not None
            await daemon.move(uffd, memory.start, source.start, PAGE)
        else:
            await trio.to_thread.run_sync(memory.touch, 0, PAGE)
        assert (region.pages.filled(), guarded.pages.filled()) == (1, 1)
        with pytest.raises(errors.PlacementRefused):
            source.read(0, 1)
        with pytest.raises(errors.RegionIncomplete):
            daemon.remove_region(region)


@kernel_test(features=Features.EVENT_REMOVE)
async def test_a_copy_in_place_of_a_move_changes_nothing_for_buffers() -> None:
    """Afterwards C applies events as before it, and the thread that touches may be trio's own."""
    features = Features.THREAD_ID | Features.EVENT_REMOVE
    memory, source = Memory.map(32 * PAGE), Memory.map(PAGE, MemoryType.SHMEM)
    source.write(0, b"s" * PAGE)
    async with open_daemon() as daemon:
        guarded = daemon.guard(memory, CopyFrom(BytesSource(content(32))), features=features)
        uffd = memory.userfaultfd
        assert uffd is not None
        await daemon.move(
            uffd, memory.start, source.start, PAGE, fallback=Fallback(lose_writes=True)
        )
        buffer = guarded.buffer()
        for page in range(1, 31, 2):
            where = (Advice.DONTNEED, page * PAGE, PAGE)
            in_thread(memory.advise, *where).result()  # the loop does not get its turn
            assert bytes(buffer[page * PAGE : (page + 1) * PAGE]) == bytes(PAGE)
            assert buffer[(page + 1) * PAGE] == content(32)[(page + 1) * PAGE]
        assert buffer[0] == ord("s")


@kernel_test(features=PROTECTED | Features.EVENT_REMOVE)
async def test_what_a_copy_has_emptied_was_not_discarded() -> None:
    """Its source may be memory that is guarded, and its pages are the policy's again."""
    features = PROTECTED | Features.EVENT_REMOVE
    memory, target = Memory.map(2 * PAGE), Memory.map(PAGE)
    async with open_daemon() as daemon:
        uffd = Userfaultfd.open(features)
        region = Region(memory.start, memory.length, CopyFrom(BytesSource(content(2))))
        daemon.add_region(uffd, region, register=BOTH_MODES, resolver="thread")
        uffd.register(target.start, target.length, BOTH_MODES)
        for _ in range(2):
            assert await trio.to_thread.run_sync(memory.read, 0, 2 * PAGE) == content(2)
            await trio.to_thread.run_sync(
                copy_exactly, uffd, target.start, memory.start + PAGE, PAGE
            )
            target.advise(Advice.DONTNEED)
        memory.advise(Advice.DONTNEED, PAGE, PAGE)
        assert await trio.to_thread.run_sync(memory.read, PAGE, PAGE) == bytes(PAGE)
