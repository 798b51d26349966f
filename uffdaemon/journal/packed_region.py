"""Regions as JSON, without their policies: for workers and for journals."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, NamedTuple

from uffdaemon.actions import Hold, Poison, Span
from uffdaemon.model.region import Region, Retry
from uffdaemon.model.region_table import RegionTable, Segment
from uffdaemon.names import name_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.actions import Extent
    from uffdaemon.journal.packet import Json, Packet
    from uffdaemon.model.page_map import PageMap
    from uffdaemon.model.region import FailureAction, Policy


def pack_region(region: Region) -> dict[str, Json]:
    """A region without its policy.  An `on_failure` that is a callable is packed as its name."""
    declared = region.on_failure
    if isinstance(declared, Hold):
        on_failure: list[Json] = ["hold", declared.reason]
    elif isinstance(declared, Poison):
        extent = declared.extent
        on_failure = ["poison", list(extent) if isinstance(extent, Span) else extent]
    else:
        on_failure = ["call", name_of(declared)]
    retry = region.retry
    return {
        "range": [region.start, region.length, region.page_size],
        "on_failure": on_failure,
        "retry": [retry.attempts, retry.timeout, retry.first_delay, retry.max_delay],
        "policy_timeout": region.policy_timeout,
        "after_remove": region.after_remove,
        "name": region.name,
    }


def unpack_region(
    packet: Packet, policy: Policy, on_failure: FailureAction | None = None
) -> Region:
    """The region of `pack_region`, with its policy.

    `on_failure` takes the place of what was packed.  Raises `LookupError` if that was a callable,
    and nothing takes its place.
    """
    start, length, page_size = packet.integers("range")
    attempts, *times = packet.reals("retry")
    return Region(
        start,
        length,
        policy,
        page_size,
        on_failure=_on_failure(packet) if on_failure is None else on_failure,
        retry=Retry(int(attempts), *times),
        policy_timeout=packet.real("policy_timeout"),
        after_remove="policy" if packet.text("after_remove") == "policy" else "zero",
        name=packet.text("name"),
    )


def _on_failure(packet: Packet) -> FailureAction:
    word, value = packet.items("on_failure")
    if word == "hold":
        return Hold(str(value))
    if word == "call":
        raise LookupError(
            f"region {packet.text('name')!r} called {value} when a fault failed: pass on_failure"
        )
    extent: Extent = value if isinstance(value, int) else 1
    if isinstance(value, list):
        extent = Span(*(number for number in value if isinstance(number, int)))
    return Poison(extent)


def pack_table(table: RegionTable) -> dict[str, Json]:
    """The regions of a userfaultfd, where their page books are in the file, and the segments."""
    numbers: dict[int, int] = {}
    regions: list[Json] = []
    segments: list[Json] = []
    for segment in table:
        pages = segment.region.pages
        number = numbers.setdefault(id(pages), len(regions))
        if number == len(regions):
            regions.append({**pack_region(segment.region), "book": pages.book.offset})
        segments.append([segment.start, segment.end, segment.region.start, number])
    return {"regions": regions, "segments": segments}


class Unpacked(NamedTuple):
    """How `unpack_table` gets what is not in the packet."""

    policy: Callable[[str], Policy]
    """The policy of a region, by the region's name."""
    on_failure: FailureAction | None
    pages: Callable[[int, int], PageMap]
    """The page map of so many pages at an offset of the file."""


def unpack_table(packet: Packet, given: Unpacked) -> RegionTable:
    """The table of `pack_table`."""
    regions: list[Region] = []
    for packed in packet.packets("regions"):
        region = unpack_region(packed, given.policy(packed.text("name")), given.on_failure)
        region.pages = given.pages(packed.integer("book"), region.pages.pages)
        regions.append(region)
    segments: list[Segment] = []
    for start, end, origin, number in _integer_lists(packet.items("segments")):
        region = copy(regions[number])
        region.start = origin
        segments.append(Segment(start, end, region))
    return RegionTable.of(segments)


def _integer_lists(items: list[Json]) -> list[list[int]]:
    return [
        [number for number in item if isinstance(number, int)]
        for item in items
        if isinstance(item, list)
    ]
