"""The calls of a daemon that bring pages: fills and moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from uffdaemon.actions import Copy, Source
from uffdaemon.arguments import check_count
from uffdaemon.daemon.fill import Fill, copy_of, runs_of
from uffdaemon.daemon.inspection import Inspection
from uffdaemon.guard.kernel_view import forget_dropped
from uffdaemon.moves.calls import ladder_for
from uffdaemon.moves.driver import climb_in_trio, finish
from uffdaemon.moves.options import Chosen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Unpack

    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.model.region import Region
    from uffdaemon.moves.options import MoveOptions
    from uffdaemon.uapi.moved import Moved

_whole = trio.lowlevel.enable_ki_protection


class Contents(Inspection):
    """The part of a `Daemon` that brings pages without a fault."""

    @_whole
    async def fill(
        self,
        region: Region,
        *,
        source: Source | None = None,
        piece: int = 256 * 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Fill the missing pages of a region, `piece` bytes at a time; faults go first.

        `source` has the region's bytes from offset 0 on; by default it is that of the region's
        `CopyFrom`.  `progress` is called with (bytes done, bytes in total).  Returns the number of
        bytes that were filled.  Raises `SourceError`, `OperationError`, and `DaemonClosed` if the
        client exits; what was filled stays.
        """
        check_count("piece", piece, least=1)
        server = self._servers.of(region)
        forget_dropped(region, server.served.regions.segments(region))
        copy = copy_of(region.policy) if source is None else Copy(source)
        return await Fill(server, region, copy, piece, progress).run()

    @_whole
    async def prefetch(
        self,
        region: Region,
        pages: Iterable[int],
        *,
        source: Source | None = None,
        piece: int = 256 * 1024,
    ) -> int:
        """Fill those of `pages` that are missing, in this order; faults go first.

        `pages` are page numbers from the region's start, such as a working set: the ``fault.page``
        of an earlier run, which an ``after`` hook gets.  Pages that are present, and pages that
        their owner has discarded, are left alone.  `source` and `piece` are those of `fill`.
        Returns the number of bytes that were filled.  Raises what `fill` raises, and `InvalidRange`
        for a page outside the region, before any is filled.
        """
        check_count("piece", piece, least=1)
        server = self._servers.of(region)
        copy = copy_of(region.policy) if source is None else Copy(source)
        done = 0
        for run in runs_of(pages, region.pages.pages):
            done += await Fill(server, region, copy, piece, limits=run).run()
        return done

    @_whole
    async def move(
        self, uffd: Userfaultfd, dst: int, src: int, length: int, **options: Unpack[MoveOptions]
    ) -> Moved:
        """Move pages to a region that this daemon serves; see `uffdaemon.moves.move`.

        The daemon records which pages arrived.  Raises what `move` raises, and `NotServed`.
        """
        server = self._servers.serving(uffd)
        region = server.served.regions.find(dst)
        if region is not None:
            options.setdefault("page_size", region.page_size)
        chosen = Chosen(**options)
        ladder = ladder_for(uffd, dst, src, length, chosen)
        try:
            await climb_in_trio(uffd, chosen.source_uffd, ladder)
        finally:
            server.handler.record_moves(ladder.moved)
        return finish(ladder.moved, verify=chosen.verify)

    @_whole
    def book(self, uffd: Userfaultfd, moved: Moved) -> None:
        """Record pages that were moved without this daemon, for instance by `Staging.fill`.

        They are then known to be there, and faults that were held there end.  Raises `NotServed`.
        """
        server = self._servers.serving(uffd)
        server.handler.record_moves(moved)
