"""What policies do wrong: the fault ends in what its region declares, and the log names them."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from tests.fake.kernel import PAGE, START, FakeUserfaultfd, failing, missing, pages, region, settled
from tests.support.daemons import failure_lines, the_open_fault
from tests.support.notes import Recorder
from uffdaemon import (
    BytesSource,
    Fault,
    FaultKind,
    Outcome,
    Source,
    StrictMove,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.actions import Perform, Span
from uffdaemon.lowlevel import Code, Userfaultfd

if TYPE_CHECKING:
    from uffdaemon.model.region import FailureAction

SOURCE = BytesSource(bytes(8 * PAGE))


Work = Callable[[Userfaultfd, Fault], object]


def raises(fault: Fault) -> actions.Action | None:
    raise ZeroDivisionError("a bug")


def answers_nothing(fault: Fault) -> actions.Action | None:
    return None


def answers_nonsense(fault: Fault) -> str:
    return "zero, please"


async def is_a_coroutine(fault: Fault) -> actions.Action:
    return actions.Zero()


def takes_its_time(fault: Fault) -> actions.Action | None:
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.002:
        pass
    return actions.Zero()


async def _too_late(uffd: Userfaultfd, fault: Fault) -> Outcome:
    await trio.sleep_forever()
    raise AssertionError("not reached")


async def _raising(uffd: Userfaultfd, fault: Fault) -> Outcome:
    await trio.lowlevel.checkpoint()
    raise OSError("the store is down")


async def _senseless(uffd: Userfaultfd, fault: Fault) -> bool:
    await trio.lowlevel.checkpoint()
    return True


async def _failed(uffd: Userfaultfd, fault: Fault) -> Outcome:
    await trio.lowlevel.checkpoint()
    return Outcome.FAILED


async def _cancels_itself(uffd: Userfaultfd, fault: Fault) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await trio.sleep_forever()


def _no_coroutine(uffd: Userfaultfd, fault: Fault) -> Outcome:
    return Outcome.COPIED


def perform(work: Work, patience: object = None) -> Callable[[Fault], actions.Action | None]:
    def policy(fault: Fault) -> actions.Action | None:
        return Perform(work, patience)  # type: ignore[arg-type]

    policy.__qualname__ = f"performs{work.__name__}"
    return policy


def answers(action: object) -> Callable[[Fault], actions.Action | None]:
    def always(fault: Fault) -> actions.Action | None:
        return action  # type: ignore[return-value]

    return always


HOSTILE: dict[str, tuple[Any, type[Exception], str]] = {
    "raises": (raises, errors.PolicyRaised, "raised ZeroDivisionError('a bug')"),
    "nothing": (answers_nothing, errors.NoAnswer, "does not answer missing faults here"),
    "nonsense": (answers_nonsense, errors.PolicyAnswerInvalid, "returned 'zero, please'"),
    "a type": (answers(actions.Zero), errors.PolicyAnswerInvalid, "which is no action"),
    "coroutine": (is_a_coroutine, errors.PolicyAnswerInvalid, "returned a coroutine"),
    "slow": (takes_its_time, errors.PolicyTooSlow, "took "),
    "late work": (perform(_too_late, 0.001), errors.PolicyTooSlow, "was not done after 0.001 s"),
    "late by itself": (perform(_too_late, 0), errors.PolicyTooSlow, "was not done after 0 s"),
    "raising work": (perform(_raising), errors.PolicyRaised, "OSError('the store is down')"),
    "senseless work": (perform(_senseless), errors.PolicyAnswerInvalid, "returned True"),
    "failed work": (perform(_failed), errors.PolicyRaised, "reports that it failed"),
    "cancelled work": (perform(_cancels_itself), errors.PolicyAnswerInvalid, "returned None"),
    "work in sync": (perform(_no_coroutine), errors.PolicyRaised, "raised TypeError"),
    "no patience": (perform(_raising, -1), errors.PolicyRaised, "raised ValueError"),
    "no number": (perform(_raising, "soon"), errors.PolicyRaised, "raised TypeError"),
    "off by one": (answers(actions.Zero(Span(1, PAGE))), errors.InvalidRange, "not made of pages"),
    "too long": (answers(actions.Zero(Span(0, 9 * PAGE))), errors.InvalidRange, "leaves"),
    "elsewhere": (answers(actions.Zero(Span(PAGE, PAGE))), errors.InvalidRange, "does not hold"),
    "below": (answers(actions.Zero(Span(-PAGE, 2 * PAGE))), errors.InvalidRange, "leaves"),
    "empty": (answers(actions.Zero(Span(0, 0))), errors.InvalidRange, "not made of pages"),
    "no pages": (answers(actions.Zero(0)), errors.InvalidRange, "at least 1"),
    "minus pages": (answers(actions.Zero(-3)), errors.InvalidRange, "at least 1"),
    "half a page": (answers(actions.Zero(0.5)), errors.InvalidRange, "is not a number"),  # type: ignore[arg-type]
    "no address": (StrictMove(-PAGE, foreign=True), errors.InvalidRange, "is not an address"),
    "far away": (answers(actions.Copy(SOURCE, 1 << 70)), errors.SourceTooShort, "8 * PAGE"),
    "no source": (answers(actions.Copy(b"bytes")), errors.SourceFailed, "AttributeError"),  # type: ignore[arg-type]
}
# Whoever else answers late, since the machine is busy, is not meant.
PATIENCE = {key: 0.001 if key == "slow" else 60.0 for key in HOSTILE}
SAYS = {key: text.replace("8 * PAGE", str(8 * PAGE)) for key, (_, _, text) in HOSTILE.items()}


def the_failure(logs: list[Any], policy: object) -> dict[str, object]:
    """The only one that was logged; it has to name the policy."""
    [line] = failure_lines(logs)
    assert line["policy"] == getattr(policy, "__qualname__", repr(policy))
    assert line["region"] == "the region"
    assert line["address"] == hex(START)
    assert line["thread"] == 7
    return line


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_policy_is_held_by_default(what: str, uffd: FakeUserfaultfd) -> None:
    policy, kind, _ = HOSTILE[what]
    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            daemon.add_region(
                uffd, region(policy, policy_timeout=PATIENCE[what], name="the region")
            )
            uffd.say(missing(0, thread=7))
            await recorder.failures(1)
            await settled()
            entry = the_open_fault(daemon)
            dumped = daemon.dump()
            counted = daemon.statistics()
        line = the_failure(logs, policy)
    [(fault, error)] = recorder.failed
    assert type(error) is kind
    assert SAYS[what] in str(error)
    assert line["error"] == str(error)
    assert line["error_type"] == kind.__name__
    assert entry.fault is fault
    assert entry.threads == (7,)
    assert entry.reason == f"{kind.__name__}: {error}"
    for said in ("thread 7", "missing", hex(START), "the region", SAYS[what]):
        assert said in dumped
    assert counted.failures == {kind.__name__: 1}
    assert counted.faults == {(FaultKind.MISSING, Outcome.HELD): 1}
    # Nothing was placed: not a page of zeros, nor any other.
    assert uffd.issued == []


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_policy_is_poisoned_if_so_declared(
    what: str, uffd: FakeUserfaultfd
) -> None:
    policy, _, _ = HOSTILE[what]
    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            guarded = region(
                policy,
                policy_timeout=PATIENCE[what],
                on_failure=actions.Poison(),
                name="the region",
            )
            daemon.add_region(uffd, guarded)
            uffd.say(missing(0, thread=7))
            [resolved] = await recorder.resolutions(1)
            await settled()
            assert not daemon.open_faults()
        the_failure(logs, policy)
    assert resolved.outcome is Outcome.POISONED
    assert [(step.code, pages(step)) for step in uffd.issued] == [(Code.POISON, (0, 1))]


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_policy_is_made_good_by_the_application(
    what: str, uffd: FakeUserfaultfd
) -> None:
    policy, kind, _ = HOSTILE[what]
    asked: list[tuple[Fault, Exception]] = []

    def instead(fault: Fault, error: Exception) -> actions.Action:
        asked.append((fault, error))
        return actions.Copy(SOURCE)

    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            guarded = region(
                policy, policy_timeout=PATIENCE[what], on_failure=instead, name="the region"
            )
            daemon.add_region(uffd, guarded)
            uffd.say(missing(0, thread=7))
            [resolved] = await recorder.resolutions(1)
        the_failure(logs, policy)
    [(fault, error)] = asked
    assert fault is resolved.fault
    assert type(error) is kind
    assert resolved.outcome is Outcome.COPIED
    assert [(step.code, pages(step)) for step in uffd.issued] == [(Code.COPY, (0, 1))]


async def test_work_has_the_time_that_its_region_gives_it(
    uffd: FakeUserfaultfd, autojump_clock: trio.testing.MockClock
) -> None:
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(perform(_too_late), policy_timeout=1000.0))
        uffd.say(missing(0))
        [(_, error)] = await recorder.failures(1)
        assert trio.current_time() >= 1000.0
    assert "was not done after 1000.0 s" in str(error)


class Odd:
    """A source whose bytes lie at an address of its own choice."""

    size = 8 * PAGE

    def __init__(self, where: object) -> None:
        self.where = where

    def address(self, offset: int, length: int) -> int | None:
        if isinstance(self.where, Exception):
            raise self.where
        return self.where  # type: ignore[return-value]

    async def fetch(self, offset: int, length: int) -> bytes:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        (-1, errors.InvalidRange),
        (1 << 64, errors.InvalidRange),
        ("here", errors.InvalidRange),
        (1.5, errors.InvalidRange),
        (KeyError("lost"), errors.SourceFailed),
        (errors.SourceTooShort("ended"), errors.SourceTooShort),
    ],
)
async def test_a_source_without_an_address_fails_only_its_fault(
    where: object, kind: type[Exception], uffd: FakeUserfaultfd
) -> None:
    source: Source = Odd(where)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        policy = lambda fault: actions.Copy(source) if fault.page else actions.Zero()  # noqa: E731
        daemon.add_region(uffd, region(policy))
        uffd.say(missing(1))
        [(_, error)] = await recorder.failures(1)
        assert type(error) is kind
        uffd.say(missing(0))
        [resolved] = await recorder.resolutions(1)
    assert resolved.outcome is Outcome.ZEROED


# -- when what was declared goes wrong, too ----------------------------------------------------


async def _coroutine(fault: Fault, error: Exception) -> actions.Action:
    return actions.Zero()


def _broken(fault: Fault, error: Exception) -> actions.Action:
    raise LookupError("no idea")


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (lambda fault, error: None, None),
        (lambda fault, error: 5, "on_failure returned 5"),
        (_coroutine, "on_failure returned a coroutine"),
        (_broken, "no idea"),
    ],
    ids=["none", "nonsense", "coroutine", "raises"],
)
async def test_an_application_that_does_not_know_lets_the_thread_wait(
    declared: FailureAction, said: str | None, uffd: FakeUserfaultfd
) -> None:
    recorder = Recorder()
    with capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            daemon.add_region(uffd, region(raises, on_failure=declared))
            uffd.say(missing(0))
            await recorder.failures(1)
            entry = the_open_fault(daemon)
    assert "PolicyRaised" in entry.reason
    wrong = [line["error"] for line in logs if line["event"] == "hook failed"]
    assert len(wrong) == (said is not None)
    assert all(said in line for line in wrong if said is not None)


async def test_a_failure_action_that_fails_is_not_tried_again(uffd: FakeUserfaultfd) -> None:
    uffd.otherwise = failing(errno.EINVAL)
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(raises, on_failure=actions.Poison()))
        uffd.say(missing(0))
        found = await recorder.failures(2)
        await settled()
        entry = the_open_fault(daemon)
    assert [type(error) for _, error in found] == [errors.PolicyRaised, errors.OperationError]
    assert "POISON" in entry.reason
    assert "EINVAL" in entry.reason
    assert uffd.codes == [Code.POISON]
