"""Sources on a real kernel: files that shrink, threads that want the same extent, and retries."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from tests.daemon.client import Client, Inside, region_of
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Gate, Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    AsyncSource,
    BytesSource,
    CopyFrom,
    FaultAround,
    FileSource,
    Outcome,
    Retry,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from pathlib import Path

QUICK = Retry(attempts=3, first_delay=0.0, max_delay=0.0)


@both_sleeps
@pytest.mark.parametrize("how", ["map", "read"])
@kernel_test(features=Features.POISON)
async def test_a_file_that_shrinks_is_never_zeros(
    how: str, native_sleep: bool, tmp_path: Path, helpers: Path
) -> None:
    """What it no longer holds is an error, though the last page of a mapping would read as
    zeros, and those after it as SIGBUS, of this process."""
    client = Client()
    uffd = await client.uffd()
    data = content(6)
    path = tmp_path / "image"
    path.write_bytes(data)
    memory = await client.guarded(len(data))
    recorder = Recorder()
    with FileSource(path, how=how) as source:  # type: ignore[arg-type]
        async with open_daemon(native_sleep=native_sleep, hooks=[recorder.hooks]) as daemon:
            region = region_of(
                memory,
                FaultAround(CopyFrom(source), 2),
                on_failure=actions.Poison(),
                retry=QUICK,
            )
            daemon.add_region(uffd, region, register=None)
            assert await client.run(Inside.read, 0, 2 * PAGE) == data[: 2 * PAGE]
            os.truncate(path, 3 * PAGE)
            # Its window is half there: the half that is, is served.
            assert await client.run(Inside.read, 2 * PAGE, PAGE) == data[2 * PAGE : 3 * PAGE]
            for page in (3, 5):
                assert await client.run(Inside.sigbus, helpers, page * PAGE) != 0
            assert await client.run(Inside.read, 0, 3 * PAGE) == data[: 3 * PAGE]
    assert {fault.page for fault, _ in recorder.failed} == {3, 5}
    assert all(isinstance(error, errors.SourceError) for _, error in recorder.failed)


@kernel_test()
async def test_a_file_that_grows_again_ends_the_waiting(tmp_path: Path) -> None:
    """A held thread has its page as soon as somebody asks again and the source can give it."""
    client = Client()
    uffd = await client.uffd()
    data = content(4)
    path = tmp_path / "image"
    path.write_bytes(data)
    memory = await client.guarded(len(data))
    recorder = Recorder()
    with FileSource(path) as source:
        os.truncate(path, PAGE)
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            region = region_of(memory, CopyFrom(source), retry=QUICK)
            daemon.add_region(uffd, region, register=None)
            first = client.start(Inside.read, 2 * PAGE, PAGE)
            await recorder.failures(1)
            assert "SourceFailed" in the_open_fault(daemon).reason
            path.write_bytes(data)
            assert await client.run(Inside.read, 2 * PAGE, PAGE) == data[2 * PAGE : 3 * PAGE]
            assert await first.result() == data[2 * PAGE : 3 * PAGE]
            await recorder.resolutions(1)
            assert not daemon.open_faults()


@both_sleeps
@kernel_test()
async def test_threads_on_one_extent_share_one_fetch(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(16)
    gate = Gate(data)
    memory = await client.guarded(len(data))
    async with open_daemon(native_sleep=native_sleep) as daemon:
        policy = FaultAround(CopyFrom(AsyncSource(gate.fetch, len(data))), 8)
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        readers = [client.start(Inside.read, page * PAGE, PAGE) for page in (0, 1, 1, 3, 7, 9, 15)]
        threads = {await reader.thread() for reader in readers}
        await gate.times(2)
        while {t for entry in daemon.open_faults() for t in entry.threads} != threads:
            await trio.lowlevel.checkpoint()
        gate.open.set()
        found = [await reader.result() for reader in readers]
        counted = daemon.statistics()
    assert sorted(gate.asked) == [(0, 8 * PAGE), (8 * PAGE, 8 * PAGE)]
    assert found == [data[p * PAGE : (p + 1) * PAGE] for p in (0, 1, 1, 3, 7, 9, 15)]
    assert counted.bytes_done == {Outcome.COPIED: len(data)}


@kernel_test()
async def test_only_so_many_fetches_at_a_time() -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(6)
    running, most = 0, 0

    async def fetch(offset: int, length: int) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        running -= 1
        return data[offset : offset + length]

    memory = await client.guarded(len(data))
    async with open_daemon(fetch_limit=2) as daemon:
        policy = CopyFrom(AsyncSource(fetch, len(data)))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        readers = [client.start(Inside.read, page * PAGE, PAGE) for page in range(6)]
        found = [await reader.result() for reader in readers]
    assert b"".join(found) == data
    assert 1 <= most <= 2


@both_sleeps
@kernel_test()
async def test_the_third_attempt_is_as_good_as_the_first(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(1)
    attempts: list[int] = []

    async def fetch(offset: int, length: int) -> bytes:
        attempts.append(offset)
        await trio.lowlevel.checkpoint()
        if len(attempts) == 1:
            raise OSError("down")
        return data[: length if len(attempts) > 2 else length - 1]

    memory = await client.guarded(PAGE)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        region = region_of(memory, CopyFrom(AsyncSource(fetch, PAGE)), retry=QUICK)
        daemon.add_region(uffd, region, register=None)
        assert await client.run(Inside.read_all) == data
        assert daemon.statistics().failures == {}
    assert len(attempts) == 3


@kernel_test()
async def test_a_source_that_is_too_short_for_its_region_from_the_start() -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(4)
    memory = await client.guarded(len(data))
    recorder = Recorder()
    short = BytesSource(data[: 2 * PAGE + 100])
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        region = region_of(memory, FaultAround(CopyFrom(short), 4))
        daemon.add_region(uffd, region, register=None)
        assert await client.run(Inside.read, PAGE, PAGE) == data[PAGE : 2 * PAGE]
        client.start(Inside.read, 2 * PAGE, 1)  # a page that it holds only in part
        [(fault, error)] = await recorder.failures(1)
        with pytest.raises(errors.SourceTooShort):
            await daemon.fill(region)
    assert fault.page == 2
    assert isinstance(error, errors.SourceTooShort)


@both_sleeps
@kernel_test()
async def test_filled_in_the_background_while_threads_ask(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(256)
    memory = await client.guarded(len(data))
    async with open_daemon(native_sleep=native_sleep) as daemon:
        policy = CopyFrom(BytesSource(data))
        region = daemon.add_region(uffd, region_of(memory, policy), register=None)
        readers = [client.start(_read_backwards) for _ in range(2)]
        done = []
        brought = await daemon.fill(region, piece=4 * PAGE, progress=lambda d, t: done.append(d))
        for reader in readers:
            assert await reader.result() == data
        assert done == sorted(done)
        assert done[-1] == len(data)
        counted = daemon.statistics()
        daemon.remove_region(region)
        assert await client.run(Inside.read_all) == data
    assert brought + sum(each for each in [counted.bytes_done[Outcome.COPIED] - brought]) == len(
        data
    )


def _read_backwards(inside: Inside) -> bytes:
    memory = inside.memories[-1]
    pages = [memory.read(offset, PAGE) for offset in range(memory.length - PAGE, -1, -PAGE)]
    return b"".join(reversed(pages))
