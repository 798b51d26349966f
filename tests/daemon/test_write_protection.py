"""Protection that a policy declares: it holds however a page comes back."""

from __future__ import annotations

import pytest
import trio

from tests.support.kernel_tests import kernel_test
from tests.support.notes import Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    AsyncSource,
    ByKind,
    BytesSource,
    CopyFrom,
    FaultAround,
    FaultKind,
    Memory,
    MemoryType,
    Outcome,
    Unprotect,
    actions,
    open_daemon,
)
from uffdaemon.lowlevel import Features, PageCategory, RegisterMode, scan_pages
from uffdaemon.ranges import HUGE_PAGE_SIZE

_PAGES = 16
_DATA = content(_PAGES)
_BOTH = RegisterMode.MISSING | RegisterMode.WP
_WP = Features.THREAD_ID | Features.PAGEFAULT_FLAG_WP
_ASYNC = _WP | Features.WP_ASYNC | Features.WP_UNPOPULATED


def _written(recorder: Recorder) -> list[int]:
    """The pages whose write-protect faults have been resolved."""
    return sorted({r.fault.page for r in recorder.resolved if r.fault.kind is FaultKind.WP})


@kernel_test(features=_ASYNC)
async def test_a_buffer_where_the_kernel_resolves_writes() -> None:
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            policy = FaultAround(CopyFrom(BytesSource(_DATA), write_protect=True), 4)
            region = daemon.guard(memory, policy, features=_ASYNC, register=_BOTH)
            assert region.why_unsafe() == ""
            with region.buffer() as buffer:
                buffer[5 * PAGE] = 1
                assert buffer[9 * PAGE : 10 * PAGE] == _DATA[9 * PAGE : 10 * PAGE]
            written = PageCategory.WRITTEN | PageCategory.PRESENT
            runs = scan_pages(memory.start, memory.length, required=written)
            assert [(run.start - memory.start, run.length) for run in runs] == [(5 * PAGE, PAGE)]


@pytest.mark.parametrize("sync", [True, False], ids=["reported", "by-the-kernel"])
@pytest.mark.parametrize("lowered", [True, False], ids=["rules", "python"])
@kernel_test(features=_ASYNC | Features.EVENT_REMOVE)
async def test_writes_to_pages_that_were_discarded(lowered: bool, sync: bool) -> None:
    """Zeros in place of contents that were to be protected are protected."""

    async def fetch(offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return _DATA[offset : offset + length]

    source = BytesSource(_DATA) if lowered else AsyncSource(fetch, len(_DATA))
    policy = ByKind(
        missing=FaultAround(CopyFrom(source, write_protect=True), 4), write_protect=Unprotect()
    )
    recorder = Recorder()
    features = (_WP if sync else _ASYNC) | Features.EVENT_REMOVE
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            daemon.guard(memory, policy, features=features, register=_BOTH)
            run = trio.to_thread.run_sync
            await run(memory.read, 0, memory.length)
            await run(memory.write, PAGE, b"!")
            await run(memory.advise, Advice.DONTNEED, 2 * PAGE, 3 * PAGE)
            assert await run(memory.read, 2 * PAGE, PAGE) == bytes(PAGE)  # only read
            assert await run(memory.read, 3 * PAGE, PAGE) == bytes(PAGE)  # read, then written
            await run(memory.write, 3 * PAGE, b"?")
            await run(memory.write, 4 * PAGE, b"?")  # written at once
            assert await run(memory.read, 4 * PAGE, PAGE) == b"?" + bytes(PAGE - 1)
            if sync:
                await recorder.until(lambda: _written(recorder) == [1, 3, 4])
            else:
                found = PageCategory.WRITTEN | PageCategory.PRESENT
                runs = scan_pages(memory.start, memory.length, required=found)
                pages = [((r.start - memory.start) // PAGE, r.length // PAGE) for r in runs]
                assert pages == [(1, 1), (3, 2)]
            kinds = daemon.statistics().faults
            assert kinds.get((FaultKind.MISSING, Outcome.ZEROED), 0) == (0 if lowered else 3)


@pytest.mark.parametrize("kind", [MemoryType.ANONYMOUS, MemoryType.HUGETLB])
@kernel_test(features=_ASYNC | Features.WP_HUGETLBFS_SHMEM)
async def test_zeros_that_are_write_protected(kind: MemoryType) -> None:
    size = HUGE_PAGE_SIZE if kind.huge else PAGE
    with Memory.map(2 * size, kind) as memory:
        async with open_daemon() as daemon:
            features = _WP | Features.WP_HUGETLBFS_SHMEM
            policy = ByKind(
                missing=lambda fault: actions.Zero(write_protect=True), write_protect=Unprotect()
            )
            daemon.guard(memory, policy, features=features, register=_BOTH)
            await trio.to_thread.run_sync(memory.write, size, b"!")
            kinds = daemon.statistics().faults
            assert kinds[FaultKind.MISSING, Outcome.ZEROED] == 1
            assert kinds[FaultKind.WP, Outcome.UNPROTECTED] == 1


@kernel_test(features=_WP)
async def test_no_buffer_where_python_resolves_writes() -> None:
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            policy = ByKind(missing=CopyFrom(BytesSource(_DATA)), write_protect=Unprotect())
            region = daemon.guard(memory, policy, features=_WP, register=_BOTH)
            assert "write-protected pages" in region.why_unsafe()
            await trio.to_thread.run_sync(memory.read, 0, 1)
