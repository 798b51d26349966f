"""Filling a region in the background, while demand faults go first.

Pages that are there, and pages that their owner discarded, are left alone.  Between any two pieces
the event loop has its turn.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from uffdaemon import errors
from uffdaemon.actions import Copy
from uffdaemon.outcomes import Code, Operation, Status, error_of
from uffdaemon.plan import operation
from uffdaemon.policy import CopyFrom, FaultAround
from uffdaemon.slow import FetchedSource, fetch_with_retry

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.handlers import Handler
    from uffdaemon.loop import Server
    from uffdaemon.policy import Policy
    from uffdaemon.region import Region
    from uffdaemon.regions import Segment

_FIRST_DELAY = 0.0001
_MAX_DELAY = 0.02


def copy_of(policy: Policy) -> Copy:
    """What a background fill copies for a region with this policy.  Raises `UsageError`."""
    while isinstance(policy, FaultAround):
        policy = policy.policy
    if isinstance(policy, CopyFrom):
        return Copy(policy.source, policy.offset, write_protect=policy.write_protect)
    raise errors.PlacementRefused(
        f"{policy!r} does not say where a whole region comes from: pass the source to fill"
    )


class Fill:
    """One background fill of a region."""

    def __init__(
        self,
        server: Server,
        region: Region,
        copy: Copy,
        piece: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._server = server
        self._region = region
        self._copy = copy
        self._pages = max(piece // region.page_size, 1)
        self._progress = progress

    async def run(self) -> int:
        """Fill until nothing is missing; returns the bytes that this fill brought.

        Raises `SourceError`, `OperationError`; `DaemonClosed` when the client is gone or the
        daemon ends.
        """
        done = 0
        pages = self._region.pages
        self._report()
        for segment in self._server.handler.regions.segments(self._region):
            region = segment.region
            at = segment.offset // region.page_size
            end = (segment.end - region.start) // region.page_size
            while (page := pages.next_fillable(at, end)) is not None:
                done += await self._piece(segment, page, min(page + self._pages, end))
                at = page
                self._report()
                await trio.lowlevel.checkpoint()
        self._report()
        return done

    def _report(self) -> None:
        if self._progress is not None:
            page_size = self._region.page_size
            self._progress(self._region.pages.filled() * page_size, self._region.length)

    async def _piece(self, segment: Segment, page: int, limit: int) -> int:
        """Fill from `page` to the first page that needs nothing; returns the bytes."""
        region, copy = segment.region, self._copy
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
            # Whatever was waited for: pages may have come or been discarded meanwhile.
            start = region.pages.next_fillable(page, end)
            if start is None:
                return 0
            _, stop = region.pages.fillable(start, start, end)
            result = self._issue(region, copy, start, stop)
            if result is not None:
                return result
            await trio.sleep(delay)
            delay = min(delay * 2, _MAX_DELAY)

    def _issue(self, region: Region, copy: Copy, first: int, end: int) -> int | None:
        """One operation; the bytes it brought, or None: an event is in flight."""
        handler = self._server.handler
        if self._server.ended.is_set() or handler.client_gone:
            raise errors.DaemonClosed(f"{region.label} is not served any more")
        offset = first * region.page_size
        length = (end - first) * region.page_size
        address = copy.source.address(copy.offset + offset, length)
        if address is None:
            raise errors.SourceFailed(f"{copy.source!r} moved its bytes out of memory")
        step = operation(copy, region, region.start + offset, length, address)
        [result] = handler.uffd.execute([step])
        handler.book(region, result)
        if result.status is Status.CLIENT_GONE:
            handler.lose_client()
            raise errors.DaemonClosed(f"the process of {region.label} is gone")
        if result.progress or result.status is Status.DONE:
            return result.done
        if result.status is Status.RETRY:
            return None
        if result.error == errno.ENOENT and handler.regions.find(region.start + offset) is None:
            return 0
        raise error_of(result)


def poison_absent(handler: Handler, region: Region, start: int, end: int) -> None:
    """Poison what was never filled between two addresses.  Raises `OperationError`."""
    size = region.page_size
    at = (start - region.start) // size
    limit = (end - region.start) // size
    while (page := region.pages.next_fillable(at, limit)) is not None:
        _, stop = region.pages.fillable(page, page, limit)
        length = (stop - page) * size
        step = Operation(Code.POISON, region.start + page * size, length, 0, 0, size)
        [result] = handler.uffd.execute([step])
        handler.book(region, result)
        if result.status is not Status.DONE:
            raise errors.OperationError(result.error or errno.EAGAIN, result)
        at = stop
