"""The result of a move: why pages were refused, and what happened to each.

Source: ``move_pages`` and ``validate_move_areas`` in ``mm/userfaultfd.c``.
"""

from __future__ import annotations

import errno
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

from uffdaemon.uapi.outcomes import Outcome

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable


class Cause(Enum):
    """Why MOVE refused a page."""

    SHARED = "shared with another process"
    """EBUSY: a forked child maps it as well, or the kernel still marks it as shared."""
    MERGED = "merged by KSM"
    """EBUSY."""
    NOT_EXCLUSIVE = "not exclusive to us: shared after a fork, merged by KSM, or pinned for I/O"
    """EBUSY of a single ioctl, which does not tell the three causes apart."""
    PINNED = "pinned for I/O"
    """EBUSY although no other process maps the page: O_DIRECT, io_uring, RDMA."""
    WRONG_MEMORY = "memory that cannot be moved"
    """EINVAL: only private anonymous memory moves; access and locking must be the same."""
    OTHER_PROCESS = "memory of another process"
    NO_MOVE = "no UFFDIO_MOVE in this kernel"
    SOURCE_HOLE = "nothing at the source"
    """ENOENT: never written, or moved away before."""
    SOURCE_MARKER = "a marker at the source"
    """EFAULT: poison, a guard, or a write-protect marker without a page."""
    NOT_EMPTY = "the destination is not empty"
    """EEXIST: a page or a marker."""
    ALREADY_MOVED = "nothing at the source, and the destination is not empty"
    """EEXIST: moved before.  Linux 6.18 also returns it for a page that it has just moved while the
    page was being swapped out: if you know that there was a page, it has moved."""
    NOT_REGISTERED = "the destination is not registered"
    """Not with this userfaultfd, or not mapped."""
    EVENT = "an event in flight"
    """EAGAIN for too long: nothing reads the userfaultfd."""
    NO_MEMORY = "no memory"
    CLIENT_GONE = "the process is gone"
    UNPROTECTABLE = "no write-protection for an exact copy"
    """Both sides must be registered MISSING and WP; a copy without that may lose writes."""
    ASKED_FOR = "an exact copy was asked for"
    """By `copy_exactly`, of a page that could have moved."""
    OTHER = "refused"


class Run(NamedTuple):
    """The result for adjacent pages, or the one that `can_move` expects."""

    dst: int
    src: int
    length: int
    """Bytes."""
    outcome: Outcome
    cause: Cause | None = None
    """Why MOVE refused them, also if a later step of the ladder succeeded."""
    error: int = 0
    """The last errno; 0 if they arrived."""

    @property
    def arrived(self) -> bool:
        """Whether they are at the destination, and no longer at the source."""
        return self.outcome is not Outcome.FAILED

    def explain(self) -> str:
        """A sentence that describes it."""
        why = "" if self.cause is None else f": {self.cause.value}"
        if self.error:
            why += f" ({errno.errorcode.get(self.error, self.error)})"
        where = f"{self.length} bytes from {self.src:#x} to {self.dst:#x}"
        return f"{where} {self.outcome.value.replace('_', ' ')}{why}"


_SHOWN: Final = 8
"""How many runs a repr shows."""


class Moved:
    """The result of a move, as runs of pages in the order of the request."""

    def __init__(self, runs: tuple[Run, ...]) -> None:
        self.runs = runs

    def __repr__(self) -> str:
        shown = [run.explain() for run in self.runs[:_SHOWN]]
        if len(self.runs) > _SHOWN:
            shown.append(f"and {len(self.runs) - _SHOWN} more runs")
        return f"<Moved: {'; '.join(shown) or 'nothing'}>"

    @property
    def complete(self) -> bool:
        """Whether all pages arrived."""
        return all(run.arrived for run in self.runs)

    @property
    def refused(self) -> list[Run]:
        """The runs that did not arrive."""
        return [run for run in self.runs if not run.arrived]

    def bytes(self, outcome: Outcome) -> int:
        """How many bytes have this outcome."""
        return sum(run.length for run in self.runs if run.outcome is outcome)


class AllMoved(Moved):
    """All pages moved.  Flat triples of (dst, src, length) become runs on first use."""

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
    """The runs, with adjacent ones of the same result joined."""
    result: list[Run] = []
    for run in runs:
        if result:
            last = result[-1]
            if (last.dst + last.length, last.src + last.length) == run[:2] and last[3:] == run[3:]:
                result[-1] = last._replace(length=last.length + run.length)
                continue
        result.append(run)
    return tuple(result)
