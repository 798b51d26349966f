"""Moves that the kernel refuses: nothing is copied unless the application says so."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
import trio

from tests.fake.kernel import PAGE, START, FakeUserfaultfd, done, failing, missing, region
from tests.support.daemons import the_open_fault
from tests.support.notes import Recorder
from uffdaemon import (
    FaultAround,
    FaultKind,
    Memory,
    MoveOrCopy,
    Outcome,
    StrictMove,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.errors import PagePinned
from uffdaemon.lowlevel import Code, RemoveEvent
from uffdaemon.moves import Cause, Fallback
from uffdaemon.moves.ladder import EXCLUSIVE_ATTEMPTS

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def source() -> Iterator[Memory]:
    """A page that nobody else maps: what is busy about it can only be a pin."""
    with Memory.map(PAGE, dont_fork=True) as memory:
        memory.write(0, b"s" * PAGE)
        yield memory


async def test_strict_move_never_swallows_ebusy(uffd: FakeUserfaultfd, source: Memory) -> None:
    uffd.otherwise = failing(errno.EBUSY)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(StrictMove(source)))
        uffd.say(missing(0))
        [(_, error)] = await recorder.failures(1)
        entry = the_open_fault(daemon)
        assert daemon.statistics().failures == {"PagePinned": 1}
    assert isinstance(error, PagePinned)
    assert error.cause is Cause.PINNED
    # The batch's own, the ladder's, and those after the page was made exclusive: no copy.
    assert uffd.codes == [Code.MOVE] * (2 + EXCLUSIVE_ATTEMPTS)
    assert "pinned for I/O" in entry.reason


async def test_what_stays_pinned_fails_unless_it_may_be_copied(
    uffd: FakeUserfaultfd, source: Memory
) -> None:
    uffd.otherwise = failing(errno.EBUSY)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(MoveOrCopy(source, Fallback(patience=0.0))))
        uffd.say(missing(0))
        [(_, error)] = await recorder.failures(1)
    assert type(error) is PagePinned
    assert set(uffd.codes) == {Code.MOVE}


async def test_a_pinned_page_is_waited_for(uffd: FakeUserfaultfd, source: Memory) -> None:
    uffd.script += [failing(errno.EBUSY)] * (3 + EXCLUSIVE_ATTEMPTS)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(MoveOrCopy(source, Fallback(patience=60.0))))
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
        faults = daemon.statistics().faults
    assert resolved.outcome is Outcome.WAITED_AND_MOVED
    assert resolved.done == PAGE
    assert faults[FaultKind.MISSING, Outcome.DEFERRED] > 0
    assert set(uffd.codes) == {Code.MOVE}


async def test_a_page_discarded_while_its_source_is_pinned_is_zeros(
    uffd: FakeUserfaultfd, source: Memory
) -> None:
    busy = failing(errno.EBUSY)
    uffd.otherwise = lambda step: busy(step) if step.code is Code.MOVE else done(step)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(MoveOrCopy(source, Fallback(patience=60.0))))
        uffd.say(missing(0))
        while uffd.codes.count(Code.MOVE) < 4:
            await trio.lowlevel.checkpoint()
        uffd.say(RemoveEvent(START, START + PAGE))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.ZEROED
    assert not recorder.failed


async def test_memory_that_is_not_the_librarys_is_no_source(uffd: FakeUserfaultfd) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(StrictMove(PAGE)))
        uffd.say(missing(0))
        [(_, error)] = await recorder.failures(1)
    assert isinstance(error, errors.ForeignMemory)
    assert uffd.issued == []


async def test_another_process_cannot_be_moved_for(source: Memory) -> None:
    with FakeUserfaultfd(same_process=False) as theirs:
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            for policy in (StrictMove(source), FaultAround(StrictMove(source), 4)):
                with pytest.raises(errors.PlacementRefused, match="within the process"):
                    daemon.add_region(theirs, region(policy))
            # Nor by a policy of which that was not known before.
            strictly = actions.Move(source.start)
            daemon.add_region(theirs, region(lambda fault: strictly))
            theirs.say(missing(0))
            [(_, error)] = await recorder.failures(1)
    assert isinstance(error, errors.PlacementRefused)
    assert theirs.issued == []


async def test_for_another_process_there_is_no_exact_copy_without_its_sources_userfaultfd(
    source: Memory,
) -> None:
    with FakeUserfaultfd(same_process=False) as theirs:
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            daemon.add_region(theirs, region(MoveOrCopy(source)))
            theirs.say(missing(0))
            [(_, error)] = await recorder.failures(1)
    # Protecting our addresses by their userfaultfd would protect memory of theirs.
    assert isinstance(error, errors.Unprotectable)
    assert theirs.issued == []
    assert source.read(0, 1) == b"s"


@pytest.mark.parametrize("busy", [0, 3])
@pytest.mark.parametrize("policy", [StrictMove, MoveOrCopy])
async def test_the_check_mode_says_that_a_source_is_not_empty(
    uffd: FakeUserfaultfd,
    source: Memory,
    policy: type[StrictMove | MoveOrCopy],
    busy: int,
) -> None:
    # This kernel only says that it has moved the page.
    uffd.script += [failing(errno.EBUSY)] * busy
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(policy(source, verify=True)))
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
        [(_, error)] = await recorder.failures(1)
        assert daemon.statistics().failures == {"SourceNotEmpty": 1}
    assert resolved.outcome is (Outcome.UNSHARED_AND_MOVED if busy else Outcome.MOVED)
    assert isinstance(error, errors.SourceNotEmpty)
    assert error.address == source.start
