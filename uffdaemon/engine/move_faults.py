"""Moves for a fault: what comes after a refusal or a climb, and the check that nothing is left.

A refused move leaves the batch: `uffdaemon.engine.tasks` climbs the ladder for it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from uffdaemon.actions import Move, Wake
from uffdaemon.engine.next_step import EVENT_IN_FLIGHT, ClientGone, Climb, Ended, Failed, Later
from uffdaemon.engine.presence import mark_absent
from uffdaemon.engine.shortages import is_shortage, try_later
from uffdaemon.errors import SourceNotEmpty
from uffdaemon.kernel.page_probe import look
from uffdaemon.moves.driver import check_empty
from uffdaemon.moves.refusals import marker_in_the_way, refusal
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.moved import Cause, Moved

if TYPE_CHECKING:
    from uffdaemon.engine.next_step import Next
    from uffdaemon.engine.state import Served
    from uffdaemon.model.batch import Step
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.outcomes import Result


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
    """Record the outcome of the ladder for one fault; returns what comes next for it."""
    region = fault.region
    run = moved.runs[0]
    if run.arrived:
        region.pages.present.add(fault.page)
        served.counters.bytes_done[run.outcome] += run.length
        mark_absent(served, run.src, run.length)
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
    error = refusal(moved, run)
    return try_later(served, fault, action, error) if is_shortage(error) else Failed(error)


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
