"""All exceptions that uffdaemon raises.

The root is `UffdaemonError`.  Its branches tell who has to act: a `UsageError` is the caller's
mistake; a `KernelRefusal` is a system call that failed, an ``OSError`` with errno, operation,
address and length; `SourceError` and `PolicyError` are failures of a source and of a policy.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from uffdaemon.uapi.moved import Cause, Moved, Run
from uffdaemon.uapi.outcomes import Code, Outcome

if TYPE_CHECKING:
    from uffdaemon.uapi.features import Features
    from uffdaemon.uapi.outcomes import Result


_NAMED: Final = 4  # runs of pages that a message names


class UffdaemonError(Exception):
    """The root of all exceptions here; never raised itself."""


# -- the caller's mistakes ---------------------------------------------------------------------


class UsageError(UffdaemonError):
    """The caller asked for something that cannot work; never raised itself."""


class InvalidRange(UsageError, ValueError):
    """A range is unaligned, empty, too long, overlaps another one, or lies outside its region."""


class InvalidDescriptor(UsageError, ValueError):
    """The descriptor is not a usable userfaultfd; never raised itself."""


class NotAUserfaultfd(InvalidDescriptor):
    """The descriptor is not a userfaultfd."""


class BlockingDescriptor(InvalidDescriptor):
    """The userfaultfd lacks ``O_NONBLOCK``, so that poll(2) always reports POLLERR."""


class ClosedDescriptor(InvalidDescriptor):
    """The userfaultfd has been closed, or the number is not an open descriptor."""


class PlacementRefused(UsageError):
    """The request cannot work with this placement.

    For instance a buffer of memory whose faults need Python, or a move in another process's memory.
    The message has the reason; docs/errors-and-outcomes.md lists them.
    """


class NotServed(UsageError, LookupError):
    """The daemon does not serve this userfaultfd or region."""


class AlreadyServed(UsageError):
    """Another daemon of this program serves the userfaultfd."""


class DaemonClosed(UsageError, RuntimeError):
    """The daemon is shutting down or has ended, or the client whose memory is filled has exited."""


class JournalError(UsageError):
    """The journal is not one, is damaged, or does not have what was asked for."""


class KeeperError(UsageError):
    """The keeper does not listen, has ended, or belongs to another user."""


class ForeignMemory(UsageError):
    """The source of a move is not memory that this library mapped.

    Its owner would find it empty.  ``foreign=True`` allows it.
    """


class RegionIncomplete(UsageError):
    """The region lacks pages, which would read as zeros if it were no longer served."""


class PagesPresent(UsageError):
    """Memory has pages before it is guarded, so that their faults never come.

    ``runs`` are the offsets of these pages, (start, end) in bytes.  ``unmapped`` is the number of
    bytes of hugetlb pages that only the memory file has: the kernel does not tell which they are.
    """

    def __init__(
        self, region: str, runs: list[tuple[int, int]], unmapped: int, page_size: int
    ) -> None:
        self.runs = runs
        self.unmapped = unmapped
        count = (sum(end - start for start, end in runs) + unmapped) // page_size
        named = [f"{start:#x}-{end:#x}" for start, end in runs[:_NAMED]]
        named += ["..."] if len(runs) > _NAMED else []
        where = f" (offsets {', '.join(named)})" if named else " in its memory file"
        super().__init__(
            f"{count} pages of {region} are present{where}, and would keep their contents: guard "
            "memory before it is touched, or pass present='keep' or 'discard'"
        )


# -- the kernel's refusals ---------------------------------------------------------------------


class KernelRefusal(UffdaemonError, OSError):
    """The kernel refused a system call; never raised itself.

    ``errno`` is the kernel's, ``operation`` the ioctl or system call, ``address`` and ``length``
    (bytes) its range if it has one.  ``reason`` explains the errno, and ``advice`` is the command
    that helps, if one is known.
    """

    def __init__(
        self,
        number: int,
        operation: str,
        *,
        address: int | None = None,
        length: int | None = None,
        reason: str = "",
        advice: str = "",
    ) -> None:
        self.operation = operation
        self.address = address
        self.length = length
        self.reason = reason
        self.advice = advice
        super().__init__(number, self._describe(number))

    def _describe(self, number: int) -> str:
        name = errno.errorcode.get(number, str(number))
        where = "" if self.address is None else f" at {self.address:#x}"
        if self.length is not None:
            where += f", {self.length} bytes"
        text = f"{self.operation}{where}: {name} ({os.strerror(number)})"
        if self.reason:
            text += f": {self.reason}"
        if self.advice:
            text += f" [{self.advice}]"
        return text

    def __str__(self) -> str:
        return str(self.strerror)

    @property
    def number(self) -> int:
        """The errno as an int; 0 if there is none."""
        return self.errno if self.errno is not None else 0


class OpenRefused(KernelRefusal):
    """A userfaultfd could not be opened, received or read."""


class PermissionRefused(OpenRefused, PermissionError):
    """The user may not open a userfaultfd this way; ``advice`` is the command that permits it."""


class FeatureMissing(KernelRefusal):
    """The kernel lacks a feature.  ``missing`` has the features, if features were requested."""

    def __init__(self, operation: str, what: str, missing: Features | None = None) -> None:
        self.missing = missing
        super().__init__(errno.EINVAL, operation, reason=f"this kernel does not have it: {what}")


class RegistrationRefused(KernelRefusal):
    """UFFDIO_REGISTER or UFFDIO_UNREGISTER failed."""


class RangeBusy(RegistrationRefused):
    """The range, or a part of it, is registered with another userfaultfd."""


class MemoryRefused(KernelRefusal):
    """mmap(2), madvise(2), mremap(2), memfd_create(2) or PAGEMAP_SCAN failed."""


class OperationError(KernelRefusal):
    """An operation on a range failed.  ``result`` has its progress.

    ``address`` and ``length`` (bytes) are the part that was not done.
    """

    def __init__(self, number: int, result: Result, *, reason: str = "", advice: str = "") -> None:
        self.result = result
        operation = result.operation
        super().__init__(
            number,
            operation.code.name,
            address=operation.dst + result.progress,
            length=operation.length - result.progress,
            reason=reason or operation.code.explain(number),
            advice=advice,
        )


class MoveRefused(OperationError):
    """A page could not be moved, and no fallback was allowed or worked.

    ``cause`` is the reason, and ``moved`` has the result for every page of the request: other
    pages may have moved.  See docs/move.md.
    """

    def __init__(
        self,
        number: int,
        result: Result,
        cause: Cause,
        moved: Moved,
        *,
        reason: str = "",
        advice: str = "",
    ) -> None:
        self.cause = cause
        self.moved = moved
        super().__init__(number, result, reason=reason, advice=advice)


class PageNotExclusive(MoveRefused):
    """EBUSY: the page is not exclusive to this process.

    Raised itself for a single ioctl, which does not tell the causes apart; the subclasses do.
    """


class PageShared(PageNotExclusive):
    """EBUSY: a child that was forked shares the page."""


class PageMerged(PageNotExclusive):
    """EBUSY: KSM has merged the page with equal ones."""


class PagePinned(PageNotExclusive):
    """EBUSY: the page is pinned for I/O (O_DIRECT, io_uring, RDMA)."""


class WrongMemory(MoveRefused):
    """EINVAL: not private anonymous memory, or mappings that differ in access or locking."""


class OtherProcess(MoveRefused):
    """The destination is memory of another process."""


class MoveMissing(MoveRefused):
    """ENOTTY: the kernel has no UFFDIO_MOVE (Linux 6.8)."""


class SourceHole(MoveRefused):
    """ENOENT: there is no page at the source."""


class SourceMarker(MoveRefused):
    """EFAULT: there is a marker at the source, such as poison."""


class DestinationNotEmpty(MoveRefused):
    """EEXIST: there is a page or a marker at the destination."""


class AlreadyMoved(DestinationNotEmpty):
    """EEXIST, and the source is empty: the page has been moved before.

    Linux 6.18 also returns this for a page that it has just moved while the page was being swapped
    out.
    """


class NotRegistered(MoveRefused):
    """ENOENT or EINVAL: the destination is not registered with this userfaultfd."""


class EventInFlight(MoveRefused):
    """EAGAIN for too long: an event is pending, and nothing reads the userfaultfd."""


class Unprotectable(MoveRefused):
    """An exact copy needs write-protection: both sides registered MISSING and WP."""


class SourceNotEmpty(KernelRefusal):
    """``verify`` found pages at the source of a move that had succeeded.

    A thread has touched the source since.
    """


# -- sources and policies ----------------------------------------------------------------------


class SourceError(UffdaemonError):
    """A source could not return the bytes; never raised itself."""


class SourceTooShort(SourceError):
    """The source ends before the requested bytes, or returned another number of bytes."""


class SourceFailed(SourceError):
    """The source raised; its exception is the ``__cause__``."""


class SourceTimedOut(SourceError):
    """The source took longer than the region's `Retry` allows."""


class PolicyError(UffdaemonError):
    """A policy broke its contract; never raised itself.  ``policy`` names it."""

    def __init__(self, policy: str, what: str) -> None:
        self.policy = policy
        super().__init__(f"policy {policy} {what}")


class PolicyRaised(PolicyError):
    """The policy raised; its exception is the ``__cause__``."""


class PolicyAnswerInvalid(PolicyError):
    """The policy returned something that is not an action, or one that does not fit the fault."""


class PolicyTooSlow(PolicyError):
    """The policy took longer than ``policy_timeout``."""


class PolicyVetoed(PolicyError):
    """A ``before`` hook vetoed the action."""


class NoAnswer(PolicyError):
    """The policy returned None: it does not resolve faults of this kind here."""


class PolicyNotLoaded(PolicyError):
    """An external policy could not be loaded, moves pages, or its worker died too often."""


class WorkerFailure(PolicyError):
    """A failure in the worker of an external policy whose exception cannot be rebuilt here.

    ``error_type`` is the name of the exception in the worker.
    """

    def __init__(self, policy: str, error_type: str, text: str) -> None:
        self.error_type = error_type
        super().__init__(policy, f"failed in its worker: {error_type}: {text}")


def error_of(result: Result) -> OperationError:
    """The error for the result of one ioctl that FAILED."""
    if result.operation.code is not Code.MOVE or result.error != errno.EBUSY:
        return OperationError(result.error, result)
    rest, done = result.rest, result.done
    runs = [Run(result.address, result.operation.src, done, Outcome.MOVED)] if done else []
    cause = Cause.NOT_EXCLUSIVE
    runs.append(Run(rest.dst, rest.src, rest.length, Outcome.FAILED, cause, result.error))
    return PageNotExclusive(result.error, result, cause, Moved(tuple(runs)))
