"""Faults outside every region: what memory that has grown in place gets."""

from __future__ import annotations

import ctypes

import pytest
import trio

from tests.daemon.client import Client, Inside, region_of
from tests.support.daemons import the_open_fault
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    BytesSource,
    CopyFrom,
    Memory,
    Outcome,
    Region,
    ZeroPage,
    open_daemon,
)
from uffdaemon.lowlevel import Features, Userfaultfd

_DATA = content(4)
_FEATURES = Features.THREAD_ID | Features.EVENT_FORK


@pytest.mark.parametrize("given", ["daemon", "region"])
@kernel_test(features=_FEATURES)
async def test_a_default_for_a_client_and_its_children(given: str) -> None:
    client = Client()
    uffd = await client.uffd(_FEATURES)
    start, length, size = await client.guarded(2 * len(_DATA))
    recorder = Recorder()
    default = ZeroPage()
    async with open_daemon(
        hooks=[recorder.hooks], default=default if given == "daemon" else None
    ) as daemon:
        region = region_of((start, length // 2, size), CopyFrom(BytesSource(_DATA)))
        daemon.add_region(
            uffd, region, register=None, default=default if given == "region" else None
        )
        assert await client.run(Inside.read, length // 2 - 1, 2) == _DATA[-1:] + b"\0"
        assert recorder.resolved[-1].outcome is Outcome.ZEROED
        assert recorder.resolved[-1].fault.region.label == (
            f"outside of every region of userfaultfd {uffd.fileno()}"
        )
        found = await client.run(Inside.fork, 0, length)
        assert found == _DATA + bytes(length // 2)
        assert not recorder.failed


@kernel_test()
async def test_memory_that_has_grown_in_place() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    pages = len(_DATA) // PAGE
    # Not closed: the daemon's end leaves the userfaultfd open, and nothing waits.
    memory = Memory.map(2 * len(_DATA))
    memory.unmap(len(_DATA), len(_DATA))
    uffd = Userfaultfd.open()
    async with open_daemon(default=ZeroPage()) as daemon:
        daemon.add_region(uffd, Region(memory.start, len(_DATA), CopyFrom(BytesSource(_DATA))))
        grown = libc.mremap(
            ctypes.c_void_p(memory.start),
            ctypes.c_size_t(len(_DATA)),
            ctypes.c_size_t(2 * len(_DATA)),
            ctypes.c_int(0),
        )
        if grown != memory.start:
            pytest.skip("other memory has been mapped there")
        found = await trio.to_thread.run_sync(memory.read, 0, 2 * pages * PAGE)
        assert found == _DATA + bytes(len(_DATA))


@kernel_test(features=_FEATURES)
async def test_without_a_default_the_fault_is_named_and_waits() -> None:
    client = Client()
    uffd = await client.uffd(_FEATURES)
    start, length, size = await client.guarded(2 * len(_DATA))
    recorder = Recorder()
    policy = CopyFrom(BytesSource(_DATA))
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region_of((start, length // 2, size), policy), register=None)
        daemon.watch_client(uffd, client.pid)

        async def touch() -> None:
            assert await client.run(Inside.read, length // 2, 1) == _DATA[:1]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(touch)
            await recorder.until(lambda: bool(recorder.failed))
            entry = the_open_fault(daemon)
            where = f"outside of every region of userfaultfd {uffd.fileno()} (process {client.pid})"
            assert entry.fault.region.label == where
            assert f"{start + length // 2:#x} is {where}, and there is no `default`" in entry.reason
            daemon.add_region(
                uffd, region_of((start + length // 2, length // 2, size), policy), register=None
            )


@kernel_test()
async def test_a_default_that_is_no_policy() -> None:
    with pytest.raises(TypeError, match="default"):
        open_daemon(default=ZeroPage)  # type: ignore[arg-type]  # the mistake
