"""Applies the events of a journal to the regions that were saved before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from uffdaemon.uapi.events import ForkEvent, RemapEvent, RemoveEvent, UnmapEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from uffdaemon.model.page_map import PageMap
    from uffdaemon.model.region_table import RegionTable
    from uffdaemon.uapi.events import Event


class Child(NamedTuple):
    """A child that was forked, as far as the journal knows."""

    place: int
    """Of the FORK event in the journal of its parent."""
    regions: RegionTable


def replay(
    table: RegionTable,
    events: Iterable[tuple[int, Event]],
    copy_at: Callable[[int], Callable[[PageMap], PageMap]],
) -> list[Child]:
    """Apply events, each with its place in the journal, in their order; returns the children.

    `copy_at` says how a page map is copied for the child of the FORK event at a place: as it was
    then, since the page books have later discards already.

    An event that has been applied already, as those of page books may have been, changes nothing:
    page states only ever gain discards.
    """
    children: list[Child] = []
    for place, event in events:
        match event:
            case RemoveEvent(start, end):
                _removed(table, start, end)
            case UnmapEvent(start, end):
                table.unmap(start, end)
            case RemapEvent(source, target, length):
                table.remap(source, target, length)
            case ForkEvent():
                children.append(Child(place, table.fork(copy_at(place))))
            case _:
                pass  # a fault: its thread is woken, and faults again
    return children


def _removed(table: RegionTable, start: int, end: int) -> None:
    for segment in table.clip(start, end):
        region = segment.region
        first = (segment.start - region.start) // region.page_size
        last = (segment.end - region.start + region.page_size - 1) // region.page_size
        region.pages.remove(first, last)
