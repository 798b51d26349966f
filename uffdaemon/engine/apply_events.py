"""What events change: ranges that were discarded, unmapped, moved; children that were born.

The kernel keeps the thread that caused an event waiting until it is read, and refuses operations
with EAGAIN until that thread has run on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from uffdaemon.actions import Zero
from uffdaemon.engine.move_faults import empty
from uffdaemon.model.page_map import PageMap
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
    from collections.abc import Callable

    from uffdaemon.handlers import Handler
    from uffdaemon.model.region_table import Segment
    from uffdaemon.native.page_book import Snapshot

_NAMES: Final[dict[type, str]] = {
    ForkEvent: "fork",
    RemapEvent: "remap",
    RemoveEvent: "remove",
    UnmapEvent: "unmap",
    UnknownEvent: "unknown",
}
"""What hooks and statistics call them."""


class Applied(NamedTuple):
    """An event that C has applied to the page books when it read it."""

    event: Change
    snapshot: Snapshot | None
    """Of a fork: the page books at that moment."""


def apply_event(handler: Handler, event: Change | Applied) -> None:
    """Bring the handler's picture of the memory up to date, and tell the hooks of the event."""
    snapshot = None
    applied = isinstance(event, Applied)
    if isinstance(event, Applied):
        event, snapshot = event
    name = _NAMES[type(event)]
    match event:
        case RemoveEvent(start, end):
            _removed(handler, start, end, applied=applied)
        case UnmapEvent(start, end):
            _stale(handler, handler.regions.unmap(start, end))
            _gone(handler, start, end)
        case RemapEvent(source, target, length):
            _stale(handler, handler.regions.remap(source, target, length))
            _gone(handler, source, source + length)
        case ForkEvent():
            # Copied now, if not before: what the parent does next is not the child's.
            handler.forks.append((event, handler.regions.fork(_copier(snapshot))))
        case UnknownEvent(message):
            handler.log.warning("unknown event", message=message.hex())
    handler.counters.events[name] += 1
    handler.hooks.event(name, event)


def _stale(handler: Handler, segments: list[Segment]) -> None:
    """Rules that were made from these do not hold any more."""
    handler.stale.update(id(segment.region.pages) for segment in segments)


def _copier(snapshot: Snapshot | None) -> Callable[[PageMap], PageMap]:
    def copy_of(pages: PageMap) -> PageMap:
        taken = None if snapshot is None else snapshot.take(pages.book)
        return pages.copy() if taken is None else PageMap(taken.pages, book=taken)

    return copy_of


def _removed(handler: Handler, start: int, end: int, *, applied: bool) -> None:
    if handler.uffd.copies.take_release(start, end):
        empty(handler, start, end - start)  # its content lives on, where it was copied to
        return
    for segment in handler.regions.clip(start, end):
        region = segment.region
        first = (segment.start - region.start) // region.page_size
        last = (segment.end - region.start + region.page_size - 1) // region.page_size
        if applied:
            region.pages.book.make_void(first, last)  # where no rule has said whose pages they are
        else:
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
