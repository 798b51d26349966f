"""Memory that changes while it is served: discarded, unmapped, moved."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from tests.daemon.client import Client, Inside, faults_pending, region_of
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Asked, Gate, Notes, Recorder
from tests.support.page_contents import HUGE, PAGE, content
from uffdaemon import (
    Advice,
    AsyncSource,
    ByKind,
    BytesSource,
    Continue,
    CopyFrom,
    FaultAround,
    FaultKind,
    Hooks,
    Memory,
    MemoryType,
    Outcome,
    ZeroPage,
    actions,
    native,
    open_daemon,
)
from uffdaemon.lowlevel import Features, RegisterMode, RemoveEvent, Status, Userfaultfd

REMOVE = Features.THREAD_ID | Features.EVENT_REMOVE
UNMAP = Features.THREAD_ID | Features.EVENT_UNMAP
REMAP = UNMAP | Features.EVENT_REMAP

in_c_and_in_python = pytest.mark.parametrize("lowered", [True, False], ids=["rules", "python"])


def hooks_that_keep_faults_in_python(lowered: bool) -> list[Hooks]:
    return [] if lowered else [Hooks(before=lambda fault, action: None)]


# -- discarded ---------------------------------------------------------------------------------


def _discard_and_look(inside: Inside, pages: int) -> list[int]:
    """Read each page, discard it and read it at once; the pages that were not zeros then."""
    wrong = []
    for page in range(pages):
        inside.read(page * PAGE, 1)
        inside.advise(Advice.DONTNEED, page * PAGE, PAGE)
        if inside.read(page * PAGE, PAGE) != bytes(PAGE):
            wrong.append(page)
    return wrong


@both_sleeps
@in_c_and_in_python
@pytest.mark.smoke
@kernel_test(features=REMOVE)
async def test_a_discarded_page_is_zeros_at_once(lowered: bool, native_sleep: bool) -> None:
    """Not one of them shows its old content, however fast it is touched again."""
    client = Client()
    uffd = await client.uffd(REMOVE)
    pages = 500
    memory = await client.guarded(pages * PAGE)
    hooks = hooks_that_keep_faults_in_python(lowered)
    async with open_daemon(native_sleep=native_sleep, hooks=hooks) as daemon:
        policy = CopyFrom(BytesSource(content(pages)))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        wrong = await client.run(_discard_and_look, pages)
        assert wrong == []
        assert daemon.statistics().events == {"remove": pages}


@pytest.mark.parametrize(
    "kind",
    [MemoryType.ANONYMOUS, MemoryType.SHMEM, MemoryType.HUGETLB],
    ids=lambda kind: kind.value,
)
@kernel_test(features=REMOVE)
async def test_the_neighbours_of_a_discarded_page_keep_their_content(kind: MemoryType) -> None:
    client = Client()
    uffd = await client.uffd(REMOVE)
    size = HUGE if kind.huge else PAGE
    data = content(6, size)
    memory = await client.guarded(len(data), kind)
    async with open_daemon() as daemon:
        policy = FaultAround(CopyFrom(BytesSource(data)), 2)
        region = daemon.add_region(uffd, region_of(memory, policy), register=None)
        await client.run(Inside.read, 0, 2 * size)
        advice = Advice.REMOVE if kind.shared else Advice.DONTNEED
        # One that is there, and one that never was.
        await client.run(Inside.advise, advice, size, 2 * size)
        expected = data[:size] + bytes(2 * size) + data[3 * size :]
        assert await client.run(Inside.read_all) == expected
        assert await daemon.fill(region) == 0


@both_sleeps
@kernel_test(features=REMOVE)
async def test_a_page_that_is_discarded_while_it_is_fetched(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd(REMOVE)
    data = content(8)
    gate, recorder = Gate(data), Recorder()
    memory = await client.guarded(len(data))
    async with open_daemon(native_sleep=native_sleep, hooks=[recorder.hooks]) as daemon:
        policy = FaultAround(CopyFrom(AsyncSource(gate.fetch, len(data))), 8)
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        reader = client.start(Inside.read, 3 * PAGE, PAGE)
        await gate.times(1)
        await client.run(Inside.advise, Advice.DONTNEED, 3 * PAGE, PAGE)
        # Answered at once: what it waited for is void.
        assert await reader.result() == bytes(PAGE)
        gate.open.set()
        expected = data[: 3 * PAGE] + bytes(PAGE) + data[4 * PAGE :]
        assert await client.run(Inside.read_all) == expected
    assert recorder.events == [RemoveEvent(memory.start + 3 * PAGE, memory.start + 4 * PAGE)]


async def pending_fault_and_removal(client: Client, uffd: Userfaultfd, probe: int) -> None:
    """Wait until a REMOVE is unread, beside whatever else: operations are refused then."""
    while uffd.zeropage(probe, PAGE).status is not Status.RETRY:
        await trio.lowlevel.checkpoint()


@both_sleeps
@kernel_test(features=REMOVE)
async def test_a_removal_counts_though_the_fault_is_read_first(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd(REMOVE)
    data = content(4)
    memory = await client.guarded(len(data))
    reader = client.start(Inside.read, PAGE, PAGE)
    await reader.thread()
    await trio.lowlevel.wait_readable(uffd.fileno())
    remover = client.start(Inside.advise, Advice.DONTNEED, 0, 2 * PAGE)
    await pending_fault_and_removal(client, uffd, memory.start + 3 * PAGE)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        policy = CopyFrom(BytesSource(data))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await reader.result() == bytes(PAGE)
        await remover.result()
        assert await client.run(Inside.read, 2 * PAGE, PAGE) == data[2 * PAGE : 3 * PAGE]
        counted = daemon.statistics()
    assert counted.events == {"remove": 1}
    assert counted.failures == {}


def _yield_to_everybody(inside: Inside) -> None:
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


@kernel_test(features=REMOVE)
async def test_an_event_in_flight_is_waited_for_with_a_timer() -> None:
    """The client hardly runs before the daemon sleeps, so that its madvise(2) cannot have gone on
    when the daemon, having read of it, asks for zeros: the kernel refuses with EAGAIN."""
    client = Client()
    everywhere = os.sched_getaffinity(0)
    one = {min(everywhere)}
    os.sched_setaffinity(client.pid, one)
    await client.run(_yield_to_everybody)
    uffd = await client.uffd(REMOVE)
    pages = 50  # an attempt each, should somebody else's process have let the client run
    memory = await client.guarded((pages + 1) * PAGE)
    policy = CopyFrom(BytesSource(content(pages)))
    deferred = 0
    for page in range(pages):
        reader = client.start(Inside.read, page * PAGE, PAGE)
        await faults_pending(uffd, 1)
        remover = client.start(Inside.advise, Advice.DONTNEED, page * PAGE, PAGE)
        await pending_fault_and_removal(client, uffd, memory.start + pages * PAGE)
        os.sched_setaffinity(0, one)
        async with open_daemon() as daemon:
            daemon.add_region(uffd, region_of(memory, policy), register=None)
            assert await reader.result() == bytes(PAGE)
            await remover.result()
            counted = daemon.statistics()
        os.sched_setaffinity(0, everywhere)
        assert counted.failures == {}
        deferred = counted.faults.get((FaultKind.MISSING, Outcome.DEFERRED), 0)
        if deferred:
            break
    assert deferred


@kernel_test(features=REMOVE | Features.MINOR_SHMEM)
async def test_a_page_punched_out_of_the_page_cache_under_a_minor_fault() -> None:
    client = Client()
    features = REMOVE | Features.MINOR_SHMEM
    uffd = await client.uffd(features)
    mode = RegisterMode.MISSING | RegisterMode.MINOR
    memory = await client.guarded(4 * PAGE, MemoryType.SHMEM, mode)
    await client.run(Inside.fill_alias)
    reader = client.start(Inside.read, 0, PAGE)
    await trio.lowlevel.wait_readable(uffd.fileno())
    remover = client.start(Inside.advise, Advice.REMOVE, 0, PAGE)
    await pending_fault_and_removal(client, uffd, memory.start + 3 * PAGE)
    async with open_daemon() as daemon:
        policy = ByKind(minor=Continue(), missing=ZeroPage())
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await reader.result() == bytes(PAGE)
        await remover.result()
        assert daemon.statistics().failures == {}


# -- unmapped ----------------------------------------------------------------------------------


@both_sleeps
@in_c_and_in_python
@kernel_test(features=UNMAP)
async def test_what_is_left_of_unmapped_memory_is_served_on(
    lowered: bool, native_sleep: bool
) -> None:
    client = Client()
    uffd = await client.uffd(UNMAP)
    data = content(8)
    memory = await client.guarded(len(data))
    hooks = hooks_that_keep_faults_in_python(lowered)
    async with open_daemon(native_sleep=native_sleep, hooks=hooks) as daemon:
        policy = FaultAround(CopyFrom(BytesSource(data)), 8)
        region = daemon.add_region(uffd, region_of(memory, policy), register=None)
        await client.run(Inside.unmap, 3 * PAGE, 2 * PAGE)
        assert await client.run(Inside.read, 0, 3 * PAGE) == data[: 3 * PAGE]
        assert await client.run(Inside.read, 5 * PAGE, 3 * PAGE) == data[5 * PAGE :]
        counted = daemon.statistics()
        daemon.remove_region(region, "release")
    assert counted.events == {"unmap": 1}
    assert counted.failures == {}


@kernel_test(features=UNMAP)
async def test_a_thread_waiting_in_unmapped_memory_gets_sigsegv() -> None:
    client = Client()
    uffd = await client.uffd(UNMAP)
    memory = await client.guarded(2 * PAGE)
    hold = Asked(lambda fault: actions.Hold("for the test"))
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region_of(memory, hold), register=None)
        client.start(Inside.read, 0, 1)
        await hold.times(1)
        client.start(Inside.unmap, 0, PAGE)
        [resolved] = await recorder.resolutions(1)
        assert await client.status() == -signal.SIGSEGV
    assert resolved.outcome is Outcome.UNMAPPED


def _map_over(inside: Inside, length: int, start: int) -> None:
    """New memory in the place of the old."""
    number, found = native.map_memory(-1, length, 0, PAGE)
    assert number == 0
    assert native.remap_memory(found, length, start) == 0
    inside.memories.append(Memory(start, length, MemoryType.ANONYMOUS, PAGE, -1))


@kernel_test(features=UNMAP)
async def test_new_memory_where_other_memory_was_has_its_own_content() -> None:
    """Again and again, and nothing remembers the region that is gone."""
    client = Client()
    uffd = await client.uffd(UNMAP)
    told = Notes()
    events: list[object] = []

    def unmapped(event: object) -> None:
        events.append(event)
        told.note()

    memory = await client.guarded(4 * PAGE)
    async with open_daemon(hooks=[Hooks(unmap=unmapped)]) as daemon:
        for times in range(1, 11):
            data = content(4, seed=times)
            policy = FaultAround(CopyFrom(BytesSource(data)), 2)
            daemon.add_region(uffd, region_of(memory, policy), register=None)
            assert await client.run(Inside.read, PAGE, 3 * PAGE) == data[PAGE:]
            # In one step: an allocator must not find the place free in between.
            await client.run(_map_over, len(data), memory.start)
            await told.until(lambda times=times: len(events) == times)  # type: ignore[misc]
            await client.run(Inside.register)


# -- moved -------------------------------------------------------------------------------------


@both_sleeps
@in_c_and_in_python
@kernel_test(features=REMAP)
async def test_all_of_it_is_moved(lowered: bool, native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd(REMAP)
    data = content(8)
    memory = await client.guarded(len(data))
    hooks = hooks_that_keep_faults_in_python(lowered)
    async with open_daemon(native_sleep=native_sleep, hooks=hooks) as daemon:
        policy = FaultAround(CopyFrom(BytesSource(data)), 4)
        region = daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.read, PAGE, PAGE) == data[PAGE : 2 * PAGE]
        start = await client.run(Inside.remap)
        assert start != memory.start
        assert await client.run(Inside.read, 5 * PAGE, PAGE) == data[5 * PAGE : 6 * PAGE]
        await daemon.fill(region)
        assert await client.run(Inside.read_all) == data
        daemon.remove_region(region)
        assert daemon.statistics().failures == {}


def _move_part(inside: Inside, offset: int, length: int, target: int) -> None:
    memory = inside.memories[0]
    assert native.remap_memory(memory.start + offset, length, target) == 0


@pytest.mark.parametrize("unmap", [True, False], ids=["unmap-told", "unmap-not-told"])
@in_c_and_in_python
@kernel_test(features=REMAP)
async def test_a_part_is_moved_over_other_guarded_memory(lowered: bool, unmap: bool) -> None:
    """What was there is gone, rules included: the content is that of the part."""
    client = Client()
    uffd = await client.uffd(REMAP if unmap else Features.THREAD_ID | Features.EVENT_REMAP)
    data, other = content(8, seed=1), content(8, seed=2)
    memory = await client.guarded(len(data))
    target = await client.guarded(len(other))
    hooks = hooks_that_keep_faults_in_python(lowered)
    async with open_daemon(hooks=hooks) as daemon:
        for where, what in ((memory, data), (target, other)):
            policy = FaultAround(CopyFrom(BytesSource(what)), 8)
            daemon.add_region(uffd, region_of(where, policy), register=None)
        place = target.start + 2 * PAGE
        await client.run(_move_part, 4 * PAGE, 2 * PAGE, place)
        found = await client.run(Inside.read_all, 1)
        expected = other[: 2 * PAGE] + data[4 * PAGE : 6 * PAGE] + other[4 * PAGE :]
        assert found == expected
        assert await client.run(Inside.read, 0, 4 * PAGE, 0) == data[: 4 * PAGE]
        assert await client.run(Inside.read, 6 * PAGE, 2 * PAGE, 0) == data[6 * PAGE :]
        counted = daemon.statistics()
    assert counted.events["remap"] == 1
    assert counted.failures == {}


@kernel_test(features=REMAP)
async def test_memory_that_is_moved_while_its_page_is_fetched() -> None:
    client = Client()
    uffd = await client.uffd(REMAP)
    data = content(4)
    gate, recorder = Gate(data), Recorder()
    memory = await client.guarded(len(data))
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        policy = CopyFrom(AsyncSource(gate.fetch, len(data)))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        reader = client.start(Inside.read, 0, 1)
        await gate.times(1)
        place = await client.run(Inside.map, len(data))
        client.start(_move_part, 0, len(data), place.start)
        # The reader's memory is gone from where it looks: that is the end of the client.
        with pytest.raises(EOFError):
            await reader.result()
        assert await client.status() == -signal.SIGSEGV
        gate.open.set()
        await recorder.resolutions(1)
        assert not daemon.open_faults()
    assert [each.outcome for each in recorder.resolved] == [Outcome.UNMAPPED]


@kernel_test(features=REMOVE)
async def test_a_held_page_that_is_discarded_is_held_no_more() -> None:
    client = Client()
    uffd = await client.uffd(REMOVE)
    memory = await client.guarded(2 * PAGE)
    hold = Asked(lambda fault: actions.Hold("for the test"))
    async with open_daemon() as daemon:
        daemon.add_region(uffd, region_of(memory, hold), register=None)
        reader = client.start(Inside.read, 0, PAGE)
        await hold.times(1)
        assert the_open_fault(daemon).reason == "for the test"
        await client.run(Inside.advise, Advice.DONTNEED, 0, PAGE)
        assert await reader.result() == bytes(PAGE)
        assert not daemon.open_faults()
