"""What an application's own objects and its logger do ends nothing but itself."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, NoReturn, cast

import pytest
import structlog
import trio
from structlog.testing import capture_logs

from tests.fake.kernel import PAGE, FakeUserfaultfd, missing, pages, region
from tests.support.daemons import failure_lines, the_open_fault
from tests.support.notes import Recorder
from uffdaemon import (
    BytesSource,
    CopyFrom,
    Fault,
    Hooks,
    Policy,
    Retry,
    actions,
    errors,
    open_daemon,
)
from uffdaemon.log import Log, LogThread
from uffdaemon.lowlevel import Code, Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

    from uffdaemon import Outcome, Resolved

SOURCE = BytesSource(bytes(8 * PAGE))
_ONCE = Retry(attempts=1)


class Bad:
    """A lazy object whose session is gone: nothing of it can be looked at."""

    @property  # type: ignore[misc]
    def __class__(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no session")

    def __repr__(self) -> str:
        raise RuntimeError("no session")


class BadError(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no session")

    __str__ = __repr__


class RaisesBad:
    def __call__(self, fault: Fault) -> actions.Action | None:
        raise BadError


class ReturnsBad:
    def __call__(self, fault: Fault) -> actions.Action | None:
        return Bad()  # type: ignore[return-value]


class BadPolicy:
    def __call__(self, fault: Fault) -> actions.Action | None:
        return None

    def __repr__(self) -> str:
        raise RuntimeError("no session")


class BadSource:
    """Has to be fetched, and raises."""

    size = 8 * PAGE

    def __repr__(self) -> str:
        raise RuntimeError("no session")

    def address(self, offset: int, length: int) -> int | None:
        return None

    async def fetch(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        raise BadError


class BadAddress(BadSource):
    def address(self, offset: int, length: int) -> int | None:
        raise BadError


class Large:
    def __call__(self, fault: Fault) -> actions.Action | None:
        raise ValueError("x" * 1_000_000)

    def __repr__(self) -> str:
        return "x" * 1_000_000


class Works:
    """Returns work that raises, or that returns something bad."""

    def __init__(self, result: object) -> None:
        self.result = result

    def __call__(self, fault: Fault) -> actions.Action | None:
        return actions.Perform(self.work)

    async def work(self, uffd: Userfaultfd, fault: Fault) -> Outcome:
        await trio.lowlevel.checkpoint()
        if issubclass(type(self.result), Exception):
            raise cast("Exception", self.result)
        return self.result  # type: ignore[return-value]


POLICIES: dict[str, tuple[Policy, type[Exception]]] = {
    "raises": (RaisesBad(), errors.PolicyRaised),
    "returns": (ReturnsBad(), errors.PolicyAnswerInvalid),
    "policy": (BadPolicy(), errors.NoAnswer),
    "fetch": (CopyFrom(BadSource()), errors.SourceFailed),
    "address": (CopyFrom(BadAddress()), errors.SourceFailed),
    "work raises": (Works(BadError()), errors.PolicyRaised),
    "work returns": (Works(Bad()), errors.PolicyAnswerInvalid),
    "large": (Large(), errors.PolicyRaised),
}


@pytest.mark.parametrize("what", POLICIES)
async def test_what_cannot_be_shown_fails_its_fault_alone(what: str, uffd: FakeUserfaultfd) -> None:
    policy, kind = POLICIES[what]
    recorder = Recorder()
    with FakeUserfaultfd() as other, capture_logs() as logs:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            daemon.add_region(uffd, region(policy, retry=_ONCE))
            daemon.add_region(other, region(lambda _: actions.Copy(SOURCE)))
            uffd.say(missing(0))
            [(_, error)] = await recorder.failures(1)
            other.say(missing(1))
            await recorder.resolutions(1)
            entry = the_open_fault(daemon)
            assert len(str(entry)) < 5000
    assert type(error) is kind
    assert len(str(error)) < 5000
    [line] = failure_lines(logs)
    assert line["error_type"] == kind.__name__
    assert [(step.code, pages(step)) for step in other.issued] == [(Code.COPY, (1, 2))]


async def test_a_hook_with_all_of_that_is_ignored(uffd: FakeUserfaultfd) -> None:
    class BadHook:
        def __repr__(self) -> str:
            raise RuntimeError("no session")

        def __call__(self, fault: Fault, action: actions.Action) -> actions.Action | None:
            return Bad()  # type: ignore[return-value]

    class BadAfter:
        def __repr__(self) -> str:
            raise RuntimeError("no session")

        def __call__(self, resolved: Resolved) -> None:
            raise BadError

    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError("no session")

        def __call__(self, resolved: Resolved) -> None:
            return Bad()  # type: ignore[return-value]

    recorder = Recorder()
    hooks = [Hooks(before=BadHook(), after=BadAfter()), Hooks(after=Odd()), recorder.hooks]
    with capture_logs() as logs:
        async with open_daemon(hooks=hooks) as daemon:
            daemon.add_region(uffd, region(lambda _: actions.Copy(SOURCE)))
            uffd.say(missing(0))
            await recorder.resolutions(1)
            assert daemon.statistics().failures == {"HookRaised": 2}
    assert [line["event"] for line in logs] == ["hook failed", "hook failed"]


# -- loggers -----------------------------------------------------------------------------------


@pytest.fixture
def configured() -> Iterator[None]:
    """Puts structlog's configuration back."""
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "full"), SystemExit(3)], ids=repr)
async def test_a_logger_that_raises_loses_its_lines(
    raised: BaseException, uffd: FakeUserfaultfd
) -> None:
    def full(*line: object) -> NoReturn:
        raise raised

    structlog.configure(processors=[full])
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.add_region(uffd, region(lambda fault: actions.Copy(SOURCE) if fault.page else None))
        uffd.say(missing(0))
        await recorder.failures(1)
        uffd.say(missing(1))
        await recorder.resolutions(1)
        assert len(daemon.open_faults()) == 1
        assert daemon.statistics().failures == {"NoAnswer": 1, "LogLineLost": 1}


@pytest.mark.usefixtures("configured")
async def test_a_logger_that_blocks_stops_no_other_thread(uffd: FakeUserfaultfd) -> None:
    released = threading.Event()
    lines: list[object] = []

    def blocks(logger: object, method: str, line: MutableMapping[str, object]) -> NoReturn:
        released.wait()
        lines.append(line["event"])
        raise structlog.DropEvent

    structlog.configure(processors=[blocks])
    recorder = Recorder()
    try:
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            daemon.add_region(
                uffd, region(lambda fault: actions.Copy(SOURCE) if fault.page else None)
            )
            uffd.say(missing(0))
            await recorder.failures(1)
            uffd.say(missing(1))
            await recorder.resolutions(1)
            assert lines == []
    finally:
        released.set()


def test_lines_wait_for_a_logger_that_blocks_and_there_is_a_limit() -> None:
    released, entered, ended = threading.Event(), threading.Event(), threading.Event()
    lines: list[object] = []

    class Logger:
        def warning(self, event: str, number: int) -> None:
            entered.set()
            released.wait()
            lines.append((event, number))
            if len(lines) == 1001:
                ended.set()

    thread = LogThread()
    log = Log(Logger(), thread)
    for number in range(1500):
        log.warning("line", number=number)
        entered.wait()
    assert thread.lost == 499
    released.set()
    ended.wait()
    assert lines == [("line", number) for number in range(1001)]


def test_a_log_passes_fields_and_levels_on() -> None:
    logger = structlog.stdlib.get_logger()
    with capture_logs() as logs:
        log = Log(logger, LogThread()).bind(region="mine", worker=1)
        log.info("one")
        log.error("two", worker=2)
        log.write("no such level", "three")
    assert logs == [
        {"event": "one", "log_level": "info", "region": "mine", "worker": 1},
        {"event": "two", "log_level": "error", "region": "mine", "worker": 2},
        {"event": "three", "log_level": "warning", "region": "mine", "worker": 1},
    ]
