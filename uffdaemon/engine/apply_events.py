"""Applies events: ranges that were discarded, unmapped or moved, and children that were forked.

The kernel keeps the thread that caused an event waiting until it is read, and refuses operations
with EAGAIN until that thread has run on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from uffdaemon.engine.next_step import Ended
from uffdaemon.engine.presence import mark_absent
from uffdaemon.engine.state import Forked
from uffdaemon.model.page_map import PageMap
from uffdaemon.uapi.events import (
    Change,
    FaultKind,
    ForkEvent,
    PageFault,
    RemapEvent,
    RemoveEvent,
    UnknownEvent,
    UnmapEvent,
    parse,
)
from uffdaemon.uapi.outcomes import Code, Operation, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.engine.next_step import Next
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Fault
    from uffdaemon.model.region_table import Segment
    from uffdaemon.native.page_book import Snapshot
    from uffdaemon.native.ports import Record
    from uffdaemon.uapi.events import Event

_NAMES: Final[dict[type, str]] = {
    ForkEvent: "fork",
    RemapEvent: "remap",
    RemoveEvent: "remove",
    UnmapEvent: "unmap",
    UnknownEvent: "unknown",
}
"""Their names in hooks and statistics."""


class Applied(NamedTuple):
    """An event that C has applied to the page books when it read it."""

    event: Change
    snapshot: Snapshot | None
    """Of a fork: the page books at that moment; None: C had none."""
    place: int = 0
    """In the journal."""


def apply_event(served: Served, event: Change | Applied) -> list[tuple[Fault, Next]]:
    """Apply an event to the regions and page books; returns what comes next for open faults."""
    snapshot, place = None, 0
    applied = isinstance(event, Applied)
    if isinstance(event, Applied):
        event, snapshot, place = event
    following: list[tuple[Fault, Next]] = []
    match event:
        case RemoveEvent(start, end):
            following = _removed(served, start, end, applied=applied)
        case UnmapEvent(start, end):
            _stale(served, served.regions.unmap(start, end))
            following = _gone(served, start, end)
        case RemapEvent(source, target, length):
            _stale(served, served.regions.remap(source, target, length))
            following = _gone(served, source, source + length)
        case ForkEvent():
            # Copied now, unless C did when it read the event: later changes are the parent's alone.
            regions = served.regions.fork(_copier(snapshot))
            served.forks.append(Forked(event, regions, place))
        case UnknownEvent(message):
            served.log.warning("unknown event", message=message.hex())
    return following


def tell_event(served: Served, event: Change | Applied) -> None:
    """Count an event that has been applied, and call the event hooks."""
    event = event.event if isinstance(event, Applied) else event
    name = _NAMES[type(event)]
    served.counters.events[name] += 1
    served.hooks.event(name, event)


def _stale(served: Served, segments: list[Segment]) -> None:
    """The rules of these segments no longer hold."""
    served.stale.update(id(segment.region.pages) for segment in segments)


def _copier(snapshot: Snapshot | None) -> Callable[[PageMap], PageMap]:
    def copy_of(pages: PageMap) -> PageMap:
        taken = None if snapshot is None else snapshot.take(pages.book)
        return pages.copy() if taken is None else PageMap(taken.pages, book=taken)

    return copy_of


def _removed(served: Served, start: int, end: int, *, applied: bool) -> list[tuple[Fault, Next]]:
    if served.uffd.copies.consume_release(start, end):
        # The contents are at the destination of the copy.
        mark_absent(served, start, end - start)
        return []
    for segment in served.regions.clip(start, end):
        region = segment.region
        first = (segment.start - region.start) // region.page_size
        last = (segment.end - region.start + region.page_size - 1) // region.page_size
        if applied:
            region.pages.book.make_void(first, last)  # where no rule covers them, C did not
        else:
            region.pages.remove(first, last)
    served.refaults.removed(start, end)
    # Whatever they were waiting for, those pages are zeros now.
    return [
        (fault, served.zeros_for(fault))
        for fault in served.ledger.inside(start, end)
        if fault.kind is FaultKind.MISSING and fault.region.after_remove == "zero"
    ]


def _gone(served: Served, start: int, end: int) -> list[tuple[Fault, Next]]:
    """The addresses are unmapped: wake the threads that wait there, which then get SIGSEGV."""
    if start < end:
        served.execute([Operation(Code.WAKE, start, end - start)])
    ended = Ended(Outcome.UNMAPPED)
    return [(fault, ended) for fault in served.ledger.inside(start, end)]


def events_of(records: list[Record]) -> list[Event | Applied]:
    """The events of records that C forwarded, in their order."""
    events: list[Event | Applied] = []
    for record, event in zip(records, parse(b"".join(r.message for r in records)), strict=True):
        snapshot = record.snapshot()
        if isinstance(event, ForkEvent) or (record.applied and not isinstance(event, PageFault)):
            events.append(Applied(event, snapshot, record.error))
        else:
            events.append(event)
    return events
