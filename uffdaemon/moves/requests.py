"""What a ladder asks its driver to do, and under which terms.  Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from uffdaemon.actions import Fallback
    from uffdaemon.uapi.moved import Cause
    from uffdaemon.uapi.outcomes import Operation, Result
    from uffdaemon.uapi.page_facts import PageFacts


# -- requests: the driver fills in the last fields ----------------------------------------------


@dataclass(slots=True)
class Issue:
    """Carry out one operation on the userfaultfd of the destination."""

    operation: Operation
    result: Result = field(init=False)


@dataclass(slots=True)
class Look:
    """Inspect `length` bytes from `start`: one `PageFacts` for each page."""

    start: int
    length: int
    pages: list[PageFacts] = field(init=False)


@dataclass(slots=True)
class Unshare:
    """MADV_POPULATE_WRITE on pages that are there."""

    start: int
    length: int


@dataclass(slots=True)
class CopyOver:
    """Copy and release, exactly or not; `stage` is one of native's ``STAGE_*``."""

    dst: int
    src: int
    length: int
    exact: bool
    done: int = field(init=False)
    error: int = field(init=False)
    stage: int = field(init=False)


@dataclass(slots=True)
class Divide:
    """Find the lengths of the parts in which neither side leaves its mapping."""

    dst: int
    src: int
    length: int
    parts: list[int] = field(init=False)
    registered: bool = field(init=False)
    """Whether the first part of the destination is registered with some userfaultfd."""


@dataclass(slots=True)
class Wait:
    """Wait for `seconds`."""

    seconds: float
    reason: str = ""
    """Empty: the wait is too short to report."""


Request: TypeAlias = Issue | Look | Unshare | CopyOver | Divide | Wait
PROTECT, COPY, RELEASE, UNPROTECT = 1, 2, 3, 4
"""Stages of a copy.  Before RELEASE the source is unchanged."""

PIECE = 256 * 1024
"""Bytes of one exact copy; writers to either side wait for that long."""


class Terms(NamedTuple):
    """The terms of a move: what may be done about refusals."""

    fallback: Fallback | None = None
    allow_source_holes: bool = False
    impossible: Cause | None = None
    """Why MOVE is impossible; None: it is possible."""
    page_size: int = PAGE_SIZE
    """Bytes of the smallest copy (hugetlb)."""
    piece: int = PIECE
    """Bytes of the largest copy; threads that write to either side wait meanwhile."""
