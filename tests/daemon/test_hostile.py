"""Policies and work that do everything wrong: nobody sees a page that is not due.

All of them with all that can be declared for failures: tests/fake/test_deciding.py.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import trio
from structlog.testing import capture_logs

from tests.daemon.client import Client, Inside, region_of
from tests.support.daemons import both_sleeps, failure_lines, the_open_fault
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    Advice,
    BytesSource,
    CopyFrom,
    Fault,
    FaultKind,
    Outcome,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.actions import Action, Perform, Span
from uffdaemon.lowlevel import Features, PageCategory, RegisterMode, Userfaultfd, scan_pages

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = content(8)
SOURCE = BytesSource(DATA)


def raises(fault: Fault) -> Action | None:
    raise ZeroDivisionError("a bug")


def answers_nothing(fault: Fault) -> Action | None:
    return None


def answers_nonsense(fault: Fault) -> Action | None:
    return "a page, please"  # type: ignore[return-value]


def fills_its_neighbour(fault: Fault) -> Action | None:
    return actions.Zero(Span(fault.offset + PAGE, PAGE))


def leaves_its_region(fault: Fault) -> Action | None:
    return actions.Zero(Span(0, 64 * PAGE))


def has_too_little(fault: Fault) -> Action | None:
    return actions.Copy(BytesSource(DATA[: PAGE - 1]))


def moves_from_nowhere(fault: Fault) -> Action | None:
    return actions.Move(1 << 46)


async def _says_so(uffd: Userfaultfd, fault: Fault) -> Outcome:
    await trio.lowlevel.checkpoint()
    return Outcome.COPIED


async def _places_another(uffd: Userfaultfd, fault: Fault) -> Outcome:
    await trio.lowlevel.checkpoint()
    uffd.copy(fault.address + 4 * PAGE, DATA[:PAGE])
    return Outcome.COPIED


async def _is_late(uffd: Userfaultfd, fault: Fault) -> Outcome:
    await trio.sleep_forever()
    raise AssertionError


async def _leaves_the_mapping(uffd: Userfaultfd, fault: Fault) -> Outcome:
    await trio.lowlevel.checkpoint()
    uffd.copy(fault.region.start - (1 << 30), DATA[:PAGE])
    return Outcome.COPIED


def claims(fault: Fault) -> Action | None:
    return Perform(_says_so)


def resolves_the_wrong_page(fault: Fault) -> Action | None:
    return Perform(_places_another)


def is_too_late(fault: Fault) -> Action | None:
    return Perform(_is_late, timeout=0.001)


def works_elsewhere(fault: Fault) -> Action | None:
    return Perform(_leaves_the_mapping)


HOSTILE: dict[Callable[[Fault], Action | None], type[Exception]] = {
    raises: errors.PolicyRaised,
    answers_nothing: errors.NoAnswer,
    answers_nonsense: errors.PolicyAnswerInvalid,
    fills_its_neighbour: errors.InvalidRange,
    leaves_its_region: errors.InvalidRange,
    has_too_little: errors.SourceTooShort,
    moves_from_nowhere: errors.PlacementRefused,
    claims: errors.PolicyAnswerInvalid,
    resolves_the_wrong_page: errors.PolicyAnswerInvalid,
    is_too_late: errors.PolicyTooSlow,
    works_elsewhere: errors.PolicyRaised,
}
hostile = pytest.mark.parametrize("policy", HOSTILE, ids=lambda policy: policy.__name__)
some = pytest.mark.parametrize(
    "policy", [raises, fills_its_neighbour, claims, is_too_late], ids=lambda policy: policy.__name__
)


@hostile
@kernel_test()
async def test_the_thread_waits_is_listed_and_sees_nothing_wrong(
    policy: Callable[[Fault], Action | None],
) -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(len(DATA))
    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            region = region_of(memory, policy, name="the region")
            daemon.add_region(uffd, region, register=None)
            reader = client.start(Inside.read, PAGE, PAGE)
            thread = await reader.thread()
            [(fault, error)] = await recorder.failures(1)
            entry = the_open_fault(daemon)
            dumped = daemon.dump()
            assert daemon.statistics().failures == {HOSTILE[policy].__name__: 1}
            # Not a page of zeros, nor any other: the page is not there.
            page = memory.start + PAGE
            assert not scan_pages(page, PAGE, required=PageCategory.PRESENT, pid=client.pid)
            # What is right comes from the application in the end.
            uffd.copy(page, DATA[PAGE : 2 * PAGE])
            assert await reader.result() == DATA[PAGE : 2 * PAGE]
    assert type(error) is HOSTILE[policy]
    [line] = failure_lines(logs)
    assert line["policy"] == policy.__qualname__
    assert line["thread"] == thread
    assert line["address"] == hex(page)
    assert entry.fault is fault
    assert entry.threads == (thread,)
    assert entry.age > 0
    assert HOSTILE[policy].__name__ in entry.reason
    for said in (f"thread {thread}", hex(page), "the region", HOSTILE[policy].__name__):
        assert said in dumped


@some
@kernel_test(features=Features.POISON)
async def test_the_client_gets_sigbus_if_poison_is_declared(
    policy: Callable[[Fault], Action | None],
) -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(len(DATA))
    async with open_daemon() as daemon:
        region = region_of(memory, policy, on_failure=actions.Poison())
        daemon.add_region(uffd, region, register=None)
        client.start(Inside.read, PAGE, PAGE)
        assert await client.status() == -signal.SIGBUS
        counted = daemon.statistics()
    assert counted.faults[FaultKind.MISSING, Outcome.POISONED] == 1
    assert counted.failures == {HOSTILE[policy].__name__: 1}


@some
@kernel_test()
async def test_the_application_makes_it_good_if_so_declared(
    policy: Callable[[Fault], Action | None],
) -> None:
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(len(DATA))
    asked: list[tuple[Fault, Exception]] = []

    def instead(fault: Fault, error: Exception) -> Action:
        asked.append((fault, error))
        return actions.Copy(SOURCE)

    async with open_daemon() as daemon:
        region = region_of(memory, policy, on_failure=instead)
        daemon.add_region(uffd, region, register=None)
        assert await client.run(Inside.read, PAGE, PAGE) == DATA[PAGE : 2 * PAGE]
        assert not daemon.open_faults()
    assert [type(error) for _, error in asked] == [HOSTILE[policy]]


@both_sleeps
@kernel_test()
async def test_one_bad_region_leaves_the_others_alone(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    bad = await client.guarded(len(DATA))
    good = await client.guarded(len(DATA))
    recorder = Recorder()
    async with open_daemon(native_sleep=native_sleep, hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region_of(bad, claims), register=None)
        daemon.add_region(uffd, region_of(good, CopyFrom(SOURCE)), register=None)
        for page in range(8):
            client.start(Inside.read, page * PAGE, 1, 0)
        assert await client.run(Inside.read_all, 1) == DATA
        await recorder.failures(8)
        assert len(daemon.open_faults()) == 8


@kernel_test()
async def test_a_policy_may_ask_for_work_as_often_as_it_likes() -> None:
    """A page that its owner discards at once, with no event about it: that is no deceit."""
    client = Client()
    uffd = await client.uffd()
    memory = await client.guarded(PAGE)

    async def place(uffd: Userfaultfd, fault: Fault) -> Outcome:
        await trio.lowlevel.checkpoint()
        uffd.copy(fault.address, DATA[:PAGE], wake=False)
        return Outcome.COPIED

    async with open_daemon() as daemon:
        region = region_of(memory, lambda fault: Perform(place))
        daemon.add_region(uffd, region, register=None)
        for _ in range(40):
            assert await client.run(_read_and_discard) == DATA[:PAGE]
        assert daemon.statistics().failures == {}


def _read_and_discard(inside: Inside) -> bytes:
    found = inside.read_all()
    inside.advise(Advice.DONTNEED)
    return found


@kernel_test(features=Features.PAGEFAULT_FLAG_WP)
async def test_poison_where_there_is_a_page_ends_in_holding() -> None:
    """A write to a protected page cannot be poisoned; the thread waits, and is listed."""
    features = Features.THREAD_ID | Features.PAGEFAULT_FLAG_WP
    client = Client()
    uffd = await client.uffd(features)
    memory = await client.guarded(PAGE, mode=RegisterMode.MISSING | RegisterMode.WP)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        copy = CopyFrom(SOURCE, write_protect=True)
        region = region_of(memory, copy, on_failure=actions.Poison())
        daemon.add_region(uffd, region, register=None)
        assert await client.run(Inside.read, 0, PAGE) == DATA[:PAGE]
        client.start(Inside.write, 0, b"x")
        await recorder.until(lambda: recorder.failed and daemon.open_faults()[:1])
        await recorder.until(lambda: isinstance(recorder.failed[-1][1], errors.PolicyAnswerInvalid))
        entry = the_open_fault(daemon)
        assert entry.fault.kind is FaultKind.WP
        assert entry.waiting.value == "nobody"
        uffd.write_protect(memory.start, PAGE, protect=False)
