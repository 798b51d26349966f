"""The end: of the daemon, of a client, of a descriptor; in the middle of whatever it is doing."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
import trio
from structlog.testing import capture_logs

from tests.fake.kernel import (
    Answer,
    FakeUserfaultfd,
    failing,
    in_flight,
    missing,
    pages,
    present,
    protected,
    region,
    settled,
)
from tests.support.daemons import both_sleeps
from tests.support.descriptors import open_descriptors
from tests.support.notes import Asked, Gate, Recorder
from tests.support.page_contents import content
from uffdaemon import (
    AsyncSource,
    CopyFrom,
    Fault,
    Hooks,
    Outcome,
    Retry,
    Shutdown,
    ZeroPage,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.actions import Perform
from uffdaemon.lowlevel import Code, Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import EventDict

DATA = content(8)


def left_waiting(logs: list[EventDict]) -> list[str]:
    """What was logged of threads that nobody answers any more."""
    return [str(line["fault"]) for line in logs if line["event"] == "thread left waiting"]


# -- shutting down -----------------------------------------------------------------------------


@both_sleeps
@pytest.mark.parametrize("how", list(Shutdown), ids=lambda how: how.value)
async def test_open_faults_end_as_the_caller_chose(
    how: Shutdown, native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    policy = Asked(lambda fault: actions.Hold("for ever"))
    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(
            on_shutdown=how, hooks=[recorder.hooks], native_sleep=native_sleep
        ) as daemon:
            daemon.add_region(uffd, region(policy))
            uffd.say(missing(2, thread=5))
            await policy.times(1)
    if how is Shutdown.POISON:
        assert [each.outcome for each in recorder.resolved] == [Outcome.POISONED]
        assert [(step.code, pages(step)) for step in uffd.issued] == [(Code.POISON, (2, 3))]
        assert left_waiting(logs) == []
    else:
        assert recorder.resolved == []
        assert uffd.issued == []
        [said] = left_waiting(logs)
        assert "thread 5" in said
        assert "for ever" in said
    assert not uffd.closed


@both_sleeps
@pytest.mark.parametrize("how", list(Shutdown), ids=lambda how: how.value)
async def test_faults_that_were_not_read_yet_are_handled_too(
    how: Shutdown, native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(
            on_shutdown=how, hooks=[recorder.hooks], native_sleep=native_sleep
        ) as daemon:
            daemon.add_region(uffd, region(lambda fault: actions.Hold("for ever")))
            await settled()
            uffd.say(missing(0))
    if how is Shutdown.POISON:
        assert [each.outcome for each in recorder.resolved] == [Outcome.POISONED]
    else:
        assert len(left_waiting(logs)) == 1


async def test_a_daemon_that_ends_before_it_began(uffd: FakeUserfaultfd) -> None:
    for how in Shutdown:
        async with open_daemon(on_shutdown=how) as daemon:
            uffd.say(missing(0))
            daemon.add_region(uffd, region(ZeroPage()))
    assert Code.ZEROPAGE in uffd.codes


@both_sleeps
async def test_resolve_waits_for_what_is_on_its_way_and_no_longer(
    native_sleep: bool, uffd: FakeUserfaultfd, autojump_clock: trio.testing.MockClock
) -> None:
    gate = Gate(DATA)
    copy = CopyFrom(AsyncSource(gate.fetch, len(DATA)))
    recorder = Recorder()
    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            async with open_daemon(
                on_shutdown=Shutdown.RESOLVE,
                shutdown_timeout=1000.0,
                hooks=[recorder.hooks],
                native_sleep=native_sleep,
            ) as daemon:
                daemon.add_region(
                    uffd, region(lambda f: copy(f) if f.page else actions.Hold("for ever"))
                )
                uffd.say(missing(0), missing(1))
                await gate.times(1)

                async def let_go() -> None:
                    await trio.sleep(10.0)
                    gate.open.set()

                nursery.start_soon(let_go)
                begun = trio.current_time()
            took = trio.current_time() - begun
    assert took == pytest.approx(10.0, abs=1.0)
    assert [each.outcome for each in recorder.resolved] == [Outcome.COPIED]
    assert len(left_waiting(logs)) == 1


@both_sleeps
async def test_resolve_gives_up_in_time_and_holds_the_rest(
    native_sleep: bool, uffd: FakeUserfaultfd, autojump_clock: trio.testing.MockClock
) -> None:
    gate = Gate(DATA)
    with capture_logs() as logs:
        async with open_daemon(
            on_shutdown=Shutdown.RESOLVE, shutdown_timeout=5.0, native_sleep=native_sleep
        ) as daemon:
            daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
            uffd.say(missing(0))
            await gate.times(1)
            begun = trio.current_time()
        took = trio.current_time() - begun
    assert took == pytest.approx(5.0, abs=0.5)
    assert len(left_waiting(logs)) == 1
    assert uffd.issued == []


async def test_resolve_waits_for_what_was_put_off(uffd: FakeUserfaultfd) -> None:
    uffd.script += [in_flight] * 3
    recorder = Recorder()
    async with open_daemon(on_shutdown=Shutdown.RESOLVE, hooks=[recorder.hooks]) as daemon:
        policy = Asked(lambda fault: actions.Zero())
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(0))
        await policy.times(1)
    assert [each.outcome for each in recorder.resolved] == [Outcome.ZEROED]


@pytest.mark.parametrize("answer", [failing(errno.EAGAIN), failing(errno.ENOMEM)])
async def test_a_fault_that_cannot_be_poisoned_is_reported(
    answer: Answer, uffd: FakeUserfaultfd
) -> None:
    policy = Asked(lambda fault: actions.Hold("for ever"))
    with capture_logs() as logs:
        async with open_daemon(on_shutdown=Shutdown.POISON) as daemon:
            daemon.add_region(uffd, region(policy))
            uffd.say(missing(0))
            await policy.times(1)
            uffd.otherwise = answer
    assert len(left_waiting(logs)) == 1


async def test_a_present_page_is_not_reported_as_poisoned(uffd: FakeUserfaultfd) -> None:
    policy = Asked(lambda fault: actions.Hold("for ever"))
    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(on_shutdown=Shutdown.POISON, hooks=[recorder.hooks]) as daemon:
            daemon.add_region(uffd, region(policy))
            uffd.say(missing(0), protected(1))
            await policy.times(2)
            uffd.otherwise = present
    assert [each.outcome for each in recorder.resolved] == [Outcome.ALREADY_PRESENT]
    # One that waits to write cannot be poisoned: its page is there.
    [said] = left_waiting(logs)
    assert "write_protect" in said


# -- cancelled ---------------------------------------------------------------------------------


class Places:
    """Where a fault can be when the end comes, each a policy that gets there and says so."""

    def __init__(self) -> None:
        self.reached = trio.Event()
        self.hooks: list[Hooks] = []

    async def _stop(self) -> None:
        self.reached.set()
        await trio.sleep_forever()

    def fetching(self) -> Callable[[Fault], actions.Action | None]:
        async def fetch(offset: int, length: int) -> bytes:
            await self._stop()
            raise AssertionError

        return CopyFrom(AsyncSource(fetch, len(DATA)))

    def between_attempts(self) -> Callable[[Fault], actions.Action | None]:
        async def fetch(offset: int, length: int) -> bytes:
            self.reached.set()
            raise OSError("down")

        return CopyFrom(AsyncSource(fetch, len(DATA)))

    def waiting_for_a_turn(self) -> Callable[[Fault], actions.Action | None]:
        return self.fetching()  # with a limit of one, and another before it

    def performing(self) -> Callable[[Fault], actions.Action | None]:
        async def work(uffd: Userfaultfd, fault: Fault) -> Outcome:
            await self._stop()
            raise AssertionError

        return lambda fault: Perform(work)

    def asking_a_hook(self) -> Callable[[Fault], actions.Action | None]:
        async def before(fault: Fault, action: actions.Action) -> None:
            await self._stop()

        self.hooks.append(Hooks(before=before))
        return lambda fault: actions.Zero()

    def deferred(self) -> Callable[[Fault], actions.Action | None]:
        def policy(fault: Fault) -> actions.Action:
            self.reached.set()
            return actions.Zero()

        return policy


PLACES = [name for name in vars(Places) if not name.startswith("_")]


@both_sleeps
@pytest.mark.parametrize("place", PLACES)
async def test_cancelled_anywhere_no_fault_is_lost(
    place: str, native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    before = open_descriptors()
    places = Places()
    policy = getattr(places, place)()
    if place == "deferred":
        uffd.otherwise = in_flight
    with capture_logs() as logs, trio.CancelScope() as scope:
        async with open_daemon(
            hooks=places.hooks, fetch_limit=1, native_sleep=native_sleep
        ) as daemon:
            patient = Retry(first_delay=60.0, max_delay=60.0)
            daemon.add_region(uffd, region(policy, retry=patient))
            uffd.say(missing(0, thread=3), missing(6, thread=4))
            await places.reached.wait()
            assert len(daemon.open_faults()) == 2
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert sorted(said[:8] for said in left_waiting(logs)) == ["thread 3", "thread 4"]
    assert Code.COPY not in uffd.codes
    assert open_descriptors() == before
    # A successor on the same descriptor sends them to ask again, and answers.
    uffd.otherwise = lambda operation: failing(0, operation.length)(operation)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(ZeroPage()), register=None)
        uffd.say(missing(0, thread=3), missing(6, thread=4))
        await recorder.resolutions(2)


async def test_the_end_is_shielded_from_cancellation(
    uffd: FakeUserfaultfd, autojump_clock: trio.testing.MockClock
) -> None:
    """Cancelled from outside, RESOLVE still gets the time that it was promised."""
    gate = Gate(DATA)
    recorder = Recorder()
    async with trio.open_nursery() as nursery:

        async def let_go() -> None:
            await trio.sleep(2.0)
            gate.open.set()

        with trio.CancelScope() as scope:
            async with open_daemon(on_shutdown=Shutdown.RESOLVE, hooks=[recorder.hooks]) as daemon:
                daemon.add_region(uffd, region(CopyFrom(AsyncSource(gate.fetch, len(DATA)))))
                uffd.say(missing(0))
                await gate.times(1)
                nursery.start_soon(let_go)
                scope.cancel()
                await trio.sleep_forever()
    assert [each.outcome for each in recorder.resolved] == [Outcome.COPIED]


async def test_an_error_in_the_block_ends_the_daemon_in_the_same_way(
    uffd: FakeUserfaultfd,
) -> None:
    policy = Asked(lambda fault: actions.Hold("for ever"))
    recorder = Recorder()
    with pytest.raises(LookupError, match="a bug of the application"):  # noqa: PT012  # the block
        async with open_daemon(on_shutdown=Shutdown.POISON, hooks=[recorder.hooks]) as daemon:
            daemon.add_region(uffd, region(policy))
            uffd.say(missing(0))
            await policy.times(1)
            raise LookupError("a bug of the application")
    assert [each.outcome for each in recorder.resolved] == [Outcome.POISONED]


async def test_nothing_is_added_to_a_daemon_that_ends(uffd: FakeUserfaultfd) -> None:
    async with open_daemon() as daemon:
        pass
    with pytest.raises(errors.DaemonClosed):
        daemon.add_region(uffd, region(ZeroPage()))


# -- descriptors -------------------------------------------------------------------------------


@both_sleeps
@pytest.mark.parametrize("how", list(Shutdown), ids=lambda how: how.value)
async def test_a_descriptor_that_is_closed_while_it_is_served(
    how: Shutdown, native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    policy = Asked(lambda fault: actions.Hold("for ever"))
    with FakeUserfaultfd() as other:
        recorder = Recorder()
        async with open_daemon(
            hooks=[recorder.hooks], on_shutdown=how, native_sleep=native_sleep
        ) as daemon:
            daemon.add_region(uffd, region(policy))
            daemon.add_region(other, region(ZeroPage()))
            uffd.say(missing(0))
            await policy.times(1)
            uffd.close()
            # The number may be another file's at once.
            reused = os.open("/dev/zero", os.O_RDONLY)
            await daemon.wait_client_gone(uffd)
            other.say(missing(1))
            await recorder.resolutions(1)
        assert os.read(reused, 1) == b"\0"
        os.close(reused)


@both_sleeps
async def test_a_failed_read_is_reported_and_ends_only_that_descriptor(
    native_sleep: bool, uffd: FakeUserfaultfd
) -> None:
    with FakeUserfaultfd() as other:
        recorder = Recorder()
        with capture_logs() as logs:
            async with open_daemon(hooks=[recorder.hooks], native_sleep=native_sleep) as daemon:
                daemon.add_region(uffd, region(ZeroPage()))
                daemon.add_region(other, region(ZeroPage()))
                uffd.hang_up()
                await daemon.wait_client_gone(uffd)
                other.say(missing(1))
                await recorder.resolutions(1)
    [line] = [line for line in logs if line["event"] == "reading the userfaultfd failed"]
    assert line["errno"] == errno.EIO
