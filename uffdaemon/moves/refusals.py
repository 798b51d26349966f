"""The errors for refused moves: from an errno to its cause, and from a cause to its error.

Source: ``move_pages`` and ``validate_move_areas`` in ``mm/userfaultfd.c``.
"""

from __future__ import annotations

import errno
from typing import Final

from uffdaemon import errors
from uffdaemon.uapi.moved import Cause, Moved, Run
from uffdaemon.uapi.outcomes import Code, Operation, Outcome, Result, Status

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
"""The cause that an errno of MOVE suggests; some need a closer look."""


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

_ADVICE: Final = {
    Cause.SHARED: "a fallback unshares it first; MADV_DONTFORK keeps children from sharing it",
    Cause.MERGED: "a fallback unmerges it first; avoid MADV_MERGEABLE on memory that is to move",
    Cause.PINNED: "wait for the I/O or unregister the buffer; a copy would lose data still to come",
    Cause.WRONG_MEMORY: "both sides must be private anonymous memory of this process, with the "
    "same access and lock flags, and the destination registered; a fallback copies exactly",
    Cause.OTHER_PROCESS: "MOVE works only within a process; a fallback copies",
    Cause.NO_MOVE: "it needs Linux 6.8; a fallback copies exactly",
    Cause.SOURCE_HOLE: "allow_source_holes skips holes in a call; a fault always needs a page",
    Cause.SOURCE_MARKER: "release the source page to get rid of the marker",
    Cause.NOT_EMPTY: "threads that wait there can be woken; the source is unchanged",
    Cause.ALREADY_MOVED: "it was moved before, or just now while it was being swapped out; if "
    "you know that there was a page, it has arrived",
    Cause.NOT_REGISTERED: "register the destination with this userfaultfd first",
    Cause.EVENT: "read the userfaultfd: the event is pending until then",
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
    advice = _ADVICE.get(cause, "")
    return kind(run.error, result, cause, moved, reason=reason, advice=advice)


def marker_in_the_way(result: Result) -> errors.MoveRefused:
    """The error for a move whose destination holds a marker: poison, or write-protection."""
    rest = result.rest
    run = Run(rest.dst, rest.src, rest.length, Outcome.FAILED, Cause.NOT_EMPTY, errno.EEXIST)
    reason = "a marker is at the destination: poison, a guard, or write-protection without a page"
    return errors.DestinationNotEmpty(
        errno.EEXIST, result, Cause.NOT_EMPTY, Moved((run,)), reason=reason
    )
