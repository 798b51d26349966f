"""Write-protect faults while pages are copied exactly: writes wait for the end of the copy.

An exact copy (`uffdaemon.kernel.exact_copies`) protects its pages from writes.  Lifting that
protection before the copy has ended would lose the write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from uffdaemon.engine.next_step import Later
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import Code

if TYPE_CHECKING:
    from uffdaemon.engine.state import Served
    from uffdaemon.model.batch import Step
    from uffdaemon.model.region import Fault
    from uffdaemon.uapi.outcomes import Result

AFTER_COPY: Final = Later(None, "its page is being copied exactly")
"""Ask the policy when the exact copy that is under way has ended."""


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
