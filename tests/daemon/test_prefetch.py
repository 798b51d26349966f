"""Bringing a list of pages, such as the working set of an earlier run."""

from __future__ import annotations

import pytest
import trio

from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import Advice, AsyncSource, BytesSource, CopyFrom, Memory, errors, open_daemon
from uffdaemon.lowlevel import Features

_PAGES = 64
_DATA = content(_PAGES)
_SET = [7, 8, 9, 40, 3, 63]


@pytest.mark.parametrize("fetched", [False, True], ids=["in-memory", "fetched"])
@kernel_test(features=Features.EVENT_REMOVE)
async def test_a_working_set_without_what_was_discarded(fetched: bool) -> None:
    asked: list[tuple[int, int]] = []

    async def fetch(offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        asked.append((offset // PAGE, length // PAGE))
        return _DATA[offset : offset + length]

    source = AsyncSource(fetch, len(_DATA)) if fetched else BytesSource(_DATA)
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            features = Features.THREAD_ID | Features.EVENT_REMOVE
            region = daemon.guard(memory, CopyFrom(source), features=features)
            run = trio.to_thread.run_sync
            await run(memory.advise, Advice.DONTNEED, 8 * PAGE, PAGE)
            assert await daemon.prefetch(region, _SET) == 5 * PAGE
            if fetched:
                assert asked == [(7, 1), (9, 1), (40, 1), (3, 1), (63, 1)]
            assert region.pages.present.runs() == [(3, 4), (7, 8), (9, 10), (40, 41), (63, 64)]
            assert await daemon.prefetch(region, _SET) == 0
            before = daemon.statistics().resolved
            for page in _SET:
                expected = bytes(PAGE) if page == 8 else _DATA[page * PAGE :][:PAGE]
                assert await run(memory.read, page * PAGE, PAGE) == expected
            assert daemon.statistics().resolved == before + 1


@kernel_test()
async def test_pages_that_a_region_does_not_have() -> None:
    with Memory.map(len(_DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, CopyFrom(BytesSource(_DATA)))
            for page in (-1, _PAGES):
                with pytest.raises(errors.InvalidRange, match=f"page {page} of a region of 64"):
                    await daemon.prefetch(region, [0, page])
            with pytest.raises(TypeError):
                await daemon.prefetch(region, ["0"])  # type: ignore[list-item]  # the mistake
            assert region.pages.filled() == 0
            assert await daemon.prefetch(region, []) == 0
