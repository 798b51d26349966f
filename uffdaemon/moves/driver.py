"""Drives a ladder: carries out its requests, in the calling thread or from trio.

From trio, requests that may block (reading from swap, or waiting until an event is read) run in
worker threads.
"""

from __future__ import annotations

import errno
import time
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

import trio

from uffdaemon import errors, native
from uffdaemon.kernel.memory import Advice
from uffdaemon.kernel.page_probe import Mapping, divide, is_registered, look, mappings, registered
from uffdaemon.kernel.page_scan import PageCategory, scan_pages
from uffdaemon.moves.ladder import EVENT_PATIENCE, Ladder
from uffdaemon.moves.refusals import refusal
from uffdaemon.moves.requests import CopyOver, Divide, Issue, Look, Request, Unshare, Wait
from uffdaemon.ranges import PAGE_SIZE
from uffdaemon.uapi.features import Features

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.uapi.moved import Moved

EVERYWHERE = 0, (1 << 64) - 1

_one_copy_at_a_time = Lock()
"""Two overlapping exact copies would lift each other's write-protection."""


# -- before and after --------------------------------------------------------------------------


def finish(moved: Moved, *, verify: bool) -> Moved:
    """Return `moved` if it is complete.  Raises `MoveRefused`; with `verify`, `SourceNotEmpty`."""
    refused = moved.refused
    if refused:
        raise refusal(moved, refused[0])
    if verify:
        for run in moved.runs:
            check_empty(run.src, run.length)
    return moved


def check_empty(src: int, length: int) -> None:
    """Check by PAGEMAP_SCAN that the source of a move is empty.  Raises `SourceNotEmpty`."""
    left = scan_pages(src, length, any_of=PageCategory.PRESENT | PageCategory.SWAPPED)
    found = [(left[0].start, left[0].length)] if left else []
    if not left and any(mapping.shared for mapping in mappings(src, length)):
        # Pages of a file may be in the page cache without being mapped here.
        pages = enumerate(look(src, length))
        found = [(src + n * PAGE_SIZE, PAGE_SIZE) for n, page in pages if page.there]
    if found:
        raise errors.SourceNotEmpty(
            errno.EEXIST,
            "PAGEMAP_SCAN",
            address=found[0][0],
            length=found[0][1],
            reason="the source of a move holds pages: a thread has touched it since",
        )


# -- climbing ----------------------------------------------------------------------------------


def climb_blocking(uffd: Userfaultfd, source_uffd: Userfaultfd | None, ladder: Ladder) -> Moved:
    """Climb in this thread, which may block."""
    for request in ladder.climb():
        if isinstance(request, Wait):
            time.sleep(request.seconds)
        else:
            _do(uffd, source_uffd, request)
    return ladder.moved


async def climb_in_trio(
    uffd: Userfaultfd,
    source_uffd: Userfaultfd | None,
    ladder: Ladder,
    *,
    waiting: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Climb without blocking trio.  `waiting` is called with the reason before each wait, `stop`
    before each request: true ends the climb.  Returns whether the ladder came to its end."""
    for request in ladder.climb():
        if isinstance(request, Wait):
            if request.reason:
                waiting(request.reason)
            await trio.sleep(request.seconds)
            continue
        # Before the request: between carrying it out and recording it there is no checkpoint.
        await trio.lowlevel.checkpoint()
        if stop():
            return False
        if isinstance(request, (Unshare, CopyOver)):
            # May read from swap, or wait until an event is read: not in trio's thread.
            await trio.to_thread.run_sync(partial(_do, uffd, source_uffd, request))
        else:
            _do(uffd, source_uffd, request)
    return True


def _do(uffd: Userfaultfd, source_uffd: Userfaultfd | None, request: Request) -> None:
    if isinstance(request, Issue):
        [request.result] = uffd.execute([request.operation])
    elif isinstance(request, Look):
        request.pages = look(request.start, request.length)
    elif isinstance(request, Unshare):
        # Populating a hole would make a page of zeros out of it.
        if all(page.there for page in look(request.start, request.length)):
            native.advise(request.start, request.length, Advice.POPULATE_WRITE)
    elif isinstance(request, Divide):
        request.parts = divide(request.dst, request.src, request.length)
        request.registered = registered(uffd, request.dst)
    elif isinstance(request, CopyOver):
        _copy_over(uffd, source_uffd, request)


def _copy_over(uffd: Userfaultfd, source_uffd: Userfaultfd | None, copy: CopyOver) -> None:
    if source_uffd is None:
        source_uffd = uffd
    sources = mappings(copy.src, copy.length)
    protectable = _is_registered(source_uffd, sources, copy.src)
    if copy.exact and not protectable:
        copy.done, copy.error, copy.stage = 0, errno.ENOENT, native.STAGE_PROTECT
        return
    flags = native.EXACT if copy.exact else 0
    if not uffd.same_process:
        flags |= native.OTHER_PROCESS
    elif any(mapping.shared for mapping in mappings(copy.dst, copy.length)):
        flags |= native.SHARED
    # Pages of shared memory belong to the file: only punching a hole empties the source.
    shared = any(mapping.shared for mapping in sources)
    advice = Advice.REMOVE if shared else Advice.DONTNEED
    # Another copy may be waiting until an event is read: do not wait for that as well.
    if not _one_copy_at_a_time.acquire(timeout=EVENT_PATIENCE):
        copy.done, copy.error, copy.stage = 0, errno.EAGAIN, native.STAGE_PROTECT
        return
    theirs = source_uffd.copies
    copy.done = copy.error = copy.stage = 0
    if protectable and source_uffd.features & Features.EVENT_REMOVE:
        theirs.expect_release(copy.src, copy.length)
    if uffd.same_process and uffd.features & Features.EVENT_REMOVE:
        uffd.copies.expect_release(copy.dst, copy.length)  # in case the copy is undone
    try:
        with uffd.copies.copying(copy.dst, copy.length), theirs.copying(copy.src, copy.length):
            copy.done, copy.error, copy.stage = native.copy_and_release(
                (uffd.fileno(), source_uffd.fileno()),
                copy.dst,
                copy.src,
                copy.length,
                flags=flags,
                advice=int(advice),
            )
    finally:
        theirs.settle_release(copy.src, copy.length, copy.done)
        undone = copy.length if copy.stage == native.STAGE_RELEASE else 0
        uffd.copies.settle_release(copy.dst, copy.length, undone)
        _one_copy_at_a_time.release()


def _is_registered(uffd: Userfaultfd, sources: list[Mapping], src: int) -> bool:
    """Whether the source is registered with `uffd`, as far as that can be determined."""
    # A userfaultfd of another process cannot protect this memory.  Through one that the source is
    # not registered with, the kernel would write-protect it, but not wake its waiting threads.
    return uffd.same_process and bool(sources) and is_registered(uffd, sources[0], src)
