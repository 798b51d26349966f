"""The calls that move pages: from any thread, from trio, many at once, and exact copies."""

from __future__ import annotations

from array import array
from operator import index
from typing import TYPE_CHECKING, cast

from uffdaemon import errors, native
from uffdaemon.actions import Fallback
from uffdaemon.kernel.own_memory import check_own, owned_around
from uffdaemon.moves.driver import (
    EVERYWHERE,
    PIECE,
    climb_blocking,
    climb_in_trio,
    finish,
    terms_of,
)
from uffdaemon.moves.ladder import LONGEST, Ladder
from uffdaemon.moves.requests import Terms
from uffdaemon.ranges import PAGE_SIZE, check_range
from uffdaemon.uapi.moved import AllMoved, Cause, Moved, Run, joined
from uffdaemon.uapi.outcomes import MOVE_ALLOW_SOURCE_HOLES, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffdaemon.kernel.userfaultfd import Userfaultfd


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
    """Move `length` bytes from address `src` of this process to `dst`, registered with `uffd`.

    Without a `fallback`, pages are moved, atomically for threads that write to them, or refused.
    With one, a shared page is unshared first; a pinned page is waited for, and copied only with
    ``copy_pinned``; where MOVE is impossible, the page is copied exactly, for which both sides must
    be registered MISSING and WP (the source with `source_uffd`, if that is another userfaultfd).

    A refused page does not stop the others.  The source must be memory that this library mapped,
    unless `foreign` allows any memory.  With `verify`, PAGEMAP_SCAN proves that
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
        # Most of the time this is all, and nothing has to be set up for it.
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
        moved = climb_blocking(uffd, source_uffd, Ladder(dst, src, length, terms, done))
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
    """`move` for the thread that runs trio; other tasks run meanwhile.

    Cancellation takes effect between two steps: each page is then either at the source or at the
    destination.
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
    costs nothing per move in Python.  Refused pages are treated as by `move`, which has the rest.
    """
    flat = _flat(moves)
    if not flat:
        return Moved(())
    done: list[int] = []
    if uffd.same_process:
        mode = MOVE_ALLOW_SOURCE_HOLES if allow_source_holes else 0
        sources = EVERYWHERE if foreign else owned_around(flat[1])
        left, done = native.move_many(uffd.fileno(), flat, mode, sources)
        if left == native.OUTSIDE:
            # From several memories, or from memory that is not ours.
            _check_sources(flat)
            left, done = native.move_many(uffd.fileno(), flat, mode, EVERYWHERE)
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
            runs += climb_blocking(uffd, source_uffd, Ladder(dst, src, length, terms)).runs
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
    return finish(climb_blocking(uffd, source_uffd, Ladder(dst, src, length, terms)), verify=verify)


def _check(dst: int, src: int, length: int, page_size: int, *, foreign: bool) -> None:
    check_move(dst, src, length, page_size)
    if not foreign:
        _check_source(src, length)


def _check_triples(flat: array[int]) -> None:
    for at in range(0, len(flat), 3):
        check_move(flat[at], flat[at + 1], flat[at + 2], PAGE_SIZE)


def _check_sources(flat: array[int]) -> None:
    for at in range(0, len(flat), 3):
        _check_source(flat[at + 1], flat[at + 2])


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
    """How many bytes of a checked range one MOVE moves."""
    if not uffd.same_process or length > LONGEST:
        return 0
    mode = MOVE_ALLOW_SOURCE_HOLES if allow_source_holes else 0
    return native.move(uffd.fileno(), dst, src, length, mode)


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
