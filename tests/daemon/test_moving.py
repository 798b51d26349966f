"""Policies that move, on a real kernel: each rung of the ladder as hooks and statistics see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.daemon.test_actions import filled_by
from tests.support.calls import in_thread
from tests.support.daemons import the_open_fault
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Recorder
from tests.support.obstacles import BOTH_MODES, PROTECTED, Pins, Sharer
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Daemon,
    FaultKind,
    Memory,
    MemoryType,
    MoveOrCopy,
    Outcome,
    StrictMove,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import RegisterMode, Userfaultfd, scan_pages
from uffdaemon.model.ledger import Waiting
from uffdaemon.moves import Cause, Fallback

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENT: Final = Fallback(patience=60.0)


def source_of(kind: MemoryType = MemoryType.ANONYMOUS) -> Memory:
    """A page that is to be moved; children get it."""
    source = Memory.map(PAGE, kind)
    source.write(0, content(1))
    return source


def guard(daemon: Daemon, memory: Memory, policy: MoveOrCopy | StrictMove) -> Userfaultfd:
    daemon.guard(memory, policy, features=PROTECTED, register=BOTH_MODES)
    assert memory.userfaultfd is not None
    return memory.userfaultfd


async def check(daemon: Daemon, recorder: Recorder, outcome: Outcome, source: Memory) -> None:
    """The one fault has ended so, for hooks and for statistics, and the source is empty."""
    await recorder.resolutions(1)
    told = [(each.outcome, each.done) for each in recorder.resolved]
    assert told == [(outcome, PAGE)]
    counted = daemon.statistics()
    assert filled_by(counted.faults) == {(FaultKind.MISSING, outcome): 1}
    assert {key: count for key, count in counted.bytes_done.items() if count} == {outcome: PAGE}
    assert scan_pages(source.start, PAGE) == []
    assert not counted.open_faults


# -- strict ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [errors.PageShared, errors.PagePinned])
@kernel_test(features=PROTECTED)
async def test_strict_move_fails_by_name_until_the_reason_is_gone(
    kind: type[errors.PageNotExclusive],
) -> None:
    with source_of() as source, Memory.map(PAGE) as memory:
        end: Callable[[], object]
        end = Sharer(source).sees if kind is errors.PageShared else Pins(source.start).end
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            uffd = guard(daemon, memory, StrictMove(source, verify=True))
            reader = in_thread(memory.read, 0, PAGE)
            [(fault, error)] = await recorder.failures(1)
            assert type(error) is kind
            assert isinstance(error, errors.MoveRefused)
            assert error.cause in (Cause.SHARED, Cause.PINNED)
            assert (fault.address, error.address) == (memory.start, memory.start)
            stuck = the_open_fault(daemon)
            assert stuck.waiting is Waiting.NOBODY
            assert kind.__name__ in stuck.reason
            assert error.cause.value in stuck.reason
            assert daemon.statistics().failures == {kind.__name__: 1}
            # Nothing was copied behind anybody's back, and nothing was lost.
            assert scan_pages(memory.start, PAGE) == []
            assert source.read(0, PAGE) == content(1)
            end()
            uffd.wake(memory.start, PAGE)
            assert await trio.to_thread.run_sync(reader.result) == content(1)
            shared = kind is errors.PageShared
            outcome = Outcome.UNSHARED_AND_MOVED if shared else Outcome.MOVED
            await check(daemon, recorder, outcome, source)


@kernel_test(features=PROTECTED)
async def test_a_page_that_its_child_has_left_moves_strictly() -> None:
    with source_of() as source, Memory.map(PAGE) as memory:
        Sharer(source).sees()
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            guard(daemon, memory, StrictMove(source, verify=True))
            assert await trio.to_thread.run_sync(memory.read, 0, PAGE) == content(1)
            await check(daemon, recorder, Outcome.UNSHARED_AND_MOVED, source)
            assert recorder.failed == []


# -- the ladder --------------------------------------------------------------------------------

RUNGS: Final[dict[Outcome, tuple[MemoryType, Callable[[Memory], object] | None, Fallback]]] = {
    Outcome.MOVED: (MemoryType.ANONYMOUS, None, Fallback()),
    Outcome.UNSHARED_AND_MOVED: (MemoryType.ANONYMOUS, Sharer, Fallback()),
    Outcome.COPIED_PINNED: (
        MemoryType.ANONYMOUS,
        lambda source: Pins(source.start),
        Fallback(copy_pinned=True, patience=0.0),
    ),
    Outcome.EXACTLY_COPIED: (MemoryType.SHMEM, None, Fallback()),
}
"""What the source is, what is done to it, and what is allowed."""


@pytest.mark.parametrize("lowered", [True, False], ids=["rules", "python"])
@pytest.mark.parametrize("outcome", RUNGS)
@kernel_test(features=PROTECTED)
async def test_move_or_copy_climbs_to(outcome: Outcome, lowered: bool) -> None:
    kind, bring_about, fallback = RUNGS[outcome]
    with source_of(kind) as source, Memory.map(PAGE) as memory:
        if bring_about is not None:
            bring_about(source)
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            uffd = guard(daemon, memory, MoveOrCopy(source, fallback, verify=not lowered))
            uffd.register(source.start, PAGE, BOTH_MODES)
            assert await trio.to_thread.run_sync(memory.read, 0, PAGE) == content(1)
            await check(daemon, recorder, outcome, source)
            assert recorder.failed == []


@kernel_test(features=PROTECTED)
async def test_move_or_copy_waits_for_a_pin_and_says_so() -> None:
    with source_of() as source, Memory.map(PAGE) as memory:
        pin = Pins(source.start)
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            guard(daemon, memory, MoveOrCopy(source, PATIENT, verify=True))
            reader = in_thread(memory.read, 0, PAGE)
            while not any(entry.waiting is Waiting.TIMER for entry in daemon.open_faults()):
                await trio.lowlevel.checkpoint()
            assert the_open_fault(daemon).reason == "the source page is pinned for I/O"
            pin.end()
            assert await trio.to_thread.run_sync(reader.result) == content(1)
            await check(daemon, recorder, Outcome.WAITED_AND_MOVED, source)
            assert daemon.statistics().faults[FaultKind.MISSING, Outcome.DEFERRED] > 0
            assert recorder.failed == []


@kernel_test(features=PROTECTED)
async def test_what_stays_pinned_fails_when_patience_is_over() -> None:
    with source_of() as source, Memory.map(PAGE) as memory:
        pin = Pins(source.start)
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            uffd = guard(daemon, memory, MoveOrCopy(source, Fallback(patience=0.01), verify=True))
            reader = in_thread(memory.read, 0, PAGE)
            [(_, error)] = await recorder.failures(1)
            assert isinstance(error, errors.PagePinned)
            assert "pinned for I/O" in the_open_fault(daemon).reason
            pin.end()
            uffd.wake(memory.start, PAGE)
            assert await trio.to_thread.run_sync(reader.result) == content(1)
            await check(daemon, recorder, Outcome.MOVED, source)


@pytest.mark.parametrize("lose_writes", [False, True])
@kernel_test(features=PROTECTED)
async def test_without_write_protection_a_copy_has_to_be_asked_for(lose_writes: bool) -> None:
    with source_of(MemoryType.SHMEM) as source, Memory.map(PAGE) as memory:
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            policy = MoveOrCopy(source, Fallback(lose_writes=lose_writes), verify=True)
            uffd = guard(daemon, memory, policy)
            reader = in_thread(memory.read, 0, PAGE)
            if not lose_writes:
                [(_, error)] = await recorder.failures(1)
                assert isinstance(error, errors.Unprotectable)
                assert source.read(0, PAGE) == content(1)
                uffd.register(source.start, PAGE, BOTH_MODES)
                uffd.wake(memory.start, PAGE)
            assert await trio.to_thread.run_sync(reader.result) == content(1)
            outcome = Outcome.COPIED if lose_writes else Outcome.EXACTLY_COPIED
            await check(daemon, recorder, outcome, source)


# -- moves of the daemon's own accord ----------------------------------------------------------


@kernel_test(features=PROTECTED)
async def test_a_move_brings_what_a_thread_is_stuck_for() -> None:
    with source_of() as source, Memory.map(PAGE) as memory:
        sharer = Sharer(source)
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            uffd = guard(daemon, memory, StrictMove(source))
            reader = in_thread(memory.read, 0, PAGE)
            await recorder.failures(1)
            where = memory.start, source.start, PAGE
            with pytest.raises(errors.PageShared) as caught:
                await daemon.move(uffd, *where, verify=True)
            assert [run.cause for run in caught.value.moved.refused] == [Cause.SHARED]
            moved = await daemon.move(uffd, *where, fallback=Fallback(), verify=True)
            assert [run.outcome for run in moved.runs] == [Outcome.UNSHARED_AND_MOVED]
            assert await trio.to_thread.run_sync(reader.result) == content(1)
            [resolved] = await recorder.resolutions(1)
            assert resolved.outcome is Outcome.ALREADY_PRESENT
            assert not daemon.open_faults()
            assert daemon.statistics().bytes_done[Outcome.UNSHARED_AND_MOVED] == PAGE
        assert sharer.sees() == content(1)


@kernel_test(features=PROTECTED)
async def test_a_move_within_a_region_leaves_a_page_that_is_missing() -> None:
    with source_of() as source, Memory.map(2 * PAGE) as memory:
        async with open_daemon() as daemon:
            policy = StrictMove(source)
            region = daemon.guard(memory, policy, features=PROTECTED)
            uffd = memory.userfaultfd
            assert uffd is not None
            assert await trio.to_thread.run_sync(memory.read, 0, PAGE) == content(1)
            away = await daemon.move(uffd, memory.start + PAGE, memory.start, PAGE, verify=True)
            assert [run.outcome for run in away.runs] == [Outcome.MOVED]
            assert [page in region.pages.present for page in range(2)] == [False, True]
            # The page that is missing now is asked for once more.
            source.write(0, content(1, seed=1))
            assert await trio.to_thread.run_sync(memory.read, 0, 2 * PAGE) == (
                content(1, seed=1) + content(1)
            )
            assert daemon.statistics().bytes_done == {Outcome.MOVED: 3 * PAGE}


@kernel_test(features=PROTECTED)
async def test_a_move_on_what_is_not_served_is_refused() -> None:
    with source_of() as source, Memory.map(PAGE) as memory, Userfaultfd.open(PROTECTED) as uffd:
        uffd.register(memory.start, PAGE, RegisterMode.MISSING)
        async with open_daemon() as daemon:
            with pytest.raises(errors.NotServed):
                await daemon.move(uffd, memory.start, source.start, PAGE)
        assert source.read(0, PAGE) == content(1)
