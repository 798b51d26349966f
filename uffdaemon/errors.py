"""Everything that uffdaemon raises.

One root, `UffdaemonError`, which is never raised itself.  Two branches that must not be confused:
what the caller got wrong (`UsageError`) and what the kernel refused (`KernelRefusal`, an
``OSError`` that keeps errno, operation, address and length).  What sources and policies do wrong is
told apart from both, since somebody else has to mend it.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from uffdaemon.uapi.moved import Cause, Moved, Run
from uffdaemon.uapi.outcomes import Code, Outcome

if TYPE_CHECKING:
    from uffdaemon.uapi.features import Features
    from uffdaemon.uapi.outcomes import Result


class UffdaemonError(Exception):
    """The root; never raised itself."""


# -- the caller's mistakes ---------------------------------------------------------------------


class UsageError(UffdaemonError):
    """The caller asked for something that can never work; never raised itself."""


class InvalidRange(UsageError, ValueError):
    """A range is unaligned, empty, too long, overlaps another one, or lies outside its region."""


class InvalidDescriptor(UsageError, ValueError):
    """A descriptor cannot serve; never raised itself."""


class NotAUserfaultfd(InvalidDescriptor):
    """The descriptor is something else."""


class BlockingDescriptor(InvalidDescriptor):
    """The userfaultfd lacks ``O_NONBLOCK``: poll(2) would report POLLERR on it for ever."""


class ClosedDescriptor(InvalidDescriptor):
    """The userfaultfd was closed, or the number never was a descriptor."""


class PlacementRefused(UsageError):
    """What was asked for cannot work from where the handler runs, for instance a move from outside
    of the process that owns the memory."""


class NotServed(UsageError, LookupError):
    """The daemon does not serve this userfaultfd or region."""


class AlreadyServed(UsageError):
    """Another daemon of this program serves the userfaultfd."""


class DaemonClosed(UsageError, RuntimeError):
    """The daemon is shutting down or gone."""


class ForeignMemory(UsageError):
    """The source of a move is not memory that this library mapped: whatever else lives there would
    find it empty.  ``foreign=True`` says that the caller knows."""


class RegionIncomplete(UsageError):
    """The region still has pages that were never filled; letting go of it would show zeros."""


# -- the kernel's refusals ---------------------------------------------------------------------


class KernelRefusal(UffdaemonError, OSError):
    """The kernel said no; never raised itself.

    ``operation`` is the ioctl or system call, ``address`` and ``length`` (bytes) the range it was
    asked about, where there is one.  ``advice`` is the line that mends it, where one is known.
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
        """The errno, always an int."""
        return self.errno if self.errno is not None else 0


class OpenRefused(KernelRefusal):
    """No userfaultfd could be opened."""


class PermissionRefused(OpenRefused, PermissionError):
    """The user may not open a userfaultfd in the way asked for; ``advice`` says what mends it."""


class FeatureMissing(KernelRefusal):
    """The kernel does not have it.  ``missing`` holds the features, where features were asked."""

    def __init__(self, operation: str, what: str, missing: Features | None = None) -> None:
        self.missing = missing
        super().__init__(errno.EINVAL, operation, reason=f"this kernel does not have it: {what}")


class RegistrationRefused(KernelRefusal):
    """REGISTER or UNREGISTER failed."""


class RangeBusy(RegistrationRefused):
    """The range, or a part of it, is watched by another userfaultfd."""


class MemoryRefused(KernelRefusal):
    """mmap(2), madvise(2), mremap(2), memfd_create(2) or PAGEMAP_SCAN failed."""


class OperationError(KernelRefusal):
    """An operation on a range failed; ``result`` holds how far it came before."""

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
    """A page was not moved, and nothing else was allowed or worked either.

    ``cause`` names the reason, and ``moved`` says what became of all that was asked for: pages
    beside the refused ones did move.
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
    """EBUSY: the page is not exclusively ours; raised by this name for a single ioctl, which does
    not tell the three causes apart."""


class PageShared(PageNotExclusive):
    """A fork child shares the page."""


class PageMerged(PageNotExclusive):
    """KSM merged the page with others of the same content."""


class PagePinned(PageNotExclusive):
    """I/O is under way to or from the page."""


class WrongMemory(MoveRefused):
    """Not private anonymous memory, or mappings that differ in access or locking."""


class OtherProcess(MoveRefused):
    """The destination is in another process."""


class MoveMissing(MoveRefused):
    """The kernel does not have UFFDIO_MOVE."""


class SourceHole(MoveRefused):
    """There is no page at the source."""


class SourceMarker(MoveRefused):
    """There is a marker at the source, such as poison."""


class DestinationNotEmpty(MoveRefused):
    """There is a page, or a marker, at the destination."""


class AlreadyMoved(DestinationNotEmpty):
    """The same, and the source is empty: the page was moved before, perhaps, or right now, while it
    was being swapped out, which Linux 6.18 reports so, too."""


class NotRegistered(MoveRefused):
    """The destination is not registered with this userfaultfd."""


class EventInFlight(MoveRefused):
    """EAGAIN for too long: somebody has to read the userfaultfd."""


class Unprotectable(MoveRefused):
    """An exact copy takes write-protection, which is not to be had here."""


class SourceNotEmpty(KernelRefusal):
    """The check mode found pages at the source of a move that had succeeded: somebody has touched
    it since."""


# -- sources and policies ----------------------------------------------------------------------


class SourceError(UffdaemonError):
    """A source could not give what is due; never raised itself."""


class SourceTooShort(SourceError):
    """The source ends before the bytes that were asked for, or gave another number of them."""


class SourceFailed(SourceError):
    """The source raised; the cause is chained."""


class SourceTimedOut(SourceError):
    """The source did not answer in time."""


class PolicyError(UffdaemonError):
    """A policy broke its contract; never raised itself.  ``policy`` names it."""

    def __init__(self, policy: str, what: str) -> None:
        self.policy = policy
        super().__init__(f"policy {policy} {what}")


class PolicyRaised(PolicyError):
    """The policy raised; the cause is chained."""


class PolicyAnswerInvalid(PolicyError):
    """The policy returned something that is no action, or an action that cannot apply."""


class PolicyTooSlow(PolicyError):
    """The policy took longer than its limit."""


class PolicyVetoed(PolicyError):
    """A hook vetoed the action."""


class NoAnswer(PolicyError):
    """No policy answers faults of this kind here."""


class PolicyNotLoaded(PolicyError):
    """An external policy could not be imported or made, or its worker died too often."""


class WorkerFailure(PolicyError):
    """What ``failed`` hooks are told of a failure in the worker of an external policy, if its error
    cannot be made anew here; ``error_type`` is the error's name there."""

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
