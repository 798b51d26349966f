"""Moving pages: from any thread, and from trio.

One ioctl moves what can be moved; for what is left, `uffdaemon.ladder` says what to do, and this
module does it.  Steps that may take their time, or wait for somebody who reads the userfaultfd,
run in worker threads when trio is to go on.
"""

from __future__ import annotations

import errno
import time
from array import array
from functools import partial
from operator import index
from threading import Lock
from typing import TYPE_CHECKING, cast

import trio

from uffdaemon import errors, native
from uffdaemon.actions import Fallback
from uffdaemon.causes import AllMoved, Cause, Moved, Run, joined, refusal
from uffdaemon.features import Features
from uffdaemon.ladder import EVENT_PATIENCE, LONGEST, Ladder, Terms
from uffdaemon.looking import Mapping, divide, look, mappings, registered, watches
from uffdaemon.memory import Advice, check_own, owned_around
from uffdaemon.outcomes import MOVE_ALLOW_SOURCE_HOLES, Outcome
from uffdaemon.pagemap import PageCategory, scan_pages
from uffdaemon.region import PAGE_SIZE, check_range
from uffdaemon.steps import Ask, CopyOver, Divide, Issue, Look, Unshare, Wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from uffdaemon.uffd import Userfaultfd

PIECE = 256 * 1024
"""Bytes that an exact copy takes in one go; writers of either side wait for so long."""

_EVERYWHERE = 0, (1 << 64) - 1

_one_copy_at_a_time = Lock()
"""Two exact copies of overlapping ranges would lift each other's write-protection."""


def move(
    uffd: Userfaultfd,
    dst: int,
    src: int,
    length: int,
    *,
    fallback: Fallback | None = None,
    allow_source_holes: bool = False,
    foreign: bool = False,
    source_uffd: Userfaultfd | None = None,
    verify: bool = False,
    page_size: int = PAGE_SIZE,
    piece: int = PIECE,
) -> Moved:
    """Move `length` bytes from address `src` of this process to `dst`, which `uffd` watches.

    Without a `fallback` pages are moved, atomically for whoever writes to them, or refused.  With
    one they climb: a page that is shared is unshared first; a pinned one is waited for, and copied
    only if ``copy_pinned``; where MOVE is impossible the copy is exact, which takes both sides
    registered MISSING and WP (the source with `source_uffd`, if that is another one).

    Everything that can arrive arrives.  The source must be memory that this library mapped, unless
    `foreign` says that nobody misses what is taken there.  With `verify`, PAGEMAP_SCAN proves that
    the source is empty afterwards.  `page_size` (bytes) is that of hugetlb pages, which are copied
    only; `piece` is how many bytes an exact copy takes in one go.

    It may wait: for a pin, or for an event to be read.  Do not call it in the thread that reads
    the userfaultfd; there is `move_in_trio`, and `Daemon.move`.

    Raises the `MoveRefused` of the first page that did not arrive, with all that did in ``moved``;
    `InvalidRange`, `ForeignMemory`, `SourceNotEmpty`, `MemoryRefused`.
    """
    _check(dst, src, length, page_size, foreign=foreign)
    done = 0
    if page_size == PAGE_SIZE:
        # Most of the time this is all: nothing else has to be set up for that.
        done = move_at_once(uffd, dst, src, length, allow_source_holes=allow_source_holes)
    moved: Moved = AllMoved(array("Q", (dst, src, length)))
    if done != length:
        terms = terms_of(
            uffd,
            fallback,
            allow_source_holes=allow_source_holes,
            page_size=page_size,
            piece=piece,
        )
        moved = _climb(uffd, source_uffd, Ladder(dst, src, length, terms, done))
    return finish(moved, verify=verify)


async def move_in_trio(
    uffd: Userfaultfd,
    dst: int,
    src: int,
    length: int,
    *,
    fallback: Fallback | None = None,
    allow_source_holes: bool = False,
    foreign: bool = False,
    source_uffd: Userfaultfd | None = None,
    verify: bool = False,
    page_size: int = PAGE_SIZE,
    piece: int = PIECE,
) -> Moved:
    """`move` for the thread that runs trio, which goes on meanwhile.

    Cancelled, it stops between two steps: each page is then at the source or at the destination,
    as it would be with nobody having asked for the rest.
    """
    ladder = ladder_for(
        uffd,
        dst,
        src,
        length,
        fallback=fallback,
        allow_source_holes=allow_source_holes,
        foreign=foreign,
        page_size=page_size,
        piece=piece,
    )
    await climb_in_trio(uffd, source_uffd, ladder)
    return finish(ladder.moved, verify=verify)


def move_many(
    uffd: Userfaultfd,
    moves: Iterable[tuple[int, int, int]] | array[int],
    *,
    fallback: Fallback | None = None,
    allow_source_holes: bool = False,
    foreign: bool = False,
    source_uffd: Userfaultfd | None = None,
    verify: bool = False,
) -> Moved:
    """Move many (dst, src, length) triples, in their order, in one call without the GIL.

    A triple that continues the one before it shares its ioctl.  An ``array('Q')`` of flat triples
    costs nothing per move in Python.  What is left over climbs as in `move`, which says the rest.
    """
    flat = _flat(moves)
    if not flat:
        return Moved(())
    done: list[int] = []
    if uffd.same_process:
        mode = MOVE_ALLOW_SOURCE_HOLES if allow_source_holes else 0
        sources = _EVERYWHERE if foreign else owned_around(flat[1])
        left, done = native.move_many(uffd.fileno(), flat, mode, sources)
        if left == native.OUTSIDE:
            # Of several memories, or of none that is ours.
            _check_sources(flat)
            left, done = native.move_many(uffd.fileno(), flat, mode, _EVERYWHERE)
        if left == native.UNFIT:
            _check_triples(flat)
        if not left:
            return finish(AllMoved(flat[:]), verify=verify)
    else:
        _check_triples(flat)
        if not foreign:
            _check_sources(flat)
    terms = terms_of(uffd, fallback, allow_source_holes=allow_source_holes)
    runs: list[Run] = []
    for at, moved in enumerate(done or [0] * (len(flat) // 3)):
        dst, src, length = flat[3 * at : 3 * at + 3]
        if moved:
            runs.append(Run(dst, src, moved, Outcome.MOVED))
        if length > moved:
            dst, src, length = dst + moved, src + moved, length - moved
            runs += _climb(uffd, source_uffd, Ladder(dst, src, length, terms)).runs
    return finish(Moved(joined(runs)), verify=verify)


def copy_exactly(
    uffd: Userfaultfd,
    dst: int,
    src: int,
    length: int,
    *,
    source_uffd: Userfaultfd | None = None,
    allow_source_holes: bool = False,
    foreign: bool = False,
    verify: bool = False,
    page_size: int = PAGE_SIZE,
    piece: int = PIECE,
) -> Moved:
    """Copy and release in the place of a move, losing no write and showing no stale read.

    Both sides are write-protected while both exist, so both must be registered MISSING and WP.
    For everything else see `move`; pages that could be moved are copied as well.
    """
    _check(dst, src, length, page_size, foreign=foreign)
    terms = Terms(Fallback(), allow_source_holes, Cause.ASKED_FOR, page_size, piece)
    return finish(_climb(uffd, source_uffd, Ladder(dst, src, length, terms)), verify=verify)


def ladder_for(
    uffd: Userfaultfd,
    dst: int,
    src: int,
    length: int,
    *,
    fallback: Fallback | None,
    allow_source_holes: bool,
    foreign: bool,
    page_size: int = PAGE_SIZE,
    piece: int = PIECE,
) -> Ladder:
    """The ladder for a checked range.  Raises `InvalidRange`, `ForeignMemory`."""
    _check(dst, src, length, page_size, foreign=foreign)
    terms = terms_of(
        uffd,
        fallback,
        allow_source_holes=allow_source_holes,
        page_size=page_size,
        piece=piece,
    )
    return Ladder(dst, src, length, terms)


def move_at_once(
    uffd: Userfaultfd, dst: int, src: int, length: int, *, allow_source_holes: bool = False
) -> int:
    """What of a checked range one MOVE brings, in bytes."""
    if not uffd.same_process or length > LONGEST:
        return 0
    mode = MOVE_ALLOW_SOURCE_HOLES if allow_source_holes else 0
    return native.move(uffd.fileno(), dst, src, length, mode)


# -- before and after --------------------------------------------------------------------------


def _check(dst: int, src: int, length: int, page_size: int, *, foreign: bool) -> None:
    check_move(dst, src, length, page_size)
    if not foreign:
        _check_source(src, length)


def check_move(dst: int, src: int, length: int, page_size: int) -> None:
    """Raises `InvalidRange` for a range that is unaligned, empty, or leaves the address space."""
    check_range(index(dst), index(length), page_size, "the destination of a move")
    check_range(index(src), length, page_size, "the source of a move")


def _check_source(src: int, length: int) -> None:
    if not check_own(src, length):
        raise errors.ForeignMemory(
            f"{length} bytes at {src:#x} are not in memory that uffdaemon has mapped: moving them "
            "away would leave zeros to whoever owns them.  foreign=True says that you know"
        )


def _check_triples(flat: array[int]) -> None:
    for at in range(0, len(flat), 3):
        check_move(flat[at], flat[at + 1], flat[at + 2], PAGE_SIZE)


def _check_sources(flat: array[int]) -> None:
    for at in range(0, len(flat), 3):
        _check_source(flat[at + 1], flat[at + 2])


def terms_of(
    uffd: Userfaultfd,
    fallback: Fallback | None,
    *,
    allow_source_holes: bool = False,
    page_size: int = PAGE_SIZE,
    piece: int = PIECE,
) -> Terms:
    """The terms of a move on `uffd`."""
    impossible = None
    if not uffd.same_process:
        impossible = Cause.OTHER_PROCESS
    elif page_size != PAGE_SIZE:
        impossible = Cause.WRONG_MEMORY
    return Terms(fallback, allow_source_holes, impossible, page_size, piece)


def finish(moved: Moved, *, verify: bool) -> Moved:
    """`moved`, if it is complete (and proved to be).  Raises `MoveRefused`, `SourceNotEmpty`."""
    refused = moved.refused
    if refused:
        raise refusal(moved, refused[0])
    if verify:
        for run in moved.runs:
            check_empty(run.src, run.length)
    return moved


def check_empty(src: int, length: int) -> None:
    """Prove that nothing is left at the source of a move.  Raises `SourceNotEmpty`."""
    left = scan_pages(src, length, any_of=PageCategory.PRESENT | PageCategory.SWAPPED)
    found = [(left[0].start, left[0].length)] if left else []
    if not left and any(mapping.shared for mapping in mappings(src, length)):
        # Pages of a file may be there without being mapped here.
        pages = enumerate(look(src, length))
        found = [(src + n * PAGE_SIZE, PAGE_SIZE) for n, page in pages if page.there]
    if found:
        raise errors.SourceNotEmpty(
            errno.EEXIST,
            "PAGEMAP_SCAN",
            address=found[0][0],
            length=found[0][1],
            reason="the source of a move holds pages: somebody touched it again",
        )


def _flat(moves: Iterable[tuple[int, int, int]] | array[int]) -> array[int]:
    if not isinstance(moves, array):
        try:
            return array("Q", [index(n) for dst, src, length in moves for n in (dst, src, length)])
        except (OverflowError, ValueError) as error:
            raise errors.InvalidRange(
                "moves are triples of (dst, src, length), none of them negative"
            ) from error
    flat = cast("array[int]", moves)
    if flat.typecode not in "QL" or flat.itemsize != 8 or len(flat) % 3:  # noqa: PLR2004  # 64 bits
        raise errors.InvalidRange("moves are triples of (dst, src, length) in an array of type 'Q'")
    return flat


# -- climbing ----------------------------------------------------------------------------------


def _climb(uffd: Userfaultfd, source_uffd: Userfaultfd | None, ladder: Ladder) -> Moved:
    """Climb in this thread."""
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
    """Climb without keeping trio.  `waiting` is told what for when it has to wait; `stop` is asked
    before each step.  Returns whether it came to the end."""
    for ask in ladder.climb():
        if isinstance(ask, Wait):
            if ask.reason:
                waiting(ask.reason)
            await trio.sleep(ask.seconds)
            continue
        # Before the step, not after it: nothing comes between what was done and its being booked.
        await trio.lowlevel.checkpoint()
        if stop():
            return False
        if isinstance(ask, (Unshare, CopyOver)):
            # Reads from swap, waits for readers of events: not in trio's thread.
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
    # The pages of shared memory are the file's: only a hole in it empties the source.
    shared = any(mapping.shared for mapping in sources)
    advice = Advice.REMOVE if shared else Advice.DONTNEED
    # Another one may wait for an event that nobody reads: that is not to be waited for, too.
    if not _one_copy_at_a_time.acquire(timeout=EVENT_PATIENCE):
        ask.done, ask.error, ask.stage = 0, errno.EAGAIN, native.STAGE_PROTECT
        return
    theirs = source_uffd.copies
    ask.done = ask.error = ask.stage = 0
    if watched and source_uffd.features & Features.EVENT_REMOVE:
        theirs.expect_release(ask.src, ask.length)
    if uffd.same_process and uffd.features & Features.EVENT_REMOVE:
        uffd.copies.expect_release(ask.dst, ask.length)  # if the copy is taken back
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
    """Whether it is `uffd` that watches the source, as far as that can be seen."""
    # One that watches addresses of another process is of no use for ours; with one that is not
    # the source's the kernel protects as well, but its waiters would hear of nothing.
    return uffd.same_process and bool(sources) and watches(uffd, sources[0], src)
