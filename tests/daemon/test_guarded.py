"""What `guard` returns: buffers, arrays, and accesses that never hold the GIL."""

from __future__ import annotations

import gc
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
import pytest
import trio

from tests.daemon.external_policies import DATA as MANY
from tests.support.calls import in_thread
from tests.support.deadline import DEADLINE
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE
from uffdaemon import (
    Advice,
    BytesSource,
    CopyFrom,
    Daemon,
    GuardedRegion,
    Memory,
    Watchdog,
    ZeroPage,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.placement import ResolverName

Way: TypeAlias = Literal["thread", "in-thread", "external", "in_process"]
_ALL: tuple[Way, ...] = get_args(Way)
every_way = pytest.mark.parametrize("way", _ALL)
plain_ways = pytest.mark.parametrize("way", _ALL[:3])

_PAGES = 8
_DATA = MANY[: _PAGES * PAGE]


def _guard(daemon: Daemon, way: Way, memory: Memory) -> GuardedRegion:
    if way == "external":
        policy = "tests.daemon.external_policies:copied"
        return daemon.guard(memory, policy, placement="external")
    answer = CopyFrom(BytesSource(_DATA))
    if way == "in_process":
        return daemon.guard(memory, answer, placement="in_process")
    return daemon.guard(memory, answer, resolver=way)


async def _counted(daemon: Daemon, region: GuardedRegion) -> int:
    """How many faults there have been."""
    if region in daemon.external:
        await daemon.external[region].refresh()
    return daemon.statistics().resolved


@every_way
@kernel_test(features=Features.SIGBUS)
async def test_accesses_that_work_everywhere(way: Way) -> None:
    run = trio.to_thread.run_sync
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            region = _guard(daemon, way, memory)
            found = bytearray(PAGE)
            assert await run(region.read_into, PAGE - 9, found) == PAGE
            assert found == _DATA[PAGE - 9 : 2 * PAGE - 9]
            assert await _counted(daemon, region) == 2
            await run(region.write_from, 3 * PAGE - 2, b"four")
            await run(partial(region.touch, 4 * PAGE, PAGE, write=True))
            assert await _counted(daemon, region) == 5
            await run(region.prefault, 0, 6 * PAGE)
            assert await _counted(daemon, region) == 6
            await run(partial(region.prefault, write=True))
            assert await _counted(daemon, region) == _PAGES
            await run(region.read_into, 0, whole := bytearray(len(_DATA)))
            assert whole == _DATA[: 3 * PAGE - 2] + b"four" + _DATA[3 * PAGE + 2 :]
            outside: list[Callable[[], object]] = [
                lambda: region.read_into(len(_DATA) - 1, bytearray(2)),
                lambda: region.write_from(len(_DATA), b"x"),
                lambda: region.touch(0, len(_DATA) + 1),
                lambda: region.read_into(-1, bytearray(1)),
            ]
            for access in outside:
                with pytest.raises(errors.InvalidRange):
                    access()


@plain_ways
@kernel_test(features=Features.SIGBUS)
async def test_memory_stays_where_it_is_while_a_buffer_is_alive(way: Way) -> None:
    memory = Memory.map(len(_DATA))
    async with open_daemon() as daemon:
        region = _guard(daemon, way, memory)
        part = region.array("<u8")[PAGE:]
        for change in (memory.close, memory.remap, partial(memory.unmap, 0, PAGE)):
            with pytest.raises(BufferError, match="buffers of it are alive"):
                change()
        assert part.tobytes() == _DATA[8 * PAGE :]
        buffer = region.buffer(readonly=True)
        del part
        with pytest.raises(BufferError, match="1 buffers"):
            memory.close()
        buffer.release()
        region.prefault()
    memory.close()


@plain_ways
@kernel_test(features=Features.SIGBUS)
async def test_nothing_is_held_that_plain_accesses_may_touch(way: Way) -> None:
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            region = _guard(daemon, way, memory)
            buffer = region.buffer()
            with pytest.raises(errors.PlacementRefused, match=r"buffers of .* exist"):
                daemon.remove_region(region, missing="hold")
            assert bytes(buffer) == _DATA
            buffer.release()
            daemon.remove_region(region, missing="hold")
            assert region.why_unsafe() == "it is no longer served"
            with pytest.raises(errors.PlacementRefused, match="no longer served"):
                region.buffer()


@pytest.mark.parametrize("guarded_first", [False, True])
@pytest.mark.parametrize("resolver", ["thread", "in-thread"])
@kernel_test(features=Features.SIGBUS)
async def test_plain_accesses_while_regions_come_and_go(
    resolver: ResolverName, guarded_first: bool
) -> None:
    """Whoever holds the GIL is answered as long as the kernel watches, and then woken by it."""
    sys.setswitchinterval(1e-5)
    pages = 1000
    policy = CopyFrom(BytesSource(bytes([1]) * pages * PAGE))

    def touch(buffer: memoryview, first: int) -> None:
        for page in range(first, pages, 3):
            assert buffer[page * PAGE] in {0, 1}

    async with open_daemon(watchdog=Watchdog(after=DEADLINE / 2, then="exit")) as daemon:
        for _ in range(150):
            with Memory.map(pages * PAGE) as memory:
                guard = partial(daemon.guard, memory, policy, resolver=resolver, present="keep")
                region = guard() if guarded_first else None
                with memory.export() as buffer:
                    async with trio.open_nursery() as nursery:
                        for first in range(3):
                            nursery.start_soon(trio.to_thread.run_sync, touch, buffer, first)
                        await trio.sleep(0.0005)
                        daemon.remove_region(region or guard(), missing="release")


@plain_ways
@kernel_test(features=Features.SIGBUS)
async def test_errors_come_out_as_they_are_past_arrays_that_are_alive(way: Way) -> None:
    """Its own traceback keeps the frame, and the array in it, alive."""
    left = Memory.map(len(_DATA))

    async def compute() -> None:
        with left:
            async with open_daemon() as daemon:
                array = _guard(daemon, way, left).array()
                assert array[PAGE] == _DATA[PAGE]
                sys.exit(3)

    with pytest.raises(SystemExit) as raised:
        await compute()
    assert raised.value.__notes__ == [f"{left!r} stays mapped: 1 buffers of it are alive"]
    Memory.map(PAGE).close()
    assert left.start, "the array is still alive"
    del raised
    gc.collect()
    Memory.map(PAGE).close()
    assert not left.start
    assert left.userfaultfd is not None
    assert left.userfaultfd.closed


@plain_ways
@kernel_test(features=Features.SIGBUS)
async def test_a_daemon_that_has_ended_gives_no_buffers_and_the_next_one_does(way: Way) -> None:
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            first = _guard(daemon, way, memory)
            assert first.buffer()[0] == _DATA[0]
        for plain in (first.buffer, first.array):
            with pytest.raises(errors.PlacementRefused, match="has ended"):
                plain()
        for _ in range(2):
            async with open_daemon(watchdog=None) as daemon:
                again = _guard(daemon, way, memory)
                assert bytes(again.buffer()[:PAGE]) == _DATA[:PAGE]
                found = np.frombuffer(again.buffer(), "u1")
                assert found[-1] == _DATA[-1]
                del found
        async with open_daemon() as daemon:
            assert bytes(_guard(daemon, way, memory).buffer()) == _DATA


@kernel_test()
async def test_what_is_served_again_is_none_of_the_last_watchdogs() -> None:
    """Not even while the loop is busy, and has no watchdog of its own."""
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon(watchdog=Watchdog(after=0.1, then="exit")) as daemon:
            _guard(daemon, "in_process", memory)
        async with open_daemon(watchdog=None) as daemon:
            region = _guard(daemon, "in_process", memory)
            reader = in_thread(region.read_into, 0, found := bytearray(len(_DATA)))
            time.sleep(0.5)  # noqa: ASYNC251  # that is what is tested
            assert reader.running
            await trio.to_thread.run_sync(reader.result)
            assert found == _DATA


@kernel_test(features=Features.SIGBUS)
async def test_the_placement_is_chosen_when_memory_is_first_guarded() -> None:
    """The userfaultfd is made for it."""
    for first, then in (("thread", "in-thread"), ("in-thread", "thread")):
        with Memory.map(len(_DATA)) as memory:
            async with open_daemon() as daemon:
                _guard(daemon, first, memory)  # type: ignore[arg-type]  # of a tuple of literals
            async with open_daemon() as daemon:
                with pytest.raises(errors.PlacementRefused, match="was first guarded"):
                    _guard(daemon, then, memory)  # type: ignore[arg-type]  # of a tuple of literals


@kernel_test()
async def test_what_belongs_to_another_placement_is_refused_at_once() -> None:
    named = "tests.daemon.external_policies:copied"
    policy = CopyFrom(BytesSource(_DATA))
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            for placement in ("native", "in_process"):
                with pytest.raises(errors.PlacementRefused, match="is the name of a policy"):
                    daemon.guard(memory, named, placement=placement)
            with pytest.raises(errors.PlacementRefused, match="placement='in_process'"):
                daemon.guard(memory, policy, resolver="loop")
            assert memory.userfaultfd is None
            region = daemon.guard(memory, named, placement="external")
            with pytest.raises(errors.NotServed, match="prefault"):
                await daemon.fill(region, source=BytesSource(_DATA))


@kernel_test()
async def test_memory_that_is_cut_into_mappings_is_filled_whole() -> None:
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            region = _guard(daemon, "thread", memory)
            memory.advise(Advice.NOHUGEPAGE, PAGE, 2 * PAGE)
            memory.advise(Advice.HUGEPAGE, 5 * PAGE, PAGE)
            assert await daemon.fill(region) == len(_DATA)
            assert memory.read(0, len(_DATA)) == _DATA


@kernel_test()
async def test_shapes_and_types_of_arrays() -> None:
    memory = Memory.map(len(_DATA))
    async with open_daemon() as daemon:
        region = _guard(daemon, "thread", memory)
        for dtype in ("u1", "<u2", ">i4", "f8", "S7", [("a", "<u4"), ("b", "u1")]):
            kind = np.dtype(dtype)
            count = len(_DATA) // kind.itemsize
            found = region.array(kind)
            assert (found.shape, found.dtype) == ((count,), kind)
            assert found.tobytes() == _DATA[: count * kind.itemsize]
            assert found.flags.writeable
        shaped = region.array("<u4", (2, 3, 5), readonly=True)
        assert shaped.shape == (2, 3, 5)
        assert shaped.tobytes() == _DATA[: 4 * 2 * 3 * 5]
        assert not shaped.flags.writeable
        assert region.array("u1", 7).tobytes() == _DATA[:7]
        assert region.array("u1", 0).shape == (0,)
        with pytest.raises(ValueError, match="buffer is smaller than"):
            region.array("u1", len(_DATA) + 1)
        written = region.array("<u2")
        written[-1] = 0xABCD
        assert bytes(region.buffer()[-2:]) == b"\xcd\xab"


@kernel_test()
async def test_a_daemon_and_what_it_guards_read_well() -> None:
    with Memory.map(PAGE) as memory, Memory.map(PAGE) as other:
        async with open_daemon() as daemon:
            assert repr(daemon) == "<Daemon: 0 userfaultfds, 0 regions, 0 open faults>"
            region = daemon.guard(memory, ZeroPage(), name="image")
            daemon.guard(other, ZeroPage(), placement="in_process")
            assert repr(region) == (
                f"<GuardedRegion 'image': {PAGE} bytes at {memory.start:#x}, policy ZeroPage(), "
                "placement native>"
            )
            assert repr(daemon) == "<Daemon: 2 userfaultfds, 2 regions, 0 open faults>"
            region.touch()
            assert repr(daemon.statistics()).startswith(
                "<Statistics: 1 faults resolved, 0 open; missing: 1 zeroed; bytes: "
            )
        assert repr(daemon).startswith("<Daemon: closed, ")
