"""What to do when a page did not move.

Each rung is an outcome of its own, and none is climbed unless the action allows it: without a
`Fallback` the refusal stands as the kernel gave it.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final

from uffdaemon import native
from uffdaemon.actions import Wake
from uffdaemon.memory import Advice
from uffdaemon.outcomes import Code, Outcome, Status
from uffdaemon.plan import Step

if TYPE_CHECKING:
    from uffdaemon.actions import Move
    from uffdaemon.handlers import Handler
    from uffdaemon.outcomes import Result
    from uffdaemon.policy import Fault

_MOVE_IMPOSSIBLE: Final = (errno.EINVAL, errno.ENOTTY)


def climb(handler: Handler, fault: Fault, action: Move, result: Result) -> bool:
    """See to a fault whose page (one page, nothing around it) was refused.  False: it failed."""
    if _is_there(fault, result):
        handler.carry_out(fault, Wake())
        return True
    if action.fallback is None:
        return False
    if result.error == errno.EBUSY:
        return _not_exclusive(handler, fault, action, result)
    if result.error in _MOVE_IMPOSSIBLE:
        _copy(handler, fault, action, result)
        return True
    return False


def _is_there(fault: Fault, result: Result) -> bool:
    """Another thread's fault has brought the page: it is at its place, or gone from its source."""
    if result.error == errno.EEXIST:
        return True
    return result.error == errno.ENOENT and fault.page in fault.region.pages.present


def _not_exclusive(handler: Handler, fault: Fault, action: Move, result: Result) -> bool:
    """EBUSY: unshare and move again; what is busy still is pinned."""
    operation = result.operation
    native.advise(operation.src, operation.length, Advice.POPULATE_WRITE)
    [again] = handler.uffd.execute([operation])
    if again.complete:
        region = fault.region
        region.pages.present.add(fault.page)
        handler.counters.bytes_done[Outcome.UNSHARED_AND_MOVED] += again.done
        handler.resolve(fault, Outcome.UNSHARED_AND_MOVED, again.done)
        return True
    if again.status is Status.RETRY:
        handler.defer(fault, action)
        return True
    if again.error != errno.EBUSY or action.fallback is None:
        return False
    now = time.perf_counter_ns()
    if now - fault.read_at < action.fallback.patience * 1e9:
        handler.counters.outcomes[fault.kind, Outcome.DEFERRED] += 1
        handler.ledger.defer(fault, action, now, "the source page is pinned for I/O")
        handler.wake()
        return True
    if action.fallback.copy_pinned:
        _copy(handler, fault, action, result)
        return True
    return False


def _copy(handler: Handler, fault: Fault, action: Move, result: Result) -> None:
    """Copy what cannot be moved.  The source stays full."""
    copied = result.operation._replace(code=Code.COPY, page_size=fault.region.page_size)
    handler.add_step(Step(copied, fault.region, [fault], [action]))
