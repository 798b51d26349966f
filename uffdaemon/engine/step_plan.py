"""From an action to the operation that carries it out for one fault, or to the task it needs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.actions import Copy, Fill, Move, Poison, Wake, Zero
from uffdaemon.engine.next_step import Climb, Fetch
from uffdaemon.kernel.own_memory import check_own
from uffdaemon.model.batch import Step, operation, target
from uffdaemon.model.region import policy_name
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.sources import zeros
from uffdaemon.uapi.outcomes import Code, Operation

if TYPE_CHECKING:
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Fault


def plan_step(served: Served, fault: Fault, action: Fill) -> Step | Fetch | Climb:
    """The step for `action`, or what has to happen in a task first.

    Raises `UsageError`, `SourceError`, and whatever the ``address`` of a source raises.
    """
    region = fault.region
    if served.discarded(fault) and not isinstance(action, Poison | Zero):
        action = served.zeros_for(fault)
    filled: Fill = action
    if isinstance(action, Zero) and (region.page_size != PAGE_SIZE or action.write_protect):
        # Hugetlb has no zero page, and ZEROPAGE cannot protect; a copy of zeros is the same.
        protect = action.write_protect
        filled = Copy(zeros(region.page_size), -fault.offset, write_protect=protect)
    start, length = served.regions.around(fault.address, *target(fault, filled))
    src = 0
    if isinstance(filled, Copy):
        offset = filled.offset + start - region.start
        address = filled.source.address(offset, length)
        if address is None:
            return Fetch(filled, start, length)
        src = address
    elif isinstance(filled, Move):
        src = _move_source(served, fault, filled, start, length)
        if not served.uffd.same_process:
            return Climb(filled, fault.address, src + fault.address - start)
    return Step(operation(filled, region, start, length, src), region, [fault], [action])


def _move_source(served: Served, fault: Fault, action: Move, start: int, length: int) -> int:
    """The address to move from.  Raises `UsageError` or `SourceError` where it may not be used."""
    name = policy_name(fault.region.policy)
    if not served.uffd.same_process and action.fallback is None:
        raise errors.PlacementRefused(
            f"policy {name} moves pages of another process, which "
            "the kernel refuses; run it in that process, or copy"
        )
    offset = start - fault.region.start
    if action.length is not None and offset + length > action.length:
        raise errors.SourceTooShort(
            f"the memory to move from has {action.length} bytes; {length} at {offset:#x} "
            "were asked for"
        )
    src = action.source + offset
    if not action.foreign and not check_own(src, length):
        raise errors.ForeignMemory(
            f"policy {name} moves from {src:#x}, which is not in "
            "memory that uffdaemon has mapped; pass foreign=True if the application owns it"
        )
    return src


def wake_step(fault: Fault) -> Step:
    """Wake the threads that wait for the fault's page, so that they retry the access."""
    return Step(wake_operation(fault), fault.region, [fault], [Wake()])


def wake_operation(fault: Fault) -> Operation:
    """UFFDIO_WAKE for the page of a fault."""
    return Operation(Code.WAKE, fault.address, fault.region.page_size)


def narrowed(action: Fill | Wake) -> Fill | Wake:
    """The same action for the page of the fault only."""
    return action if isinstance(action, Wake) else replace(action, extent=1)
