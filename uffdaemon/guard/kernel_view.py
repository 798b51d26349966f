"""What the kernel knows of guarded pages: the page book is a hint.

The kernel drops pages without an event where EVENT_REMOVE was not negotiated.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.guard.guarded_region import GuardedRegion
from uffdaemon.kernel.memory import MemoryType
from uffdaemon.kernel.page_scan import PageCategory, scan_pages

if TYPE_CHECKING:
    from uffdaemon.model.region import Region
    from uffdaemon.model.region_table import Segment

_NO_CATEGORY = PageCategory(0)


def forget_dropped(region: Region, segments: list[Segment]) -> None:
    """Mark pages as absent that the page book has as present, and the kernel has not.

    For private memory of this process; pages of shared memory are in a file, whatever is mapped.
    Without PAGEMAP_SCAN (before Linux 6.7) nothing is done.
    """
    if not isinstance(region, GuardedRegion) or region.memory.type is not MemoryType.ANONYMOUS:
        return
    for segment in segments:
        with suppress(errors.MemoryRefused):
            found = scan_pages(segment.start, segment.end - segment.start, reported=_NO_CATEGORY)
            at = segment.start
            for start, end in [*((run.start, run.end) for run in found), (segment.end, 0)]:
                origin = segment.region.start
                first, last = (
                    (at - origin) // region.page_size,
                    (start - origin) // region.page_size,
                )
                region.pages.present.discard_range(first, last)
                at = end
