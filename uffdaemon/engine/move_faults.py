"""Moves that the kernel refused, and write-protect faults that exact copies cause.

Here a refused move leaves the batch: `uffdaemon.engine.tasks` climbs the ladder for it in a task.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final

from uffdaemon.actions import Move, Unprotect, Wake
from uffdaemon.engine.failures import fail, release_held
from uffdaemon.errors import SourceNotEmpty
from uffdaemon.kernel.page_probe import look
from uffdaemon.moves.driver import check_empty
from uffdaemon.moves.refusals import marker_in_the_way, refusal
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.moved import Cause, Moved
from uffdaemon.uapi.outcomes import Code, Outcome

if TYPE_CHECKING:
    from uffdaemon.handlers import Handler
    from uffdaemon.model.batch import Step
    from uffdaemon.model.region import Fault
    from uffdaemon.model.region_table import Segment
    from uffdaemon.uapi.outcomes import Result

after_copy: Final = Unprotect()
"""Stands for: ask the policy when the exact copy that is under way has ended."""


def refused(handler: Handler, fault: Fault, action: Move, result: Result) -> None:
    """See to a fault whose page (one page, nothing around it) did not move."""
    if result.error == errno.EEXIST and _is_marker(handler, fault):
        fail(handler, fault, marker_in_the_way(result))
    elif _is_there(fault, result.error):
        handler.carry_out(fault, Wake())
    else:
        handler.slow.climb(fault, action, result.operation.dst, result.operation.src)


def _is_there(fault: Fault, error: int) -> bool:
    """Another thread's fault has brought the page: it is at its place, or gone from its source."""
    if error == errno.EEXIST:
        return True
    return error == errno.ENOENT and fault.page in fault.region.pages.present


def _is_marker(handler: Handler, fault: Fault) -> bool:
    """Whether there is no page at the destination, so that a thread woken would come back."""
    return handler.uffd.same_process and look(fault.address, PAGE_SIZE)[0].marker


def climbed(handler: Handler, fault: Fault, action: Move, moved: Moved) -> None:
    """Book what came of climbing for one fault."""
    region = fault.region
    run = moved.runs[0]
    if run.arrived:
        region.pages.present.add(fault.page)
        handler.counters.bytes_done[run.outcome] += run.length
        empty(handler, run.src, run.length)
        if action.verify:
            _prove_empty(handler, fault, run.src, run.length)
        handler.repeats.placed(fault)
        handler.resolve(fault, run.outcome, run.length)
    elif run.cause is Cause.CLIENT_GONE:
        handler.lose_client()
    elif run.cause is Cause.EVENT:
        handler.defer(fault, action, time.perf_counter_ns())
    elif _is_there(fault, run.error):
        handler.carry_out(fault, Wake())
    else:
        fail(handler, fault, refusal(moved, run))


def verify(handler: Handler, step: Step, result: Result) -> None:
    """Look whether a move has left nothing behind, if one of its policies wants that."""
    for fault, action in zip(step.faults, step.actions, strict=True):
        if isinstance(action, Move) and action.verify:
            _prove_empty(handler, fault, result.operation.src, result.done)
            return


def _prove_empty(handler: Handler, fault: Fault, src: int, length: int) -> None:
    error = _what_is_left(src, length)
    if error is not None:
        handler.counters.failures[type(error).__name__] += 1
        handler.hooks.failed(fault, error)
        handler.log.error("source not empty after a move", address=hex(src), error=str(error))


def _what_is_left(src: int, length: int) -> SourceNotEmpty | None:
    try:
        check_empty(src, length)
    except SourceNotEmpty as error:
        return error
    return None


def waits_for_copy(handler: Handler, fault: Fault) -> bool:
    """Whether a write has to wait because an exact copy of its page is under way, whose end lets
    it go; answering it earlier would lose it."""
    if fault.kind is not FaultKind.WP or not handler.uffd.copies.overlap(fault.address, 1):
        return False
    wait_for_copy(handler, fault)
    return True


def issue(handler: Handler, steps: list[Step]) -> tuple[list[Step], list[Result]]:
    """Carry the steps out, but for those that would lift the write-protection of an exact copy:
    their faults wait.  Returns what was carried out, with the results."""
    copies = handler.uffd.copies
    if not any(step.operation.code is Code.WRITEPROTECT for step in steps):
        return steps, handler.execute([step.operation for step in steps])
    late: list[Step] = []
    kept: list[Step] = []
    with copies.marking:  # none begins meanwhile
        for step in steps:
            _, start, length, *_ = operation = step.operation
            lifts = operation.code is Code.WRITEPROTECT and copies.overlap(start, length)
            (late if lifts else kept).append(step)
        results = handler.execute([step.operation for step in kept])
    for step in late:
        for fault in step.faults:
            wait_for_copy(handler, fault)
    return kept, results


def wait_for_copy(handler: Handler, fault: Fault) -> None:
    """Ask again what to do about the fault when its page is not being copied any more."""
    handler.counters.outcomes[fault.kind, Outcome.DEFERRED] += 1
    now = time.perf_counter_ns()
    handler.ledger.defer(fault, after_copy, now, "its page is being copied exactly")
    handler.wake()


def book_moves(handler: Handler, moved: Moved) -> None:
    """Note what a direct move has brought, and where it has left nothing."""
    for run in moved.runs:
        if run.arrived:
            handler.counters.bytes_done[run.outcome] += run.length
            for segment in handler.regions.clip(run.dst, run.dst + run.length):
                _arrived(handler, segment)
            empty(handler, run.src, run.length)
    if handler.holds:
        release_held(handler)


def _arrived(handler: Handler, segment: Segment) -> None:
    first, end = _pages(segment)
    present = segment.region.pages.present
    if not handler.uffd.same_process:
        present.add_range(first, end)
        return
    # Holes may have been left as they are: what is not there must not count as filled.
    size = segment.region.page_size // PAGE_SIZE
    there = [page.there for page in look(segment.start, segment.end - segment.start)]
    for number in range(first, end):
        if there[(number - first) * size]:
            present.add(number)


def empty(handler: Handler, src: int, length: int) -> None:
    """Note that a move has left nothing at its source, if that is served, too."""
    for each in handler.of_this_process():
        for segment in each.regions.clip(src, src + length):
            segment.region.pages.present.discard_range(*_pages(segment))


def _pages(segment: Segment) -> tuple[int, int]:
    """The first page of a segment in its region, and the one after its last."""
    region = segment.region
    first = (segment.start - region.start) // region.page_size
    return first, (segment.end - region.start) // region.page_size
