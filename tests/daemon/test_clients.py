"""Clients that are killed, sources that die, daemons that end and their successors."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest
import trio

from tests.daemon.client import Client, Inside, region_of
from tests.daemon.external import until
from tests.support.daemons import both_sleeps
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Asked, Gate, Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    AsyncSource,
    BytesSource,
    CopyFrom,
    Outcome,
    Retry,
    ZeroPage,
    actions,
    errors,
    open_daemon,
    serve,
)
from uffdaemon.lowlevel import Features

if TYPE_CHECKING:
    from pathlib import Path

    from uffdaemon.model.region import Missing
    from uffdaemon.placement import ResolverName

REMOVE = Features.THREAD_ID | Features.EVENT_REMOVE


# -- clients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("native_sleep", [True, False], ids=["in-c", "in-trio"])
@pytest.mark.parametrize("resolver", ["loop", "thread"])
@kernel_test()
async def test_one_that_makes_its_descriptor_blocking_stops_nobody(
    resolver: ResolverName, native_sleep: bool
) -> None:
    data = content(4)
    hostile, other = Client(), Client()
    uffd, theirs = await hostile.uffd(), await other.uffd()
    memory, their_memory = await hostile.guarded(len(data)), await other.guarded(len(data))
    async with open_daemon(native_sleep=native_sleep) as daemon:
        for each, mapped in ((uffd, memory), (theirs, their_memory)):
            region = region_of(mapped, CopyFrom(BytesSource(data)))
            daemon.add_region(each, region, register=None, resolver=resolver)
        for page in range(3):
            await hostile.run(Inside.make_blocking)
            # The daemon reads once more when it has resolved this one.
            assert await hostile.run(Inside.read, page * PAGE, PAGE) == data[page * PAGE :][:PAGE]
            assert await other.run(Inside.read, page * PAGE, PAGE) == data[page * PAGE :][:PAGE]
            await trio.lowlevel.checkpoint()
        # It is set again: else every sleep on it would end at once.
        await until(lambda: not os.get_blocking(uffd.fileno()))


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
async def test_a_dead_clients_region_can_be_removed(missing: Missing) -> None:
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
