"""Sources that have to be fetched: retried as configured, shared, limited, and never padded."""

from __future__ import annotations

import array
import errno
import itertools
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from tests.fake.kernel import (
    PAGE,
    START,
    FakeUserfaultfd,
    done,
    failing,
    in_flight,
    missing,
    pages,
    region,
    settled,
)
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.deadline import DEADLINE
from tests.support.notes import Gate, Recorder
from tests.support.page_contents import content
from uffdaemon import (
    AsyncSource,
    BytesSource,
    CopyFrom,
    FaultAround,
    Outcome,
    Retry,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.actions import Hold
from uffdaemon.lowlevel import Code, RemapEvent, RemoveEvent, UnmapEvent

DATA = content(8)
QUICK = Retry(attempts=3, timeout=5.0, first_delay=0.0, max_delay=0.0)
Fetch = Callable[[int, int], Awaitable[object]]


async def _raises(offset: int, length: int) -> object:
    raise OSError(errno.EIO, "the store is down")


async def _too_short(offset: int, length: int) -> object:
    return bytes(length - 1)


async def _too_long(offset: int, length: int) -> object:
    return bytes(length + 1)


async def _empty(offset: int, length: int) -> object:
    return b""


async def _nothing(offset: int, length: int) -> object:
    return None


async def _text(offset: int, length: int) -> object:
    return "x" * length


async def _never(offset: int, length: int) -> object:
    await trio.sleep_forever()


async def _many(offset: int, length: int) -> object:
    raise ExceptionGroup("both replicas", [OSError("one"), OSError("two")])


def _at_once(offset: int, length: int) -> object:
    return bytes(length)


BAD: dict[str, tuple[object, type[Exception], str]] = {
    "raises": (_raises, errors.SourceFailed, "the store is down"),
    "a group": (_many, errors.SourceFailed, "both replicas"),
    "too short": (_too_short, errors.SourceTooShort, "gave 4095 bytes"),
    "too long": (_too_long, errors.SourceTooShort, "gave 4097 bytes"),
    "empty": (_empty, errors.SourceTooShort, "gave 0 bytes"),
    "nothing": (_nothing, errors.SourceFailed, "TypeError"),
    "text": (_text, errors.SourceFailed, "TypeError"),
    "never": (_never, errors.SourceTimedOut, "did not answer in 0.001 s"),
    "no coroutine": (_at_once, errors.SourceFailed, "TypeError"),
}


@pytest.mark.parametrize("declared", [Hold(), actions.Poison()], ids=["hold", "poison"])
@pytest.mark.parametrize("what", BAD)
async def test_a_source_that_fails_ends_as_declared(
    what: str, declared: Hold | actions.Poison, uffd: FakeUserfaultfd
) -> None:
    fetch, kind, said = BAD[what]
    asked: list[int] = []

    async def counting(offset: int, length: int) -> object:
        asked.append(offset)
        return await fetch(offset, length)  # type: ignore[operator]

    recorder = Recorder()
    source = AsyncSource(counting, len(DATA))  # type: ignore[arg-type]
    retry = Retry(attempts=3, timeout=0.001, first_delay=0.0, max_delay=0.0)
    with capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            guarded = region(CopyFrom(source), retry=retry, on_failure=declared)
            daemon.add_region(uffd, guarded)
            uffd.say(missing(2))
            [(_fault, error)] = await recorder.failures(1)
            await settled()
            held = [entry.reason for entry in daemon.open_faults()]
            counted = daemon.statistics()
    assert type(error) is kind
    assert said in str(error)
    assert asked == [2 * PAGE] * 3
    assert counted.failures == {kind.__name__: 1}
    [line] = [line for line in logs if line["event"] == "fault failed"]
    assert "CopyFrom" in line["policy"]
    if isinstance(declared, Hold):
        assert held == [f"{kind.__name__}: {error}"]
        assert uffd.issued == []
    else:
        assert held == []
        assert [(step.code, pages(step)) for step in uffd.issued] == [(Code.POISON, (2, 3))]


@both_sleeps
async def test_a_source_that_works_at_the_third_attempt_is_no_failure(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    attempts: list[int] = []

    async def fetch(offset: int, length: int) -> bytes:
        attempts.append(offset)
        if len(attempts) < 3:
            raise OSError("not yet")
        await trio.lowlevel.checkpoint()
        return DATA[offset : offset + length]

    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        policy = CopyFrom(AsyncSource(fetch, len(DATA)))
        daemon.add_region(uffd, region(policy, retry=QUICK))
        uffd.say(missing(1))
        [resolved] = await recorder.resolutions(1)
        counted = daemon.statistics()
    assert attempts == [PAGE] * 3
    assert resolved.outcome is Outcome.COPIED
    assert counted.failures == {}


async def test_a_wide_fetch_that_fails_is_tried_page_by_page(uffd: FakeUserfaultfd) -> None:
    """What a neighbour lacks is not the fault's trouble."""
    asked: list[tuple[int, int]] = []

    async def fetch(offset: int, length: int) -> bytes:
        asked.append((offset // PAGE, length // PAGE))
        await trio.lowlevel.checkpoint()
        if offset + length > 6 * PAGE:
            raise OSError("a bad block")
        return DATA[offset : offset + length]

    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        policy = FaultAround(CopyFrom(AsyncSource(fetch, len(DATA))), 4)
        daemon.add_region(uffd, region(policy, retry=Retry(attempts=1)))
        uffd.say(missing(4), missing(5), missing(6))
        await recorder.until(lambda: len(recorder.resolved) == 2 and recorder.failed)
    assert sorted(each.fault.page for each in recorder.resolved) == [4, 5]
    assert [fault.page for fault, _ in recorder.failed] == [6]
    assert asked[0] == (4, 4)
    assert sorted(asked[1:]) == [(4, 1), (5, 1), (6, 1)]


async def test_the_delay_between_attempts_doubles(
    autojump_clock: trio.testing.MockClock, uffd: FakeUserfaultfd
) -> None:
    times: list[float] = []

    async def fetch(offset: int, length: int) -> bytes:
        times.append(trio.current_time())
        raise OSError("down")

    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        retry = Retry(attempts=5, first_delay=1.0, max_delay=3.0)
        daemon.add_region(uffd, region(CopyFrom(AsyncSource(fetch, len(DATA))), retry=retry))
        uffd.say(missing(0))
        await recorder.failures(1)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert waits == pytest.approx([1.0, 2.0, 3.0, 3.0])


@both_sleeps
async def test_faults_on_one_extent_share_one_fetch(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    gate = Gate(DATA)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        policy = FaultAround(CopyFrom(AsyncSource(gate.fetch, len(DATA))), 4)
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(1, thread=1))
        await gate.times(1)
        uffd.say(missing(2, thread=2), missing(1, thread=3), missing(5, thread=4))
        await gate.times(2)
        waiting = {entry.fault.page: entry.threads for entry in daemon.open_faults()}
        assert waiting == {1: (1, 3), 2: (2,), 5: (4,)}
        reasons = {entry.waiting.value for entry in daemon.open_faults()}
        assert reasons == {"source"}
        gate.open.set()
        found = await recorder.resolutions(3)
    assert gate.asked == [(0, 4 * PAGE), (4 * PAGE, 4 * PAGE)]
    assert {each.outcome for each in found} == {Outcome.COPIED}
    assert sum(each.done for each in found) == 8 * PAGE


async def test_no_more_fetches_run_at_a_time_than_allowed(uffd: FakeUserfaultfd) -> None:
    gate = Gate(DATA)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], fetch_limit=2) as daemon:
        daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
        uffd.say(*(missing(page, page + 1) for page in range(5)))
        await gate.times(2)
        await settled()
        assert len(gate.asked) == 2
        assert len(daemon.open_faults()) == 5
        gate.open.set()
        await recorder.resolutions(5)
    assert sorted(gate.asked) == [(page * PAGE, PAGE) for page in range(5)]


async def test_a_slow_source_delays_no_other_fault(uffd: FakeUserfaultfd) -> None:
    gate = Gate(DATA)
    slow, quick = CopyFrom(AsyncSource(gate.fetch, len(DATA))), CopyFrom(BytesSource(DATA))
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], fetch_limit=1) as daemon:
        daemon.add_region(uffd, region(lambda fault: (slow if fault.page < 4 else quick)(fault)))
        uffd.say(missing(0), missing(1))
        await gate.times(1)
        uffd.say(missing(5))
        [resolved] = await recorder.resolutions(1)
        assert resolved.fault.page == 5
        gate.open.set()
        await recorder.resolutions(3)


@pytest.mark.parametrize(
    "shape",
    [
        bytearray,
        memoryview,
        lambda data: memoryview(b"".join(bytes([byte, 0]) for byte in data))[::2],
        lambda data: array.array("Q", data),
    ],
    ids=["bytearray", "memoryview", "every other byte", "array"],
)
async def test_whatever_is_like_bytes_will_do(
    shape: Callable[[bytes], object], uffd: FakeUserfaultfd
) -> None:
    async def fetch(offset: int, length: int) -> object:
        await trio.lowlevel.checkpoint()
        return shape(DATA[offset : offset + length])

    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(CopyFrom(AsyncSource(fetch, len(DATA)))))  # type: ignore[arg-type]
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.COPIED


async def test_a_source_in_memory_that_cannot_be_read_is_retried_then_fails(
    uffd: FakeUserfaultfd,
) -> None:
    """EFAULT: the file below the mapping has shrunk, or its disk failed."""
    uffd.otherwise = failing(errno.EFAULT)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(CopyFrom(BytesSource(DATA)), retry=QUICK))
        uffd.say(missing(0))
        [(_, error)] = await recorder.failures(1)
        entry = the_open_fault(daemon)
    assert type(error) is errors.SourceFailed
    assert "its file ended" in entry.reason
    assert uffd.codes == [Code.COPY] * 3


# -- what happens while the source is being asked ----------------------------------------------


@both_sleeps
async def test_a_page_that_is_discarded_while_it_is_fetched_is_zeros(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    gate = Gate(DATA)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        policy = FaultAround(CopyFrom(AsyncSource(gate.fetch, len(DATA))), 8)
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(3))
        await gate.times(1)
        # Its thread has not run on yet: the zeros are refused at first.
        uffd.script.append(in_flight)
        uffd.say(RemoveEvent(START + 3 * PAGE, START + 5 * PAGE))
        await recorder.until(lambda: recorder.events)
        [resolved] = await recorder.resolutions(1)
        assert resolved.outcome is Outcome.ZEROED
        # What was fetched for the others may come, around the hole.
        uffd.say(missing(1), missing(6))
        gate.open.set()
        await recorder.resolutions(3)
    copied = [pages(step) for step in uffd.issued if step.code is Code.COPY]
    assert all(end <= 3 or first >= 5 for first, end in copied), copied


async def test_pages_discarded_at_the_very_moment_their_bytes_arrive(
    uffd: FakeUserfaultfd,
) -> None:
    """C has read the event, and Python has not applied it, when the bytes are there."""
    gate = Gate(DATA)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        policy = FaultAround(CopyFrom(AsyncSource(gate.fetch, len(DATA))), 8)
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(3))
        await gate.times(1)
        await settled()
        uffd.say(RemoveEvent(START + 3 * PAGE, START + 5 * PAGE))
        gate.open.set()
        [resolved] = await recorder.resolutions(1)
        await settled()
    assert resolved.outcome is Outcome.ZEROED
    assert [(step.code, pages(step)) for step in uffd.issued] == [(Code.ZEROPAGE, (3, 4))]


async def test_pages_discarded_while_they_are_fetched_need_no_source(
    uffd: FakeUserfaultfd,
) -> None:
    """The zeros are deferred, and the fetch fails before they are there."""
    begun, down = trio.Event(), trio.Event()

    async def fetch(offset: int, length: int) -> bytes:
        begun.set()
        await down.wait()
        raise OSError(errno.EIO, "the store is down")

    recorder = Recorder()
    once = Retry(attempts=1, timeout=DEADLINE)
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        policy = CopyFrom(AsyncSource(fetch, len(DATA)))
        daemon.add_region(uffd, region(policy, on_failure=actions.Poison(), retry=once))
        uffd.say(missing(3))
        await begun.wait()
        uffd.otherwise = in_flight
        uffd.say(RemoveEvent(START + 3 * PAGE, START + 4 * PAGE))
        await recorder.until(lambda: recorder.events)
        down.set()
        await trio.testing.wait_all_tasks_blocked()
        uffd.otherwise = done
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.ZEROED
    assert set(uffd.codes) == {Code.ZEROPAGE}
    assert recorder.failed == []


@pytest.mark.parametrize("what", ["unmap", "remap"])
async def test_a_range_that_goes_away_while_it_is_fetched_gets_nothing(
    what: str, uffd: FakeUserfaultfd
) -> None:
    gate = Gate(DATA)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
        uffd.say(missing(1))
        await gate.times(1)
        away = START - 64 * PAGE
        if what == "unmap":
            uffd.say(UnmapEvent(START, START + 8 * PAGE))
        else:
            uffd.say(RemapEvent(START, away, 8 * PAGE))
        [resolved] = await recorder.resolutions(1)
        assert resolved.outcome is Outcome.UNMAPPED
        gate.open.set()
        await settled()
        assert uffd.codes == [Code.WAKE]
        if what == "remap":
            uffd.say(missing(-63))
            await recorder.resolutions(2)
            assert uffd.issued[-1].dst == away + PAGE
            assert gate.asked == [(PAGE, PAGE)] * 2
    assert not recorder.failed


async def test_a_page_that_the_application_has_placed_meanwhile_is_there(
    uffd: FakeUserfaultfd,
) -> None:
    gate = Gate(DATA)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        guarded = daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
        uffd.say(missing(1))
        await gate.times(1)
        await daemon.fill(guarded, source=BytesSource(DATA))
        gate.open.set()
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.COPIED  # for all that this kernel knows
    assert [pages(step) for step in uffd.issued] == [(0, 8), (1, 2)]
