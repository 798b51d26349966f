"""From the result of an operation to what comes next for the faults that it was for."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.actions import Copy, Fill, Move, Wake, Zero
from uffdaemon.engine.failures import comes_back
from uffdaemon.engine.move_faults import refused
from uffdaemon.engine.next_step import ClientGone, Ended, Failed, Later
from uffdaemon.engine.shortages import is_shortage, no_huge_page, try_later
from uffdaemon.engine.step_plan import wake_operation
from uffdaemon.errors import error_of
from uffdaemon.model.refaults import MAX_CLAIMS, MAX_REPEATS
from uffdaemon.uapi.outcomes import OUTCOME_OF_CODE, Code, Outcome, Status

if TYPE_CHECKING:
    from uffdaemon.engine.next_step import Next
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.outcomes import Result


def reached(served: Served, fault: Fault, action: Fill | Wake, result: Result, done: int) -> Next:
    """What comes next for a fault whose page an operation has reached."""
    code = result.operation.code
    if result.present and not result.done:
        outcome = Outcome.ALREADY_PRESENT
    elif code is Code.COPY and isinstance(action, Zero):
        outcome = Outcome.ZEROED
    else:
        outcome = OUTCOME_OF_CODE[code]
    if outcome not in (Outcome.ALREADY_PRESENT, Outcome.WOKEN):
        served.refaults.placed(fault)
    elif failed := comes_back(served, fault, MAX_REPEATS):
        lacking = no_huge_page(served, fault, result)
        return failed if lacking is None else try_later(served, fault, action, lacking)
    return Ended(outcome, done)


def stopped(served: Served, fault: Fault, action: Fill | Wake, result: Result) -> Next:
    """What comes next for a fault whose own page, and nothing around it, an operation failed."""
    code = result.operation.code
    if isinstance(action, Move) and code is Code.MOVE:
        return refused(served, fault, action, result)
    error = error_of(result)
    if is_shortage(error):
        return try_later(served, fault, action, error)
    if code is Code.COPY and result.error == errno.EFAULT and isinstance(action, Copy):
        # The source is mapped but cannot be read: its file shrank, or its disk failed.
        return source_failed(served, fault, action, errors.SourceFailed(str(error)))
    pages = fault.region.pages
    if code is Code.CONTINUE and result.error == errno.EFAULT and fault.page in pages.removed:
        # Its owner removed it from the page cache: the thread has to look again.
        return Wake()
    return Failed(error)


def source_failed(served: Served, fault: Fault, action: Copy, error: errors.SourceError) -> Next:
    """A source in memory could not be read: try again as the region's `Retry` says, then fail."""
    retry = fault.region.retry
    failures = served.ledger.count_failure(fault)
    if failures >= retry.attempts:
        return Failed(error)
    due = time.perf_counter_ns() + int(retry.delay(failures) * 1e9)
    return Later(action, str(error), due)


def claimed(served: Served, fault: Fault, outcome: Outcome) -> Next:
    """The application's own work has resolved the fault: wake its thread."""
    if failed := comes_back(served, fault, MAX_CLAIMS):
        return failed
    [result] = served.execute([wake_operation(fault)])
    if result.status is Status.CLIENT_GONE:
        return ClientGone()
    return Failed(error_of(result)) if result.status is Status.FAILED else Ended(outcome)
