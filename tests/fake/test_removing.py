"""Regions that are removed, and a single one that is served to its end."""

from __future__ import annotations

import errno

import pytest
import trio

from tests.fake.kernel import PAGE, START, FakeUserfaultfd, failing, missing, pages, region, settled
from tests.support.daemons import the_open_fault
from tests.support.notes import Asked, Gate, Recorder
from tests.support.page_contents import content
from uffdaemon import (
    AsyncSource,
    BytesSource,
    CopyFrom,
    Outcome,
    Region,
    ZeroPage,
    actions,
    errors,
    open_daemon,
    serve,
)
from uffdaemon.lowlevel import Code

DATA = content(8)


async def test_an_incomplete_region_is_not_let_go_of_by_mistake(uffd: FakeUserfaultfd) -> None:
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(CopyFrom(BytesSource(DATA)), name="the image"))
        with pytest.raises(errors.RegionIncomplete, match="the image lacks 8 of 8 pages"):
            daemon.remove_region(guarded)
        assert uffd.ranges == [("register", START, 8 * PAGE)]
        await daemon.fill(guarded)
        daemon.remove_region(guarded)
        assert uffd.ranges[-1] == ("unregister", START, 8 * PAGE)
        with pytest.raises(errors.NotServed):
            daemon.remove_region(guarded)


async def test_removed_with_its_missing_pages_poisoned(uffd: FakeUserfaultfd) -> None:
    policy = Asked(lambda fault: actions.Zero() if fault.page in (2, 3) else actions.Hold("no"))
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        guarded = daemon.add_region(uffd, region(policy))
        uffd.say(missing(2), missing(3), missing(5))
        await recorder.resolutions(2)
        daemon.remove_region(guarded, "poison")
        poisoned = [pages(step) for step in uffd.issued if step.code is Code.POISON]
        assert poisoned == [(0, 2), (4, 8)]
        assert uffd.ranges[-1][0] == "unregister"
        assert not daemon.open_faults()


async def test_removed_and_held(uffd: FakeUserfaultfd) -> None:
    policy = Asked(lambda fault: actions.Hold("no"))
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(policy, name="the image"))
        uffd.say(missing(5))
        await policy.times(1)
        daemon.remove_region(guarded, "hold")
        assert the_open_fault(daemon).reason == "region the image was removed"
        assert [what for what, _, _ in uffd.ranges] == ["register"]
        # Its policy is asked no more.
        uffd.say(missing(5, thread=2))
        await settled()
        assert len(policy.faults) == 1
        assert the_open_fault(daemon).threads == (1, 2)


async def test_removed_and_released_while_a_page_is_fetched(uffd: FakeUserfaultfd) -> None:
    gate = Gate(DATA)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        policy = CopyFrom(AsyncSource(gate.fetch, len(DATA)))
        guarded = daemon.add_region(uffd, region(policy))
        uffd.say(missing(5))
        await gate.times(1)
        daemon.remove_region(guarded, "release")
        [resolved] = await recorder.resolutions(1)
        gate.open.set()
        await settled()
    assert resolved.outcome is Outcome.WOKEN
    assert uffd.issued == []


# -- serve -------------------------------------------------------------------------------------


async def test_serve_ends_with_its_client(uffd: FakeUserfaultfd) -> None:
    recorder = Recorder()
    async with trio.open_nursery() as nursery:
        daemon = await nursery.start(
            lambda task_status: serve(
                uffd, [region(ZeroPage())], hooks=[recorder.hooks], task_status=task_status
            )
        )
        uffd.say(missing(0))
        await recorder.resolutions(1)
        uffd.otherwise = failing(errno.ESRCH)
        uffd.say(missing(1))
    assert daemon.statistics().resolved == 2


async def test_serve_refuses_what_overlaps(uffd: FakeUserfaultfd) -> None:
    regions = [region(ZeroPage(), name="one"), Region(START + PAGE, PAGE, ZeroPage(), name="two")]
    with pytest.raises(errors.InvalidRange, match=r"two.*overlaps.*one"):
        await serve(uffd, regions)
    assert not uffd.closed


async def test_a_region_that_begins_low_and_is_long_costs_no_more(uffd: FakeUserfaultfd) -> None:
    low, length = 1 << 16, 1 << 42
    uffd.script.append(failing(errno.ENOMEM))
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, Region(low, length, ZeroPage(), name="the image"))
        with pytest.raises(errors.RegionIncomplete, match="the image lacks some pages"):
            daemon.remove_region(guarded)
        # Whether its process is alive is asked by an operation outside of it.
        with pytest.raises(errors.OperationError):
            daemon.remove_region(guarded, "poison")
        assert [(step.code, step.dst) for step in uffd.issued] == [
            (Code.POISON, low),
            (Code.ZEROPAGE, low + length),
        ]
        daemon.remove_region(guarded, "release")


async def test_poisoning_goes_on_behind_the_end_of_a_mapping(uffd: FakeUserfaultfd) -> None:
    uffd.script += [failing(errno.ENOENT), failing(errno.ENOENT)]
    async with open_daemon() as daemon:
        guarded = daemon.add_region(uffd, region(ZeroPage()))
        daemon.remove_region(guarded, "poison")
        assert [pages(step) for step in uffd.issued] == [(0, 8), (0, 4), (0, 2), (2, 8)]
        assert {step.code for step in uffd.issued} == {Code.POISON}


async def test_many_that_are_removed_leave_the_rules_of_the_others(uffd: FakeUserfaultfd) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        added = [
            daemon.add_region(uffd, Region(START + page * PAGE, PAGE, ZeroPage()))
            for page in range(40)
        ]
        await settled()
        for each in added[1:]:
            daemon.remove_region(each, "release")
        # Before the rules are written anew.
        uffd.say(missing(0), missing(7))
        outcomes = {each.fault.address: each.outcome for each in await recorder.resolutions(2)}
        assert outcomes == {START: Outcome.ZEROED, START + 7 * PAGE: Outcome.WOKEN}
        daemon.remove_region(added[0], "release")
