"""The calls that move pages: from any thread, from trio, many at once, and exact copies."""

from __future__ import annotations

from array import array
from operator import index
from typing import TYPE_CHECKING, cast

from uffdaemon import errors, native
from uffdaemon.actions import Fallback
from uffdaemon.kernel.own_memory import check_own, owned_around
from uffdaemon.moves.driver import EVERYWHERE, climb_blocking, climb_in_trio, finish
from uffdaemon.moves.ladder import LONGEST, Ladder
from uffdaemon.moves.options import DEFAULTS, Chosen
from uffdaemon.ranges import PAGE_SIZE, check_range
from uffdaemon.uapi.moved import AllMoved, Cause, Moved, Run, joined
from uffdaemon.uapi.outcomes import MOVE_ALLOW_SOURCE_HOLES, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Unpack

    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.moves.options import CopyOptions, MoveOptions


def move(
    uffd: Userfaultfd, dst: int, src: int, length: int, **options: Unpack[MoveOptions]
) -> Moved:
    """Move `length` bytes from address `src` of this process to `dst`, registered with `uffd`.

    The options are those of `MoveOptions`.  Without a ``fallback``, pages are moved, atomically for
    threads that write to them, or refused.  With one, more is tried: a shared page is unshared, a
    pinned one is waited for, and copied only with ``copy_pinned``.  Where MOVE is impossible, pages
    are copied exactly; both sides must then be registered MISSING and WP.  A page that is refused
    does not stop the others.

    It may block until a page is unpinned or an event has been read.  Do not call it in the thread
    that reads the userfaultfd: use `move_in_trio` or `Daemon.move` there.

    Raises the `MoveRefused` of the first page that did not arrive, with the result of all pages in
    ``moved``; `InvalidRange`, `ForeignMemory`, `SourceNotEmpty`, `MemoryRefused`, and TypeError for
    unknown options.  Source: ``mm/userfaultfd.c``, ioctl_userfaultfd(2).
    """
    chosen = Chosen(**options) if options else DEFAULTS
    _check(dst, src, length, chosen)
    done = 0
    if chosen.page_size == PAGE_SIZE:
        # The common case: MOVE does it all, and no ladder is needed.
        holes = chosen.allow_source_holes
        done = move_at_once(uffd, dst, src, length, allow_source_holes=holes)
    moved: Moved = AllMoved(array("Q", (dst, src, length)))
    if done != length:
        ladder = Ladder(dst, src, length, chosen.terms(uffd), done)
        moved = climb_blocking(uffd, chosen.source_uffd, ladder)
    return finish(moved, verify=chosen.verify)


async def move_in_trio(
    uffd: Userfaultfd, dst: int, src: int, length: int, **options: Unpack[MoveOptions]
) -> Moved:
    """`move` for the thread that runs trio; other tasks run meanwhile.

    Cancelled, it stops between two steps.  Each page is then at the source or at the destination.
    Raises what `move` raises.
    """
    chosen = Chosen(**options)
    ladder = ladder_for(uffd, dst, src, length, chosen)
    await climb_in_trio(uffd, chosen.source_uffd, ladder)
    return finish(ladder.moved, verify=chosen.verify)


def move_many(
    uffd: Userfaultfd,
    moves: Iterable[tuple[int, int, int]] | array[int],
    **options: Unpack[MoveOptions],
) -> Moved:
    """Move many (dst, src, length) triples, in their order, in one call without the GIL.

    A triple that continues the one before it shares its ioctl.  With a flat ``array('Q')`` of
    triples, Python does no work per move.  Options, errors, and what happens to refused pages are
    those of `move`.
    """
    flat = _flat(moves)
    if not flat:
        return Moved(())
    chosen = Chosen(**options) if options else DEFAULTS
    done: list[int] | None = []
    if uffd.same_process and chosen.page_size == PAGE_SIZE:
        done = _move_at_once(uffd, flat, chosen)
        if done is None:
            return finish(AllMoved(flat[:]), verify=chosen.verify)
    else:
        _check_triples(flat, chosen.page_size)
        if not chosen.foreign:
            _check_sources(flat)
    terms = chosen.terms(uffd)
    runs: list[Run] = []
    for at, moved in enumerate(done or [0] * (len(flat) // 3)):
        dst, src, length = flat[3 * at : 3 * at + 3]
        if moved:
            runs.append(Run(dst, src, moved, Outcome.MOVED))
        if length > moved:
            ladder = Ladder(dst + moved, src + moved, length - moved, terms)
            runs += climb_blocking(uffd, chosen.source_uffd, ladder).runs
    return finish(Moved(joined(runs)), verify=chosen.verify)


def _move_at_once(uffd: Userfaultfd, flat: array[int], chosen: Chosen) -> list[int] | None:
    """MOVE all triples in one call.  Returns how many bytes of each were moved; None: all."""
    mode = MOVE_ALLOW_SOURCE_HOLES if chosen.allow_source_holes else 0
    sources = EVERYWHERE if chosen.foreign else owned_around(flat[1])
    with uffd.in_use as fd:
        left, done = native.move_many(fd, flat, mode, sources)
    if left == native.OUTSIDE:
        # Several mappings, or memory that this library did not map.
        _check_sources(flat)
        with uffd.in_use as fd:
            left, done = native.move_many(fd, flat, mode, EVERYWHERE)
    if left == native.UNALIGNED:
        _check_triples(flat, PAGE_SIZE)
    return done if left else None


def copy_exactly(
    uffd: Userfaultfd, dst: int, src: int, length: int, **options: Unpack[CopyOptions]
) -> Moved:
    """Copy and release pages instead of moving them: no write is lost, no thread sees old contents.

    Both sides are write-protected while both exist, so both must be registered MISSING and WP.
    Pages that could be moved are copied, too.  It blocks and raises like `move`.
    """
    chosen = Chosen(**options, fallback=Fallback())
    _check(dst, src, length, chosen)
    terms = chosen.terms(uffd)._replace(impossible=Cause.ASKED_FOR)
    moved = climb_blocking(uffd, chosen.source_uffd, Ladder(dst, src, length, terms))
    return finish(moved, verify=chosen.verify)


def _check(dst: int, src: int, length: int, chosen: Chosen) -> None:
    check_move(dst, src, length, chosen.page_size)
    if not chosen.foreign:
        _check_source(src, length)


def _check_triples(flat: array[int], page_size: int) -> None:
    for at in range(0, len(flat), 3):
        check_move(flat[at], flat[at + 1], flat[at + 2], page_size)


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


def ladder_for(uffd: Userfaultfd, dst: int, src: int, length: int, chosen: Chosen) -> Ladder:
    """The ladder for a checked range.  Raises `InvalidRange`, `ForeignMemory`."""
    _check(dst, src, length, chosen)
    return Ladder(dst, src, length, chosen.terms(uffd))


def move_at_once(
    uffd: Userfaultfd, dst: int, src: int, length: int, *, allow_source_holes: bool = False
) -> int:
    """How many bytes of a checked range one MOVE moves."""
    if not uffd.same_process or length > LONGEST:
        return 0
    mode = MOVE_ALLOW_SOURCE_HOLES if allow_source_holes else 0
    with uffd.in_use as fd:
        return native.move(fd, dst, src, length, mode)


def check_move(dst: int, src: int, length: int, page_size: int) -> None:
    """Raises `InvalidRange` for a range that is unaligned, empty, or leaves the address space."""
    check_range(index(dst), index(length), page_size, "the destination of a move")
    check_range(index(src), length, page_size, "the source of a move")


def _check_source(src: int, length: int) -> None:
    if not check_own(src, length):
        raise errors.ForeignMemory(
            f"{length} bytes at {src:#x} are not in memory that uffdaemon has mapped: their owner "
            "would find zeros there.  Pass foreign=True to move them all the same"
        )
