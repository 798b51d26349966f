"""From actions to operations, without system calls.

A *step* is one operation and the faults that it resolves.  The steps of a batch are sorted by
address and neighbours are merged, so that a burst of faults costs few ioctls.
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, assert_never

from uffdaemon.actions import Continue, Copy, Fill, Move, Poison, Span, Unprotect, Wake, Zero
from uffdaemon.errors import InvalidRange
from uffdaemon.names import shown
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import CONTINUE_WRITE_PROTECT, COPY_WRITE_PROTECT, Code, Operation

if TYPE_CHECKING:
    from uffdaemon.model.region import Fault, Region

MAX_MERGED = 2 << 20
"""Bytes of a merged operation at most, so that none takes long."""

ADDRESSES = 1 << 64

Waiters: TypeAlias = "list[tuple[Fault, Fill | Wake]]"
"""Faults, each with the action that is to resolve it."""


class Step(NamedTuple):
    """An operation, the faults it resolves, and the action of each, for another attempt."""

    operation: Operation
    region: Region
    faults: list[Fault]
    actions: list[Fill | Wake]


def target(fault: Fault, action: Fill) -> tuple[int, int]:
    """The range that `action` fills for `fault`: (address, length) in bytes.

    The extent is cut to pages that can be filled: present and discarded pages are left alone,
    unless the page of the fault is one of those, and its contents are the policy's again.
    Raises `InvalidRange` for a span that is unaligned, leaves the region, or does not hold the
    fault, and for an extent that is not positive.
    """
    extent = action.extent
    region = fault.region
    page_size = region.page_size
    if extent == 1:
        return fault.address, page_size
    if isinstance(extent, Span):
        _check(extent, fault)
    elif _whole(extent) > 0:
        extent = window(fault, extent, 0, region.length)
    else:
        raise InvalidRange(f"extent of {extent} pages: at least 1 is needed")
    low, high = extent.offset // page_size, (extent.offset + extent.length) // page_size
    if isinstance(action, Copy):
        # Leave out pages that are not wholly in the source.  If the faulting page is one of them,
        # fill it alone, so that no other page fails with it.
        low = max(low, -(action.offset // page_size))
        high = min(high, (action.source.size - action.offset) // page_size)
        if not low <= fault.page < high:
            return fault.address, page_size
    if isinstance(action, Move) and action.length is not None:
        # Past the end of the source there is other memory.
        high = min(high, action.length // page_size)
        if fault.page >= high:
            return fault.address, page_size
    if isinstance(action, Move | Poison):
        low, high = region.pages.fillable(fault.page, low, high)
    elif not isinstance(action, Unprotect):
        # Without an event, the kernel may have dropped the window again.
        due = region.after_remove == "policy" and fault.kind is FaultKind.MISSING
        low, high = region.pages.refillable(fault.page, low, high, discarded=due)
    return region.start + low * page_size, (high - low) * page_size


def _check(span: Span, fault: Fault) -> None:
    region, (offset, length) = fault.region, span
    if _whole(offset) % region.page_size or _whole(length) % region.page_size or length <= 0:
        raise InvalidRange(
            f"span {offset:#x}, {length} bytes, is not made of pages of {region.page_size} bytes"
        )
    if offset < 0 or offset + length > region.length:
        raise InvalidRange(f"span {offset:#x}, {length} bytes, leaves {region.label}")
    if not offset <= fault.offset < offset + length:
        raise InvalidRange(
            f"span {offset:#x}, {length} bytes, does not hold the fault at {fault.offset:#x}"
        )


def _whole(number: int) -> int:
    """`number`, from a policy or a source, as an integer that can be packed for C."""
    try:
        return index(number)
    except TypeError:
        raise InvalidRange(f"{shown(number)} is not a number of bytes or pages") from None


def operation(action: Fill, region: Region, start: int, length: int, src: int = 0) -> Operation:
    """The operation that carries `action` out on the range; `src` is where a copy or a move of
    this very range begins.  Raises `InvalidRange` if that is not an address."""
    page_size = region.page_size
    if not 0 <= _whole(src) <= ADDRESSES - length:
        raise InvalidRange(
            f"{shown(action)} takes its bytes from {src:#x}, which is not an address"
        )
    match action:
        case Copy():
            mode = COPY_WRITE_PROTECT if action.write_protect else 0
            return Operation(Code.COPY, start, length, src, mode, page_size)
        case Zero():
            return Operation(Code.ZEROPAGE, start, length, 0, 0, page_size)
        case Continue():
            mode = CONTINUE_WRITE_PROTECT if action.write_protect else 0
            return Operation(Code.CONTINUE, start, length, 0, mode, page_size)
        case Poison():
            return Operation(Code.POISON, start, length, 0, 0, page_size)
        case Unprotect():
            return Operation(Code.WRITEPROTECT, start, length)
        case Move():
            # MOVE must stop at a present page: to skip it would leave its source page behind.
            return Operation(Code.MOVE, start, length, src)
        case _:
            assert_never(action)


def merge(steps: list[Step]) -> list[Step]:
    """Sort by address, and merge neighbours that one ioctl can resolve."""
    if not steps:
        return steps
    steps.sort(key=lambda step: step.operation.dst)
    merged = [steps[0]]
    for step in steps[1:]:
        last = merged[-1]
        joined = _join(last.operation, step.operation) if step.region is last.region else None
        if joined is None:
            merged.append(step)
        else:
            last.faults.extend(step.faults)
            last.actions.extend(step.actions)
            merged[-1] = last._replace(operation=joined)
    return merged


def _join(left: Operation, right: Operation) -> Operation | None:
    """One operation for both; None if they cannot be merged.  Operations that overlap, like the
    windows of neighbours, can, if their bytes come from the same place."""
    if left.code is not right.code or left.mode != right.mode:
        return None
    distance = right.dst - left.dst
    if distance > left.length:
        return None
    if left.src and left.src + distance != right.src:
        return None
    length = max(left.length, distance + right.length)
    if length > max(MAX_MERGED, left.length):
        return None
    return left._replace(length=length)


def narrow(step: Step, progress: int) -> tuple[Waiters, Waiters]:
    """Split a step's faults into those whose page lies in the first `progress` bytes, and the
    others."""
    reached = step.operation.dst + progress
    inside: Waiters = []
    beyond: Waiters = []
    for fault, action in zip(step.faults, step.actions, strict=True):
        (inside if fault.address < reached else beyond).append((fault, action))
    return inside, beyond


def window(fault: Fault, pages: int, low: int, high: int) -> Span:
    """The window of `pages` pages around `fault`, aligned from the region's start, cut to the
    pages of the region that begin from offset `low` up to `high` (bytes)."""
    size = pages * fault.region.page_size
    start = fault.offset - fault.offset % size
    return cut(fault, start, start + size, (low, high))


def cut(fault: Fault, start: int, end: int, limits: tuple[int, int]) -> Span:
    """The pages that begin from offset `start` up to `end` and within `limits` (bytes)."""
    page_size, length = fault.region.page_size, fault.region.length
    low, high = (limit + -limit % page_size for limit in limits)
    first = max(start, low)
    return Span(first, min(end, high, length) - first)
