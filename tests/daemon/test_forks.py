"""Children of clients: adopted or closed; and what they share with their parents."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress

import pytest
import trio

from tests.daemon.client import Client, Inside, faults_pending, region_of
from tests.support.calls import Barrier, in_thread
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.descriptors import open_descriptors, open_kept_descriptors
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    BytesSource,
    CopyFrom,
    FaultAround,
    Hooks,
    Memory,
    MemoryType,
    MoveOrCopy,
    Outcome,
    StrictMove,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import (
    Features,
    ForkEvent,
    PageCategory,
    RemoveEvent,
    Userfaultfd,
    scan_pages,
)

FORK = Features.THREAD_ID | Features.EVENT_FORK
FORK_AND_REMOVE = FORK | Features.EVENT_REMOVE


@both_sleeps
@pytest.mark.parametrize("lowered", [True, False], ids=["rules", "python"])
@kernel_test(features=FORK)
async def test_a_child_is_served_as_its_parent_was(lowered: bool, native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd(FORK)
    data = content(8)
    memory = await client.guarded(len(data))
    recorder = Recorder()
    hooks = [recorder.hooks] if lowered else [recorder.hooks, Hooks(before=lambda f, a: None)]
    async with open_daemon(native_sleep=native_sleep, hooks=hooks) as daemon:
        policy = FaultAround(CopyFrom(BytesSource(data)), 2)
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.read, 0, PAGE) == data[:PAGE]
        await client.run(Inside.write, PAGE, b"the parent's")
        expected = data[:PAGE] + b"the parent's" + data[PAGE + 12 :]
        # The child first, then the parent: each brings its own pages.
        assert await client.run(Inside.fork, 0, len(data)) == expected
        await client.run(Inside.write, 2 * PAGE, b"later")
        assert await client.run(Inside.read, 2 * PAGE, 6) == b"later" + data[2 * PAGE + 5 :][:1]
        # And a child that is born after that of another one that has ended.
        now = await client.run(Inside.read_all)
        assert await client.run(Inside.fork, 0, len(data)) == now
        counted = daemon.statistics()
    assert counted.events == {"fork": 2}
    assert counted.failures == {}
    assert [type(event) for event in recorder.events] == [ForkEvent] * 2


@kernel_test(features=FORK_AND_REMOVE)
async def test_what_the_parent_discards_later_is_still_the_childs() -> None:
    client = Client()
    uffd = await client.uffd(FORK_AND_REMOVE)
    data = content(4)
    memory = await client.guarded(len(data))
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        policy = CopyFrom(BytesSource(data))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        go = await client.run(_fork_and_wait)
        await client.run(Inside.advise, Advice.DONTNEED, 0, 2 * PAGE)
        assert await client.run(Inside.read_all) == bytes(2 * PAGE) + data[2 * PAGE :]
        assert await client.run(_let_child_read, go) == data
    assert [type(event) for event in recorder.events] == [ForkEvent, RemoveEvent]


def _fork_and_wait(inside: Inside) -> int:
    """A child that reads everything once it may; its number among what is kept."""
    memory = inside.memories[-1]
    barrier = Barrier()
    reading, writing = os.pipe()
    if os.fork() == 0:
        barrier.wait()
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(memory.read(0, memory.length))
        os._exit(0)
    os.close(writing)
    inside.kept.append((barrier, reading))
    return len(inside.kept) - 1


def _let_child_read(inside: Inside, which: int) -> bytes:
    kept = inside.kept[which]
    assert isinstance(kept, tuple)
    barrier, reading = kept
    barrier.cross()
    with os.fdopen(reading, "rb") as pipe:
        return bytes(pipe.read())


@both_sleeps
@kernel_test(features=FORK)
async def test_a_child_that_is_not_wanted_reads_zeros_for_what_is_missing(
    native_sleep: bool,
) -> None:
    client = Client()
    uffd = await client.uffd(FORK)
    data = content(4)
    memory = await client.guarded(len(data))
    asked: list[ForkEvent] = []

    def decide(event: ForkEvent) -> str:
        asked.append(event)
        return "close"

    await open_kept_descriptors()
    before = open_descriptors()
    async with open_daemon(on_fork=decide, native_sleep=native_sleep) as daemon:  # type: ignore[arg-type]
        policy = CopyFrom(BytesSource(data))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.read, 0, PAGE) == data[:PAGE]
        found = await client.run(Inside.fork, 0, len(data))
        assert found == data[:PAGE] + bytes(3 * PAGE)
        assert await client.run(Inside.read_all) == data
    assert len(asked) == 1
    assert open_descriptors() == before


@kernel_test(features=FORK)
async def test_a_decision_that_raises_loses_no_child() -> None:
    client = Client()
    uffd = await client.uffd(FORK)
    data = content(4)
    memory = await client.guarded(len(data))

    def decide(event: ForkEvent) -> str:
        raise LookupError("no idea")

    async with open_daemon(on_fork=decide) as daemon:  # type: ignore[arg-type]
        policy = CopyFrom(BytesSource(data))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.fork, 0, len(data)) == data
        assert daemon.statistics().failures == {"HookRaised": 1}


@kernel_test(features=FORK)
async def test_a_child_that_lives_and_lacks_pages_never_reads_zeros() -> None:
    """The daemon that ends hands the child's descriptor on instead of closing it."""
    client = Client()
    uffd = await client.uffd(FORK)
    data = content(4)
    memory = await client.guarded(len(data))
    policy = CopyFrom(BytesSource(data))
    async with open_daemon() as daemon:
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        which = await client.run(_fork_and_wait)
    [orphan] = daemon.orphans
    reader = client.start(_let_child_read, which)
    await trio.lowlevel.wait_readable(orphan.fileno())
    async with open_daemon() as successor:
        successor.add_region(orphan, region_of(memory, policy), register=None)
        assert await reader.result() == data
    orphan.close()


# -- pages that are shared with a child --------------------------------------------------------


def _nothing(inside: Inside) -> None:
    """The child is there, and shares its parent's pages: that is all it has to do."""


@kernel_test(features=Features.MOVE)
async def test_strict_move_says_that_a_page_is_shared() -> None:
    data = content(2)
    staging, memory = Memory.map(len(data)), Memory.map(len(data))
    staging.write(0, data)
    sharing = Client()
    await sharing.run(_nothing)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.guard(memory, StrictMove(staging), features=Features.MOVE, name="the region")
        reader = in_thread(memory.read, 0, len(data))
        [(_, error)] = await recorder.failures(1)
        entry = the_open_fault(daemon)
        assert isinstance(error, errors.PageShared)
        assert "shared with another process" in entry.reason
        # Nothing was copied behind anybody's back, and nothing was lost.
        assert not scan_pages(memory.start, memory.length, required=PageCategory.PRESENT)
        assert staging.read(0, len(data)) == data
        # Once the page is the process's own again, the thread that asks again gets it.
        sharing.kill()
        await sharing.status()
        staging.advise(Advice.POPULATE_WRITE)
        assert memory.userfaultfd is not None
        memory.userfaultfd.wake(memory.start, PAGE)
        assert await trio.to_thread.run_sync(reader.result) == data
    # One ending for the fault that was held, and one for the other page.
    assert [each.outcome for each in recorder.resolved] == [Outcome.MOVED, Outcome.MOVED]


@kernel_test(features=Features.MOVE)
async def test_move_or_copy_unshares_and_moves() -> None:
    data = content(4)
    staging, memory = Memory.map(len(data)), Memory.map(len(data))
    staging.write(0, data)
    sharing = Client()
    await sharing.run(_nothing)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        policy = FaultAround(MoveOrCopy(staging), 2)
        daemon.guard(memory, policy, features=Features.MOVE)
        found = await trio.to_thread.run_sync(memory.read, 0, len(data))
        assert found == data
    assert not recorder.failed
    assert {each.outcome for each in recorder.resolved} == {Outcome.UNSHARED_AND_MOVED}
    assert not scan_pages(staging.start, staging.length, required=PageCategory.PRESENT)


@kernel_test(features=Features.MOVE)
async def test_neighbours_of_which_none_can_be_moved_each_fail_once() -> None:
    """Two threads at once, whose operations are merged, refused, and tried apart."""
    data = content(2)
    with Memory.map(len(data), MemoryType.SHMEM) as staging:
        memory = Memory.map(len(data))
        uffd = Userfaultfd.open(Features.MOVE | Features.THREAD_ID)
        uffd.register(memory.start, memory.length)
        readers = [in_thread(memory.read, page * PAGE, 1) for page in range(2)]
        await faults_pending(uffd, 2)
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            guarded = (memory.start, memory.length, PAGE)
            zero = actions.Zero()
            region = region_of(guarded, StrictMove(staging), on_failure=lambda *failed: zero)
            daemon.add_region(uffd, region, register=None)
            for reader in readers:
                assert await trio.to_thread.run_sync(reader.result) == b"\0"
    assert sorted(fault.page for fault, _ in recorder.failed) == [0, 1]


@pytest.mark.parametrize("left", [0, 1, 2])
@kernel_test(features=Features.EVENT_FORK)
async def test_a_fork_without_descriptors_ends_nothing(left: int) -> None:
    """The child is served once there are some; the parent's memory all the time.  A fork has one
    event for each userfaultfd."""
    data = content(4)
    size = len(data)
    with Memory.map(size) as memory, Memory.map(size) as other:
        async with open_daemon() as daemon:
            source = BytesSource(data)
            buffers = [daemon.guard(each, CopyFrom(source)).buffer() for each in (memory, other)]
            assert [buffer[0] for buffer in buffers] == [data[0]] * 2
            reading, writing = os.pipe()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            taken = []
            with suppress(OSError):
                while True:
                    taken.append(os.dup(reading))
            for fd in taken[:left]:
                os.close(fd)
            pid = os.fork()
            if pid == 0:
                for each in (memory, other):
                    os.write(writing, ctypes.string_at(each.start, size))
                os._exit(0)
            assert [buffer[PAGE] for buffer in buffers] == [data[PAGE]] * 2
            for fd in taken[left:]:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for _ in buffers:
                assert await trio.to_thread.run_sync(os.read, reading, size) == data
            await trio.to_thread.run_sync(os.waitpid, pid, 0)
            for buffer in buffers:
                assert bytes(buffer) == data
                buffer.release()
