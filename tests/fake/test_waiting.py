"""Threads that wait for nothing, come back for nothing, or are held."""

from __future__ import annotations

import pytest
import trio

from tests.fake.kernel import (
    PAGE,
    START,
    FakeUserfaultfd,
    missing,
    pages,
    present,
    protected,
    region,
    settled,
)
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.notes import Asked, Recorder
from uffdaemon import Fault, Outcome, Policy, Region, actions, errors, open_daemon
from uffdaemon.actions import Action, Perform
from uffdaemon.lowlevel import Code, Userfaultfd


async def come_back(uffd: FakeUserfaultfd, recorder: Recorder, most: int) -> int:
    """Have the thread fault as often as it is woken, until that is taken for a failure; how often
    it was woken."""
    for count in range(most):
        uffd.say(missing(0))
        await recorder.either(count + 1)
        if recorder.failed:
            return count
    raise AssertionError("nobody minds")


async def _claims(uffd: Userfaultfd, fault: Fault) -> Outcome:
    await trio.lowlevel.checkpoint()
    return Outcome.COPIED


@both_sleeps
@pytest.mark.parametrize(
    ("policy", "most"),
    [(lambda fault: actions.Wake(), 8), (lambda fault: Perform(_claims), 256)],
    ids=["wake", "perform"],
)
async def test_a_thread_that_is_woken_for_nothing_is_noticed(
    policy: Policy, most: int, native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region(policy))
        times = await come_back(uffd, recorder, 1000)
        # The last wake-up brings it back once more: that is no news.
        uffd.say(missing(0))
        await settled()
        entry = the_open_fault(daemon)
    [(_, error)] = recorder.failed
    assert type(error) is errors.PolicyAnswerInvalid
    assert "times in a row the thread found it is not" in entry.reason
    assert times >= most


async def test_a_page_that_is_there_and_is_not_is_noticed(uffd: FakeUserfaultfd) -> None:
    recorder = Recorder()
    uffd.otherwise = present
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(lambda fault: actions.Zero(), on_failure=actions.Poison()))
        times = await come_back(uffd, recorder, 100)
    assert times >= 8
    assert {each.outcome for each in recorder.resolved} == {Outcome.ALREADY_PRESENT}


async def test_threads_that_share_a_page_are_not_taken_for_deceived(uffd: FakeUserfaultfd) -> None:
    """One brings the page, the other finds it there; then it is discarded, again and again."""
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(lambda fault: actions.Zero()))
        for times in range(40):
            uffd.say(missing(0, thread=1))
            await recorder.resolutions(2 * times + 1)
            uffd.script.append(present)
            uffd.say(missing(0, thread=2))
            await recorder.resolutions(2 * times + 2)
        assert not recorder.failed


async def test_an_address_outside_of_every_region_is_woken_then_held(
    uffd: FakeUserfaultfd,
) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, Region(START + 64 * PAGE, PAGE, lambda fault: actions.Zero()))
        await come_back(uffd, recorder, 100)
        entry = the_open_fault(daemon)
        assert entry.fault.region.label.startswith("outside of every region of userfaultfd ")
        assert set(uffd.codes) == {Code.WAKE}
        # The last wake-up brings the thread back, too: it stays held.
        uffd.say(missing(0))
        await settled()
        the_open_fault(daemon)
        assert len(recorder.failed) == 1
        # Once there is a region, whoever is held there is sent to ask again.
        daemon.add_region(uffd, region(lambda fault: actions.Zero()))
        assert not daemon.open_faults()
        assert pages(uffd.issued[-1]) == (0, 8)
        uffd.say(missing(0))
        await recorder.until(lambda: recorder.resolved[-1].outcome is Outcome.ZEROED)


# -- who is held -------------------------------------------------------------------------------


@both_sleeps
async def test_a_held_fault_is_decided_again_when_a_thread_faults_again(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    said: list[Action] = [actions.Hold("not yet"), actions.Hold("not yet"), actions.Zero()]
    policy = Asked(lambda fault: said[len(policy.faults) - 1])
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(0, thread=1))
        await policy.times(1)
        uffd.say(missing(0, thread=2))
        await policy.times(2)
        assert the_open_fault(daemon).threads == (1, 2)
        uffd.say(missing(0, thread=1))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.ZEROED
    assert daemon.statistics().joined == 2


async def test_a_held_fault_ends_when_a_neighbour_fills_its_page(uffd: FakeUserfaultfd) -> None:
    policy = Asked(lambda fault: actions.Zero(4) if fault.page else actions.Hold("no"))
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(0, thread=1))
        await policy.times(1)
        uffd.say(missing(2, thread=2))
        found = await recorder.resolutions(2)
        assert not daemon.open_faults()
    outcomes = {each.fault.page: each.outcome for each in found}
    assert outcomes == {0: Outcome.ALREADY_PRESENT, 2: Outcome.ZEROED}


async def test_a_write_protect_fault_never_merges_with_a_missing_one(
    uffd: FakeUserfaultfd,
) -> None:
    policy = Asked(lambda fault: actions.Hold(fault.kind.value))
    async with open_daemon() as daemon:
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(0, thread=1), protected(0, thread=2))
        await policy.times(2)
        reasons = sorted(entry.reason for entry in daemon.open_faults())
    assert reasons == ["missing", "write_protect"]
