"""Operations on ranges, their results, and the outcomes of faults.

The meaning of each errno is defined here and nowhere else.  Source: ioctl_userfaultfd(2),
``fs/userfaultfd.c`` and ``mm/userfaultfd.c``.
"""

from __future__ import annotations

import errno
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple


class Code(IntEnum):
    """``_UFFDIO_*``: the operations on a range."""

    WAKE = 2
    COPY = 3
    ZEROPAGE = 4
    MOVE = 5
    WRITEPROTECT = 6
    CONTINUE = 7
    POISON = 8

    def explain(self, number: int) -> str:
        """What errno `number` means for this operation; "" if unknown."""
        return _REASONS.get((self, number)) or _COMMON_REASONS.get(number, "")


DONTWAKE: Final = 1
"""Mode bit of every operation but WRITEPROTECT: do not wake the waiting threads."""
COPY_WRITE_PROTECT: Final = 2
CONTINUE_WRITE_PROTECT: Final = 2
MOVE_ALLOW_SOURCE_HOLES: Final = 2
WRITEPROTECT_PROTECT: Final = 1
WRITEPROTECT_DONTWAKE: Final = 2


class Operation(NamedTuple):
    """One ioctl on one range of one userfaultfd; see ioctl_userfaultfd(2)."""

    code: Code
    dst: int
    """The address in the faulting process, page-aligned."""
    length: int
    """Bytes, a multiple of the page size."""
    src: int = 0
    """COPY: an address in memory of the caller.  MOVE: an address in the same process as `dst`."""
    mode: int = 0
    page_size: int = 0
    """Bytes.  Skip present pages and wake the threads that wait for them; 0: stop at the first."""


class Status(Enum):
    """How an operation ended."""

    DONE = "done"
    """The whole range is done, or was present before."""
    RETRY = "retry"
    """An event is pending: read the userfaultfd, then issue the rest later."""
    CLIENT_GONE = "client gone"
    """The process has exited."""
    FAILED = "failed"
    """The kernel refused; ``error`` is the errno.  Methods of `Userfaultfd` raise instead."""


class Result(NamedTuple):
    """The result of one operation: how far it came, and the errno that stopped it."""

    operation: Operation
    done: int
    """Bytes that were filled, moved, mapped, poisoned, (un)protected or woken."""
    present: int
    """Bytes that were present before; the threads that waited for them were woken."""
    status: Status
    error: int
    """The errno that stopped it; 0 if none did."""

    @property
    def address(self) -> int:
        """The start of the range, in bytes."""
        return self.operation.dst

    @property
    def length(self) -> int:
        """The length of the range, in bytes."""
        return self.operation.length

    @property
    def progress(self) -> int:
        """Bytes from the start of the range that are done: `done` and `present`."""
        return self.done + self.present

    @property
    def complete(self) -> bool:
        """Whether the whole range is done."""
        return self.status is Status.DONE

    @property
    def rest(self) -> Operation:
        """The rest of the range, as an operation."""
        operation, progress = self.operation, self.progress
        return operation._replace(
            dst=operation.dst + progress,
            src=operation.src + progress if operation.src else 0,
            length=operation.length - progress,
        )


def result_of(operation: Operation, error: int, done: int, present: int) -> Result:
    """The result of `operation` from what C reported."""
    return Result(operation, done, present, status_of(error), error)


def status_of(error: int) -> Status:
    """The status for an errno."""
    if error == 0:
        return Status.DONE
    if error == errno.EAGAIN:
        return Status.RETRY
    if error == errno.ESRCH:
        return Status.CLIENT_GONE
    return Status.FAILED


class Outcome(Enum):
    """How a fault ended, or why it has not yet.  Each fault has exactly one final outcome.

    The values are the names in `Statistics.as_dict`.
    """

    MOVED = "moved"
    UNSHARED_AND_MOVED = "unshared_and_moved"
    WAITED_AND_MOVED = "waited_and_moved"
    """The page was pinned for I/O, which then ended."""
    EXACTLY_COPIED = "exactly_copied"
    """Instead of a move: both sides were write-protected, and the source is empty now."""
    COPIED_PINNED = "copied_pinned"
    """Instead of a move: what its I/O had not delivered is lost."""
    COPIED = "copied"
    """From a source, or instead of a move without write-protection."""
    ZEROED = "zeroed"
    MAPPED = "mapped"
    """CONTINUE: the page of the page cache is mapped."""
    UNPROTECTED = "unprotected"
    ALREADY_PRESENT = "already_present"
    WOKEN = "woken"
    """The thread was woken; the page was placed by other code."""
    POISONED = "poisoned"
    UNMAPPED = "unmapped"
    """The range is no longer mapped; the thread gets SIGSEGV."""
    CLIENT_GONE = "client_gone"
    FAILED = "failed"
    """No page was placed; the region's ``on_failure`` was done instead."""
    DEFERRED = "deferred"
    """Not final: an event was pending, and a timer tries again."""
    HELD = "held"
    """Not final: the thread waits, and the fault is listed with the reason."""

    if TYPE_CHECKING:

        def __hash__(self) -> int: ...

    else:
        __hash__ = object.__hash__  # counted once a fault

    @property
    def final(self) -> bool:
        """Whether the fault has ended."""
        return self not in (Outcome.DEFERRED, Outcome.HELD)


OUTCOME_OF_CODE: Final = {
    Code.COPY: Outcome.COPIED,
    Code.ZEROPAGE: Outcome.ZEROED,
    Code.MOVE: Outcome.MOVED,
    Code.CONTINUE: Outcome.MAPPED,
    Code.POISON: Outcome.POISONED,
    Code.WRITEPROTECT: Outcome.UNPROTECTED,
    Code.WAKE: Outcome.WOKEN,
}
"""The outcome of a fault that an operation resolved."""

_COMMON_REASONS: Final = {
    errno.EAGAIN: "an event is in flight; read the userfaultfd and try again",
    errno.EEXIST: "there is a page already",
    errno.ENOENT: "the range is not inside one registered mapping",
    errno.ESRCH: "the process is gone",
    errno.ENOMEM: "the kernel has no memory for the page, or the cgroup's limit is reached",
    errno.EINVAL: "unaligned or empty range, unknown mode bit, or wrong type of memory",
    errno.EBADF: "the userfaultfd is closed",
    errno.ENOTTY: "this kernel does not have the operation",
}

_REASONS: Final = {
    (Code.COPY, errno.EFAULT): "the source cannot be read: it is not mapped, or its file ended",
    (Code.COPY, errno.ENOSPC): "the file that backs the memory is full, or the mapping changed",
    (Code.ZEROPAGE, errno.EINVAL): "unaligned or empty range, or hugetlb, which has no zero page",
    (Code.MOVE, errno.EBUSY): "the page is not exclusive to us: shared after a fork, merged by "
    "KSM, or pinned for I/O",
    (Code.MOVE, errno.ENOENT): "a hole in the source, or the range is not registered",
    (Code.MOVE, errno.EEXIST): "the destination is not empty",
    (Code.MOVE, errno.EFAULT): "the source holds a marker or the mapping changed",
    (Code.MOVE, errno.EINVAL): "both sides must be private anonymous memory of this process, each "
    "inside one mapping, writable, with the same access and lock flags",
    (Code.CONTINUE, errno.EFAULT): "the page is not in the page cache",
    (Code.CONTINUE, errno.EINVAL): "only shmem and hugetlb have minor faults",
    (Code.WRITEPROTECT, errno.ENOENT): "a part of the range is not registered for "
    "write-protection; earlier parts may have changed",
}
