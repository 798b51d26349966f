"""What the kernel reports about one page, and why it may have refused to move it."""

from __future__ import annotations

from typing import NamedTuple

from uffdaemon.uapi.moved import Cause


class PageFacts(NamedTuple):
    """What user space can see of a page."""

    there: bool
    """Present or swapped out."""
    exclusive: bool = False
    """Mapped by this process alone.  The kernel may still not treat it as exclusive."""
    merged: bool = False
    zero: bool = False
    huge: bool = False
    marker: bool = False
    present: bool = False


def why_busy(page: PageFacts) -> Cause | None:
    """Why MOVE returned EBUSY for the page.  None: no visible reason, so it is pinned, or was
    shared with a process that has exited."""
    if page.merged:
        return Cause.MERGED
    return None if page.exclusive or not page.there else Cause.SHARED
