"""Moves that the kernel refused, and write-protect faults that exact copies cause.

A refused move leaves the batch: `uffdaemon.engine.tasks` climbs the ladder for it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from uffdaemon.actions import Move, Wake
from uffdaemon.engine.next_step import ClientGone, Climb, Ended, Failed, Later
from uffdaemon.errors import SourceNotEmpty
from uffdaemon.kernel.page_probe import look
from uffdaemon.moves.driver import check_empty
from uffdaemon.moves.refusals import marker_in_the_way, refusal
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.moved import Cause, Moved
from uffdaemon.uapi.outcomes import Code

if TYPE_CHECKING:
    from uffdaemon.engine.next_step import Next
    from uffdaemon.engine.state import Served
    from uffdaemon.model.batch import Step
    from uffdaemon.model.region import Fault
    from uffdaemon.model.region_table import Segment
    from uffdaemon.uapi.outcomes import Result

EVENT_IN_FLIGHT: Final = "an event is in flight (EAGAIN)"

AFTER_COPY: Final = Later(None, "its page is being copied exactly")
"""Ask the policy when the exact copy that is under way has ended."""


def refused(served: Served, fault: Fault, action: Move, result: Result) -> Next:
    """What comes next for a fault whose page (one page, nothing around it) did not move."""
    if result.error == errno.EEXIST and _is_marker(served, fault):
        return Failed(marker_in_the_way(result))
    if _is_there(fault, result.error):
        return Wake()
    return Climb(action, result.operation.dst, result.operation.src)


def _is_there(fault: Fault, error: int) -> bool:
    """Whether another fault has moved the page already: its destination is full, or its source
    empty."""
    if error == errno.EEXIST:
        return True
    return error == errno.ENOENT and fault.page in fault.region.pages.present


def _is_marker(served: Served, fault: Fault) -> bool:
    """Whether the destination holds a marker and no page: a woken thread would fault again."""
    return served.uffd.same_process and look(fault.address, PAGE_SIZE)[0].marker


def climbed(served: Served, fault: Fault, action: Move, moved: Moved) -> Next:
    """Record what came of climbing for one fault; returns what comes next for it."""
    region = fault.region
    run = moved.runs[0]
    if run.arrived:
        region.pages.present.add(fault.page)
        served.counters.bytes_done[run.outcome] += run.length
        empty(served, run.src, run.length)
        if action.verify:
            _prove_empty(served, fault, run.src, run.length)
        served.refaults.placed(fault)
        return Ended(run.outcome, run.length)
    if run.cause is Cause.CLIENT_GONE:
        return ClientGone()
    if run.cause is Cause.EVENT:
        return Later(action, EVENT_IN_FLIGHT)
    if _is_there(fault, run.error):
        return Wake()
    return Failed(refusal(moved, run))


def verify(served: Served, step: Step, result: Result) -> None:
    """Check that the source of a move is empty, if one of its policies asks for that."""
    for fault, action in zip(step.faults, step.actions, strict=True):
        if isinstance(action, Move) and action.verify:
            _prove_empty(served, fault, result.operation.src, result.done)
            return


def _prove_empty(served: Served, fault: Fault, src: int, length: int) -> None:
    error = _what_is_left(src, length)
    if error is not None:
        served.counters.failures[type(error).__name__] += 1
        served.hooks.failed(fault, error)
        served.log.error("source not empty after a move", address=hex(src), error=str(error))


def _what_is_left(src: int, length: int) -> SourceNotEmpty | None:
    try:
        check_empty(src, length)
    except SourceNotEmpty as error:
        return error
    return None


def waits_for_copy(served: Served, fault: Fault) -> bool:
    """Whether a write has to wait for the end of an exact copy of its page.  Lifting the
    protection earlier would lose the write."""
    return fault.kind is FaultKind.WP and served.uffd.copies.overlap(fault.address, 1)


def issue(served: Served, steps: list[Step]) -> tuple[list[Step], list[Result], list[Fault]]:
    """Carry the steps out, but for those that would lift the write-protection of an exact copy.

    Returns what was carried out, with the results, and the faults that have to wait for a copy.
    """
    copies = served.uffd.copies
    if not any(step.operation.code is Code.WRITEPROTECT for step in steps):
        return steps, served.execute([step.operation for step in steps]), []
    late: list[Fault] = []
    kept: list[Step] = []
    with copies.marking:  # no copy may begin between the check and the call
        for step in steps:
            _, start, length, *_ = operation = step.operation
            if operation.code is Code.WRITEPROTECT and copies.overlap(start, length):
                late += step.faults
            else:
                kept.append(step)
        results = served.execute([step.operation for step in kept])
    return kept, results, late


def record_moves(served: Served, moved: Moved) -> None:
    """Record which pages a move has filled, and which it has emptied."""
    for run in moved.runs:
        if run.arrived:
            served.counters.bytes_done[run.outcome] += run.length
            for segment in served.regions.clip(run.dst, run.dst + run.length):
                _arrived(served, segment)
            empty(served, run.src, run.length)


def _arrived(served: Served, segment: Segment) -> None:
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


def empty(served: Served, src: int, length: int) -> None:
    """Record that the source of a move is empty, if it is served here, too."""
    for each in served.loop.peers():
        for segment in each.regions.clip(src, src + length):
            segment.region.pages.present.discard_range(*_pages(segment))


def _pages(segment: Segment) -> tuple[int, int]:
    """The first page of a segment in its region, and the one after its last."""
    region = segment.region
    first = (segment.start - region.start) // region.page_size
    return first, (segment.end - region.start) // region.page_size
