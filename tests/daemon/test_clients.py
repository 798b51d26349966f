"""Clients that are killed, sources that die, daemons that end and their successors."""

from __future__ import annotations

import os
import select
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from structlog.testing import capture_logs

from tests.daemon.client import Client, Inside
from tests.daemon.support import (
    PAGE,
    Asked,
    Gate,
    Recorder,
    both_sleeps,
    content,
    faults_pending,
    open_descriptors,
    region_of,
    the_open_fault,
)
from tests.kernel.harness import kernel_test
from uffdaemon import (
    Advice,
    AsyncSource,
    BytesSource,
    CopyFrom,
    Features,
    FileSource,
    Outcome,
    Poison,
    Retry,
    Shutdown,
    ZeroPage,
    actions,
    errors,
    open_daemon,
    serve,
)

if TYPE_CHECKING:
    from uffdaemon.daemon import Missing

REMOVE = Features.THREAD_ID | Features.EVENT_REMOVE


# -- clients -----------------------------------------------------------------------------------


@both_sleeps
@kernel_test()
async def test_killed_while_it_waits_and_is_watched(native_sleep: bool) -> None:
    doomed, other = Client(), Client()
    uffd, theirs = await doomed.uffd(), await other.uffd()
    data = content(2)
    memory, their_memory = await doomed.guarded(len(data)), await other.guarded(len(data))
    hold = Asked(lambda fault: actions.Hold("for the test"))
    recorder = Recorder()
    async with open_daemon(native_sleep=native_sleep, hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region_of(memory, hold), register=None)
        daemon.add_region(theirs, region_of(their_memory, CopyFrom(BytesSource(data))))
        daemon.watch_client(uffd, doomed.pid)
        doomed.start(Inside.read, 0, 1)
        await hold.times(1)
        doomed.kill()
        await daemon.wait_client_gone(uffd)
        assert not daemon.open_faults()
        # Nobody else has noticed.
        assert await other.run(Inside.read_all) == data
    outcomes = [each.outcome for each in recorder.resolved]
    assert outcomes[0] is Outcome.CLIENT_GONE
    assert set(outcomes[1:]) == {Outcome.COPIED}
    assert not uffd.closed


@both_sleeps
@kernel_test()
async def test_killed_while_its_page_is_fetched_and_not_watched(native_sleep: bool) -> None:
    """The userfaultfd says nothing; the operation does, with ESRCH."""
    client = Client()
    uffd = await client.uffd()
    data = content(2)
    gate, recorder = Gate(data), Recorder()
    memory = await client.guarded(len(data))
    async with open_daemon(native_sleep=native_sleep, hooks=[recorder.hooks]) as daemon:
        policy = CopyFrom(AsyncSource(gate.fetch, len(data)))
        region = daemon.add_region(uffd, region_of(memory, policy), register=None)
        client.start(Inside.read, 0, 1)
        client.start(Inside.read, PAGE, 1)
        await gate.times(2)
        client.kill()
        await client.status()
        assert len(daemon.open_faults()) == 2
        gate.open.set()
        await daemon.wait_client_gone(uffd)
        assert not daemon.open_faults()
        with pytest.raises(errors.NotServed):
            daemon.remove_region(region, "release")
    assert [each.outcome for each in recorder.resolved] == [Outcome.CLIENT_GONE] * 2
    assert not recorder.failed


@kernel_test()
async def test_killed_while_nothing_is_open() -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(PAGE)
    async with open_daemon() as daemon:
        daemon.add_region(uffd, region_of(memory, ZeroPage()), register=None)
        daemon.watch_client(uffd, client.pid)
        client.kill()
        await daemon.wait_client_gone(uffd)


@kernel_test()
async def test_a_process_that_is_gone_cannot_be_watched() -> None:
    client, gone = Client(), Client()
    gone.kill()
    await gone.status()
    uffd = await client.uffd()
    memory = await client.guarded(PAGE)
    async with open_daemon() as daemon:
        with pytest.raises(errors.NotServed):
            daemon.watch_client(uffd, client.pid)
        daemon.add_region(uffd, region_of(memory, ZeroPage()), register=None)
        with pytest.raises(errors.OpenRefused, match=str(gone.pid)):
            daemon.watch_client(uffd, gone.pid)
        assert await client.run(Inside.read, 0, 1) == b"\0"


def _touch_for_ever(inside: Inside) -> None:
    while True:
        inside.touch()
        inside.advise(Advice.DONTNEED)


@both_sleeps
@kernel_test()
async def test_killed_while_it_is_served(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(64 * PAGE)
    recorder = Recorder()
    async with open_daemon(native_sleep=native_sleep, hooks=[recorder.hooks]) as daemon:
        policy = CopyFrom(BytesSource(content(64)))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        daemon.watch_client(uffd, client.pid)
        client.start(_touch_for_ever)
        await recorder.resolutions(500)
        client.kill()
        await daemon.wait_client_gone(uffd)
        assert not daemon.open_faults()
        assert daemon.statistics().failures == {}


@kernel_test()
async def test_serve_returns_when_its_client_is_gone() -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(1)
    memory = await client.guarded(PAGE)
    async with trio.open_nursery() as nursery:
        daemon = await nursery.start(
            lambda task_status: serve(
                uffd,
                [region_of(memory, CopyFrom(BytesSource(data)))],
                register=None,
                client=client.pid,
                task_status=task_status,
            )
        )
        assert await client.run(Inside.read_all) == data
        client.kill()
    assert daemon.statistics().resolved == 1


@pytest.mark.parametrize("missing", ["hold", "poison", "release"])
@kernel_test()
async def test_a_dead_clients_region_can_be_let_go_of(missing: Missing) -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(PAGE)
    async with open_daemon() as daemon:
        region = daemon.add_region(uffd, region_of(memory, ZeroPage()), register=None)
        client.kill()
        await client.status()
        daemon.remove_region(region, missing)
        assert not daemon.open_faults()


# -- sources -----------------------------------------------------------------------------------


def _give_pages(sock: socket.socket, data: bytes) -> None:
    """A store in another process: offset in, a page out."""
    while asked := sock.recv(8):
        offset = int.from_bytes(asked, "little")
        sock.sendall(data[offset : offset + PAGE])


@both_sleeps
@kernel_test(features=Features.POISON)
async def test_a_source_that_dies_is_sigbus_if_so_declared(
    native_sleep: bool, helpers: Path
) -> None:
    data = content(2)
    ours, theirs = socket.socketpair()
    store = os.fork()
    if store == 0:
        ours.close()
        _give_pages(theirs, data)
        os._exit(0)
    theirs.close()
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(len(data))
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    async def fetch(offset: int, length: int) -> bytes:
        await stream.send_all(offset.to_bytes(8, "little"))
        found = b""
        while len(found) < length and (piece := await stream.receive_some()):
            found += piece
        return found

    recorder = Recorder()
    async with open_daemon(native_sleep=native_sleep, hooks=[recorder.hooks]) as daemon:
        region = region_of(
            memory,
            CopyFrom(AsyncSource(fetch, len(data))),
            on_failure=actions.Poison(),
            retry=Retry(first_delay=0.0),
        )
        daemon.add_region(uffd, region, register=None)
        assert await client.run(Inside.read, 0, PAGE) == data[:PAGE]
        os.kill(store, signal.SIGKILL)
        os.waitpid(store, 0)  # noqa: ASYNC222  # it has
        assert await client.run(Inside.sigbus, helpers, PAGE) != 0
        assert await client.run(Inside.read, 0, PAGE) == data[:PAGE]
    [(fault, error)] = recorder.failed
    assert fault.page == 1
    assert isinstance(error, errors.SourceError)


# -- the daemon's end, and its successor -------------------------------------------------------


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
    from uffdaemon import Fault, Userfaultfd

    def policy(fault: Fault) -> actions.Action:
        os.write(said, b"x")
        return actions.Hold("for ever")

    async def main() -> None:
        await serve(Userfaultfd.adopt(os.dup(fd)), [region_of(memory, policy)], register=None)

    trio.run(main)


@both_sleeps
@kernel_test(features=Features.POISON)
async def test_poisoned_at_the_end_and_nobody_forgotten(native_sleep: bool) -> None:
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
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with open_daemon(
                native_sleep=native_sleep, on_shutdown=Shutdown.RESOLVE
            ) as daemon:
                policy = CopyFrom(AsyncSource(gate.fetch, len(data)))
                daemon.add_region(uffd, region_of(memory, policy), register=None)
                reader = client.start(Inside.read_all)
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
