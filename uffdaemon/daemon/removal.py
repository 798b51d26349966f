"""Serving a region no more: what becomes of the pages that it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uffdaemon import errors
from uffdaemon.daemon.fill import poison_absent
from uffdaemon.engine.failures import hold
from uffdaemon.guard.requirements import refuse_to_hold

if TYPE_CHECKING:
    from uffdaemon.loop import Server
    from uffdaemon.model.region import Missing, Region


def remove(server: Server, region: Region, missing: Missing | None) -> None:
    """Take the region from its server; `Daemon.remove_region` says what is raised."""
    pages = region.pages
    if missing == "hold":
        refuse_to_hold(region)
    absent = pages.pages - pages.filled()
    if absent and missing is None:
        raise errors.RegionIncomplete(
            f"{region.label} lacks {absent} of {pages.pages} pages: say missing='hold', "
            "'poison' or 'release'"
        )
    handler = server.handler
    segments = handler.regions.segments(region)
    if absent and missing == "poison":
        for segment in segments:
            poison_absent(handler, segment.region, segment.start, segment.end)
    watched = absent > 0 and missing == "hold"
    if not watched:
        # Before the rules go: a thread that holds the GIL may touch it at any time, and would wait.
        for segment in segments:
            handler.uffd.unregister(segment.start, segment.end - segment.start)
    handler.regions.remove(region)
    server.rules.forget(segments)
    server.rules.update()
    for segment in segments:
        if not watched:
            server.woken(segment.start, segment.end)
        else:
            for fault in handler.ledger.inside(segment.start, segment.end):
                hold(handler, fault, f"region {region.label} was removed")
