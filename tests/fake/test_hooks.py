"""Hooks observe, replace, veto, measure; whatever they do, no fault is lost over it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Literal

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from tests.fake.kernel import PAGE, START, FakeUserfaultfd, failing, gone, missing, region, settled
from tests.support.daemons import both_sleeps, the_open_fault
from tests.support.notes import Asked, Notes, Recorder
from tests.support.page_contents import content
from uffdaemon import (
    BytesSource,
    CopyFrom,
    Fault,
    FaultKind,
    Hooks,
    Outcome,
    Resolved,
    Shutdown,
    Veto,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import Code, Event, ForkEvent, RemapEvent, RemoveEvent, UnmapEvent

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from uffdaemon.actions import Action

COPY = CopyFrom(BytesSource(content(8)))
BeforeAnswer = actions.Action | Veto | None

sync_and_async = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


class Hook(Notes):
    """A ``before`` hook that answers what it is told to, sync or async."""

    def __init__(self, answer: object, is_async: bool) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[tuple[Fault, Action]] = []
        self.hooks = Hooks(before=self._later if is_async else self._now)  # type: ignore[arg-type]

    def _now(self, fault: Fault, action: Action) -> object:
        self.seen.append((fault, action))
        self.note()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def _later(self, fault: Fault, action: Action) -> object:
        await trio.lowlevel.checkpoint()
        return self._now(fault, action)


@sync_and_async
@both_sleeps
async def test_before_sees_every_fault_with_its_action(
    is_async: bool, native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    hook, recorder = Hook(None, is_async), Recorder()
    hooks = [hook.hooks, recorder.hooks]
    async with open_daemon(hooks=hooks, native_sleep=native_sleep) as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(missing(0), missing(5))
        found = await recorder.resolutions(2)
    assert sorted(fault.page for fault, _ in hook.seen) == [0, 5]
    assert {type(action) for _, action in hook.seen} == {actions.Copy}
    assert {each.outcome for each in found} == {Outcome.COPIED}


@sync_and_async
async def test_before_can_do_something_else(is_async: bool, uffd: FakeUserfaultfd) -> None:
    first, last = Hook(actions.Zero(), is_async), Hook(None, is_async)
    recorder = Recorder()
    async with open_daemon(hooks=[first.hooks, last.hooks, recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.ZEROED
    # The next one is told what it has become.
    assert [action for _, action in last.seen] == [actions.Zero()]


@sync_and_async
async def test_before_can_veto_by_name_and_reason(is_async: bool, uffd: FakeUserfaultfd) -> None:
    hook, last, recorder = Hook(Veto("not today"), is_async), Hook(None, is_async), Recorder()
    async with open_daemon(hooks=[hook.hooks, last.hooks, recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(missing(0))
        [(_, error)] = await recorder.failures(1)
        entry = the_open_fault(daemon)
    assert isinstance(error, errors.PolicyVetoed)
    assert "vetoed: not today" in entry.reason
    assert "Hook._" in entry.reason
    assert last.seen == []
    assert uffd.issued == []


@sync_and_async
@pytest.mark.parametrize("answer", [ValueError("a bug"), 7, trio.TooSlowError()], ids=repr)
async def test_before_that_fails_loses_nothing(
    answer: object, is_async: bool, uffd: FakeUserfaultfd
) -> None:
    hook, last, recorder = Hook(answer, is_async), Hook(None, is_async), Recorder()
    with capture_logs() as logs:
        async with open_daemon(hooks=[hook.hooks, last.hooks, recorder.hooks]) as daemon:
            daemon.add_region(uffd, region(COPY))
            uffd.say(missing(0))
            [resolved] = await recorder.resolutions(1)
            counted = daemon.statistics()
    assert resolved.outcome is Outcome.COPIED
    assert len(last.seen) == 1
    assert counted.failures == {"HookRaised": 1}
    [line] = [line for line in logs if line["event"] == "hook failed"]
    assert "Hook._" in line["hook"]


async def test_a_before_hook_that_never_returns_times_out(
    uffd: FakeUserfaultfd, autojump_clock: trio.testing.MockClock
) -> None:
    reasons: list[str] = []

    async def before(fault: Fault, action: Action) -> None:
        await trio.lowlevel.checkpoint()
        reasons.append(the_open_fault(daemon).waiting.value)
        await trio.sleep_forever()

    recorder = Recorder()
    async with open_daemon(hooks=[Hooks(before=before), recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
    assert reasons == ["hook"]
    assert resolved.outcome is Outcome.COPIED


async def test_a_range_that_goes_away_while_before_is_asked_gets_nothing(
    uffd: FakeUserfaultfd,
) -> None:
    asked, answer = trio.Event(), trio.Event()

    async def before(fault: Fault, action: Action) -> None:
        asked.set()
        await answer.wait()

    recorder = Recorder()
    async with open_daemon(hooks=[Hooks(before=before), recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(COPY))
        uffd.say(missing(0))
        await asked.wait()
        uffd.say(UnmapEvent(START, START + PAGE))
        await recorder.resolutions(1)
        answer.set()
        await settled()
    assert uffd.codes == [Code.WAKE]


@sync_and_async
@pytest.mark.parametrize("missing_pages", ["release", "hold"])
async def test_a_fault_that_a_hook_of_another_one_ends_is_not_decided(
    missing_pages: Literal["release", "hold"], is_async: bool, uffd: FakeUserfaultfd
) -> None:
    asked: list[int] = []

    def now(fault: Fault) -> None:
        asked.append(fault.page)
        daemon.remove_region(guarded, missing_pages)

    async def later(fault: Fault) -> None:
        await trio.lowlevel.checkpoint()

    def before(fault: Fault, action: Action) -> Awaitable[None] | None:
        now(fault)
        return later(fault) if is_async else None  # nobody is left to await it for

    async with open_daemon(hooks=[Hooks(before=before)]) as daemon:
        guarded = daemon.add_region(uffd, region(COPY))
        uffd.say(missing(0), missing(1))
        await settled()
        assert asked == [0]
        waiting = [(each.fault.page, each.waiting.value) for each in daemon.open_faults()]
        assert waiting == ([(1, "nobody")] if missing_pages == "hold" else [])


async def test_what_is_read_of_a_client_that_is_gone_ends_with_it(uffd: FakeUserfaultfd) -> None:
    recorder = Recorder()
    uffd.otherwise = gone
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(COPY))
        [server] = daemon._servers.own.values()
        uffd.say(missing(0))
        await recorder.resolutions(1)
        server.handler.handle([missing(1)], 0)
        assert not server.served.ledger
    assert [each.outcome for each in recorder.resolved] == [Outcome.CLIENT_GONE] * 2


class Listener(Notes):
    """Hooks that only observe, sync or async, and raise if they are told to."""

    def __init__(self, is_async: bool, error: Exception | None = None) -> None:
        super().__init__()
        self.heard: list[tuple[str, object]] = []
        self.error = error
        make = self._async if is_async else self._sync
        self.hooks = Hooks(
            after=make("after"),
            failed=make("failed"),
            fork=make("fork"),
            remap=make("remap"),
            remove=make("remove"),
            unmap=make("unmap"),
        )

    def _hear(self, name: str, *what: object) -> None:
        self.heard.append((name, what))
        self.note()
        if self.error is not None:
            raise self.error

    def _sync(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
        return lambda *what: self._hear(name, *what)

    def _async(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
        async def hook(*what: object) -> None:
            await trio.lowlevel.checkpoint()
            self._hear(name, *what)

        return hook

    async def names(self, count: int) -> list[str]:
        await self.until(lambda: len(self.heard) >= count)
        return [name for name, _ in self.heard]


@sync_and_async
@pytest.mark.parametrize("error", [None, RuntimeError("a bug")], ids=["fine", "raising"])
async def test_event_hooks_are_called_in_order(
    error: Exception | None, is_async: bool, uffd: FakeUserfaultfd
) -> None:
    listener = Listener(is_async, error)
    fd = os.open("/dev/null", os.O_RDONLY)
    events: list[Event] = [
        RemoveEvent(START, START + PAGE),
        ForkEvent(fd),
        RemapEvent(START + PAGE, START - PAGE, PAGE),
        UnmapEvent(START + 2 * PAGE, START + 3 * PAGE),
    ]
    async with open_daemon(hooks=[listener.hooks], on_fork="close") as daemon:
        daemon.add_region(uffd, region(ZeroPage()))
        uffd.say(*events)
        names = await listener.names(4)
        await settled()
        counted = daemon.statistics()
    assert names == ["remove", "fork", "remap", "unmap"]
    assert [what for _, what in listener.heard] == [(event,) for event in events]
    assert counted.events == {"remove": 1, "fork": 1, "remap": 1, "unmap": 1}
    assert counted.failures == ({"HookRaised": 4} if error else {})


@sync_and_async
@pytest.mark.parametrize("error", [None, RuntimeError("a bug")], ids=["fine", "raising"])
async def test_hooks_see_outcomes_and_failures(
    error: Exception | None, is_async: bool, uffd: FakeUserfaultfd
) -> None:
    listener = Listener(is_async, error)
    async with open_daemon(hooks=[listener.hooks]) as daemon:
        guarded = region(
            lambda fault: actions.Zero() if fault.page else None, on_failure=actions.Poison()
        )
        daemon.add_region(uffd, guarded)
        uffd.say(missing(0))
        names = await listener.names(2)
        uffd.say(missing(1))
        await listener.names(3)
    assert names == ["failed", "after"]
    [failed, poisoned, zeroed] = [what for _, what in listener.heard]
    assert isinstance(failed, tuple)
    assert isinstance(failed[1], errors.NoAnswer)
    for what, outcome in ((poisoned, Outcome.POISONED), (zeroed, Outcome.ZEROED)):
        assert isinstance(what, tuple)
        [resolved] = what
        assert isinstance(resolved, Resolved)
        assert resolved.outcome is outcome
        assert resolved.done == PAGE
        assert resolved.latency > 0


@sync_and_async
@pytest.mark.parametrize("how", ["poison", "gone", "resolve", "unmapped"])
async def test_after_hears_of_the_very_last_fault(
    how: str, is_async: bool, uffd: FakeUserfaultfd
) -> None:
    listener = Listener(is_async)
    policy = Asked(lambda fault: actions.Hold("no"))
    ending = {"poison": Shutdown.POISON, "resolve": Shutdown.RESOLVE}.get(how, Shutdown.HOLD)
    async with open_daemon(hooks=[listener.hooks], on_shutdown=ending) as daemon:
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(0))
        await policy.times(1)
        if how == "gone":
            policy.policy = ZeroPage()
            uffd.otherwise = gone
            uffd.say(missing(1))
            await daemon.wait_client_gone(uffd)
        elif how == "resolve":
            policy.policy = ZeroPage()
            uffd.say(missing(0))
        elif how == "unmapped":
            uffd.say(UnmapEvent(START, START + PAGE))
            await listener.names(1)
    endings = [what[0].outcome for name, what in listener.heard if name == "after"]  # type: ignore[index]
    expected = {
        "poison": [Outcome.POISONED],
        "gone": [Outcome.CLIENT_GONE] * 2,
        "resolve": [Outcome.ZEROED],
        "unmapped": [Outcome.UNMAPPED],
    }
    assert endings == expected[how]


async def test_a_hook_that_hangs_does_not_keep_the_daemon_from_ending(
    uffd: FakeUserfaultfd, autojump_clock: trio.testing.MockClock
) -> None:
    told: list[Resolved] = []

    async def after(resolved: Resolved) -> None:
        told.append(resolved)
        await trio.sleep_forever()

    policy = Asked(lambda fault: actions.Zero())
    async with open_daemon(hooks=[Hooks(after=after)], shutdown_timeout=3.0) as daemon:
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(0), missing(4))
        await policy.times(2)
        begun = trio.current_time()
    assert trio.current_time() - begun == pytest.approx(3.0, abs=0.5)
    # The first hangs, the second never got its turn, and nobody complains of that.
    assert len(told) == 1


async def test_the_failure_hook_is_called_before_the_declared_action(uffd: FakeUserfaultfd) -> None:
    uffd.script.append(failing(errno.EINVAL))
    seen: list[list[Code]] = []

    def failed(fault: Fault, error: Exception) -> None:
        seen.append(uffd.codes)

    recorder = Recorder()
    async with open_daemon(hooks=[Hooks(failed=failed), recorder.hooks]) as daemon:
        guarded = region(lambda fault: actions.Zero(), on_failure=actions.Poison())
        daemon.add_region(uffd, guarded)
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
    assert resolved.fault.kind is FaultKind.MISSING
    assert seen == [[Code.ZEROPAGE]]
    assert uffd.codes == [Code.ZEROPAGE, Code.POISON]
