"""The harness keeps its promises: nothing hangs, and what fails says why."""

from __future__ import annotations

import errno
import os
import select
import signal
from typing import TYPE_CHECKING

import pytest

from tests.support import requirements
from tests.support.calls import in_child, in_thread
from tests.support.deadline import DEADLINE
from tests.support.kernel_tests import Ended, judge, kernel_test, run_child
from tests.support.messages import next_fault
from tests.support.page_contents import PAGE
from uffdaemon import Memory, MemoryType
from uffdaemon.errors import PermissionRefused
from uffdaemon.lowlevel import Features, Userfaultfd

if TYPE_CHECKING:
    from pathlib import Path

    from _pytest.outcomes import OutcomeException

HERE = "tests.kernel.test_harness"


def hangs_with_the_gil_held() -> None:
    memory = Memory.map(PAGE)
    uffd = Userfaultfd.open()
    uffd.register(memory.start, memory.length)
    import ctypes

    ctypes.c_char.from_address(memory.start).value  # noqa: B018  # never comes back


def fails() -> None:
    found, expected = 3, 4
    assert found == expected


def dies() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves_a_grandchild(pipe: Path) -> None:
    with pipe.open("wb"):  # and the grandchild holds it open, too
        in_child(signal.pause)


async def fails_in_trio() -> None:
    import trio

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.checkpoint)
        fails()


def skips() -> None:
    pytest.skip("not today")


def is_refused() -> None:
    raise PermissionRefused(errno.EACCES, "/dev/userfaultfd", advice="chmod it")


def outcome_of(ended: Ended, deadline: float = DEADLINE) -> OutcomeException:
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as caught:
        judge(ended, "the test", deadline)
    assert isinstance(caught.value, pytest.fail.Exception | pytest.skip.Exception)
    return caught.value


@pytest.mark.kernel
def test_a_hung_child_is_killed_and_says_where_it_hung() -> None:
    requirements.require(Features(0))
    message = ""
    # On a busy machine the first deadline may pass before the child gets to where it hangs.
    for deadline in (1.0, DEADLINE / 2):
        ended = run_child(f"{HERE}:hangs_with_the_gil_held", {}, deadline)
        assert ended.late
        assert ended.status == -signal.SIGABRT
        message = str(outcome_of(ended, deadline))
        assert f"did not end within {deadline:g} s" in message
        if "in hangs_with_the_gil_held" in message:
            break
    assert "in hangs_with_the_gil_held" in message


def test_a_failed_assertion_is_shown_with_its_line_and_its_variables() -> None:
    message = str(outcome_of(run_child(f"{HERE}:fails", {})))
    assert "assert found == expected" in message
    assert "found = 3" in message


def test_a_failure_inside_a_nursery_is_shown_too() -> None:
    message = str(outcome_of(run_child(f"{HERE}:fails_in_trio", {})))
    assert "found = 3" in message


def test_a_child_that_dies_is_a_failure_that_names_the_signal() -> None:
    message = str(outcome_of(run_child(f"{HERE}:dies", {})))
    assert "SIGSEGV" in message


def test_a_skip_in_the_child_is_a_skip() -> None:
    outcome = outcome_of(run_child(f"{HERE}:skips", {}))
    assert isinstance(outcome, pytest.skip.Exception)
    assert str(outcome) == "not today"


def test_a_refusal_in_the_child_is_a_skip_or_where_it_may_not_be_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(requirements.REQUIRED, raising=False)
    ended = run_child(f"{HERE}:is_refused", {})
    outcome = outcome_of(ended)
    assert isinstance(outcome, pytest.skip.Exception)
    assert str(outcome) == "/dev/userfaultfd: EACCES; chmod it"
    monkeypatch.setenv(requirements.REQUIRED, "1")
    assert isinstance(outcome_of(ended), pytest.fail.Exception)


def test_nothing_of_a_child_is_left(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    ended = run_child(f"{HERE}:leaves_a_grandchild", {"pipe": pipe})
    assert ended.report == {"outcome": "passed", "text": "", "advice": ""}
    poll = select.poll()
    poll.register(reader)
    assert poll.poll() == [(reader, select.POLLHUP)]
    os.close(reader)


def test_without_permission_the_reason_and_what_mends_it_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(requirements.REQUIRED, raising=False)
    monkeypatch.setattr(requirements, "_obstacle", lambda *_: ("EPERM", "sysctl x=1"))
    with pytest.raises(pytest.skip.Exception, match="EPERM; sysctl x=1"):
        requirements.require(Features(0))
    monkeypatch.setenv(requirements.REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="EPERM; sysctl x=1"):
        requirements.require(Features(0))


def test_a_missing_feature_is_a_skip_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(requirements.REQUIRED, "1")
    requirements.require(Features(0), user_mode_only=True)
    with pytest.raises(pytest.skip.Exception, match="does not have bit 63"):
        requirements.require(Features(1 << 63), user_mode_only=True)


@pytest.mark.parametrize("kind", [MemoryType.ANONYMOUS, MemoryType.SHMEM])
@kernel_test()
def test_a_body_gets_its_parameters(kind: MemoryType, tmp_path: Path) -> None:
    assert tmp_path.is_dir()
    with Userfaultfd.open() as uffd, Memory.map(PAGE, kind) as memory:
        uffd.register(memory.start, memory.length)
        reader = in_thread(memory.read, 0, 3)
        assert next_fault(uffd).address == memory.start
        assert reader.running
        assert uffd.copy(memory.start, b"abc" + bytes(PAGE - 3)).complete
        assert reader.result() == b"abc"


@kernel_test(features=Features.THREAD_ID)
async def test_a_body_may_be_async() -> None:
    import trio

    await trio.lowlevel.checkpoint()
