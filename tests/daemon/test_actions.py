"""Every action and every shipped policy, from the fault to what the thread sees."""

from __future__ import annotations

import errno
import signal
from typing import TYPE_CHECKING

import pytest
import trio

from tests.daemon.client import Client, Inside, region_of
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Asked, Recorder
from tests.support.page_contents import HUGE, PAGE, content
from uffdaemon import (
    Advice,
    AsyncSource,
    ByKind,
    ByRange,
    BytesSource,
    Continue,
    CopyFrom,
    Fault,
    FaultAround,
    FaultKind,
    FileSource,
    FirstOf,
    Memory,
    MemoryType,
    MoveOrCopy,
    Outcome,
    Poison,
    StrictMove,
    Unprotect,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.actions import Perform
from uffdaemon.lowlevel import Features, PageCategory, RegisterMode, Userfaultfd, scan_pages
from uffdaemon.moves import Fallback

if TYPE_CHECKING:
    from pathlib import Path

# BUS_MCEERR_AR, or BUS_ADRERR from a kernel that was built without MEMORY_FAILURE.
_POISONED = (4, 2)  # asm-generic/siginfo.h

WP = Features.THREAD_ID | Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM
every_type = pytest.mark.parametrize("kind", list(MemoryType), ids=lambda kind: kind.value)


def page_size_of(kind: MemoryType) -> int:
    return HUGE if kind.huge else PAGE


Counted = dict[tuple[FaultKind, Outcome], int]


def filled_by(found: Counted) -> Counted:
    """The endings that were counted."""
    return {key: count for key, count in found.items() if key[1].final}


@both_sleeps
@every_type
@kernel_test()
async def test_zero_pages_on_every_type(kind: MemoryType, native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(3 * page_size_of(kind), kind)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region_of(memory, ZeroPage()), register=None)
        assert await client.run(Inside.read, memory.page_size - 1, 2) == bytes(2)
        await client.run(Inside.write, 2 * memory.page_size, b"mine")
        assert await client.run(Inside.read, 2 * memory.page_size, 5) == b"mine\0"
        counted = daemon.statistics()
    assert filled_by(counted.faults) == {(FaultKind.MISSING, Outcome.ZEROED): 3}
    assert not counted.open_faults


@both_sleeps
@every_type
@kernel_test()
async def test_copies_from_every_kind_of_source(
    kind: MemoryType, native_sleep: bool, tmp_path: Path
) -> None:
    client = Client()
    uffd = await client.uffd()
    size = page_size_of(kind)
    data = content(3, size)
    (tmp_path / "image").write_bytes(data)

    async def fetch(offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return data[offset : offset + length]

    with (
        FileSource(tmp_path / "image") as mapped,
        FileSource(tmp_path / "image", how="read") as read,
    ):
        sources = BytesSource(data), mapped, read, AsyncSource(fetch, len(data))
        async with open_daemon(native_sleep=native_sleep) as daemon:
            for source in sources:
                # From the second page on: `offset` is where in the source the region begins.
                memory = await client.guarded(2 * size, kind)
                policy = CopyFrom(source, offset=size)
                daemon.add_region(uffd, region_of(memory, policy), register=None)
                found = await client.run(Inside.read_all)
                assert found == data[size:], source
            counted = daemon.statistics()
    assert filled_by(counted.faults) == {(FaultKind.MISSING, Outcome.COPIED): 8}
    assert counted.bytes_done == {Outcome.COPIED: 8 * size}


@both_sleeps
@kernel_test(features=Features.MOVE)
async def test_strict_move_moves_and_leaves_the_source_empty(native_sleep: bool) -> None:
    data = content(4)
    with Memory.map(len(data)) as staging, Memory.map(len(data)) as memory:
        staging.write(0, data)
        async with open_daemon(native_sleep=native_sleep) as daemon:
            daemon.guard(memory, StrictMove(staging), features=Features.MOVE)
            found = await trio.to_thread.run_sync(memory.read, PAGE, 2 * PAGE)
            assert found == data[PAGE : 3 * PAGE]
            counted = daemon.statistics()
            left = scan_pages(staging.start, staging.length, required=PageCategory.PRESENT)
            present = [(each.start, each.length) for each in left]
            assert present == [(staging.start, PAGE), (staging.start + 3 * PAGE, PAGE)]
    assert filled_by(counted.faults) == {(FaultKind.MISSING, Outcome.MOVED): 2}


@kernel_test(features=Features.MOVE)
async def test_strict_move_of_a_whole_transparent_huge_page(transparent_huge_pages: None) -> None:
    data = content(512)
    with (
        Memory.map(HUGE, transparent_huge=True) as staging,
        Memory.map(HUGE, transparent_huge=True) as memory,
    ):
        staging.write(0, data)
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            policy = FaultAround(StrictMove(staging), pages=512)
            daemon.guard(memory, policy, features=Features.MOVE)
            found = await trio.to_thread.run_sync(memory.read, 0, HUGE)
            assert found == data
            assert not scan_pages(staging.start, HUGE, required=PageCategory.PRESENT)
            [found_page] = scan_pages(memory.start, HUGE, required=PageCategory.PRESENT)
            assert found_page.categories & PageCategory.HUGE
    assert [(each.outcome, each.done) for each in recorder.resolved] == [(Outcome.MOVED, HUGE)]


@kernel_test(features=Features.MOVE)
async def test_what_cannot_be_moved_is_copied_only_if_that_was_asked_for() -> None:
    data = content(2)
    with (
        Memory.map(len(data), MemoryType.SHMEM) as staging,  # MOVE is EINVAL
        Memory.map(len(data)) as strict,
        Memory.map(len(data)) as loose,
    ):
        staging.write(0, data)
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            policy = MoveOrCopy(staging, Fallback(lose_writes=True))
            daemon.guard(loose, policy, features=Features.MOVE)
            found = await trio.to_thread.run_sync(loose.read, 0, len(data))
            assert found == data
            # The copy wakes the reader, and is booked after that.
            resolved = await recorder.resolutions(2)
            assert {each.outcome for each in resolved} == {Outcome.COPIED}
            assert not recorder.failed
            assert not scan_pages(staging.start, staging.length)
            staging.write(0, data)

            daemon.guard(
                strict,
                StrictMove(staging),
                features=Features.MOVE,
                on_failure=lambda fault, error: actions.Zero(),
            )
            found = await trio.to_thread.run_sync(strict.read, 0, PAGE)
            assert found == bytes(PAGE)
            [(fault, error)] = recorder.failed
            assert fault.address == strict.start
            assert isinstance(error, errors.WrongMemory)
            assert error.operation == "MOVE"
            assert error.errno == errno.EINVAL


@both_sleeps
@pytest.mark.parametrize("around", [1, 4])
@pytest.mark.parametrize("kind", [MemoryType.SHMEM, MemoryType.HUGETLB], ids=lambda k: k.value)
@kernel_test(features=Features.MINOR_SHMEM | Features.MINOR_HUGETLBFS)
async def test_minor_faults_are_mapped_from_the_page_cache(
    kind: MemoryType, around: int, native_sleep: bool
) -> None:
    client = Client()
    uffd = await client.uffd(Features.MINOR_SHMEM | Features.MINOR_HUGETLBFS)
    size = page_size_of(kind)
    data = content(4, size)
    memory = await client.guarded(len(data), kind, RegisterMode.MINOR)
    await client.run(Inside.fill_alias)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        policy = FaultAround(Continue(), around)
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.read_all) == data
        counted = daemon.statistics()
    faults = 4 // around
    assert filled_by(counted.faults) == {(FaultKind.MINOR, Outcome.MAPPED): faults}
    assert counted.bytes_done == {Outcome.MAPPED: len(data)}


@kernel_test(features=Features.MINOR_SHMEM)
async def test_a_hole_in_the_page_cache_ends_the_window_and_not_the_fault() -> None:
    client = Client()
    uffd = await client.uffd(Features.MINOR_SHMEM)
    data = content(4)
    memory = await client.guarded(len(data), MemoryType.SHMEM, RegisterMode.MINOR)
    await client.run(Inside.fill_alias)
    await client.run(_punch_through_alias, PAGE, PAGE)
    async with open_daemon() as daemon:
        policy = FaultAround(Continue(), 4)
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        for page in (2, 0, 3):
            found = await client.run(Inside.read, page * PAGE, PAGE)
            assert found == data[page * PAGE : (page + 1) * PAGE]
        assert daemon.statistics().failures == {}


def _punch_through_alias(inside: Inside, offset: int, length: int) -> None:
    with inside.memories[-1].alias() as alias:
        alias.advise(Advice.REMOVE, offset, length)


@both_sleeps
@every_type
@kernel_test(features=Features.POISON)
async def test_poison_is_sigbus_in_the_client(
    kind: MemoryType, native_sleep: bool, helpers: Path
) -> None:
    client = Client()
    uffd = await client.uffd()
    size = page_size_of(kind)
    memory = await client.guarded(2 * size, kind)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        policy = ByRange(
            [(0, size, Poison()), (size, size, CopyFrom(BytesSource(content(2, size))))]
        )
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.sigbus, helpers, 0) in _POISONED
        assert await client.run(Inside.sigbus, helpers, 8, write=True) in _POISONED
        assert await client.run(Inside.sigbus, helpers, size) == 0
        counted = daemon.statistics()
        # Without a handler for the signal, that is the end of the client.
        client.start(Inside.read, 0, 1)
        assert await client.status() == -signal.SIGBUS
    assert filled_by(counted.faults) == {
        (FaultKind.MISSING, Outcome.POISONED): 1,
        (FaultKind.MISSING, Outcome.COPIED): 1,
    }


@every_type
@kernel_test(features=WP)
async def test_write_protected_pages_are_let_through_once(kind: MemoryType) -> None:
    client = Client()
    uffd = await client.uffd(WP)
    size = page_size_of(kind)
    data = content(2, size)
    mode = RegisterMode.MISSING | RegisterMode.WP
    memory = await client.guarded(len(data), kind, mode)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        policy = ByKind(
            missing=CopyFrom(BytesSource(data), write_protect=True), write_protect=Unprotect()
        )
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.read_all) == data
        for text in (b"once", b"more"):
            await client.run(Inside.write, size, text)
        assert await client.run(Inside.read, size, 4) == b"more"
    outcomes = [(each.fault.page, each.fault.kind, each.outcome) for each in recorder.resolved]
    assert outcomes == [
        (0, FaultKind.MISSING, Outcome.COPIED),
        (1, FaultKind.MISSING, Outcome.COPIED),
        (1, FaultKind.WP, Outcome.UNPROTECTED),
    ]
    assert recorder.resolved[-1].fault.write


@kernel_test()
async def test_wake_lets_the_thread_find_a_page_filled_by_other_means() -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(PAGE)
    data = content(1)

    def place(fault: Fault) -> actions.Wake:
        uffd.copy(fault.address, data, wake=False)
        return actions.Wake()

    async with open_daemon() as daemon:
        daemon.add_region(uffd, region_of(memory, place), register=None)
        assert await client.run(Inside.read_all) == data
        counted = daemon.statistics()
    assert filled_by(counted.faults) == {(FaultKind.MISSING, Outcome.WOKEN): 1}


@both_sleeps
@pytest.mark.smoke
@kernel_test()
async def test_a_held_thread_is_listed_and_the_others_go_on(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(2)
    memory = await client.guarded(len(data))
    hold = Asked(lambda fault: actions.Hold("for the test") if fault.page == 0 else None)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        policy = FirstOf(hold, CopyFrom(BytesSource(data)))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        stuck = client.start(Inside.read, 5, 1)
        thread = await stuck.thread()
        await hold.times(1)
        assert await client.run(Inside.read, PAGE, PAGE) == data[PAGE:]
        entry = the_open_fault(daemon)
        assert entry.fault.address == memory.start
        assert entry.threads == (thread,)
        assert entry.reason == "for the test"
        assert entry.age > 0
        assert daemon.statistics().faults[FaultKind.MISSING, Outcome.HELD] == 1
        # The application may still place the page by itself.
        uffd.copy(memory.start, data[:PAGE])
        assert await stuck.result() == data[5:6]


@both_sleeps
@kernel_test()
async def test_perform_does_what_no_action_describes(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(2 * PAGE)
    data = content(1)

    async def both_pages(uffd: Userfaultfd, fault: Fault) -> Outcome:
        await trio.lowlevel.checkpoint()
        uffd.zeropage(memory.start + PAGE, PAGE, wake=False)
        uffd.copy(memory.start, data, wake=False)
        return Outcome.COPIED

    async with open_daemon(native_sleep=native_sleep) as daemon:
        policy = Asked(lambda fault: Perform(both_pages))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.read_all) == data + bytes(PAGE)
        counted = daemon.statistics()
    assert len(policy.faults) == 1
    assert filled_by(counted.faults) == {(FaultKind.MISSING, Outcome.COPIED): 1}


@kernel_test()
async def test_transparent_huge_pages_are_copied_into_page_by_page(
    transparent_huge_pages: None,
) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(512)
    memory = await client.guarded(HUGE, huge=True)
    async with open_daemon() as daemon:
        policy = FaultAround(CopyFrom(BytesSource(data)), 64)
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await client.run(Inside.read_all) == data
        counted = daemon.statistics()
    assert filled_by(counted.faults) == {(FaultKind.MISSING, Outcome.COPIED): 8}
