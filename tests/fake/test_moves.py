"""Moves that the kernel refuses: nothing is copied unless the application says so."""

from __future__ import annotations

import errno

import pytest

from tests.daemon.support import Recorder, the_open_fault
from tests.fake.kernel import (
    PAGE,
    FakeUserfaultfd,
    failing,
    missing,
    region,
)
from uffdaemon import (
    Code,
    FaultAround,
    MoveOrCopy,
    Outcome,
    PageNotExclusive,
    StrictMove,
    actions,
    errors,
    open_daemon,
)


async def test_strict_move_never_swallows_ebusy(uffd: FakeUserfaultfd) -> None:
    uffd.otherwise = failing(errno.EBUSY)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(StrictMove(PAGE)))
        uffd.say(missing(0))
        [(_, error)] = await recorder.failures(1)
        entry = the_open_fault(daemon)
    assert isinstance(error, PageNotExclusive)
    assert uffd.codes == [Code.MOVE]
    assert "not exclusively ours" in entry.reason


@pytest.mark.parametrize("copies", [True, False])
async def test_what_stays_busy_is_copied_only_if_the_application_says_so(
    copies: bool, uffd: FakeUserfaultfd
) -> None:
    uffd.script += [failing(errno.EBUSY)] * 2
    fallback = actions.Fallback(copy_pinned=copies, patience=0.0)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        # Nothing is mapped there, so that unsharing it has no effect.
        daemon.add_region(uffd, region(MoveOrCopy(PAGE, fallback)))
        uffd.say(missing(0))
        await recorder.either(1)
    assert uffd.codes == [Code.MOVE] * 2 + [Code.COPY] * copies
    if copies:
        assert [each.outcome for each in recorder.resolved] == [Outcome.COPIED]
    else:
        assert [type(error) for _, error in recorder.failed] == [PageNotExclusive]


async def test_a_pinned_page_is_waited_for(uffd: FakeUserfaultfd) -> None:
    uffd.script += [failing(errno.EBUSY)] * 6
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(MoveOrCopy(PAGE, actions.Fallback(patience=60.0))))
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.MOVED
    assert set(uffd.codes) == {Code.MOVE}


async def test_another_process_cannot_be_moved_for(uffd: FakeUserfaultfd) -> None:
    with FakeUserfaultfd(same_process=False) as theirs:
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            for policy in (StrictMove(PAGE), FaultAround(MoveOrCopy(PAGE), 4)):
                with pytest.raises(errors.PlacementRefused, match="inside of the process"):
                    daemon.add_region(theirs, region(policy))
            # Nor by a policy of which that was not known before.
            daemon.add_region(theirs, region(lambda fault: actions.Move(PAGE)))
            theirs.say(missing(0))
            [(_, error)] = await recorder.failures(1)
    assert isinstance(error, errors.PlacementRefused)
    assert theirs.issued == []
