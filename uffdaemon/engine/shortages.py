"""Faults for which there is no memory, or no descriptor, just now: they are tried again.

A cgroup's limit is raised, huge pages come back, and files are closed: what lacked is there later.
So the fault is tried again after the pauses of its region's `Retry`, for as long as one attempt at
its source may take, and listed meanwhile.  Then it fails.  If its region declares `Hold()`, it has
failed as well, and is tried on: its thread waits anyway.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.actions import Hold
from uffdaemon.engine.failures import fail
from uffdaemon.engine.next_step import Failed, Later
from uffdaemon.kernel.page_probe import look
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import Code

if TYPE_CHECKING:
    from uffdaemon.actions import Action
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.outcomes import Result

_SCARCE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error means that memory or descriptors are used up."""
    return isinstance(error, OSError) and error.errno in _SCARCE


def try_later(
    served: Served, fault: Fault, action: Action | None, error: Exception
) -> Later | Failed:
    """What comes next after a shortage; `action` is tried again, or with None the policy asked."""
    now = time.perf_counter_ns()
    region, record = fault.region, served.ledger.find(fault)
    times, since = served.ledger.count_shortage(fault, now)
    if now - since >= region.retry.timeout * 1e9:
        if not isinstance(region.on_failure, Hold):
            return Failed(error)
        if record is not None and not record.failed:
            fail(served, fault, error)  # told once
    if fault.kind is not FaultKind.WP:
        region.pages.present.discard_range(fault.page, fault.page + 1)
    return Later(action, str(error), now + int(region.retry.delay(times) * 1e9))


def no_huge_page(served: Served, fault: Fault, result: Result) -> errors.OperationError | None:
    """The error, if what the kernel says to be present is not: COPY returns EEXIST as well if it
    has no huge page to fill, and a page table is there.

    Source: ``hugetlb_mfill_atomic_pte`` in ``mm/hugetlb.c``.
    """
    if result.operation.code is not Code.COPY or fault.region.page_size == PAGE_SIZE:
        return None
    if served.uffd.same_process and look(fault.address, PAGE_SIZE)[0].there:
        return None
    reason = "the kernel has no huge page to fill, or the cgroup's limit is reached"
    return errors.OperationError(errno.ENOMEM, result._replace(present=0), reason=reason)
