"""A userfaultfd without a kernel: messages come through a pipe, operations are scripted."""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable, Sequence

import trio
import trio.testing

from tests.support.deadline import DEADLINE
from uffdaemon import FaultKind, Policy, Region, Retry
from uffdaemon.lowlevel import (
    Code,
    Event,
    Features,
    IoctlSet,
    Operation,
    RegisterMode,
    Result,
    Userfaultfd,
)
from uffdaemon.model.region import HOLD, RETRY, AfterRemove, FailureAction
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.events import PageFault, message
from uffdaemon.uapi.outcomes import result_of

PAGE = PAGE_SIZE
START = 0x2000_0000_0000
"""Where nothing is mapped: far below what the kernel hands out, from the top down.  The library
does look what is there, and memory that happened to be would change what is due."""

Answer = Callable[[Operation], Result]


def done(operation: Operation) -> Result:
    return result_of(operation, 0, operation.length, 0)


def present(operation: Operation) -> Result:
    return result_of(operation, 0, 0, operation.length)


def failing(number: int, after: int = 0) -> Answer:
    """Stops with an errno, `after` bytes that were done."""
    return lambda operation: result_of(operation, number, after, 0)


in_flight = failing(errno.EAGAIN)
gone = failing(errno.ESRCH)


class FakeUserfaultfd(Userfaultfd):
    """Does what it is told to, and keeps what it was asked."""

    def __init__(
        self, features: Features = Features.THREAD_ID, *, same_process: bool = True
    ) -> None:
        fd, self.pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self.pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
        super().__init__(fd, features, same_process=same_process)
        self.issued: list[Operation] = []
        self.batches: list[list[Operation]] = []
        self.script: deque[Answer] = deque()
        """What becomes of the next operations that are no wake-ups."""
        self.otherwise: Answer = done
        self.ranges: list[tuple[str, int, int]] = []

    def say(self, *events: Event) -> None:
        """Let messages become readable, all at once."""
        os.write(self.pipe, b"".join(map(message, events)))

    def hang_up(self) -> None:
        """Let reading fail from now on."""
        os.close(self.pipe)
        self.pipe = -1

    def close(self) -> None:
        super().close()
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1

    def execute(self, operations: Sequence[Operation], carry_out: object = None) -> list[Result]:
        self.fileno()
        self.batches.append(list(operations))
        self.issued += operations
        return [self._answer(operation) for operation in operations]

    def _answer(self, operation: Operation) -> Result:
        if operation.code is Code.WAKE or not self.script:
            return done(operation) if operation.code is Code.WAKE else self.otherwise(operation)
        return self.script.popleft()(operation)

    def register(
        self, start: int, length: int, mode: RegisterMode = RegisterMode.MISSING
    ) -> IoctlSet:
        self.ranges.append(("register", start, length))
        return IoctlSet(0)

    def unregister(self, start: int, length: int) -> None:
        self.ranges.append(("unregister", start, length))

    @property
    def codes(self) -> list[Code]:
        """The operations that were issued, by their codes."""
        return [operation.code for operation in self.issued]


def missing(page: int, thread: int = 1, *, write: bool = False) -> PageFault:
    return PageFault(START + page * PAGE, FaultKind.MISSING, write, thread)


def minor(page: int, thread: int = 1) -> PageFault:
    return PageFault(START + page * PAGE, FaultKind.MINOR, write=False, thread=thread)


def protected(page: int, thread: int = 1) -> PageFault:
    return PageFault(START + page * PAGE, FaultKind.WP, write=True, thread=thread)


def pages(operation: Operation) -> tuple[int, int]:
    """Which pages an operation was for, from and to."""
    first = (operation.dst - START) // PAGE
    return first, first + operation.length // PAGE


def region(
    policy: Policy,
    count: int = 8,
    *,
    on_failure: FailureAction = HOLD,
    retry: Retry = RETRY,
    policy_timeout: float = DEADLINE,
    after_remove: AfterRemove = "zero",
    name: str = "",
) -> Region:
    """`count` pages from `START`."""
    return Region(
        START,
        count * PAGE,
        policy,
        on_failure=on_failure,
        retry=retry,
        policy_timeout=policy_timeout,
        after_remove=after_remove,
        name=name,
    )


async def settled() -> None:
    """Until nothing is left that could happen by itself."""
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()
