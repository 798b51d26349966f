"""Daemons that end, what they leave behind, and who goes on."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING

import pytest
import trio
from structlog.testing import capture_logs

from tests.daemon.client import Client, Inside, faults_pending, region_of
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.descriptors import open_descriptors, open_kept_descriptors
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Asked, Gate
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    AsyncSource,
    BytesSource,
    CopyFrom,
    FileSource,
    Poison,
    Shutdown,
    actions,
    errors,
    open_daemon,
    serve,
)
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from pathlib import Path

    from uffdaemon.model.region import Missing


@both_sleeps
@kernel_test()
async def test_held_and_taken_over_by_a_successor(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(4)
    gate = Gate(data)
    memory = await client.guarded(len(data))
    # The client's own copy is gone: the daemon's side alone keeps the range alive.
    await client.run(Inside.close_uffd)
    with capture_logs() as logs:
        async with open_daemon(native_sleep=native_sleep) as daemon:
            policy = CopyFrom(AsyncSource(gate.fetch, len(data)))
            daemon.add_region(uffd, region_of(memory, policy), register=None)
            readers = [client.start(Inside.read, page * PAGE, PAGE) for page in range(3)]
            threads = {await reader.thread() for reader in readers}
            await gate.times(3)
    left = [str(line["fault"]) for line in logs if line["event"] == "thread left waiting"]
    assert len(left) == 3
    assert all(any(f"thread {thread}:" in line for line in left) for thread in threads)
    # In between, another thread asks, too.
    readers.append(client.start(Inside.read, 3 * PAGE, PAGE))
    await trio.lowlevel.wait_readable(uffd.fileno())
    async with open_daemon(native_sleep=native_sleep) as successor:
        successor.add_region(uffd, region_of(memory, CopyFrom(BytesSource(data))), register=None)
        found = [await reader.result() for reader in readers]
        assert b"".join(found) == data


@kernel_test()
async def test_a_daemon_that_is_killed_is_taken_over_from() -> None:
    """Its process dies with messages it has read; whoever kept the descriptor goes on."""
    client = Client()
    uffd = await client.uffd()
    data = content(2)
    memory = await client.guarded(len(data))
    reading, writing = os.pipe()
    first = Client()  # shares the descriptor

    reader = client.start(Inside.read, 0, len(data))
    first.start(_serve_badly, uffd.fileno(), memory, writing)
    await trio.lowlevel.wait_readable(reading)
    first.kill()
    await first.status()
    async with open_daemon() as daemon:
        daemon.add_region(uffd, region_of(memory, CopyFrom(BytesSource(data))), register=None)
        assert await reader.result() == data


def _serve_badly(inside: Inside, fd: int, memory: tuple[int, int, int], said: int) -> None:
    """A daemon that reads the fault, says so, and never answers."""
    from uffdaemon import Fault
    from uffdaemon.lowlevel import Userfaultfd

    def policy(fault: Fault) -> actions.Action:
        os.write(said, b"x")
        return actions.Hold("for ever")

    async def main() -> None:
        await serve(Userfaultfd.adopt(os.dup(fd)), [region_of(memory, policy)], register=None)

    trio.run(main)


@both_sleeps
@kernel_test(features=Features.POISON)
async def test_every_open_fault_is_poisoned_at_the_end(native_sleep: bool) -> None:
    """One is held, the message of the other has not even been read."""
    clients = [Client(), Client()]
    hold = Asked(lambda fault: actions.Hold("for the test"))
    async with open_daemon(native_sleep=native_sleep, on_shutdown=Shutdown.POISON) as daemon:
        uffds = []
        for client in clients:
            uffds.append(await client.uffd())
            memory = await client.guarded(PAGE)
            daemon.add_region(uffds[-1], region_of(memory, hold), register=None)
        clients[0].start(Inside.read, 0, 1)
        await hold.times(1)
        clients[1].start(Inside.read, 0, 1)
        # Without giving the loop a turn.
        poll = select.poll()
        poll.register(uffds[1])
        poll.poll()
    for client in clients:
        assert await client.status() == -signal.SIGBUS


@both_sleeps
@kernel_test()
async def test_resolved_at_the_end_though_cancelled_from_outside(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(1)
    gate = Gate(data)
    memory = await client.guarded(PAGE)
    reader = client.start(Inside.read_all)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with open_daemon(
                native_sleep=native_sleep, on_shutdown=Shutdown.RESOLVE
            ) as daemon:
                policy = CopyFrom(AsyncSource(gate.fetch, len(data)))
                daemon.add_region(uffd, region_of(memory, policy), register=None)
                await gate.times(1)

                async def let_go() -> None:
                    # A thread's turn later: the end has begun by then.
                    await trio.to_thread.run_sync(lambda: None)
                    gate.open.set()

                nursery.start_soon(let_go)
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert await reader.result() == data


# -- removing regions --------------------------------------------------------------------------


@both_sleeps
@pytest.mark.parametrize("missing", ["hold", "poison", "release"])
@kernel_test(features=Features.POISON)
async def test_a_region_that_is_removed_before_it_is_complete(
    missing: Missing, native_sleep: bool, helpers: Path
) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(4)
    memory = await client.guarded(len(data))
    gate = Gate(data)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        quick = CopyFrom(BytesSource(data))
        slow = CopyFrom(AsyncSource(gate.fetch, len(data)))
        policy = lambda fault: (slow if fault.page == 3 else quick)(fault)  # noqa: E731
        region = daemon.add_region(uffd, region_of(memory, policy, name="image"), register=None)
        assert await client.run(Inside.read, 0, 2 * PAGE) == data[: 2 * PAGE]
        waiting = client.start(Inside.sigbus, helpers, 3 * PAGE)
        await gate.times(1)
        with pytest.raises(errors.RegionIncomplete, match="image lacks 2 of 4"):
            daemon.remove_region(region)
        daemon.remove_region(region, missing)
        assert await client.run(Inside.read, 0, 2 * PAGE) == data[: 2 * PAGE]
        if missing == "poison":
            assert await waiting.result() != 0
            assert await client.run(Inside.sigbus, helpers, 2 * PAGE) != 0
        elif missing == "release":
            assert await waiting.result() == 0
            assert await client.run(Inside.read, 2 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
        else:
            assert the_open_fault(daemon).reason == "region image was removed"
            # It can be served again, and whoever waited is sent to ask again.
            daemon.add_region(uffd, region_of(memory, quick), register=None)
            assert await waiting.result() == 0
            assert await client.run(Inside.read_all) == data


@kernel_test(features=Features.POISON)
async def test_poison_policies_can_be_removed_like_others(helpers: Path) -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(2 * PAGE)
    async with open_daemon() as daemon:
        region = daemon.add_region(uffd, region_of(memory, Poison()), register=None)
        assert await client.run(Inside.sigbus, helpers, 0) != 0
        daemon.remove_region(region, "poison")
        assert await client.run(Inside.sigbus, helpers, PAGE) != 0


# -- descriptors -------------------------------------------------------------------------------


@both_sleeps
@kernel_test(features=Features.THREAD_ID | Features.EVENT_FORK)
async def test_no_descriptor_is_left(native_sleep: bool, tmp_path: Path) -> None:
    features = Features.THREAD_ID | Features.EVENT_FORK
    clients = [Client() for _ in range(3)]
    data = content(2)
    (tmp_path / "image").write_bytes(data)
    await open_kept_descriptors()
    before = open_descriptors()
    for client in clients:
        uffd = await client.uffd(features)
        with (
            uffd,
            FileSource(tmp_path / "image") as mapped,
            FileSource(tmp_path / "image", how="read") as read,
        ):
            async with open_daemon(native_sleep=native_sleep) as daemon:
                for source in (mapped, read):
                    memory = await client.guarded(len(data))
                    daemon.add_region(uffd, region_of(memory, CopyFrom(source)), register=None)
                    daemon.watch_client(uffd, client.pid)
                    assert await client.run(Inside.fork, 0, len(data)) == data
                    assert await client.run(Inside.read_all) == data
        await client.run(Inside.close_uffd)
    assert open_descriptors() == before


@kernel_test()
async def test_pending_faults_are_counted_by_the_kernel() -> None:
    """What the other tests rely on: a stuck thread is visible before its message is read."""
    client = Client()
    uffd = await client.uffd()
    await client.guarded(2 * PAGE)
    readers = [client.start(Inside.read, page * PAGE, 1) for page in range(2)]
    await faults_pending(uffd, 2)
    assert len(uffd.read_events()) == 2
    del readers
