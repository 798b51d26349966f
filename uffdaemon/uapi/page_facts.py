"""What the kernel tells of one page, and what that says about a refused move."""

from __future__ import annotations

from typing import NamedTuple

from uffdaemon.uapi.moved import Cause


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
