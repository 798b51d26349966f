"""Removes a region from its server, and deals with the pages that are missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from uffdaemon import errors
from uffdaemon.daemon.fill import poison_absent
from uffdaemon.guard.kernel_view import forget_dropped
from uffdaemon.guard.requirements import refuse_if_exported, unregistered

if TYPE_CHECKING:
    from uffdaemon.loop import Server
    from uffdaemon.model.region import Missing, Region

_COUNTED: Final = 1 << 18
"""Pages up to which those that are missing are counted for the message: 1 GiB."""


def complete(server: Server, region: Region) -> bool:
    """Whether no page is missing, as the kernel sees it."""
    if region.pages.complete:
        forget_dropped(region, server.served.regions.segments(region))
    return region.pages.complete


def remove(server: Server, region: Region, missing: Missing | None) -> None:
    """Stop serving the region: see `Daemon.remove_region`."""
    pages = region.pages
    if missing == "hold":
        refuse_if_exported(region)
    absent = not complete(server, region)
    if absent and missing is None:
        counted = pages.pages <= _COUNTED  # it takes time in proportion
        lacking = f"{pages.pages - pages.filled()} of {pages.pages}" if counted else "some"
        raise errors.RegionIncomplete(
            f"{region.label} lacks {lacking} pages: pass missing='hold', 'poison' or 'release'"
        )
    handler, served = server.handler, server.served
    segments = served.regions.segments(region)
    if absent and missing == "poison":
        for segment in segments:
            poison_absent(handler, segment.region, segment.start, segment.end)
    stays_registered = absent and missing == "hold"
    if not stays_registered:
        # Before the rules go: without them, a thread that faults with the GIL held would hang.
        for segment in segments:
            served.uffd.unregister(segment.start, segment.end - segment.start)
        unregistered(region, served.uffd)
    served.regions.remove(region)
    server.rules.remove()
    for segment in segments:
        if not stays_registered:
            server.woken(segment.start, segment.end)
        else:
            waiting = served.ledger.inside(segment.start, segment.end)
            handler.hold_all(waiting, f"region {region.label} was removed")
