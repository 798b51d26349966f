"""Where there is no room for what is read: nobody's fault or event is lost."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import trio
from structlog.testing import capture_logs

from tests.support.calls import in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import Advice, BytesSource, CopyFrom, Memory, actions, open_daemon
from uffdaemon.lowlevel import Features

EVENTS = 5000
REMOVE = Features.THREAD_ID | Features.EVENT_REMOVE


def _discard(memory: Memory) -> None:
    for _ in range(EVENTS):
        memory.advise(Advice.DONTNEED, 0, PAGE)


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


@kernel_test(features=REMOVE)
async def test_without_memory_for_records_reading_waits() -> None:
    data = content(4)
    with Memory.map(len(data)) as memory, capture_logs() as logs:
        async with open_daemon() as daemon:
            source = BytesSource(data)
            daemon.guard(memory, lambda fault: actions.Copy(source), features=REMOVE)
            assert await trio.to_thread.run_sync(memory.read, 0, 1) == data[:1]
            [server] = daemon._servers.own.values()
            discarding = in_thread(_discard, memory)
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (_mapped(), hard))
            while not server._port.shortages:  # the loop does nothing else meanwhile
                os.sched_yield()
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            await trio.to_thread.run_sync(discarding.result)
            assert await trio.to_thread.run_sync(memory.read, 3 * PAGE, PAGE) == data[3 * PAGE :]
            assert daemon.statistics().events == {"remove": EVENTS}
            assert daemon.open_faults() == []
    assert "no memory for more records: reading waits" in [line["event"] for line in logs]


@kernel_test(features=REMOVE)
async def test_a_fault_is_resolved_though_the_queue_is_full() -> None:
    """The loop does nothing, and the events of a thread that discards have to wait."""
    data = content(4)
    with Memory.map(len(data)) as memory:
        async with open_daemon() as daemon:
            buffer = daemon.guard(memory, CopyFrom(BytesSource(data)), features=REMOVE).buffer()
            [server] = daemon._servers.own.values()
            discarding = in_thread(_discard, memory)
            while not server._port.is_full:
                os.sched_yield()
            assert bytes(buffer[PAGE:]) == data[PAGE:]
            await trio.to_thread.run_sync(discarding.result)
            assert bytes(buffer) == bytes(PAGE) + data[PAGE:]
            assert daemon.statistics().events == {"remove": EVENTS}
            buffer.release()
