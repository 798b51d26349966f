"""Fills the missing pages of a region in the background.

Demand faults go first: trio's other tasks run between any two pieces.  Pages that are present, and
pages that their owner has discarded, are left alone.
"""

from __future__ import annotations

import errno
from operator import index
from typing import TYPE_CHECKING

import trio

from uffdaemon import errors
from uffdaemon.actions import Copy
from uffdaemon.engine.fetches import FetchedSource, fetch_with_retry
from uffdaemon.errors import error_of
from uffdaemon.model.batch import operation
from uffdaemon.names import shown
from uffdaemon.policy import ByKind, CopyFrom, FaultAround
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import Code, Operation, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from uffdaemon.handlers import Handler
    from uffdaemon.loop import Server
    from uffdaemon.model.region import Policy, Region
    from uffdaemon.model.region_table import Segment

_MISSING = FaultKind.MISSING
_FIRST_DELAY = 0.0001
_MAX_DELAY = 0.02
_POISONED = 1 << 15
"""Pages that are poisoned at a time."""


def copy_of(policy: Policy) -> Copy:
    """The `Copy` from which a region with this policy can be filled.

    Raises `PlacementRefused` if the policy has no single source for the whole region.
    """
    while isinstance(policy, FaultAround | ByKind):
        inner = policy.policy if isinstance(policy, FaultAround) else policy.policies[_MISSING]
        if inner is None:
            break
        policy = inner
    if isinstance(policy, CopyFrom):
        return Copy(policy.source, policy.offset, write_protect=policy.write_protect)
    raise errors.PlacementRefused(
        f"{shown(policy)} has no source for the whole region: pass the source to fill"
    )


class Fill:
    """One background fill of a region."""

    def __init__(
        self,
        server: Server,
        region: Region,
        copy: Copy,
        piece: int,
        progress: Callable[[int, int], None] | None = None,
        *,
        limits: tuple[int, int] | None = None,
    ) -> None:
        """`limits` are the first page to fill, and the one after the last; None: all."""
        self._server = server
        self._region = region
        self._copy = copy
        self._pages = max(piece // region.page_size, 1)
        self._progress = progress
        self._limits = limits or (0, region.pages.pages)

    async def run(self) -> int:
        """Fill until no page is missing.  Returns the number of bytes that this fill has copied.

        Raises `SourceError` and `OperationError`, and `DaemonClosed` if the client is gone or the
        daemon ends.
        """
        done = 0
        at = self._limits[0]
        self._report()
        while (part := self._next(at)) is not None:
            at = part[0]
            done += await self._piece(*part)
            self._report()
            await trio.lowlevel.checkpoint()
        self._report()
        return done

    def _next(self, page: int) -> tuple[int, int] | None:
        """The next pages to fill, (first, end), at or after `page`.

        The segments are looked up each time, since the owner may move or unmap them meanwhile.
        """
        pages = self._region.pages
        parts = sorted(map(_pages_of, self._server.served.regions.segments(self._region)))
        for first, last in parts:
            end = min(last, self._limits[1])
            found = pages.next_fillable(max(first, page), end)
            if found is not None:
                return found, min(found + self._pages, end)
        return None

    def _report(self) -> None:
        if self._progress is not None:
            page_size = self._region.page_size
            self._progress(self._region.pages.filled() * page_size, self._region.length)

    async def _piece(self, page: int, limit: int) -> int:
        """Fill from `page` to the first page that is not missing; returns the bytes copied."""
        region, copy = self._region, self._copy
        _, end = region.pages.fillable(page, page, limit)
        offset, length = page * region.page_size, (end - page) * region.page_size
        if copy.source.address(copy.offset + offset, length) is None:
            data = await fetch_with_retry(copy, copy.offset + offset, length, region.retry)
            copy = Copy(
                FetchedSource(data, copy.offset + offset),
                copy.offset,
                write_protect=copy.write_protect,
            )
        delay = _FIRST_DELAY
        while True:
            # During the wait, pages may have been filled, discarded or moved.
            self._server.drain()
            part = self._next(page)
            if part is None or part[0] >= end:
                return 0
            start = part[0]
            _, stop = region.pages.fillable(start, start, min(part[1], end))
            result = self._issue(copy, start, stop)
            if result is not None:
                return result
            await trio.sleep(delay)
            delay = min(delay * 2, _MAX_DELAY)

    def _issue(self, copy: Copy, first: int, end: int) -> int | None:
        """Issue one operation; returns the bytes copied, or None if an event is pending."""
        handler, served = self._server.handler, self._server.served
        if self._server.ended.is_set() or served.client_gone:
            raise errors.DaemonClosed(f"{self._region.label} is no longer served")
        region = next(
            segment.region
            for segment in served.regions.segments(self._region)
            if _pages_of(segment)[0] <= first < _pages_of(segment)[1]
        )
        offset = first * region.page_size
        length = (end - first) * region.page_size
        address = copy.source.address(copy.offset + offset, length)
        if address is None:
            raise errors.SourceFailed(f"{shown(copy.source)} no longer has its bytes in memory")
        step = operation(copy, region, region.start + offset, length, address)
        [result] = served.execute([step])
        handler.record(region, result)
        if result.status is Status.CLIENT_GONE:
            handler.client_exited()
            raise errors.DaemonClosed(f"the process of {region.label} is gone")
        if result.progress or result.status is Status.DONE:
            return result.done
        if result.status is Status.RETRY:
            return None
        if result.error == errno.ENOENT and end - first > 1:
            # A mapping ends in the middle, such as one that mprotect(2) has cut.
            return self._issue(copy, first, (first + end) // 2)
        raise error_of(result)


def runs_of(pages: Iterable[int], count: int) -> list[tuple[int, int]]:
    """Page numbers as runs, (first, end), in their order.  Raises `InvalidRange` for one that is
    not below `count`, and TypeError for what is no number."""
    runs: list[tuple[int, int]] = []
    for page in map(index, pages):
        if not 0 <= page < count:
            raise errors.InvalidRange(f"page {page} of a region of {count} pages")
        if runs and runs[-1][1] == page:
            runs[-1] = runs[-1][0], page + 1
        else:
            runs.append((page, page + 1))
    return runs


def _pages_of(segment: Segment) -> tuple[int, int]:
    """The pages of its region that a segment has, (first, end)."""
    size = segment.region.page_size
    return segment.offset // size, (segment.end - segment.region.start) // size


def poison_absent(handler: Handler, region: Region, start: int, end: int) -> None:
    """Poison the missing pages between two addresses.  Raises `OperationError`."""
    served, size = handler.served, region.page_size
    at = (start - region.start) // size
    limit = (end - region.start) // size
    while (page := region.pages.next_fillable(at, limit)) is not None:
        _, stop = region.pages.fillable(page, page, min(limit, page + _POISONED))
        length = (stop - page) * size
        step = Operation(Code.POISON, region.start + page * size, length, 0, 0, size)
        [result] = served.execute([step])
        handler.record(region, result)
        while result.error == errno.ENOENT and not result.progress and step.length > size:
            # A mapping ends in the middle, such as one that mprotect(2) has cut.
            step = step._replace(length=step.length // size // 2 * size)
            [result] = served.execute([step])
            handler.record(region, result)
            stop = page + step.length // size
        if result.status is not Status.DONE:
            raise errors.OperationError(result.error or errno.EAGAIN, result)
        at = stop
