"""The loop and its sleep: trio goes on as ever, and nothing is overheard."""

from __future__ import annotations

import json
import os
import threading

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from tests.fake.kernel import PAGE, START, FakeUserfaultfd, missing, region, settled
from tests.support.daemons import both_sleeps
from tests.support.notes import Asked, Recorder
from tests.support.page_contents import content
from uffdaemon import BytesSource, CopyFrom, Outcome, Region, ZeroPage, actions, open_daemon
from uffdaemon.ports.trio_sleep import Sleeper


@both_sleeps
async def test_more_messages_than_fit_in_one_read(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    count = 1000
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        policy = CopyFrom(BytesSource(content(count)))
        daemon.add_region(uffd, region(Asked(policy), count))
        uffd.say(*(missing(page, page + 1) for page in range(count)))
        found = await recorder.resolutions(count)
        counted = daemon.statistics()
    assert {each.fault.page for each in found} == set(range(count))
    assert counted.resolved == sum(counted.latencies) == count
    assert counted.bytes_done == {Outcome.COPIED: count * PAGE}


@both_sleeps
async def test_other_tasks_run_while_faults_keep_coming(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    """Each fault brings the next, so that the loop never has nothing to do."""
    ticks = 0
    enough = trio.Event()

    async def tick() -> None:
        nonlocal ticks
        while ticks < 20:
            await trio.lowlevel.checkpoint()
            ticks += 1
        enough.set()

    def policy(fault: object) -> actions.Action:
        uffd.say(missing(0))
        return actions.Zero()

    async with open_daemon(native_sleep=native_sleep) as daemon, trio.open_nursery() as nursery:
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(0))
        nursery.start_soon(tick)
        await trio.sleep(0.01)
        await enough.wait()
        assert daemon.statistics().resolved
        uffd.close()


@both_sleeps
async def test_worker_threads_and_sockets_wake_the_loop(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    async with open_daemon(native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region(ZeroPage()))
        await settled()
        assert await trio.to_thread.run_sync(threading.get_native_id) != os.getpid()
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(theirs.send_all, b"x")
            assert await ours.receive_some(1) == b"x"


@pytest.mark.parametrize("count", [2, 3])
async def test_several_daemons_in_one_program(count: int, uffd: FakeUserfaultfd) -> None:
    """Only one can sleep in trio's place: none may be deaf meanwhile, whoever ends first."""
    recorders = [Recorder() for _ in range(count)]
    descriptors = [FakeUserfaultfd() for _ in range(count)]
    leave = [trio.Event() for _ in range(count)]
    ready = [trio.Event() for _ in range(count)]

    async def run(index: int) -> None:
        async with open_daemon(hooks=[recorders[index].hooks]) as daemon:
            daemon.add_region(descriptors[index], region(lambda fault: actions.Zero()))
            ready[index].set()
            await leave[index].wait()

    async with trio.open_nursery() as nursery:
        for index in range(count):
            nursery.start_soon(run, index)
            await ready[index].wait()
        for first in range(count):
            for index in range(first, count):
                await settled()
                # From a thread, so that nothing else wakes the loop.
                await trio.to_thread.run_sync(descriptors[index].say, missing(first))
                await recorders[index].resolutions(first + 1)
            leave[first].set()
    for descriptor in descriptors:
        descriptor.close()


async def test_a_sleep_that_goes_wrong_is_given_up(uffd: FakeUserfaultfd) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(lambda fault: actions.Zero()))
        await settled()
        sleeper = daemon._servers._sleeper
        assert sleeper is not None
        # What epoll_wait(2) gets is no epoll descriptor any more.
        nothing = os.open("/dev/null", os.O_RDONLY)
        os.dup2(nothing, sleeper._waiter.fd)
        os.close(nothing)
        await settled()
        assert sleeper.failed
        uffd.say(missing(0))
        await recorder.resolutions(1)


async def test_without_trios_descriptor_tasks_do_it(
    uffd: FakeUserfaultfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none(wake: object) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Sleeper, "join", none)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(lambda fault: actions.Zero()))
        uffd.say(missing(0))
        await recorder.resolutions(1)


@both_sleeps
async def test_hundreds_of_regions_come_and_go_while_faults_come(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        regions = []
        for index in range(300):
            start = START + 4 * index * PAGE
            added = Region(start, 2 * PAGE, Asked(ZeroPage()), name=f"number {index}")
            regions.append(daemon.add_region(uffd, added))
            uffd.say(missing(4 * index))
            if index % 3 == 2:
                daemon.remove_region(regions[index - 2], "release")
            if index % 16 == 0:
                await trio.lowlevel.checkpoint()
        found = await recorder.resolutions(300)
        assert not daemon.open_faults()
        # Those that were removed before their fault was read are nobody's: sent to look again.
        outcomes = {each.outcome for each in found}
        assert outcomes <= {Outcome.ZEROED, Outcome.WOKEN}
        for index in range(1, 300, 3):
            uffd.say(missing(4 * index + 1))
        await recorder.resolutions(400)
        assert {each.outcome for each in recorder.resolved[300:]} == {Outcome.ZEROED}


async def test_aggregates_are_logged_if_so_wanted(
    uffd: FakeUserfaultfd, autojump_clock: trio.testing.MockClock
) -> None:
    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks], log_interval=10.0) as daemon:
            daemon.add_region(uffd, region(lambda fault: actions.Zero()))
            uffd.say(missing(0))
            await recorder.resolutions(1)
            await trio.sleep(35.0)
    served = [line for line in logs if line["event"] == "served"]
    assert len(served) == 4
    assert {line["resolved"] for line in served} == {1}
    # A line for so much time, and not one for a fault.
    assert logs == served


async def test_an_uneventful_run_logs_nothing(uffd: FakeUserfaultfd) -> None:
    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            daemon.add_region(uffd, region(lambda fault: actions.Zero()))
            uffd.say(*(missing(page) for page in range(8)))
            await recorder.resolutions(8)
    assert logs == []


async def test_statistics_are_plain_values_if_so_wanted(uffd: FakeUserfaultfd) -> None:
    policy = Asked(lambda fault: actions.Zero() if fault.page else actions.Hold("no"))
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(policy, name="the image"))
        uffd.say(missing(0, thread=9), missing(1))
        await recorder.resolutions(1)
        plain = json.loads(json.dumps(daemon.statistics().as_dict()))
    assert plain["faults"] == {"missing": {"held": 1, "zeroed": 1}}
    assert plain["resolved"] == 1
    assert plain["bytes"] == {"zeroed": PAGE}
    [entry] = plain["open"]
    assert entry["threads"] == [9]
    assert entry["address"] == START
    assert entry["region"] == "the image"
    assert entry["waits_for"] == "nobody"
    assert entry["reason"] == "no"
    assert entry["age_seconds"] > 0
    assert sum(plain["latency_histogram_ns"].values()) == 1
    assert 0 < plain["latency_seconds"]["p50"] <= plain["latency_seconds"]["max"]
