"""Why a page did not simply move, and what became of it instead.

Source: ``move_pages`` and ``validate_move_areas`` in ``mm/userfaultfd.c``.
"""

from __future__ import annotations

import errno
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

from uffdaemon import errors
from uffdaemon.outcomes import Code, Operation, Outcome, Result, Status

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable


class Cause(Enum):
    """Why MOVE refused a page."""

    SHARED = "shared with another process"
    """EBUSY: a fork child maps it too, or the kernel still takes it for shared."""
    MERGED = "merged by KSM"
    """EBUSY."""
    NOT_EXCLUSIVE = "not exclusively ours: shared after a fork, merged by KSM, or pinned for I/O"
    """EBUSY of a single ioctl, which does not tell the three apart."""
    PINNED = "pinned for I/O"
    """EBUSY that stays when nobody else maps the page: O_DIRECT, io_uring, RDMA."""
    WRONG_MEMORY = "memory that cannot be moved"
    """EINVAL: only private anonymous memory moves, between mappings of equal access and locking."""
    OTHER_PROCESS = "memory of another process"
    NO_MOVE = "no UFFDIO_MOVE in this kernel"
    SOURCE_HOLE = "nothing at the source"
    """ENOENT: never written, or given away before."""
    SOURCE_MARKER = "a marker at the source"
    """EFAULT: poison, a guard, or a write-protect marker where no page is."""
    NOT_EMPTY = "the destination is not empty"
    """EEXIST: a page, or a marker."""
    ALREADY_MOVED = "nothing at the source, and the destination is not empty"
    """EEXIST: moved before.  Linux 6.18 says it of a page, too, that it has just moved while that
    was being swapped out: who knows that there was a page can take it for moved."""
    NOT_REGISTERED = "the destination is not registered"
    """With this userfaultfd, or not mapped at all."""
    EVENT = "an event in flight"
    """EAGAIN: nobody has read the userfaultfd for too long."""
    NO_MEMORY = "no memory"
    CLIENT_GONE = "the process is gone"
    UNPROTECTABLE = "no write-protection for an exact copy"
    """Both sides must be registered MISSING and WP; else a plain copy may lose writes."""
    ASKED_FOR = "an exact copy was asked for"
    """Of a page that might have moved."""
    OTHER = "refused"


CAUSE_OF_ERRNO: Final = {
    errno.EBUSY: Cause.NOT_EXCLUSIVE,
    errno.EINVAL: Cause.WRONG_MEMORY,
    errno.ENOTTY: Cause.NO_MOVE,
    errno.ENOENT: Cause.SOURCE_HOLE,
    errno.EFAULT: Cause.SOURCE_MARKER,
    errno.EEXIST: Cause.NOT_EMPTY,
    errno.EAGAIN: Cause.EVENT,
    errno.ENOMEM: Cause.NO_MEMORY,
    errno.ESRCH: Cause.CLIENT_GONE,
}
"""What an errno of MOVE says by itself; several have to be looked into."""


class Run(NamedTuple):
    """What became of neighbouring pages, or what would."""

    dst: int
    src: int
    length: int
    """Bytes."""
    outcome: Outcome
    cause: Cause | None = None
    """Why they were not simply moved; also where a higher rung succeeded."""
    error: int = 0
    """The errno that was left; 0 where they arrived."""

    @property
    def arrived(self) -> bool:
        """Whether they are at the destination, and no longer at the source."""
        return self.outcome is not Outcome.FAILED

    def explain(self) -> str:
        """One sentence about it."""
        why = "" if self.cause is None else f": {self.cause.value}"
        if self.error:
            why += f" ({errno.errorcode.get(self.error, self.error)})"
        where = f"{self.length} bytes from {self.src:#x} to {self.dst:#x}"
        return f"{where} {self.outcome.value}{why}"


_TOLD: Final = 8
"""Runs that a repr shows."""


class Moved:
    """What a move came to, run by run, in the order in which it was asked for."""

    def __init__(self, runs: tuple[Run, ...]) -> None:
        self.runs = runs

    def __repr__(self) -> str:
        told = [run.explain() for run in self.runs[:_TOLD]]
        if len(self.runs) > _TOLD:
            told.append(f"and {len(self.runs) - _TOLD} more runs")
        return f"<Moved: {'; '.join(told) or 'nothing'}>"

    @property
    def complete(self) -> bool:
        """Whether everything arrived."""
        return all(run.arrived for run in self.runs)

    @property
    def refused(self) -> list[Run]:
        """What did not arrive."""
        return [run for run in self.runs if not run.arrived]

    def bytes(self, outcome: Outcome) -> int:
        """How many bytes ended so."""
        return sum(run.length for run in self.runs if run.outcome is outcome)


class AllMoved(Moved):
    """Everything moved: flat triples of (dst, src, length) become runs when they are asked for."""

    def __init__(self, flat: array[int]) -> None:
        self._flat = flat

    @cached_property
    def runs(self) -> tuple[Run, ...]:  # type: ignore[override]
        """Neighbours are joined."""
        triples = zip(self._flat[0::3], self._flat[1::3], self._flat[2::3], strict=True)
        return joined(Run(*triple, Outcome.MOVED) for triple in triples)

    @property
    def refused(self) -> list[Run]:
        """Nothing."""
        return []


def joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The runs, with neighbours of one fate made one."""
    result: list[Run] = []
    for run in runs:
        if result:
            last = result[-1]
            if (last.dst + last.length, last.src + last.length) == run[:2] and last[3:] == run[3:]:
                result[-1] = last._replace(length=last.length + run.length)
                continue
        result.append(run)
    return tuple(result)


_CLASSES: Final[dict[Cause, type[errors.MoveRefused]]] = {
    Cause.SHARED: errors.PageShared,
    Cause.MERGED: errors.PageMerged,
    Cause.PINNED: errors.PagePinned,
    Cause.NOT_EXCLUSIVE: errors.PageNotExclusive,
    Cause.WRONG_MEMORY: errors.WrongMemory,
    Cause.OTHER_PROCESS: errors.OtherProcess,
    Cause.NO_MOVE: errors.MoveMissing,
    Cause.SOURCE_HOLE: errors.SourceHole,
    Cause.SOURCE_MARKER: errors.SourceMarker,
    Cause.NOT_EMPTY: errors.DestinationNotEmpty,
    Cause.ALREADY_MOVED: errors.AlreadyMoved,
    Cause.NOT_REGISTERED: errors.NotRegistered,
    Cause.EVENT: errors.EventInFlight,
    Cause.UNPROTECTABLE: errors.Unprotectable,
}

_CURES: Final = {
    Cause.SHARED: "a fallback unshares it first; MADV_DONTFORK keeps children from sharing it",
    Cause.MERGED: "a fallback unmerges it first; do not mark memory MERGEABLE that is to move",
    Cause.PINNED: "wait for the I/O or unregister the buffer; a copy would lose what has not come",
    Cause.WRONG_MEMORY: "both sides must be private anonymous memory of this process, with the "
    "same access and lock flags, and the destination registered; a fallback copies exactly",
    Cause.OTHER_PROCESS: "MOVE works only from inside of the process; a fallback copies",
    Cause.NO_MOVE: "it takes Linux 6.8; a fallback copies exactly",
    Cause.SOURCE_HOLE: "in a call, allow_source_holes leaves holes as they are; to a fault "
    "something is due",
    Cause.SOURCE_MARKER: "release the source page to get rid of the marker",
    Cause.NOT_EMPTY: "whoever waits there can be woken; the source is as it was",
    Cause.ALREADY_MOVED: "moved before, perhaps, or just now while it was being swapped out; a "
    "page that is known to have been there has arrived",
    Cause.NOT_REGISTERED: "register the destination with this userfaultfd first",
    Cause.EVENT: "somebody has to read the userfaultfd",
    Cause.UNPROTECTABLE: "register both sides MISSING and WP, or allow lose_writes",
}


def refusal(moved: Moved, run: Run) -> errors.MoveRefused:
    """The error for a run that did not arrive."""
    cause = run.cause or Cause.OTHER
    operation = Operation(Code.MOVE, run.dst, run.length, run.src)
    result = Result(operation, 0, 0, Status.FAILED, run.error)
    reason, others = cause.value, len(moved.refused) - 1
    if others > 0:
        reason += f"; {others} more runs of pages were refused: see `moved`"
    kind = _CLASSES.get(cause, errors.MoveRefused)
    advice = _CURES.get(cause, "")
    return kind(run.error, result, cause, moved, reason=reason, advice=advice)


def marker_in_the_way(result: Result) -> errors.MoveRefused:
    """The error for a move whose destination holds a marker: poison, or write-protection."""
    rest = result.rest
    run = Run(rest.dst, rest.src, rest.length, Outcome.FAILED, Cause.NOT_EMPTY, errno.EEXIST)
    reason = "a marker is at the destination: poison, a guard, or write-protection without a page"
    return errors.DestinationNotEmpty(
        errno.EEXIST, result, Cause.NOT_EMPTY, Moved((run,)), reason=reason
    )


def error_of(result: Result) -> errors.OperationError:
    """The error for the result of one ioctl that FAILED."""
    if result.operation.code is not Code.MOVE or result.error != errno.EBUSY:
        return errors.OperationError(result.error, result)
    rest, done = result.rest, result.done
    runs = [Run(result.address, result.operation.src, done, Outcome.MOVED)] if done else []
    cause = Cause.NOT_EXCLUSIVE
    runs.append(Run(rest.dst, rest.src, rest.length, Outcome.FAILED, cause, result.error))
    return errors.PageNotExclusive(result.error, result, cause, Moved(tuple(runs)))
