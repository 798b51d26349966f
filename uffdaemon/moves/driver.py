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
from uffdaemon.kernel.page_probe import Mapping, divide, look, mappings, registered, watches
from uffdaemon.kernel.page_scan import PageCategory, scan_pages
from uffdaemon.moves.ladder import EVENT_PATIENCE, Ladder
from uffdaemon.moves.refusals import refusal
from uffdaemon.moves.requests import Ask, CopyOver, Divide, Issue, Look, Unshare, Wait
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
    for ask in ladder.climb():
        if isinstance(ask, Wait):
            time.sleep(ask.seconds)
        else:
            _do(uffd, source_uffd, ask)
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
    for ask in ladder.climb():
        if isinstance(ask, Wait):
            if ask.reason:
                waiting(ask.reason)
            await trio.sleep(ask.seconds)
            continue
        # Before the request: between carrying it out and recording it there is no checkpoint.
        await trio.lowlevel.checkpoint()
        if stop():
            return False
        if isinstance(ask, (Unshare, CopyOver)):
            # May read from swap, or wait until an event is read: not in trio's thread.
            await trio.to_thread.run_sync(partial(_do, uffd, source_uffd, ask))
        else:
            _do(uffd, source_uffd, ask)
    return True


def _do(uffd: Userfaultfd, source_uffd: Userfaultfd | None, ask: Ask) -> None:
    if isinstance(ask, Issue):
        [ask.result] = uffd.execute([ask.operation])
    elif isinstance(ask, Look):
        ask.pages = look(ask.start, ask.length)
    elif isinstance(ask, Unshare):
        # Populating a hole would make a page of zeros out of it.
        if all(page.there for page in look(ask.start, ask.length)):
            native.advise(ask.start, ask.length, Advice.POPULATE_WRITE)
    elif isinstance(ask, Divide):
        ask.parts = divide(ask.dst, ask.src, ask.length)
        ask.registered = registered(uffd, ask.dst)
    elif isinstance(ask, CopyOver):
        _copy_over(uffd, source_uffd, ask)


def _copy_over(uffd: Userfaultfd, source_uffd: Userfaultfd | None, ask: CopyOver) -> None:
    if source_uffd is None:
        source_uffd = uffd
    sources = mappings(ask.src, ask.length)
    watched = _watches(source_uffd, sources, ask.src)
    if ask.exact and not watched:
        ask.done, ask.error, ask.stage = 0, errno.ENOENT, native.STAGE_PROTECT
        return
    flags = native.EXACT if ask.exact else 0
    if not uffd.same_process:
        flags |= native.OTHER_PROCESS
    elif any(mapping.shared for mapping in mappings(ask.dst, ask.length)):
        flags |= native.SHARED
    # Pages of shared memory belong to the file: only punching a hole empties the source.
    shared = any(mapping.shared for mapping in sources)
    advice = Advice.REMOVE if shared else Advice.DONTNEED
    # Another copy may be waiting until an event is read: do not wait for that as well.
    if not _one_copy_at_a_time.acquire(timeout=EVENT_PATIENCE):
        ask.done, ask.error, ask.stage = 0, errno.EAGAIN, native.STAGE_PROTECT
        return
    theirs = source_uffd.copies
    ask.done = ask.error = ask.stage = 0
    if watched and source_uffd.features & Features.EVENT_REMOVE:
        theirs.expect_release(ask.src, ask.length)
    if uffd.same_process and uffd.features & Features.EVENT_REMOVE:
        uffd.copies.expect_release(ask.dst, ask.length)  # in case the copy is undone
    try:
        with uffd.copies.copying(ask.dst, ask.length), theirs.copying(ask.src, ask.length):
            ask.done, ask.error, ask.stage = native.copy_and_release(
                (uffd.fileno(), source_uffd.fileno()),
                ask.dst,
                ask.src,
                ask.length,
                flags=flags,
                advice=int(advice),
            )
    finally:
        theirs.settle_release(ask.src, ask.length, ask.done)
        if ask.stage != native.STAGE_RELEASE:
            uffd.copies.settle_release(ask.dst, ask.length, 0)
        _one_copy_at_a_time.release()


def _watches(uffd: Userfaultfd, sources: list[Mapping], src: int) -> bool:
    """Whether the source is registered with `uffd`, as far as that can be determined."""
    # A userfaultfd of another process cannot protect this memory.  Through one that the source is
    # not registered with, the kernel would write-protect it, but not wake its waiting threads.
    return uffd.same_process and bool(sources) and watches(uffd, sources[0], src)
