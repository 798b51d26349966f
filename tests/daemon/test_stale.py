"""No rule, address or source outlives what it names, and the kernel is asked what is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
import trio
import trio.lowlevel
import trio.testing

from tests.daemon.client import Client, Inside, region_of
from tests.support.calls import in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    ByRange,
    BytesSource,
    CopyFrom,
    FileSource,
    FirstOf,
    Memory,
    Region,
    StrictMove,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Features, Userfaultfd
from uffdaemon.native.ports import Port

if TYPE_CHECKING:
    from uffdaemon import Fault

DATA = content(4)


@pytest.mark.parametrize("how", ["map", "read"])
@kernel_test()
async def test_a_source_is_not_closed_while_it_is_served(
    tmp_path: Path, how: Literal["map", "read"]
) -> None:
    (tmp_path / "image").write_bytes(DATA)
    source = FileSource(tmp_path / "image", how=how)
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, FirstOf(ByRange([(0, len(DATA), CopyFrom(source))])))
            with pytest.raises(BufferError, match="cannot be closed: a daemon serves"):
                source.close()
            assert await trio.to_thread.run_sync(memory.read, 0, len(DATA)) == DATA
            daemon.remove_region(region)
            source.close()
            with pytest.raises(ValueError, match="has been closed"):
                source.address(0, PAGE)


@kernel_test()
async def test_a_source_of_a_client_is_let_go_at_once(tmp_path: Path) -> None:
    """Removed, and at the end of the daemon."""
    (tmp_path / "image").write_bytes(DATA)
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(len(DATA))
    source = FileSource(tmp_path / "image")
    with FileSource(tmp_path / "image") as other:
        async with open_daemon() as daemon:
            region = region_of(memory, CopyFrom(source))
            daemon.add_region(uffd, region, register=None)
            await trio.testing.wait_all_tasks_blocked()
            assert await client.run(Inside.read, 0, PAGE) == DATA[:PAGE]
            daemon.remove_region(region, "hold")
            source.close()
            daemon.add_region(uffd, region_of(memory, CopyFrom(other)), register=None)
            assert await client.run(Inside.read_all) == DATA


@kernel_test()
async def test_an_error_goes_on_past_a_source_that_is_served(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(DATA)
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            source = FileSource(tmp_path / "image")

            def fail() -> None:
                with source:
                    daemon.guard(memory, CopyFrom(source))
                    raise RuntimeError("ours")

            with pytest.raises(RuntimeError, match="ours") as caught:
                fail()
            assert "stays open" in caught.value.__notes__[0]
        source.close()


@kernel_test(features=Features.EVENT_REMOVE)
async def test_removed_while_events_keep_the_rules_from_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The region's own rules are gone when `remove_region` returns, and the others are not."""
    client = Client()
    uffd = await client.uffd(Features.EVENT_REMOVE)
    memory = await client.guarded(2 * len(DATA))
    kept = Region(memory.start, len(DATA), ZeroPage())
    gone = Region(memory.start + len(DATA), len(DATA), CopyFrom(BytesSource(DATA)))
    async with open_daemon() as daemon:
        for region in (kept, gone):
            daemon.add_region(uffd, region, register=None, resolver="thread")
        assert await client.run(Inside.read, len(DATA), PAGE) == DATA[:PAGE]
        monkeypatch.setattr(Port, "publish", lambda _port, _rules: False)
        daemon.remove_region(gone, "hold")
        held = client.start(Inside.read, len(DATA) + PAGE, PAGE)
        await held.thread()
        # A rule would have filled the page before this one.
        assert await client.run(Inside.read, PAGE, PAGE) == bytes(PAGE)
        while not daemon.open_faults():
            await trio.lowlevel.checkpoint()
        uffd.copy(gone.start + PAGE, content(1))
        assert await held.result() == content(1)
        monkeypatch.undo()


@kernel_test(features=Features.MOVE)
async def test_closing_the_source_of_moves_leaves_the_other_rules() -> None:
    """A thread with the GIL held touches what is copied right after."""
    source = Memory.map(len(DATA), dont_fork=True)
    source.write(0, DATA)
    moved, copied = (0, len(DATA), StrictMove(source)), BytesSource(DATA + DATA)
    policy = ByRange([moved, (len(DATA), len(DATA), CopyFrom(copied))])
    with Memory.map(2 * len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, policy)
            with region.buffer() as buffer:
                assert bytes(buffer[: len(DATA)]) == DATA
                source.close()
                assert bytes(buffer[len(DATA) :]) == DATA


@kernel_test(features=Features.EVENT_REMOVE)
async def test_a_discard_while_the_source_is_slow() -> None:
    """The page is discarded while its copy waits for the source's memory, which somebody serves."""
    with Memory.map(PAGE) as slow, Memory.map(PAGE) as memory, Userfaultfd.open() as behind:
        behind.register(slow.start, slow.length)

        class Slow:
            size = PAGE

            def address(self, offset: int, length: int) -> int:
                return slow.start + offset

            async def fetch(self, offset: int, length: int) -> bytes:
                raise NotImplementedError

        def policy(fault: Fault) -> actions.Action:
            return actions.Copy(source)

        source = Slow()

        def serve_slowly() -> None:
            """The discard is over before the source has its page."""
            while not behind.read_events():
                pass
            memory.advise(Advice.DONTNEED)
            behind.copy(slow.start, content(1))

        async with open_daemon() as daemon:
            daemon.guard(memory, policy, features=Features.EVENT_REMOVE)
            serving = in_thread(serve_slowly)
            reading = in_thread(memory.read, 0, PAGE)
            while serving.running or reading.running:
                await trio.lowlevel.checkpoint()
            serving.result()
            assert reading.result() == bytes(PAGE)
            assert await trio.to_thread.run_sync(memory.read, 0, PAGE) == bytes(PAGE)


@kernel_test()
async def test_pages_that_were_dropped_without_an_event_are_missing() -> None:
    with Memory.map(len(DATA)) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, CopyFrom(BytesSource(DATA)))
            await trio.to_thread.run_sync(memory.read, 0, len(DATA))
            memory.advise(Advice.DONTNEED, PAGE, PAGE)
            with pytest.raises(errors.RegionIncomplete, match="lacks 1 of 4"):
                daemon.remove_region(region)
            assert await daemon.fill(region) == PAGE
            daemon.remove_region(region)
            assert memory.read(0, len(DATA)) == DATA
