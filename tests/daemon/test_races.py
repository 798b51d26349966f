"""Everything at once: threads that touch, write and discard, a fill, windows, slow sources."""

from __future__ import annotations

import pytest
import trio
import trio.lowlevel

from tests.daemon.client import Client, Inside, region_of
from tests.support.daemons import both_sleeps
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    AsyncSource,
    BytesSource,
    CopyFrom,
    FaultAround,
    Hooks,
    Source,
    open_daemon,
)
from uffdaemon.lowlevel import Features

REMOVE = Features.THREAD_ID | Features.EVENT_REMOVE
PAGES = 512


def _live(inside: Inside, first: int, step: int) -> list[str]:
    """Each thread's own pages, in the middle of the others': what was seen that was not due."""
    memory = inside.memories[-1]
    wrong: list[str] = []

    def see(page: int, due: bytes, when: str) -> None:
        found = memory.read(page * PAGE, PAGE)
        if found != due:
            kind = "zeros" if found == bytes(PAGE) else "content" if found == data[page] else "else"
            wrong.append(f"page {page} {when}: {kind}")

    data = [content(1, seed=page) for page in range(PAGES)]
    for page in range(first, PAGES, step):
        if page % 3:
            see(page, data[page], "at first")
        memory.advise(Advice.DONTNEED, page * PAGE, PAGE)
        see(page, bytes(PAGE), "when discarded")
        memory.write(page * PAGE, b"mine")
        see(page, b"mine" + bytes(PAGE - 4), "when written")
        memory.advise(Advice.DONTNEED, page * PAGE, PAGE)
        see(page, bytes(PAGE), "when discarded again")
    return wrong


@both_sleeps
@pytest.mark.parametrize("slow", [False, True], ids=["bytes", "async"])
@pytest.mark.parametrize("lowered", [True, False], ids=["rules", "python"])
@kernel_test(features=REMOVE)
async def test_no_thread_sees_wrong_contents(lowered: bool, slow: bool, native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd(REMOVE)
    data = b"".join(content(1, seed=page) for page in range(PAGES))
    memory = await client.guarded(len(data))

    async def fetch(offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return data[offset : offset + length]

    source: Source = AsyncSource(fetch, len(data)) if slow else BytesSource(data)
    hooks = [] if lowered else [Hooks(before=lambda fault, action: None)]
    async with open_daemon(native_sleep=native_sleep, hooks=hooks) as daemon:
        policy = FaultAround(CopyFrom(source), 8)
        region = daemon.add_region(uffd, region_of(memory, policy), register=None)
        calls = [client.start(_live, first, 4) for first in range(4)]
        await daemon.fill(region, piece=4 * PAGE)
        for call in calls:
            assert await call.result() == []
        assert not daemon.open_faults()
        assert daemon.statistics().failures == {}
        assert await client.run(Inside.read_all) == bytes(len(data))
