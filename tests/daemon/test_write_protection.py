"""Protection that a policy declares: it holds however a page comes back."""

from __future__ import annotations

import trio

from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import ByKind, BytesSource, CopyFrom, FaultAround, Memory, Unprotect, open_daemon
from uffdaemon.lowlevel import Features, PageCategory, RegisterMode, scan_pages

_PAGES = 16
_DATA = content(_PAGES)
_BOTH = RegisterMode.MISSING | RegisterMode.WP
_WP = Features.THREAD_ID | Features.PAGEFAULT_FLAG_WP
_ASYNC = _WP | Features.WP_ASYNC | Features.WP_UNPOPULATED


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


@kernel_test(features=_WP)
async def test_no_buffer_where_python_resolves_writes() -> None:
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            policy = ByKind(missing=CopyFrom(BytesSource(_DATA)), write_protect=Unprotect())
            region = daemon.guard(memory, policy, features=_WP, register=_BOTH)
            assert "write-protected pages" in region.why_unsafe()
            await trio.to_thread.run_sync(memory.read, 0, 1)
