"""Memory, regions and daemons that come and go leave nothing behind."""

from __future__ import annotations

import gc
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.support.descriptors import open_descriptors
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import content
from uffdaemon import BytesSource, CopyFrom, Memory, open_daemon

if TYPE_CHECKING:
    from uffdaemon import Daemon
    from uffdaemon.placement import PlacementName, ResolverName

DATA = content(4)
POLICY = CopyFrom(BytesSource(DATA))
WAYS: dict[str, tuple[PlacementName, ResolverName]] = {
    "thread": ("native", "thread"),
    "in-thread": ("native", "in-thread"),
    "in_process": ("in_process", "loop"),
}


def _left() -> Counter[str]:
    """What this process has: descriptors, threads, and objects of this library by their type."""
    gc.collect()
    found = Counter(
        type(each).__name__
        for each in gc.get_objects()
        if type(each).__module__.startswith(("uffdaemon", "trio"))
    )
    found["descriptors"] = len(open_descriptors())
    return found


async def _guard_and_let_go(daemon: Daemon, way: str, *, remove: bool) -> None:
    placement, resolver = WAYS[way]
    memory = Memory.map(len(DATA))
    region = daemon.guard(memory, POLICY, placement=placement, resolver=resolver)
    await trio.to_thread.run_sync(memory.touch)
    if remove:
        daemon.remove_region(region)
    uffd = memory.userfaultfd
    assert uffd is not None
    memory.close()
    await daemon.wait_client_gone(uffd)


@pytest.mark.parametrize("remove", [False, True], ids=["closed", "removed"])
@pytest.mark.parametrize("way", WAYS)
@kernel_test()
async def test_memory_that_is_guarded_and_closed(way: str, remove: bool) -> None:
    async with open_daemon() as daemon:
        for _ in range(3):
            await _guard_and_let_go(daemon, way, remove=remove)
        await trio.testing.wait_all_tasks_blocked()
        before = _left()
        for _ in range(30):
            await _guard_and_let_go(daemon, way, remove=remove)
        await trio.testing.wait_all_tasks_blocked()
        more = _left() - before
        assert not {what: count for what, count in more.items() if count >= 15}


@pytest.mark.parametrize("way", WAYS)
@kernel_test()
def test_daemons_one_after_the_other(way: str) -> None:
    async def one() -> None:
        async with open_daemon() as daemon:
            await _guard_and_let_go(daemon, way, remove=False)

    for _ in range(3):
        trio.run(one)
    before = _left()
    for _ in range(30):
        trio.run(one)
    assert not _left() - before


@pytest.mark.parametrize("way", WAYS)
@kernel_test()
def test_daemons_that_guard_the_same_memory(way: str) -> None:
    placement, resolver = WAYS[way]
    with Memory.map(len(DATA)) as memory:

        async def one() -> None:
            async with open_daemon() as daemon:
                daemon.guard(memory, POLICY, placement=placement, resolver=resolver)

        for _ in range(3):
            trio.run(one)
        assert memory.userfaultfd is not None
        before, calls = _left(), len(memory.userfaultfd.on_close)
        for _ in range(30):
            trio.run(one)
        assert not _left() - before
        assert len(memory.userfaultfd.on_close) == calls
