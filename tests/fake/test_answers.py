"""What the kernel answers, and what becomes of the faults then."""

from __future__ import annotations

import errno
import os

import pytest

from tests.fake.kernel import (
    PAGE,
    START,
    Answer,
    FakeUserfaultfd,
    done,
    failing,
    gone,
    in_flight,
    minor,
    missing,
    pages,
    present,
    protected,
    region,
    settled,
)
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.notes import Asked, Recorder
from tests.support.page_contents import content
from uffdaemon import (
    ByKind,
    BytesSource,
    Continue,
    CopyFrom,
    FaultAround,
    FaultKind,
    Outcome,
    Policy,
    StrictMove,
    Unprotect,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Code, Event, RemoveEvent, UnmapEvent
from uffdaemon.uapi.events import ForkEvent, RemapEvent, UnknownEvent

# Asked in Python: a subclass is never lowered, and there is no kernel for rules to ask.
COPY = CopyFrom(BytesSource(content(8)))


@both_sleeps
@pytest.mark.parametrize(
    ("event", "policy", "code", "outcome"),
    [
        (missing(1), ZeroPage(), Code.ZEROPAGE, Outcome.ZEROED),
        (missing(1), COPY, Code.COPY, Outcome.COPIED),
        (missing(1), StrictMove(PAGE, foreign=True), Code.MOVE, Outcome.MOVED),
        (minor(1), Continue(), Code.CONTINUE, Outcome.MAPPED),
        (protected(1), Unprotect(), Code.WRITEPROTECT, Outcome.UNPROTECTED),
        (missing(1), lambda fault: actions.Poison(), Code.POISON, Outcome.POISONED),
        (missing(1), lambda fault: actions.Wake(), Code.WAKE, Outcome.WOKEN),
    ],
    ids=lambda value: value.name if isinstance(value, Code) else "",
)
async def test_each_action_is_its_operation(  # noqa: PLR0917  # a table of five columns
    event: Event,
    policy: Policy,
    code: Code,
    outcome: Outcome,
    native_sleep: bool,
    uffd: FakeUserfaultfd,
) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region(policy))
        uffd.say(event)
        [resolved] = await recorder.resolutions(1)
        counted = daemon.statistics()
    assert resolved.outcome is outcome
    assert resolved.fault.page == 1
    assert [(step.code, pages(step)) for step in uffd.issued] == [(code, (1, 2))]
    assert counted.faults == {(resolved.fault.kind, outcome): 1}
    assert sum(counted.latencies) == counted.resolved == 1
    assert not counted.open_faults


async def test_a_burst_is_one_call_of_few_operations(uffd: FakeUserfaultfd) -> None:
    """Six threads on five pages: neighbours are merged, and whoever shares a page joins."""
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(*(missing(page, thread) for thread, page in enumerate((6, 2, 1, 4, 2, 5), 1)))
        found = await recorder.resolutions(5)
        counted = daemon.statistics()
    [batch] = uffd.batches
    assert [pages(step) for step in batch] == [(1, 3), (4, 7)]
    assert sorted(each.fault.page for each in found) == [1, 2, 4, 5, 6]
    assert counted.joined == 1
    assert counted.bytes_done == {Outcome.COPIED: 5 * PAGE}
    assert sum(each.done for each in found) == 5 * PAGE


@both_sleeps
async def test_an_event_in_flight_defers_until_a_timer_tries_again(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    uffd.script += [in_flight] * 4
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
        counted = daemon.statistics()
    assert resolved.outcome is Outcome.COPIED
    # Tried as often as it was put off, and once more: never in between.
    assert uffd.codes == [Code.COPY] * 5
    assert counted.faults == {
        (FaultKind.MISSING, Outcome.DEFERRED): 4,
        (FaultKind.MISSING, Outcome.COPIED): 1,
    }
    # 0.1 + 0.2 + 0.4 + 0.8 ms have to have passed.
    assert resolved.latency >= 1_500_000


async def test_a_deferred_fault_has_a_reason(uffd: FakeUserfaultfd) -> None:
    uffd.otherwise = in_flight
    async with open_daemon() as daemon:
        policy = Asked(COPY)
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(0))
        await policy.times(1)
        entry = the_open_fault(daemon)
        assert "an event is in flight (EAGAIN)" in str(entry)
        uffd.otherwise = done


async def test_progress_before_an_event_is_not_done_again(uffd: FakeUserfaultfd) -> None:
    uffd.script.append(failing(errno.EAGAIN, after=2 * PAGE))
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        guarded = daemon.add_region(uffd, region(COPY))
        uffd.say(missing(0), missing(1), missing(2), missing(3))
        found = await recorder.resolutions(4)
    assert [pages(step) for step in uffd.issued] == [(0, 4), (2, 4)]
    assert {each.outcome for each in found} == {Outcome.COPIED}
    assert sum(each.done for each in found) == 4 * PAGE
    assert guarded.pages.present.runs() == [(0, 4)]


async def test_a_page_that_is_there_is_an_outcome(uffd: FakeUserfaultfd) -> None:
    uffd.script.append(present)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.ALREADY_PRESENT
    assert resolved.done == 0


@pytest.mark.parametrize(
    "answer", [failing(errno.ENOMEM), failing(errno.ENOENT)], ids=["ENOMEM", "ENOENT"]
)
async def test_a_wide_operation_that_fails_is_tried_page_by_page(
    answer: Answer, uffd: FakeUserfaultfd
) -> None:
    """A neighbour's trouble does not become the fault's."""
    uffd.script.append(answer)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(FaultAround(Asked(COPY), 4)))
        uffd.say(missing(2))
        [resolved] = await recorder.resolutions(1)
    assert [pages(step) for step in uffd.issued] == [(0, 4), (2, 3)]
    assert resolved.outcome is Outcome.COPIED
    assert not recorder.failed


async def test_one_of_a_burst_that_fails_fails_alone(uffd: FakeUserfaultfd) -> None:
    # Together, as far as the second; then each by itself; then that one as a move of its own.
    uffd.script.append(failing(errno.EIO, after=PAGE))
    full = failing(errno.EIO)
    uffd.otherwise = lambda step: full(step) if step.dst == START + PAGE else done(step)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(StrictMove(PAGE, foreign=True)))
        uffd.say(missing(0), missing(1), missing(2))
        found = await recorder.resolutions(2)
        await recorder.failures(1)
        entry = the_open_fault(daemon)
    assert [pages(step) for step in uffd.issued] == [(0, 3), (1, 2), (2, 3), (1, 2)]
    assert sorted(each.fault.page for each in found) == [0, 2]
    assert entry.fault.page == 1
    assert "EIO" in entry.reason


async def test_neighbours_that_all_fail_fail_once_each(uffd: FakeUserfaultfd) -> None:
    uffd.otherwise = failing(errno.EIO)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(FaultAround(StrictMove(PAGE, foreign=True), 2)))
        uffd.say(*(missing(page, page + 1) for page in range(6)))
        found = await recorder.failures(6)
        await settled()
        assert len(daemon.open_faults()) == 6
    assert sorted(fault.page for fault, _ in found) == [0, 1, 2, 3, 4, 5]
    # By itself in the batch, and then as a move of its own.
    alone = [(page, page + 1) for page in range(6)]
    assert sorted(pages(step) for step in uffd.issued[1:]) == sorted(alone * 2)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.ENOENT, errno.EFAULT])
async def test_a_refusal_is_never_swallowed(number: int, uffd: FakeUserfaultfd) -> None:
    uffd.otherwise = failing(number)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(lambda fault: actions.Zero()))
        uffd.say(missing(0))
        [(_, error)] = await recorder.failures(1)
        entry = the_open_fault(daemon)
    assert isinstance(error, errors.OperationError)
    assert (error.errno, error.operation, error.address, error.length) == (
        number,
        "ZEROPAGE",
        START,
        PAGE,
    )
    assert errno.errorcode[number] in entry.reason


@both_sleeps
async def test_all_faults_of_an_exited_client_end(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    policy = Asked(lambda fault: actions.Hold("no") if fault.page == 7 else actions.Zero())
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(7))
        await policy.times(1)
        uffd.otherwise = gone
        uffd.say(missing(0))
        found = await recorder.resolutions(2)
        await daemon.wait_client_gone(uffd)
        counted = daemon.statistics()
    assert {each.outcome for each in found} == {Outcome.CLIENT_GONE}
    assert counted.faults[FaultKind.MISSING, Outcome.CLIENT_GONE] == 2
    assert not counted.open_faults
    assert not recorder.failed
    # The descriptor was never the daemon's to close.
    assert not uffd.closed


# -- events before faults ----------------------------------------------------------------------


@both_sleeps
async def test_a_removal_that_is_read_last_comes_first(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        guarded = daemon.add_region(uffd, region(COPY))
        uffd.say(missing(1), missing(4), RemoveEvent(START + PAGE, START + 3 * PAGE))
        await recorder.resolutions(2)
        uffd.say(missing(2))
        found = await recorder.resolutions(3)
    outcomes = {each.fault.page: each.outcome for each in found}
    assert outcomes == {1: Outcome.ZEROED, 2: Outcome.ZEROED, 4: Outcome.COPIED}
    assert guarded.pages.removed.runs() == [(1, 3)]


async def test_after_a_removal_the_policy_is_asked_again_where_that_is_wanted(
    uffd: FakeUserfaultfd,
) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(COPY, after_remove="policy"))
        uffd.say(missing(1), RemoveEvent(START, START + 8 * PAGE))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.COPIED


async def test_a_minor_fault_on_a_page_that_was_punched_out_is_sent_to_look_again(
    uffd: FakeUserfaultfd,
) -> None:
    uffd.otherwise = failing(errno.EFAULT)  # it is not in the page cache any more
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(ByKind(minor=Continue())))
        uffd.say(minor(0), RemoveEvent(START, START + PAGE))
        [resolved] = await recorder.resolutions(1)
        assert resolved.outcome is Outcome.WOKEN
        # One that was never discarded is a failure: somebody forgot to fill it.
        uffd.say(minor(1))
        [(fault, error)] = await recorder.failures(1)
    assert fault.page == 1
    assert "not in the page cache" in str(error)


async def test_threads_waiting_in_unmapped_memory_are_woken(
    uffd: FakeUserfaultfd,
) -> None:
    policy = Asked(lambda fault: actions.Hold("no"))
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        guarded = daemon.add_region(uffd, region(policy))
        uffd.say(missing(0), missing(5))
        await policy.times(2)
        uffd.say(UnmapEvent(START, START + 4 * PAGE))
        [resolved] = await recorder.resolutions(1)
        entry = the_open_fault(daemon)
        assert resolved.fault.page == 0
        assert resolved.outcome is Outcome.UNMAPPED
        assert entry.fault.page == 5
        [(code, where)] = [(step.code, pages(step)) for step in uffd.issued]
        assert (code, where) == (Code.WAKE, (0, 4))
        # What is left is still served; what is gone is nobody's.
        assert daemon.statistics().events == {"unmap": 1}
        daemon.remove_region(guarded, "release")
    assert uffd.ranges[-1] == ("unregister", START + 4 * PAGE, 4 * PAGE)


async def test_what_is_moved_keeps_its_content_at_its_new_place(uffd: FakeUserfaultfd) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(Asked(COPY)))
        away = START - 64 * PAGE
        uffd.say(RemapEvent(START + 2 * PAGE, away, 2 * PAGE), missing(-64), missing(1))
        await recorder.resolutions(2)
    source = COPY.source.address(0, PAGE)
    assert source is not None
    where = {step.dst: step.src - source for step in uffd.issued if step.code is Code.COPY}
    assert where == {away: 2 * PAGE, START + PAGE: PAGE}


async def test_an_unknown_message_is_counted_and_nothing_else(uffd: FakeUserfaultfd) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(UnknownEvent(b"\x77" + bytes(31)), missing(0))
        await recorder.resolutions(1)
        assert daemon.statistics().events == {"unknown": 1}


async def test_a_childs_descriptor_is_closed_if_so_decided(uffd: FakeUserfaultfd) -> None:
    theirs, other = os.pipe2(os.O_NONBLOCK)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], on_fork="close") as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(ForkEvent(theirs))
        await recorder.until(lambda: recorder.events)
        await settled()
        with pytest.raises(BrokenPipeError):
            os.write(other, b"x")
    os.close(other)
