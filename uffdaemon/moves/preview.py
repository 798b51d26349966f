"""What a move would do to each page, as far as that can be determined without moving it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from uffdaemon.kernel.page_probe import divide, look, mappings, registered
from uffdaemon.moves.calls import check_move
from uffdaemon.moves.options import Chosen
from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE
from uffdaemon.uapi.moved import Cause, Run, joined
from uffdaemon.uapi.outcomes import Outcome
from uffdaemon.uapi.page_facts import PageFacts, why_busy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffdaemon.actions import Fallback
    from uffdaemon.kernel.userfaultfd import Userfaultfd
    from uffdaemon.moves.requests import Terms


def can_move(
    uffd: Userfaultfd,
    dst: int,
    src: int,
    length: int,
    *,
    fallback: Fallback | None = None,
    allow_source_holes: bool = False,
) -> list[Run]:
    """What `move` would do to each page, and why; changes nothing.

    It cannot see that a page is pinned, that it was shared with a child that has exited, or that
    it is shared while it is swapped out.  Nor does it see whether mappings differ in locking, and
    whether both sides are registered for write-protection, as an exact copy needs.  Without
    CAP_SYS_ADMIN a merged page counts as shared.  Raises `InvalidRange`.
    """
    check_move(dst, src, length, PAGE_SIZE)
    options = Chosen(fallback=fallback, allow_source_holes=allow_source_holes)
    terms = options.terms(uffd)
    return list(joined(_runs(uffd, dst, src, length, terms)))


def _runs(uffd: Userfaultfd, dst: int, src: int, length: int, terms: Terms) -> Iterator[Run]:
    at = 0
    for part in divide(dst, src, length) if uffd.same_process else [length]:
        cause = terms.impossible or _unfit(uffd, dst + at, src + at)
        for start in range(at, at + part, HUGE_PAGE_SIZE):
            size = min(HUGE_PAGE_SIZE, at + part - start)
            unseen = [_EMPTY] * (size // PAGE_SIZE)
            targets = look(dst + start, size) if uffd.same_process else unseen
            for number, (page, target) in enumerate(
                zip(look(src + start, size), targets, strict=True)
            ):
                offset = start + number * PAGE_SIZE
                outcome, why, error = _page(page, target, cause, terms)
                yield Run(dst + offset, src + offset, PAGE_SIZE, outcome, why, error)
        at += part


_EMPTY = PageFacts(there=False)


def _unfit(uffd: Userfaultfd, dst: int, src: int) -> Cause | None:
    """Why nothing can move between two mappings; None: pages can."""
    sides = [mapping for start in (dst, src) for mapping in mappings(start, PAGE_SIZE)]
    if not registered(uffd, dst):
        return Cause.NOT_REGISTERED
    if len(sides) < 2:  # noqa: PLR2004  # the source is not mapped
        return Cause.SOURCE_HOLE
    left, right = sides
    if left.movable and right.movable and left.access == right.access:
        return None
    return Cause.WRONG_MEMORY


def _page(
    page: PageFacts, target: PageFacts, unfit: Cause | None, terms: Terms
) -> tuple[Outcome, Cause | None, int]:
    """The outcome for one page, by the rules of ``mm/userfaultfd.c`` in the kernel's order."""
    if unfit is Cause.NOT_REGISTERED or (unfit is not None and terms.fallback is None):
        return Outcome.FAILED, unfit, errno.ENOTTY if unfit is Cause.NO_MOVE else errno.EINVAL
    # MOVE looks at the destination first; for a hole, no copy is started.
    if unfit is None and target.there:
        why = Cause.NOT_EMPTY if page.there else Cause.ALREADY_MOVED
        return Outcome.FAILED, why, errno.EEXIST
    if not page.there and not terms.allow_source_holes:
        return Outcome.FAILED, Cause.SOURCE_HOLE, errno.ENOENT
    if page.marker:
        return Outcome.FAILED, Cause.SOURCE_MARKER, errno.EFAULT
    if unfit is not None:
        if page.there and target.there:
            return Outcome.FAILED, Cause.NOT_EMPTY, errno.EEXIST
        return Outcome.EXACTLY_COPIED, unfit, 0
    cause = why_busy(page) if page.present else None
    if cause is None:
        return Outcome.MOVED, None, 0
    if terms.fallback is None:
        return Outcome.FAILED, cause, errno.EBUSY
    return Outcome.UNSHARED_AND_MOVED, cause, 0
