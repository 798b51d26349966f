"""Windows of `FaultAround` where pages come and go: as wide as before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    AsyncSource,
    BytesSource,
    CopyFrom,
    Daemon,
    FaultAround,
    Memory,
    open_daemon,
)
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from uffdaemon.model.region import AfterRemove

_PAGES = 256
_WINDOW = 32
_DATA = content(_PAGES)


async def _fetch(offset: int, length: int) -> bytes:
    await trio.lowlevel.checkpoint()
    return _DATA[offset : offset + length]


def _brought(daemon: Daemon) -> int:
    """How many faults brought pages, and did not find them there."""
    return sum(
        number
        for (_, outcome), number in daemon.statistics().faults.items()
        if outcome.value == "copied"
    )


@pytest.mark.parametrize("reported", [True, False], ids=["event", "no-event"])
@pytest.mark.parametrize("lowered", [True, False], ids=["rules", "python"])
@kernel_test(features=Features.EVENT_REMOVE)
async def test_memory_that_was_evicted(lowered: bool, reported: bool) -> None:
    source = BytesSource(_DATA) if lowered else AsyncSource(_fetch, len(_DATA))
    after: AfterRemove = "policy" if reported else "zero"
    features = Features.THREAD_ID | (Features.EVENT_REMOVE if reported else Features(0))
    run = trio.to_thread.run_sync
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            daemon.guard(
                memory,
                FaultAround(CopyFrom(source), _WINDOW),
                features=features,
                after_remove=after,
            )
            for times in range(1, 4):
                assert await run(memory.read, 0, memory.length) == _DATA
                assert _brought(daemon) == times * _PAGES // _WINDOW
                await run(memory.advise, Advice.DONTNEED)
            # A part of a window: the rest is there, and stays as it is.
            await run(memory.read, 0, memory.length)
            await run(memory.write, 0, b"!")
            await run(memory.advise, Advice.DONTNEED, 4 * PAGE, 2 * PAGE)
            before = _brought(daemon)
            assert await run(memory.read, 0, memory.length) == b"!" + _DATA[1:]
            assert _brought(daemon) == before + 1


@kernel_test(features=Features.EVENT_REMOVE)
async def test_pages_discarded_for_good_are_left_out() -> None:
    run = trio.to_thread.run_sync
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            features = Features.THREAD_ID | Features.EVENT_REMOVE
            policy = FaultAround(CopyFrom(BytesSource(_DATA)), _WINDOW)
            daemon.guard(memory, policy, features=features)
            await run(memory.advise, Advice.DONTNEED, 4 * PAGE, 2 * PAGE)
            found = await run(memory.read, 0, memory.length)
            assert found == _DATA[: 4 * PAGE] + bytes(2 * PAGE) + _DATA[6 * PAGE :]
