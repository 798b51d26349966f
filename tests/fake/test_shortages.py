"""No memory or no descriptor, which may pass: the fault is tried again, and listed meanwhile."""

from __future__ import annotations

import errno

import pytest
import trio

from tests.fake.kernel import (
    START,
    FakeUserfaultfd,
    done,
    failing,
    missing,
    present,
    region,
    settled,
)
from tests.support.daemons import the_open_fault
from tests.support.notes import Recorder
from tests.support.page_contents import content
from uffdaemon import (
    BytesSource,
    CopyFrom,
    Fault,
    Outcome,
    Region,
    Retry,
    StrictMove,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Code, Userfaultfd
from uffdaemon.model.ledger import Waiting
from uffdaemon.ranges import PAGE_SIZE

NO_MEMORY = failing(errno.ENOMEM)
NOW = Retry(first_delay=0.0, max_delay=0.0)
LATER = Retry(first_delay=3600.0, max_delay=3600.0)
OVER = Retry(first_delay=0.0, max_delay=0.0, timeout=1e-9)
"""The second attempt is the last one."""
HUGE = 512 * PAGE_SIZE


@pytest.mark.parametrize(
    ("policy", "outcome"),
    [
        (CopyFrom(BytesSource(content(8))), Outcome.COPIED),
        (ZeroPage(), Outcome.ZEROED),
        (StrictMove(PAGE_SIZE, foreign=True), Outcome.MOVED),
        (lambda fault: actions.Continue(), Outcome.MAPPED),
    ],
    ids=["copy", "zero", "move", "continue"],
)
async def test_it_is_tried_until_there_is_memory(
    policy: CopyFrom, outcome: Outcome, uffd: FakeUserfaultfd
) -> None:
    uffd.script += [NO_MEMORY] * 5
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(policy, retry=NOW))
        uffd.say(missing(2))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is outcome
    assert recorder.failed == []


async def test_it_is_listed_meanwhile(uffd: FakeUserfaultfd) -> None:
    uffd.otherwise = NO_MEMORY
    async with open_daemon() as daemon:
        daemon.add_region(uffd, region(ZeroPage(), retry=LATER))
        uffd.say(missing(2))
        await settled()
        entry = the_open_fault(daemon)
        [shown] = daemon.statistics().as_dict()["open"]
    assert (entry.waiting, entry.attempts, shown["attempts"]) == (Waiting.TIMER, 1, 1)
    assert "ENOMEM" in entry.reason
    assert str(entry).endswith("; attempts: 1")


async def test_it_ends_in_the_declared_action(uffd: FakeUserfaultfd) -> None:
    uffd.script += [NO_MEMORY] * 2
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(ZeroPage(), on_failure=actions.Poison(), retry=OVER))
        uffd.say(missing(2))
        [resolved] = await recorder.resolutions(1)
    assert uffd.codes == [Code.ZEROPAGE, Code.ZEROPAGE, Code.POISON]
    assert resolved.outcome is Outcome.POISONED
    assert [type(error) for _, error in recorder.failed] == [errors.OperationError]


async def test_who_is_held_goes_on_by_itself(uffd: FakeUserfaultfd) -> None:
    uffd.script += [NO_MEMORY] * 9
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(ZeroPage(), retry=OVER))
        uffd.say(missing(2))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.ZEROED
    assert len(recorder.failed) == 1


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.ENFILE])
@pytest.mark.parametrize("where", ["policy", "work"])
async def test_a_policy_is_asked_again(where: str, number: int, uffd: FakeUserfaultfd) -> None:
    asked: list[Fault] = []

    def decide(fault: Fault) -> actions.Action:
        asked.append(fault)
        if len(asked) > 3:
            return actions.Zero()
        if where == "work":
            return actions.Perform(work)
        raise OSError(number, "used up")

    async def work(uffd: Userfaultfd, fault: Fault) -> Outcome:
        raise OSError(number, "used up")

    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(decide, retry=NOW))
        uffd.say(missing(2))
        [resolved] = await recorder.resolutions(1)
    assert (resolved.outcome, len(asked), recorder.failed) == (Outcome.ZEROED, 4, [])


async def test_a_huge_page_that_is_not_there_is_not_believed_for_ever() -> None:
    """COPY says EEXIST, and the thread faults again each time that it is woken."""
    with FakeUserfaultfd(same_process=False) as uffd:
        uffd.otherwise = present
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            source = BytesSource(bytes(HUGE))
            policy = lambda fault: actions.Copy(source)  # noqa: E731  # not lowered
            guarded = Region(START, HUGE, policy, page_size=HUGE, retry=NOW)
            daemon.add_region(uffd, guarded)
            for count in range(8):
                uffd.say(missing(0))
                await recorder.resolutions(count + 1)
            uffd.say(missing(0))
            while not any("no huge page" in each.reason for each in daemon.open_faults()):
                await trio.lowlevel.checkpoint()
            uffd.otherwise = done
            await recorder.resolutions(9)
    assert [each.outcome for each in recorder.resolved[-2:]] == [
        Outcome.ALREADY_PRESENT,
        Outcome.COPIED,
    ]
    assert recorder.failed == []
