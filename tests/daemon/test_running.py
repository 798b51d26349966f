"""The running program: many clients and regions, other tasks, signals, idleness, and looking in."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.daemon.client import Client, Inside, region_of
from tests.support.calls import in_thread
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Asked, Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    BytesSource,
    CopyFrom,
    Daemon,
    FaultAround,
    Outcome,
    StrictMove,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.errors import PlacementRefused

# -- many --------------------------------------------------------------------------------------


def _map_many(inside: Inside, count: int, pages: int) -> list[tuple[int, int, int]]:
    """Regions that are neighbours of each other in memory."""
    found = []
    for _ in range(count):
        found.append(tuple(inside.map(pages * PAGE)))
        inside.register()
    return found  # type: ignore[return-value]


def _read_them(inside: Inside, start: int, step: int) -> list[bytes]:
    return [memory.read(0, memory.length) for memory in inside.memories[start::step]]


@both_sleeps
@kernel_test()
async def test_many_regions_of_many_clients_in_one_loop(native_sleep: bool) -> None:
    clients = [Client() for _ in range(3)]
    count = 150
    async with open_daemon(native_sleep=native_sleep) as daemon:
        for number, client in enumerate(clients):
            uffd = await client.uffd()
            for index, where in enumerate(await client.run(_map_many, count, 2)):
                policy = CopyFrom(BytesSource(content(2, seed=1000 * number + index)))
                daemon.add_region(uffd, region_of(where, policy), register=None)
        calls = [
            (number, half, client.start(_read_them, half, 2))
            for number, client in enumerate(clients)
            for half in range(2)
        ]
        for number, half, call in calls:
            expected = [content(2, seed=1000 * number + i) for i in range(half, count, 2)]
            assert await call.result() == expected
        counted = daemon.statistics()
    assert counted.resolved == sum(counted.latencies)
    assert counted.bytes_done == {Outcome.COPIED: 3 * count * 2 * PAGE}


@both_sleeps
@kernel_test()
async def test_regions_come_and_go_while_their_neighbour_is_read(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(512)
    memory = await client.guarded(len(data))
    other = content(2, seed=9)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        policy = CopyFrom(BytesSource(data))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        reader = client.start(Inside.read_all, 0)
        for _ in range(20):
            theirs = await client.guarded(len(other))
            added = region_of(theirs, CopyFrom(BytesSource(other)))
            daemon.add_region(uffd, added, register=None)
            assert await client.run(Inside.read_all) == other
            daemon.remove_region(added)
        assert await reader.result() == data


@kernel_test()
async def test_what_cannot_be_guarded_is_refused_by_name() -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(4 * PAGE)
    async with open_daemon() as daemon:
        daemon.add_region(uffd, region_of(memory, ZeroPage(), name="one"), register=None)
        inner = region_of((memory.start + PAGE, PAGE, PAGE), ZeroPage(), name="two")
        with pytest.raises(errors.InvalidRange, match=r"two .*overlaps region one"):
            daemon.add_region(uffd, inner, register=None)
        # Nothing is mapped there, so that nothing can be registered, and nothing stays.
        nowhere = region_of((1 << 40, PAGE, PAGE), ZeroPage())
        for _ in range(2):
            with pytest.raises(errors.RegistrationRefused):
                daemon.add_region(uffd, nowhere)
        for policy in (StrictMove(memory.start), FaultAround(StrictMove(memory.start), 2)):
            moving = region_of((memory.start + (1 << 30), PAGE, PAGE), policy)
            with pytest.raises(PlacementRefused, match="only within the process"):
                daemon.add_region(uffd, moving)
        assert await client.run(Inside.read_all) == bytes(4 * PAGE)


# -- trio goes on ------------------------------------------------------------------------------


def _fault_for_ever(inside: Inside) -> None:
    while True:
        inside.touch()
        inside.advise(Advice.DONTNEED)


@both_sleeps
@pytest.mark.parametrize("lowered", [True, False], ids=["rules", "python"])
@kernel_test()
async def test_all_else_goes_on_while_faults_keep_coming(lowered: bool, native_sleep: bool) -> None:
    """Timers, tasks, worker threads, sockets, signals: none waits for the faults to end, which
    never do."""
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(64 * PAGE)
    policy = ZeroPage()
    async with open_daemon(native_sleep=native_sleep) as daemon, trio.open_nursery() as nursery:
        region = region_of(memory, policy if lowered else Asked(policy))
        daemon.add_region(uffd, region, register=None)
        for _ in range(2):
            client.start(_fault_for_ever)
        ticked = trio.Event()

        async def tick() -> None:
            for _ in range(20):
                await trio.sleep(0.001)
            ticked.set()

        nursery.start_soon(tick)
        await ticked.wait()
        assert await trio.to_thread.run_sync(threading.get_native_id) != os.getpid()
        ours, theirs = trio.socket.socketpair()
        with ours, theirs:
            await theirs.send(b"x")
            assert await ours.recv(1) == b"x"
        with trio.open_signal_receiver(signal.SIGUSR1) as received:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert await anext(aiter(received)) == signal.SIGUSR1
        before = daemon.statistics().resolved
        while daemon.statistics().resolved == before:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


@both_sleeps
@kernel_test()
async def test_timers_threads_and_signals_end_the_sleep(native_sleep: bool) -> None:
    """The same when not a single fault comes."""
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(PAGE)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region_of(memory, ZeroPage()), register=None)
        await trio.sleep(0.05)
        assert await trio.to_thread.run_sync(threading.get_native_id) != os.getpid()
        with trio.open_signal_receiver(signal.SIGUSR1) as received:
            await trio.to_thread.run_sync(os.kill, os.getpid(), signal.SIGUSR1)
            assert await anext(aiter(received)) == signal.SIGUSR1
        assert await client.run(Inside.read_all) == bytes(PAGE)


@both_sleeps
@kernel_test()
async def test_nothing_runs_while_nothing_happens(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(64 * PAGE)
    async with open_daemon(native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region_of(memory, ZeroPage()), register=None)
        await client.run(Inside.touch)
        await trio.sleep(0.1)
        before = _switches()
        await trio.sleep(1.0)
        switches = _switches() - before
    # Going to sleep, and waking up from it: an idle daemon does nothing else.
    assert switches <= 5


def _switches() -> int:
    status = Path("/proc/self/status").read_text("ascii")
    found = re.search(r"^voluntary_ctxt_switches:\s*(\d+)$", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


@both_sleeps
@kernel_test()
async def test_two_daemons_in_one_program(native_sleep: bool) -> None:
    clients = [Client(), Client()]
    data = content(64)
    async with (
        open_daemon(native_sleep=native_sleep) as one,
        open_daemon(native_sleep=native_sleep) as other,
    ):
        for daemon, client in zip((one, other), clients, strict=True):
            uffd = await client.uffd()
            memory = await client.guarded(len(data))
            policy = CopyFrom(BytesSource(data))
            daemon.add_region(uffd, region_of(memory, policy), register=None)
        calls = [client.start(Inside.read_all) for client in clients]
        assert [await call.result() for call in calls] == [data] * 2


# -- looking in --------------------------------------------------------------------------------


async def _stuck(daemon: Daemon, client: Client) -> tuple[int, int]:
    """A thread that is held, and the address at which it is."""
    uffd = await client.uffd()
    memory = await client.guarded(PAGE)
    hold = Asked(lambda fault: actions.Hold("for the test"))
    daemon.add_region(uffd, region_of(memory, hold, name="the image"), register=None)
    thread = await client.start(Inside.read, 0, 1).thread()
    await hold.times(1)
    return thread, memory.start


@both_sleeps
@kernel_test()
async def test_open_faults_are_reported_on_demand_and_on_a_signal(native_sleep: bool) -> None:
    client = Client()
    async with open_daemon(native_sleep=native_sleep) as daemon, trio.open_nursery() as nursery:
        thread, address = await _stuck(daemon, client)
        entry = the_open_fault(daemon)
        assert (entry.threads, entry.fault.address) == ((thread,), address)
        first = entry.age
        assert the_open_fault(daemon).age > first
        dumped = daemon.dump()
        for said in ("1 open fault", str(thread), hex(address), "the image", "for the test"):
            assert said in dumped

        sent = trio.Event()

        class Said(io.StringIO):
            def flush(self) -> None:
                if "for the test" in self.getvalue():
                    sent.set()

        error, sys.stderr = sys.stderr, Said()
        nursery.start_soon(daemon.dump_on_signal, signal.SIGUSR1)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(os.getpid(), signal.SIGUSR1)
        await sent.wait()
        said_by_signal, sys.stderr = sys.stderr.getvalue(), error
        assert re.sub(r"[\d.]+ s,", "", said_by_signal).strip() == re.sub(r"[\d.]+ s,", "", dumped)
        nursery.cancel_scope.cancel()


@both_sleeps
@kernel_test()
async def test_the_figures_add_up(native_sleep: bool) -> None:
    clients = [Client(), Client()]
    data = content(32)
    recorder = Recorder()
    async with open_daemon(native_sleep=native_sleep, hooks=[recorder.hooks]) as daemon:
        for client in clients:
            uffd = await client.uffd()
            memory = await client.guarded(len(data))
            policy = CopyFrom(BytesSource(data))
            daemon.add_region(uffd, region_of(memory, policy), register=None)
            daemon.watch_client(uffd, client.pid)
            readers = [client.start(Inside.read_all) for _ in range(4)]
            for reader in readers:
                assert await reader.result() == data
            client.kill()
            await daemon.wait_client_gone(uffd)
        counted = daemon.statistics()
    told = len(recorder.resolved)
    assert counted.resolved == sum(counted.latencies) == told, (counted, told)
    assert counted.bytes_done == {Outcome.COPIED: 2 * len(data)}
    assert sum(each.done for each in recorder.resolved) == 2 * len(data)
    outcomes = {each.outcome for each in recorder.resolved}
    assert outcomes <= {Outcome.COPIED, Outcome.ALREADY_PRESENT}
    for fraction in (0.5, 0.99, 1.0):
        assert 0 < counted.latency(fraction) <= counted.latency(1.0)


@kernel_test()
async def test_interrupted_by_the_keyboard_while_it_sleeps() -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(PAGE)

    async def serve() -> None:
        async with open_daemon() as daemon:
            daemon.add_region(uffd, region_of(memory, ZeroPage()), register=None)
            in_thread(_interrupt_when_asleep)
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        await serve()
    # Who comes later finds nobody, and is not lost: the next daemon answers.
    reader = client.start(Inside.read_all)
    async with open_daemon() as daemon:
        daemon.add_region(uffd, region_of(memory, ZeroPage()), register=None)
        assert await reader.result() == bytes(PAGE)


def _interrupt_when_asleep() -> None:
    main = Path(f"/proc/self/task/{os.getpid()}")
    while "(sleeping)" not in (main / "status").read_text("ascii"):
        pass
    os.kill(os.getpid(), signal.SIGINT)
