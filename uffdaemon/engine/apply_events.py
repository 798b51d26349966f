"""What events change: ranges that were discarded, unmapped, moved; children that were born.

The kernel keeps the thread that caused an event waiting until it is read, and refuses operations
with EAGAIN until that thread has run on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from uffdaemon.actions import Zero
from uffdaemon.engine.move_faults import empty
from uffdaemon.uapi.events import (
    Change,
    FaultKind,
    ForkEvent,
    RemapEvent,
    RemoveEvent,
    UnknownEvent,
    UnmapEvent,
)
from uffdaemon.uapi.outcomes import Code, Operation, Outcome

if TYPE_CHECKING:
    from uffdaemon.handlers import Handler
    from uffdaemon.model.region_table import Segment

_NAMES: Final[dict[type, str]] = {
    ForkEvent: "fork",
    RemapEvent: "remap",
    RemoveEvent: "remove",
    UnmapEvent: "unmap",
    UnknownEvent: "unknown",
}
"""What hooks and statistics call them."""


def apply_event(handler: Handler, event: Change) -> None:
    """Bring the handler's picture of the memory up to date, and tell the hooks of the event."""
    name = _NAMES[type(event)]
    match event:
        case RemoveEvent(start, end):
            _removed(handler, start, end)
        case UnmapEvent(start, end):
            _stale(handler, handler.regions.unmap(start, end))
            _gone(handler, start, end)
        case RemapEvent(source, target, length):
            _stale(handler, handler.regions.remap(source, target, length))
            _gone(handler, source, source + length)
        case ForkEvent():
            # Copied now: what the parent does next is not the child's.
            handler.forks.append((event, handler.regions.fork(known=handler.carry_out_all is None)))
        case UnknownEvent(message):
            handler.log.warning("unknown event", message=message.hex())
    handler.counters.events[name] += 1
    handler.hooks.event(name, event)


def _stale(handler: Handler, segments: list[Segment]) -> None:
    """Rules that were made from these do not hold any more."""
    handler.stale.update(id(segment.region.pages) for segment in segments)


def _removed(handler: Handler, start: int, end: int) -> None:
    if handler.uffd.copies.take_release(start, end):
        empty(handler, start, end - start)  # its content lives on, where it was copied to
        return
    for segment in handler.regions.clip(start, end):
        region = segment.region
        first = (segment.start - region.start) // region.page_size
        last = (segment.end - region.start + region.page_size - 1) // region.page_size
        region.pages.remove(first, last)
    handler.repeats.removed(start, end)
    for fault in handler.ledger.inside(start, end):
        # Whatever it waits for, the data is void now.
        if fault.kind is FaultKind.MISSING and fault.region.after_remove == "zero":
            handler.carry_out(fault, Zero())


def _gone(handler: Handler, start: int, end: int) -> None:
    """There is no memory at these addresses any more; who waits there has to find that out."""
    if start < end:
        handler.execute([Operation(Code.WAKE, start, end - start)])
    for fault in handler.ledger.inside(start, end):
        handler.resolve(fault, Outcome.UNMAPPED)
