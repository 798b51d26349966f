"""What was asked of the kernel, what came of it, and how a fault ended.

The errno rules of the operations live here, and nowhere else.  Source: ioctl_userfaultfd(2),
``fs/userfaultfd.c`` and ``mm/userfaultfd.c``.
"""

from __future__ import annotations

import errno
from enum import Enum, IntEnum
from typing import Final, NamedTuple


class Code(IntEnum):
    """``_UFFDIO_*``: the operations that work on a range of a registered region."""

    WAKE = 2
    COPY = 3
    ZEROPAGE = 4
    MOVE = 5
    WRITEPROTECT = 6
    CONTINUE = 7
    POISON = 8

    def explain(self, number: int) -> str:
        """What `number` (an errno) means when this operation answers it; "" if that is unknown."""
        return _REASONS.get((self, number)) or _COMMON_REASONS.get(number, "")


DONTWAKE: Final = 1
"""Mode bit of every operation but WRITEPROTECT: leave the waiting threads asleep."""
COPY_WRITE_PROTECT: Final = 2
CONTINUE_WRITE_PROTECT: Final = 2
MOVE_ALLOW_SOURCE_HOLES: Final = 2
WRITEPROTECT_PROTECT: Final = 1
WRITEPROTECT_DONTWAKE: Final = 2


class Operation(NamedTuple):
    """One ioctl on one range of one userfaultfd."""

    code: Code
    dst: int
    """Bytes, page-aligned: where, in the memory of the process that faults."""
    length: int
    """Bytes, a multiple of the page size."""
    src: int = 0
    """COPY: an address in the caller's memory.  MOVE: one in the same process."""
    mode: int = 0
    page_size: int = 0
    """Bytes; a page found present is stepped over and its waiters are woken.  0: stop instead."""


class Status(Enum):
    """How far an operation came."""

    DONE = "done"
    """All of the range is there."""
    RETRY = "retry"
    """An event is in flight: read the userfaultfd, then ask for the rest again, later."""
    CLIENT_GONE = "client gone"
    """The process whose memory it was has died."""
    FAILED = "failed"
    """Neither; the error says why.  Methods that return a `Result` raise instead."""


class Result(NamedTuple):
    """What one operation did."""

    operation: Operation
    done: int
    """Bytes that this operation filled, moved, mapped, poisoned, (un)protected or woke."""
    present: int
    """Bytes that were there before; whoever waited for them was woken."""
    status: Status
    error: int
    """The errno that stopped it, 0 where none did."""

    @property
    def address(self) -> int:
        """Where the operation began, in bytes."""
        return self.operation.dst

    @property
    def length(self) -> int:
        """What was asked for, in bytes."""
        return self.operation.length

    @property
    def progress(self) -> int:
        """Bytes from the start of the range that need nothing more."""
        return self.done + self.present

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.status is Status.DONE

    @property
    def rest(self) -> Operation:
        """What is left to do, as an operation."""
        operation, progress = self.operation, self.progress
        return operation._replace(
            dst=operation.dst + progress,
            src=operation.src + progress if operation.src else 0,
            length=operation.length - progress,
        )


def result_of(operation: Operation, error: int, done: int, present: int) -> Result:
    """Name what the C side reported for `operation`."""
    return Result(operation, done, present, status_of(error), error)


def status_of(error: int) -> Status:
    """What an errno says about going on."""
    if error == 0:
        return Status.DONE
    if error == errno.EAGAIN:
        return Status.RETRY
    if error == errno.ESRCH:
        return Status.CLIENT_GONE
    return Status.FAILED


class Outcome(Enum):
    """How a fault ended, or why it has not ended yet.  Each fault gets exactly one ending."""

    MOVED = "moved"
    UNSHARED_AND_MOVED = "unshared and moved"
    WAITED_AND_MOVED = "waited and moved"
    """The page was pinned for I/O, which has ended."""
    EXACTLY_COPIED = "exactly copied"
    """In the place of a move: both sides write-protected, and the source is empty now."""
    COPIED_PINNED = "copied although pinned"
    """The same, and what its I/O had not delivered yet is lost."""
    COPIED = "copied"
    """From a source, or in the place of a move without write-protection."""
    ZEROED = "zeroed"
    MAPPED = "mapped"
    """CONTINUE: the page of the page cache is in the page table."""
    UNPROTECTED = "unprotected"
    ALREADY_PRESENT = "already present"
    WOKEN = "woken"
    """The thread was sent to try again, since the page is somebody else's doing."""
    POISONED = "poisoned"
    UNMAPPED = "unmapped"
    """The range is gone; the thread gets what the kernel gives it, which is SIGSEGV."""
    CLIENT_GONE = "client gone"
    FAILED = "failed"
    """Nothing was placed, and what was declared for that case was done instead."""
    DEFERRED = "deferred"
    """Not an ending: an event was in flight, a timer will try again."""
    HELD = "held"
    """Not an ending: the thread goes on waiting, and is listed as stuck, with the reason."""

    __hash__ = object.__hash__  # counted once a fault

    @property
    def final(self) -> bool:
        """Whether the fault has left."""
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
"""The outcome of a fault that was answered by an operation."""

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
    (Code.MOVE, errno.EBUSY): "the page is not exclusively ours: shared after a fork, merged by "
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
