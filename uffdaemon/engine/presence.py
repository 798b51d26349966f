"""Records which pages an operation or a move has filled or emptied, and how many bytes.

The handler calls this for each result of a batch, and for moves that the application makes itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uffdaemon.kernel.page_probe import look
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.outcomes import OUTCOME_OF_CODE, Code

if TYPE_CHECKING:
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Region
    from uffdaemon.model.region_table import Segment
    from uffdaemon.uapi.moved import Moved
    from uffdaemon.uapi.outcomes import Result


def record_result(served: Served, region: Region, result: Result) -> None:
    """Record which pages of `region` an operation has brought, and how many bytes."""
    code = result.operation.code
    if code is Code.WAKE:
        return
    served.counters.bytes_done[OUTCOME_OF_CODE[code]] += result.done
    if result.progress and code is not Code.WRITEPROTECT:
        if code is Code.MOVE:
            mark_absent(served, result.operation.src, result.progress)
        first = (result.operation.dst - region.start) // region.page_size
        region.pages.present.add_range(first, first + result.progress // region.page_size)


def record_moves(served: Served, moved: Moved) -> None:
    """Record which pages a move has filled, and which it has emptied."""
    for run in moved.runs:
        if run.arrived:
            served.counters.bytes_done[run.outcome] += run.length
            for segment in served.regions.clip(run.dst, run.dst + run.length):
                _mark_present(served, segment)
            mark_absent(served, run.src, run.length)


def _mark_present(served: Served, segment: Segment) -> None:
    first, end = _pages(segment)
    present = segment.region.pages.present
    if not served.uffd.same_process:
        present.add_range(first, end)
        return
    # Source holes leave holes at the destination: those pages must not count as present.
    size = segment.region.page_size // PAGE_SIZE
    there = [page.there for page in look(segment.start, segment.end - segment.start)]
    for number in range(first, end):
        if there[(number - first) * size]:
            present.add(number)


def mark_absent(served: Served, src: int, length: int) -> None:
    """Record that a move has emptied the pages of a range (bytes), wherever they are served."""
    for each in served.loop.peers():
        for segment in each.regions.clip(src, src + length):
            segment.region.pages.present.discard_range(*_pages(segment))


def _pages(segment: Segment) -> tuple[int, int]:
    """The first page of a segment in its region, and the one after its last."""
    region = segment.region
    first = (segment.start - region.start) // region.page_size
    return first, (segment.end - region.start) // region.page_size
