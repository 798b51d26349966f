"""Rules that are carried out without the interpreter, by a thread or by those that fault."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.support.kernel_tests import kernel_test
from tests.support.notes import Gate, Recorder
from tests.support.page_contents import HUGE, PAGE, content
from uffdaemon import (
    Advice,
    AsyncSource,
    ByKind,
    BytesSource,
    Continue,
    CopyFrom,
    Daemon,
    FaultKind,
    FileSource,
    GuardedRegion,
    Memory,
    MemoryType,
    Outcome,
    Region,
    Unprotect,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Features, RegisterMode, Userfaultfd

if TYPE_CHECKING:
    from uffdaemon import Fault
    from uffdaemon.actions import Action
    from uffdaemon.placement import ResolverName

both_resolvers = pytest.mark.parametrize("resolver", ["thread", "in-thread"])

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
_libc_held = ctypes.PyDLL(None)  # keeps the GIL around each call
_libc_held.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


# -- rules that change -------------------------------------------------------------------------

_PART = 16 * PAGE
_ROUNDS = 60


@both_resolvers
@kernel_test(features=Features.SIGBUS)
async def test_rules_come_change_and_go_while_faults_arrive(resolver: ResolverName) -> None:
    """Threads fault all the time, in parts that stay; beside them parts come and go."""
    threads, changing = 3, 4
    parts = [content(16, seed=part) for part in range(threads + changing)]
    memory = Memory.map(len(parts) * _PART)
    memory.userfaultfd = uffd = Userfaultfd.open(
        Features.THREAD_ID | (Features.SIGBUS if resolver == "in-thread" else Features(0))
    )
    wrong: list[int] = []
    stop = threading.Event()

    def fault(part: int) -> None:
        rounds = 0
        while rounds < _ROUNDS or not stop.is_set():
            if _libc.memcmp(memory.start + part * _PART, parts[part], _PART):
                wrong.append(part)
            memory.advise(Advice.DONTNEED, part * _PART, _PART)
            rounds += 1

    def add(daemon: Daemon, part: int, data: bytes) -> Region:
        start = memory.start + part * _PART
        region = Region(start, _PART, CopyFrom(BytesSource(data)), PAGE)
        return daemon.add_region(uffd, region, resolver=resolver)

    async with open_daemon() as daemon, trio.open_nursery() as nursery:
        for part in range(threads):
            add(daemon, part, parts[part])
            nursery.start_soon(trio.to_thread.run_sync, fault, part)
        for number in range(_ROUNDS):
            part = threads + number % changing
            data = content(16, seed=100 + number)
            region = add(daemon, part, data)
            # Touched by this very thread, and the rest filled.
            at = part * _PART
            assert ctypes.string_at(memory.start + at, PAGE) == data[:PAGE]
            await daemon.fill(region)
            assert ctypes.string_at(memory.start + at, _PART) == data
            daemon.remove_region(region)
            memory.advise(Advice.DONTNEED, at, _PART)
        stop.set()
    assert not wrong
    assert daemon.statistics().failures == {}
    assert daemon.statistics().resolved >= threads * _ROUNDS * 16


# -- hooks and failures ------------------------------------------------------------------------


@both_resolvers
@kernel_test(features=Features.SIGBUS)
async def test_hooks_hear_of_every_fault_afterwards(resolver: ResolverName) -> None:
    pages = 1000
    data = content(pages)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        memory = Memory.map(len(data))
        region = daemon.guard(memory, CopyFrom(BytesSource(data)), resolver=resolver)
        buffer = region.buffer()
        # With the GIL held, in the thread that will have to call the hooks.
        assert bytes(buffer) == data
        seen = await recorder.resolutions(pages)
    # memcpy begins with the end.
    assert sorted(each.fault.page for each in seen) == list(range(pages))
    assert {each.fault.thread for each in seen} == {threading.get_native_id()}
    assert {(each.outcome, each.done) for each in seen} == {(Outcome.COPIED, PAGE)}
    assert {(each.fault.kind, each.fault.write) for each in seen} == {(FaultKind.MISSING, False)}
    assert all(0 < each.latency < 10**10 for each in seen)
    assert daemon.statistics().faults == {(FaultKind.MISSING, Outcome.COPIED): pages}


@kernel_test()
async def test_a_page_that_cannot_be_had_is_poisoned_without_python(
    helpers: Path, tmp_path: Path
) -> None:
    """The GIL is held from the fault until SIGBUS has come."""
    library = ctypes.PyDLL(str(helpers))
    library.touch.argtypes = [ctypes.c_uint64, ctypes.c_int]
    path = tmp_path / "image"
    data = content(4)
    path.write_bytes(data)
    recorder = Recorder()
    with FileSource(path) as source, Memory.map(len(data)) as memory:
        os.truncate(path, 2 * PAGE)
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            region = daemon.guard(memory, CopyFrom(source), on_failure=actions.Poison())
            assert library.touch(region.start + PAGE, 0) == 0
            assert library.touch(region.start + 2 * PAGE, 0) != 0
            assert library.touch(region.start + 3 * PAGE, 1) != 0
            failed = await recorder.failures(2)
            assert [fault.page for fault, _ in failed] == [2, 3]
            assert {type(error) for _, error in failed} == {errors.SourceFailed}
            seen = await recorder.resolutions(3)
            outcomes = [Outcome.COPIED, Outcome.POISONED, Outcome.POISONED]
            assert [each.outcome for each in seen] == outcomes
        assert daemon.statistics().failures == {"SourceFailed": 2}


# -- discarded pages, and pages of the page cache ----------------------------------------------


@pytest.mark.parametrize("kind", [MemoryType.HUGETLB, MemoryType.HUGETLB_PRIVATE])
@both_resolvers
@kernel_test(features=Features.EVENT_REMOVE | Features.MISSING_HUGETLBFS | Features.SIGBUS)
async def test_discarded_huge_pages_are_zeros(resolver: ResolverName, kind: MemoryType) -> None:
    data = content(2, HUGE)
    memory = Memory.map(len(data), kind)
    async with open_daemon() as daemon:
        region = daemon.guard(
            memory,
            CopyFrom(BytesSource(data)),
            resolver=resolver,
            features=Features.THREAD_ID | Features.EVENT_REMOVE,
        )
        buffer = region.buffer()
        assert bytes(buffer[HUGE:]) == data[HUGE:]
        advice = mmap.MADV_REMOVE if kind is MemoryType.HUGETLB else mmap.MADV_DONTNEED
        for offset in (HUGE, 0):  # what is there, and what is not
            assert _libc_held.madvise(memory.start + offset, HUGE, advice) == 0
            assert bytes(buffer[offset : offset + HUGE]) == bytes(HUGE)
    del buffer
    memory.close()


@both_resolvers
@kernel_test(features=Features.EVENT_REMOVE | Features.EVENT_FORK | Features.SIGBUS)
async def test_who_notes_what_was_discarded(resolver: ResolverName) -> None:
    """C does until Python has, and then looks at what Python has noted.  Nobody but C can answer:
    the thread that touches holds the GIL, and is the event loop's."""
    pages, recorder = 16, Recorder()
    data = content(pages)
    with Memory.map(len(data)) as memory:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            region = daemon.guard(
                memory,
                CopyFrom(BytesSource(data)),
                resolver=resolver,
                features=Features.THREAD_ID | Features.EVENT_REMOVE,
            )
            server = daemon._servers.of(region)
            buffer = region.buffer(readonly=True)

            def holds(page: int, expected: bytes, buffer: memoryview = buffer) -> None:
                assert bytes(buffer[page * PAGE : (page + 1) * PAGE]) == expected

            def discard(page: int) -> None:
                assert _libc_held.madvise(memory.start + page * PAGE, PAGE, mmap.MADV_DONTNEED) == 0

            def original(page: int) -> bytes:
                return data[page * PAGE : (page + 1) * PAGE]

            holds(1, original(1))
            discard(1)
            discard(3)  # before it was ever touched
            server._port.settle()
            # Known as soon as the event was read, and before Python has heard of it.
            assert region.pages.removed.runs() == [(1, 2), (3, 4)]
            assert len(recorder.events) == 0
            holds(1, bytes(PAGE))
            await recorder.until(lambda: len(recorder.events) == 2)
            await trio.testing.wait_all_tasks_blocked()
            assert region.pages.removed.runs() == [(1, 2), (3, 4)]
            holds(3, bytes(PAGE))
            holds(2, original(2))
            discard(1)
            holds(1, bytes(PAGE))
            holds(4, original(4))
            del buffer, holds


@both_resolvers
@kernel_test(features=Features.MINOR_SHMEM | Features.SIGBUS)
async def test_what_the_page_cache_has_is_mapped(resolver: ResolverName) -> None:
    data = content(4)
    with Memory.map(len(data), MemoryType.SHMEM) as memory, memory.alias() as alias:
        alias.write(0, data)
        async with open_daemon() as daemon:
            region = daemon.guard(
                memory,
                ByKind(minor=Continue()),
                resolver=resolver,
                features=Features.THREAD_ID | Features.MINOR_SHMEM,
                register=RegisterMode.MINOR,
            )
            buffer = region.buffer()
            assert bytes(buffer) == data
            del buffer
            found = daemon.statistics().faults
            assert found == {(FaultKind.MINOR, Outcome.MAPPED): 4}


# -- where the resolver runs -------------------------------------------------------------------


@kernel_test()
async def test_the_resolver_moves_to_the_core_of_the_faulting_threads() -> None:
    """As long as all of them are bound to the same core."""
    cores = os.sched_getaffinity(0)
    first, last = min(cores), max(cores)
    pages = 256

    def resolver() -> set[int]:
        [thread] = [
            int(task.name)
            for task in Path("/proc/self/task").iterdir()
            if (task / "comm").read_text() == "uffd-resolver\n"
        ]
        return os.sched_getaffinity(thread)

    def touch(region: GuardedRegion, core: int) -> None:
        os.sched_setaffinity(0, {core})
        try:
            region.touch()
        finally:
            os.sched_setaffinity(0, cores)

    async with open_daemon() as daemon:
        parts = [Memory.map(pages * PAGE) for _ in range(2)]
        here, there = [daemon.guard(part, ZeroPage()) for part in parts]
        assert resolver() == cores
        await trio.to_thread.run_sync(touch, here, first)
        assert resolver() == {first}
        await trio.to_thread.run_sync(touch, there, last)
        assert resolver() == (cores if last != first else {first})


# -- what is Python's --------------------------------------------------------------------------


@both_resolvers
@kernel_test(features=Features.SIGBUS)
async def test_faults_without_a_rule_are_resolved_by_python(resolver: ResolverName) -> None:
    """The thread waits meanwhile, and goes on."""
    data = content(4)
    gate = Gate(data)

    def policy(fault: Fault) -> Action | None:
        if fault.page % 2:
            return actions.Copy(AsyncSource(gate.fetch, len(data)))
        return actions.Copy(BytesSource(data))

    async with open_daemon() as daemon, trio.open_nursery() as nursery:
        region = daemon.guard(Memory.map(len(data)), policy, resolver=resolver)
        found = bytearray(len(data))
        nursery.start_soon(trio.to_thread.run_sync, region.read_into, 0, found)
        assert await gate.times(1) == [(PAGE, PAGE)]
        [waiting] = daemon.open_faults()
        assert waiting.threads != (threading.get_native_id(),)
        gate.open.set()
    assert found == data
    assert gate.asked == [(PAGE, PAGE), (3 * PAGE, PAGE)]


@kernel_test(features=Features.SIGBUS | Features.PAGEFAULT_FLAG_WP)
async def test_a_thread_cannot_tell_itself_of_protected_pages() -> None:
    async with open_daemon() as daemon:
        with Memory.map(PAGE) as memory:
            for register in (RegisterMode.WP, RegisterMode.MISSING | RegisterMode.WP):
                with pytest.raises(errors.PlacementRefused, match="the kind of a fault"):
                    daemon.guard(
                        memory,
                        ByKind(write_protect=Unprotect()),
                        resolver="in-thread",
                        register=register,
                    )
            assert memory.userfaultfd is None
