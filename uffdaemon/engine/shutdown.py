"""What a daemon that ends does about open faults, and about memory that is not complete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from uffdaemon.guard.guarded_region import GuardedRegion
from uffdaemon.guard.requirements import leave_behind
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.events import FaultKind
from uffdaemon.uapi.outcomes import Code, Operation, Outcome, Status

if TYPE_CHECKING:
    from uffdaemon.engine.state import Served
    from uffdaemon.model.region import Fault
    from uffdaemon.ports.endpoint import Post

_LOW_PAGE: Final = 0x10000  # the lowest that programs may map by default: vm.mmap_min_addr


def poison_open_faults(served: Served) -> list[tuple[Fault, Outcome]]:
    """Have the threads that wait get SIGBUS; returns the faults that have ended so."""
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
    """Whether the process still exists, as far as an operation that does nothing can tell."""
    if served.client_gone:
        return False
    page = next(
        page for page in range(_LOW_PAGE, 1 << 40, PAGE_SIZE) if served.regions.find(page) is None
    )
    # Nothing is watched there, so that a living process answers ENOENT.
    [result] = served.uffd.execute([Operation(Code.ZEROPAGE, page, PAGE_SIZE)])
    return result.status is not Status.CLIENT_GONE


def would_read_zeros(served: Served) -> bool:
    """Whether a process lives that would, if the descriptor were closed: its pages are not
    complete."""
    if served.uffd.closed or served.client_gone:
        return False
    maps = [segment.region.pages for segment in served.regions]
    return any(pages.filled() != pages.pages for pages in maps) and is_alive(served)


def abandon(served: Served, post: Post, *, poisoning: bool) -> None:
    """Memory of this process may be touched on, while nobody answers: see that nobody forks for
    ever, and leave the rest to the watchdog."""
    if served.uffd.same_process:
        for segment in served.regions:
            leave_behind(served.uffd, segment)
    regions = [segment.region for segment in served.regions]
    if regions:
        exported = any(isinstance(r, GuardedRegion) and r.memory.exported for r in regions)
        # A thread with a buffer may hold the GIL while it waits: then no successor can come.
        ranges = [(segment.start, segment.end) for segment in served.regions]
        post.abandon(ranges, "poison" if poisoning or exported else None)


def warn_of_closing(served: Served) -> None:
    """Somebody closes a descriptor under us, whose client may go on to fault."""
    maps = [segment.region.pages for segment in served.regions]
    missing = sum(pages.pages - pages.filled() for pages in maps)
    if missing:
        served.log.warning("userfaultfd closed while served", missing_pages=missing)
