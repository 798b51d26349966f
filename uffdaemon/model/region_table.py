"""The regions of a userfaultfd by address, through mremap(2), munmap(2) and fork(2).

A region begins as one segment.  When a part of it is moved elsewhere, that part becomes a segment
of its own, whose region is the same one seen from another start: offsets, policy and page states
stay as they are.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from copy import copy
from typing import TYPE_CHECKING, NamedTuple

from uffdaemon.actions import Action, Wake
from uffdaemon.errors import InvalidRange
from uffdaemon.model.page_map import PageMap
from uffdaemon.model.region import Region
from uffdaemon.ranges import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from uffdaemon.model.region import Fault, Policy
    from uffdaemon.uapi.events import PageFault


class Segment(NamedTuple):
    """Addresses `start` to `end` (exclusive), which belong to `region`."""

    start: int
    end: int
    region: Region

    @property
    def offset(self) -> int:
        """Bytes from the region's start."""
        return self.start - self.region.start


class RegionTable:
    """The regions of one userfaultfd, by address."""

    __slots__ = ("_by_pages", "_segments", "_starts")

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._starts: list[int] = []
        self._by_pages: dict[int, list[Segment]] = {}
        """The segments that share a page map, by its id, in the order of addresses."""

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> RegionTable:
        """A table of segments, which must not overlap."""
        table = cls()
        table._set(list(segments))
        return table

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def __len__(self) -> int:
        return len(self._segments)

    def _set(self, segments: list[Segment]) -> None:
        self._segments = sorted((s for s in segments if s.start < s.end), key=lambda s: s.start)
        self._starts = [segment.start for segment in self._segments]
        self._by_pages = {}
        for segment in self._segments:
            self._by_pages.setdefault(id(segment.region.pages), []).append(segment)

    def _segment_of(self, address: int) -> Segment | None:
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        segment = self._segments[at]
        return segment if address < segment.end else None

    def find(self, address: int) -> Region | None:
        """The region that holds `address`."""
        segment = self._segment_of(address)
        return None if segment is None else segment.region

    def page_size_below(self, address: int) -> int:
        """The page size of the last segment below an address: that of memory which grew there."""
        at = bisect_right(self._starts, address) - 1
        return self._segments[max(at, 0)].region.page_size if self._segments else PAGE_SIZE

    def around(self, address: int, start: int, length: int) -> tuple[int, int]:
        """The part of a range (start, length in bytes) around `address` that belongs to the same
        segment: others may have been moved into the region's range."""
        segment = self._segment_of(address)
        if segment is None:
            return start, length
        low = max(start, segment.start)
        return low, min(start + length, segment.end) - low

    def add(self, region: Region) -> None:
        """Add a region.  Raises `InvalidRange`, naming both, if it overlaps another one."""
        at = bisect_right(self._starts, region.start)
        for segment in self._segments[max(at - 1, 0) : at + 1]:
            if segment.start < region.end and region.start < segment.end:
                raise InvalidRange(
                    f"region {region.label} ({region.start:#x}-{region.end:#x}) overlaps region "
                    f"{segment.region.label} ({segment.start:#x}-{segment.end:#x})"
                )
        added = Segment(region.start, region.end, region)
        self._segments.insert(at, added)
        self._starts.insert(at, region.start)
        insort(self._by_pages.setdefault(id(region.pages), []), added, key=lambda s: s.start)

    def remove(self, region: Region) -> list[Segment]:
        """Remove a region, wherever its segments are now; returns them."""
        gone = self.segments(region)
        for segment in gone:
            at = bisect_left(self._starts, segment.start)
            del self._segments[at], self._starts[at]
        self._by_pages.pop(id(region.pages), None)
        return gone

    def segments(self, region: Region) -> list[Segment]:
        """The segments of a region, which share its page map."""
        return list(self._by_pages.get(id(region.pages), ()))

    def clip(self, start: int, end: int) -> list[Segment]:
        """The segments inside a range, cut to it."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        return [
            Segment(max(s.start, start), min(s.end, end), s.region)
            for s in self._segments[first : bisect_left(self._starts, end)]
            if s.start < end and start < s.end
        ]

    def unmap(self, start: int, end: int) -> list[Segment]:
        """Remove a range that was unmapped; returns the segments that were in it."""
        gone = self.clip(start, end)
        if gone:
            kept: list[Segment] = []
            for segment in self._segments:
                kept.append(segment._replace(end=max(min(segment.end, start), segment.start)))
                kept.append(segment._replace(start=min(max(segment.start, end), segment.end)))
            # A segment that the range does not touch is added once whole and once empty.
            self._set(kept)
        return gone

    def remap(self, source: int, target: int, length: int) -> list[Segment]:
        """Move a range; returns the segments that were in it, at their new addresses."""
        gone = self.unmap(source, source + length)
        shift = target - source
        moved: list[Segment] = []
        for segment in gone:
            region = copy(segment.region)
            region.start += shift
            moved.append(Segment(segment.start + shift, segment.end + shift, region))
        # mremap(2) has unmapped what was at the target.
        self.unmap(target, target + length)
        self._set([*self._segments, *moved])
        return moved

    def fork(self, copy_of: Callable[[PageMap], PageMap] = PageMap.copy) -> RegionTable:
        """The table of a forked child, with page maps of its own.  `copy_of` returns the page map
        of the parent as it was at the fork."""
        known = {id(s.region.pages): s.region.pages for s in self._segments}
        maps = {key: copy_of(pages) for key, pages in known.items()}
        segments: list[Segment] = []
        for segment in self._segments:
            region = copy(segment.region)
            region.pages = maps[id(segment.region.pages)]
            segments.append(segment._replace(region=region))
        return RegionTable.of(segments)


def outside_every_region(fault: Fault) -> Action:
    """The policy for addresses outside every region.  If the range has just been unmapped, the
    woken thread gets SIGSEGV.  If not, it faults again, and in the end the fault is held."""
    del fault
    return Wake()


def nowhere(
    event: PageFault,
    policy: Policy = outside_every_region,
    of: str = "",
    page_size: int = PAGE_SIZE,
) -> Region:
    """A placeholder region for a fault outside every region `of` a userfaultfd: one page."""
    page = event.address - event.address % page_size
    name = f"outside of every region of {of}" if of else "outside of every region"
    return Region(page, page_size, policy, name=name)
