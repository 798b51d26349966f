"""The end of a daemon: what happens to open faults, and to memory that still has missing pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from uffdaemon.guard.guarded_region import GuardedRegion
from uffdaemon.guard.requirements import unblock_forks
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import Code, Operation, Outcome, Status

if TYPE_CHECKING:
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Fault
    from uffdaemon.ports.endpoint import Endpoint

_LOW_PAGE: Final = 0x10000  # the lowest that programs may map by default: vm.mmap_min_addr


def poison_open_faults(served: Served) -> list[tuple[Fault, Outcome]]:
    """Poison the pages of open faults: their threads get SIGBUS.  Returns the faults that ended."""
    ended: list[tuple[Fault, Outcome]] = []
    for fault in served.ledger:
        if fault.kind is FaultKind.WP:
            continue  # there is a page, and a page cannot be poisoned
        page_size = fault.region.page_size
        [result] = served.execute(
            [Operation(Code.POISON, fault.address, page_size, 0, 0, page_size)]
        )
        if result.complete:
            ended.append((fault, Outcome.POISONED if result.done else Outcome.ALREADY_PRESENT))
    return ended


def is_alive(served: Served) -> bool:
    """Whether the process still exists, by the errno of an operation that does nothing."""
    if served.client_gone:
        return False
    page = _LOW_PAGE
    for segment in served.regions:  # by address
        if page < segment.start:
            break
        page = segment.end
    # Nothing is registered there: ENOENT if the process lives, ESRCH if it is gone.
    [result] = served.uffd.execute([Operation(Code.ZEROPAGE, page, PAGE_SIZE)])
    return result.status is not Status.CLIENT_GONE


def would_read_zeros(served: Served) -> bool:
    """Whether closing the descriptor would show zeros: its process lives and lacks pages."""
    if served.uffd.closed or served.client_gone:
        return False
    maps = [segment.region.pages for segment in served.regions]
    return not all(pages.complete for pages in maps) and is_alive(served)


def abandon(served: Served, endpoint: Endpoint, *, poisoning: bool) -> None:
    """Threads of this process may touch the memory on, and nothing serves it: make sure that no
    fork waits for ever, and leave the rest to the watchdog."""
    if served.uffd.same_process:
        for segment in served.regions:
            unblock_forks(served.uffd, segment)
    regions = [segment.region for segment in served.regions]
    if regions:
        exported = any(isinstance(r, GuardedRegion) and r.memory.exported for r in regions)
        # A thread with a buffer may hold the GIL while it waits: then no successor can start.
        ranges = [(segment.start, segment.end) for segment in served.regions]
        endpoint.abandon(ranges, "poison" if poisoning or exported else None)


def warn_of_closing(served: Served) -> None:
    """Log that a descriptor was closed while it was served and its client lacks pages."""
    maps = [segment.region.pages for segment in served.regions]
    missing = sum(pages.pages - pages.filled() for pages in maps)
    if missing:
        served.log.warning("userfaultfd closed while served", missing_pages=missing)
