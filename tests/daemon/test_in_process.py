"""Memory of the daemon's own process, touched by threads that do not hold the GIL."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.support.daemons import both_sleeps
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Asked, Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    ByKind,
    BytesSource,
    CopyFrom,
    FaultAround,
    FaultKind,
    Memory,
    MemoryType,
    Outcome,
    StrictMove,
    Unprotect,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Features, RegisterMode


@both_sleeps
@pytest.mark.smoke
@kernel_test()
async def test_guarded_memory_of_this_very_process(native_sleep: bool) -> None:
    data = content(8)
    with Memory.map(len(data)) as memory, Memory.map(2 * PAGE, MemoryType.SHMEM) as shared:
        async with open_daemon(native_sleep=native_sleep) as daemon:
            region = daemon.guard(memory, CopyFrom(BytesSource(data)), name="ours")
            daemon.guard(shared, ZeroPage())
            found = await trio.to_thread.run_sync(memory.read, PAGE, PAGE)
            assert found == data[PAGE : 2 * PAGE]
            assert await trio.to_thread.run_sync(shared.read, 0, 1) == b"\0"
            await daemon.fill(region)
            assert memory.read(0, len(data)) == data
        # After the daemon's end, a complete region needs nobody.
        assert memory.read(0, len(data)) == data


@both_sleeps
@kernel_test()
async def test_memory_that_is_closed_while_it_is_served(native_sleep: bool) -> None:
    data = content(4)
    hold = Asked(lambda fault: actions.Hold("for the test"))
    async with open_daemon(native_sleep=native_sleep) as daemon:
        for _ in range(3):
            with Memory.map(len(data)) as memory:
                daemon.guard(memory, CopyFrom(BytesSource(data)))
                assert await trio.to_thread.run_sync(memory.read, 0, len(data)) == data
        assert daemon.statistics().resolved == 12
        with Memory.map(PAGE) as memory:
            daemon.guard(memory, hold)
        # By a worker thread as well as by this one.
        memory = Memory.map(PAGE)
        daemon.guard(memory, hold)
        await trio.to_thread.run_sync(memory.close)
        assert not daemon.open_faults()


@kernel_test(features=Features.PAGEFAULT_FLAG_WP)
async def test_writes_are_seen_once_a_page_until_they_are_to_be_seen_again() -> None:
    data = content(4)
    recorder = Recorder()
    features = Features.THREAD_ID | Features.PAGEFAULT_FLAG_WP
    with Memory.map(len(data)) as memory:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            policy = ByKind(missing=CopyFrom(BytesSource(data)), write_protect=Unprotect())
            mode = RegisterMode.MISSING | RegisterMode.WP
            region = daemon.guard(memory, policy, features=features, register=mode)
            await daemon.fill(region, source=BytesSource(data))
            assert memory.userfaultfd is not None
            for _ in range(12):
                memory.userfaultfd.write_protect(memory.start, len(data))
                for _ in range(2):
                    await trio.to_thread.run_sync(memory.write, 2 * PAGE, b"x")
            counted = daemon.statistics()
    assert counted.faults == {(FaultKind.WP, Outcome.UNPROTECTED): 12}
    assert counted.failures == {}


@both_sleeps
@kernel_test()
async def test_the_loops_own_thread_may_not_touch_the_memory(native_sleep: bool) -> None:
    data = content(4)
    with Memory.map(len(data)) as memory:
        async with open_daemon(native_sleep=native_sleep) as daemon:
            region = daemon.guard(memory, CopyFrom(BytesSource(data)), placement="in_process")
            for access in (
                lambda: memory.read(0, PAGE),
                lambda: memory.write(PAGE, b"x"),
                memory.touch,
            ):
                with pytest.raises(errors.PlacementRefused, match="worker thread"):
                    access()
            assert await trio.to_thread.run_sync(memory.read, 0, PAGE) == data[:PAGE]
            assert memory.read(0, PAGE) == data[:PAGE]
            await daemon.fill(region)
            assert memory.read(0, len(data)) == data
        with Memory.map(PAGE) as other:
            async with open_daemon(native_sleep=native_sleep) as daemon:
                removed = daemon.guard(other, CopyFrom(BytesSource(data)), placement="in_process")
                daemon.remove_region(removed, missing="release")
                assert other.read(0, 1) == b"\0"


@kernel_test(features=Features.MOVE)
async def test_a_move_stops_at_the_end_of_its_source() -> None:
    data, behind = content(4, seed=1), content(4, seed=2)
    with Memory.map(8 * PAGE) as ours, Memory.map(8 * PAGE) as target:
        ours.write(0, data)
        ours.write(len(data), behind)
        staging = Memory(ours.start, len(data), ours.type, PAGE, -1)
        async with open_daemon() as daemon:
            policy = FaultAround(StrictMove(staging), 8)
            daemon.guard(target, policy, on_failure=lambda fault, error: actions.Zero())
            found = await trio.to_thread.run_sync(target.read, 0, len(data))
            assert found == data
            assert await trio.to_thread.run_sync(target.read, len(data), 1) == b"\0"
            assert daemon.statistics().failures == {"SourceTooShort": 1}
        assert ours.read(len(data), len(behind)) == behind
