"""What a mover waits for, and where it may be stopped: no page is at both sides, or at none."""

from __future__ import annotations

import errno
import os
from itertools import count

import pytest
import trio
import trio.testing

from tests.kernel.moving import Watched, fates, there, two_sides
from tests.support.calls import Barrier, in_child, in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import count_pending, next_event, next_fault, wait_readable
from tests.support.obstacles import Pins
from tests.support.page_contents import PAGE, content
from uffdaemon import Advice, FaultKind, Memory, Outcome, errors
from uffdaemon.lowlevel import Features, RegisterMode, RemoveEvent, Result, Status, Userfaultfd
from uffdaemon.moves import Cause, Fallback, copy_exactly, move, move_in_trio
from uffdaemon.moves.ladder import EXCLUSIVE_ATTEMPTS
from uffdaemon.uapi.events import PageFault

BOTH = RegisterMode.MISSING | RegisterMode.WP
WP = Features.MOVE | Features.PAGEFAULT_FLAG_WP
REMOVE = WP | Features.EVENT_REMOVE
PATIENT = Fallback(patience=3600.0)


def _at_one_side(source: Memory, target: Memory, data: bytes) -> list[int]:
    """The pages that are at the destination; all others are at the source, and none is lost."""
    left, right = there(source), there(target)
    assert sorted(left + right) == list(range(len(data) // PAGE))
    for pages, memory in ((left, source), (right, target)):
        for page in pages:
            assert memory.read(page * PAGE, PAGE) == data[page * PAGE : (page + 1) * PAGE]
    return right


# -- pins --------------------------------------------------------------------------------------


@kernel_test(features=Features.MOVE)
def test_a_pin_that_ends_is_waited_for() -> None:
    with two_sides(3) as (uffd, source, target), Pins(source.start + PAGE) as pins:
        busy = count(1)

        def release_in_the_end(result: Result) -> None:
            # Tried as it is, and then made our own so many times: from here on it is waited for.
            if result.error == errno.EBUSY and next(busy) == 2 + EXCLUSIVE_ATTEMPTS:
                pins.end()

        uffd.tell = release_in_the_end
        moved = move(uffd, target.start, source.start, 3 * PAGE, fallback=PATIENT, verify=True)
        assert fates(moved) == [
            (1, Outcome.MOVED, None),
            (1, Outcome.WAITED_AND_MOVED, Cause.PINNED),
            (1, Outcome.MOVED, None),
        ]
        assert target.read(0, 3 * PAGE) == content(3)


@kernel_test(features=Features.MOVE)
async def test_trio_goes_on_while_a_pin_is_waited_for() -> None:
    with two_sides(1) as (uffd, source, target), Pins(source.start) as pins:
        async with trio.open_nursery() as nursery:

            async def release() -> None:
                # Long enough for all steps but the longest pauses between two attempts.
                await trio.testing.wait_all_tasks_blocked(0.03)
                pins.end()

            nursery.start_soon(release)
            moved = await move_in_trio(
                uffd, target.start, source.start, PAGE, fallback=PATIENT, verify=True
            )
        assert fates(moved) == [(1, Outcome.WAITED_AND_MOVED, Cause.PINNED)]


# -- cancellation ------------------------------------------------------------------------------


@kernel_test(features=Features.MOVE)
async def test_cancelled_before_it_begins_it_does_nothing() -> None:
    with two_sides(4) as (uffd, source, target):
        arguments = (uffd, target.start, source.start, 4 * PAGE)
        with trio.CancelScope() as scope:
            scope.cancel()
            await move_in_trio(*arguments)
        assert scope.cancelled_caught
        assert _at_one_side(source, target, content(4)) == []
        assert (await move_in_trio(*arguments, verify=True)).complete
        assert target.read(0, 4 * PAGE) == content(4)


@kernel_test(features=WP)
async def test_cancelled_after_any_step_it_has_lost_nothing_and_can_be_resumed() -> None:
    # Our own, shared, pinned, and one that is in the way: every kind of step is taken.
    arrived = set[int]()
    for steps in count(1):
        with two_sides(8, WP, dont_fork=False) as (uffd, source, target):
            for memory in (source, target):
                uffd.register(memory.start, memory.length, BOTH)
            let_go = Barrier()
            child = in_child(let_go.wait)
            source.advise(Advice.POPULATE_WRITE, 0, 2 * PAGE)
            source.advise(Advice.POPULATE_WRITE, 5 * PAGE, 3 * PAGE)
            fallback = Fallback(copy_pinned=True, patience=0.002)
            done = count(1)
            scope = trio.CancelScope()

            def cancel(
                result: Result,
                done: count[int] = done,
                steps: int = steps,
                scope: trio.CancelScope = scope,
            ) -> None:
                if next(done) == steps:
                    scope.cancel()

            uffd.tell = cancel
            with Pins(source.start + 5 * PAGE):
                with scope:
                    await move_in_trio(
                        uffd, target.start, source.start, 8 * PAGE, fallback=fallback
                    )
                right = _at_one_side(source, target, content(8))
                assert right == list(range(len(right)))
                arrived.add(len(right))
            # What has not arrived can be moved by whoever likes to.
            uffd.tell = lambda result: None
            if scope.cancelled_caught:
                at = len(right) * PAGE
                rest = (uffd, target.start + at, source.start + at, 8 * PAGE - at)
                moved = await move_in_trio(*rest, fallback=PATIENT, verify=True)
                assert moved.complete
            assert there(source) == []
            assert target.read(0, 8 * PAGE) == content(8)
            let_go.cross()
            child.result()
        if not scope.cancelled_caught:
            break
    assert arrived == {2, 5, 6, 8}


@kernel_test(features=Features.MOVE)
async def test_cancelled_while_it_waits_for_a_pin_it_leaves_the_page_where_it_is() -> None:
    with two_sides(3) as (uffd, source, target):
        with Pins(source.start + PAGE):
            async with trio.open_nursery() as nursery:
                arguments = (uffd, target.start, source.start, 3 * PAGE)

                async def wait() -> None:
                    await move_in_trio(*arguments, fallback=PATIENT)

                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked(0.03)
                nursery.cancel_scope.cancel()
            assert _at_one_side(source, target, content(3)) == [0]
        rest = (uffd, target.start + PAGE, source.start + PAGE, 2 * PAGE)
        moved = await move_in_trio(*rest, verify=True)
        assert fates(moved) == [(2, Outcome.MOVED, None)]
        assert target.read(0, 3 * PAGE) == content(3)


# -- copies ------------------------------------------------------------------------------------


@kernel_test(features=REMOVE)
def test_writers_wait_at_both_sides_of_an_exact_copy_and_lose_nothing() -> None:
    with (
        two_sides(2, WP) as (uffd, _, target),
        Watched.open(REMOVE) as theirs,
        Memory.map(2 * PAGE, dont_fork=True) as source,
    ):
        source.write(0, content(2))
        uffd.register(target.start, target.length, BOTH)
        theirs.register(source.start, source.length, BOTH)
        # It releases the source only when that event has been read: until then both sides exist.
        copying = in_thread(
            copy_exactly,
            uffd,
            target.start,
            source.start,
            2 * PAGE,
            source_uffd=theirs,
            verify=True,
        )
        wait_readable(theirs)
        assert uffd.copies.overlap(target.start, 1)
        assert theirs.copies.overlap(source.start, 1)
        assert source.read(0, 2 * PAGE) == target.read(0, 2 * PAGE) == content(2)
        old = in_thread(source.write, 0, b"old")
        new = in_thread(target.write, PAGE, b"new")
        fault = next_fault(uffd)
        assert (fault.kind, fault.address) == (FaultKind.WP, target.start + PAGE)
        _wait_until_stuck(theirs)
        assert source.read(0, PAGE) == target.read(0, PAGE) == content(1)
        first, second = theirs.read_events()
        assert isinstance(first, PageFault)
        assert (first.kind, first.address) == (FaultKind.WP, source.start)
        assert second == RemoveEvent(source.start, source.end)
        # From here on the writer of the source writes into a missing page, of which it is told.
        again = next_fault(theirs)
        assert (again.kind, again.address) == (FaultKind.MISSING, source.start)
        assert fates(copying.result()) == [(2, Outcome.EXACTLY_COPIED, Cause.ASKED_FOR)]
        new.result()
        assert target.read(0, 2 * PAGE) == content(2)[:PAGE] + b"new" + content(2)[PAGE + 3 :]
        theirs.zeropage(source.start, PAGE)
        old.result()
        assert source.read(0, PAGE) == b"old" + bytes(PAGE - 3)


def _wait_until_stuck(uffd: Userfaultfd) -> None:
    """Until a thread waits whose message nobody has read; what else is there is not read."""
    while count_pending(uffd) != 1:
        os.sched_yield()  # the deadline is the limit


# -- events ------------------------------------------------------------------------------------


@kernel_test(features=REMOVE)
def test_a_move_waits_until_an_event_has_been_read() -> None:
    with two_sides(5, REMOVE) as (uffd, source, target):
        tried = Barrier()
        # Beside what is moved: the pages are discarded only when the event has been read.
        discarding = in_thread(target.advise, Advice.DONTNEED, 4 * PAGE, PAGE)
        wait_readable(uffd)
        uffd.tell = lambda result: tried.cross() if result.status is Status.RETRY else None
        moving = in_thread(move, uffd, target.start, source.start, 4 * PAGE, verify=True)
        tried.wait()
        assert (there(source), there(target)) == ([0, 1, 2, 3, 4], [])
        assert next_event(uffd) == RemoveEvent(target.start + 4 * PAGE, target.end)
        discarding.result()
        assert fates(moving.result()) == [(4, Outcome.MOVED, None)]
        assert target.read(0, 4 * PAGE) == content(4)


@kernel_test(features=REMOVE)
async def test_the_thread_that_runs_trio_can_read_it_meanwhile() -> None:
    with two_sides(5, REMOVE) as (uffd, source, target):
        tried = trio.Event()
        discarding = in_thread(target.advise, Advice.DONTNEED, 4 * PAGE, PAGE)
        wait_readable(uffd)
        uffd.tell = lambda result: tried.set() if result.status is Status.RETRY else None
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await tried.wait()
                assert there(target) == []
                next_event(uffd)

            nursery.start_soon(read)
            moved = await move_in_trio(uffd, target.start, source.start, 4 * PAGE, verify=True)
        discarding.result()
        assert fates(moved) == [(4, Outcome.MOVED, None)]


@kernel_test(features=REMOVE)
def test_an_event_that_nobody_reads_is_named_in_the_end() -> None:
    with two_sides(5, REMOVE) as (uffd, source, target):
        discarding = in_thread(target.advise, Advice.DONTNEED, 4 * PAGE, PAGE)
        wait_readable(uffd)
        arguments = (uffd, target.start, source.start, 4 * PAGE)
        with pytest.raises(errors.EventInFlight, match="read the userfaultfd") as caught:
            move(*arguments)
        assert caught.value.errno == errno.EAGAIN
        assert fates(caught.value.moved) == [(4, Outcome.FAILED, Cause.EVENT)]
        next_event(uffd)
        discarding.result()
        assert fates(move(*arguments, verify=True)) == [(4, Outcome.MOVED, None)]


@kernel_test(features=REMOVE)
def test_the_event_of_an_exact_copy_is_known_for_its_own() -> None:
    with two_sides(4, REMOVE) as (uffd, source, target):
        for memory in (source, target):
            uffd.register(memory.start, memory.length, BOTH)
        copying = in_thread(copy_exactly, uffd, target.start, source.start, 4 * PAGE, verify=True)
        event = next_event(uffd)
        assert event == RemoveEvent(source.start, source.end)
        assert uffd.copies.consume_release(source.start, source.end)
        assert not uffd.copies.consume_release(source.start, source.end)
        assert fates(copying.result()) == [(4, Outcome.EXACTLY_COPIED, Cause.ASKED_FOR)]
        assert not uffd.copies.overlap(source.start, 1)
        assert target.read(0, 4 * PAGE) == content(4)
