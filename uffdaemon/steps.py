"""What can be seen of a page, and what a ladder asks its driver to do: without a system call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from uffdaemon.causes import Cause

if TYPE_CHECKING:
    from uffdaemon.outcomes import Operation, Result


class PageFacts(NamedTuple):
    """What can be seen of a page from outside."""

    there: bool
    """Present or swapped out."""
    exclusive: bool = False
    """Mapped by this process alone; that the kernel takes it for exclusive is not said by it."""
    merged: bool = False
    zero: bool = False
    huge: bool = False
    marker: bool = False
    present: bool = False


def why_busy(page: PageFacts) -> Cause | None:
    """What EBUSY for the page comes from; None: nothing to be seen, so that it is pinned, or was
    shared with somebody who is gone."""
    if page.merged:
        return Cause.MERGED
    return None if page.exclusive or not page.there else Cause.SHARED


# -- what a driver is asked to do; it fills the last fields in ----------------------------------


@dataclass(slots=True)
class Issue:
    """Carry out one operation on the userfaultfd of the destination."""

    operation: Operation
    result: Result = field(init=False)


@dataclass(slots=True)
class Look:
    """See what is at `length` bytes from `start`: one `PageFacts` for each 4 KiB."""

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
    """Let others run for `seconds`."""

    seconds: float
    reason: str = ""
    """Nothing: it is too short to be told to anybody."""


Ask: TypeAlias = Issue | Look | Unshare | CopyOver | Divide | Wait
PROTECT, COPY, RELEASE, UNPROTECT = 1, 2, 3, 4
"""Stages of a copy; in the first two nothing has happened to the source yet."""
