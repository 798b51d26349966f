"""Hooks on a real kernel: what rules have answered in C is told as well.

What hooks can do wrong: tests/fake/test_hooks.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel

from tests.daemon.client import Client, Inside, faults_pending, region_of
from tests.support.daemons import both_sleeps
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    BytesSource,
    CopyFrom,
    Fault,
    FaultAround,
    FaultKind,
    Hooks,
    Outcome,
    Resolved,
    Veto,
    actions,
    errors,
    open_daemon,
)

if TYPE_CHECKING:
    from uffdaemon.actions import Action


@both_sleeps
@pytest.mark.parametrize("lowered", [True, False], ids=["rules", "python"])
@kernel_test()
async def test_after_hears_of_every_fault_and_of_the_first(
    lowered: bool, native_sleep: bool
) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(12)
    memory = await client.guarded(len(data))
    reader = client.start(Inside.read, 0, PAGE)
    thread = await reader.thread()
    await faults_pending(uffd, 1)
    recorder = Recorder()
    hooks = [recorder.hooks] if lowered else [recorder.hooks, Hooks(before=lambda f, a: None)]
    async with open_daemon(native_sleep=native_sleep, hooks=hooks) as daemon:
        policy = FaultAround(CopyFrom(BytesSource(data)), 4)
        region = daemon.add_region(uffd, region_of(memory, policy), register=None)
        assert await reader.result() == data[:PAGE]
        [first] = await recorder.resolutions(1)
        for page in (2, 6, 4, 11):
            await client.run(Inside.write, page * PAGE, b"x")
        found = await recorder.resolutions(3)
        counted = daemon.statistics()
    assert first.fault.thread == thread
    assert first.fault.region is region
    assert [each.fault.page for each in found] == [0, 6, 11]
    assert [each.done for each in found] == [4 * PAGE] * 3
    assert [each.fault.write for each in found] == [False, True, True]
    assert {each.fault.kind for each in found} == {FaultKind.MISSING}
    assert {each.outcome for each in found} == {Outcome.COPIED}
    assert all(each.latency > 0 for each in found)
    assert counted.resolved == sum(counted.latencies) == 3


@both_sleeps
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@kernel_test()
async def test_before_replaces_and_vetoes(is_async: bool, native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(3)
    memory = await client.guarded(len(data))

    def decide(fault: Fault, action: Action) -> Action | Veto | None:
        assert isinstance(action, actions.Copy)
        return {0: None, 1: actions.Zero(), 2: Veto("for the test")}[fault.page]

    async def decide_later(fault: Fault, action: Action) -> Action | Veto | None:
        await trio.lowlevel.checkpoint()
        return decide(fault, action)

    recorder = Recorder()
    instead = actions.Copy(BytesSource(bytes(len(data) - 1) + b"!"))
    hooks = [Hooks(before=decide_later if is_async else decide), recorder.hooks]
    async with open_daemon(native_sleep=native_sleep, hooks=hooks) as daemon:
        policy = CopyFrom(BytesSource(data))
        region = region_of(memory, policy, on_failure=lambda fault, error: instead)
        daemon.add_region(uffd, region, register=None)
        found = await client.run(Inside.read_all)
    assert found == data[:PAGE] + bytes(2 * PAGE - 1) + b"!"
    [(fault, error)] = recorder.failed
    assert fault.page == 2
    assert isinstance(error, errors.PolicyVetoed)
    outcomes = [each.outcome for each in recorder.resolved]
    assert outcomes == [Outcome.COPIED, Outcome.ZEROED, Outcome.COPIED]


@both_sleeps
@kernel_test()
async def test_hooks_that_raise_lose_no_fault(native_sleep: bool) -> None:
    client = Client()
    uffd = await client.uffd()
    data = content(64)
    memory = await client.guarded(len(data))

    def raises(*what: object) -> None:
        raise ZeroDivisionError("a bug")

    async def raises_later(resolved: Resolved) -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("a bug")

    hooks = [Hooks(after=raises, before=raises, failed=raises), Hooks(after=raises_later)]
    async with open_daemon(native_sleep=native_sleep, hooks=hooks) as daemon:
        policy = CopyFrom(BytesSource(data))
        daemon.add_region(uffd, region_of(memory, policy), register=None)
        readers = [client.start(Inside.read_all) for _ in range(3)]
        for reader in readers:
            assert await reader.result() == data
        assert not daemon.open_faults()
    assert daemon.statistics().failures["HookRaised"] >= 3 * 64
