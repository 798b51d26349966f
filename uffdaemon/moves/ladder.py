"""The ladder from a strict move to an exact copy: what to try next.  Makes no system calls.

`Ladder.climb` yields requests (`moves.requests`).  The driver (`moves.driver`) carries each one
out, in a thread or in trio, and stores the result in it.  Each page ends on one rung:

    MOVE
    after EBUSY: MADV_POPULATE_WRITE, which unshares the page, and MOVE again
    still EBUSY: the page is pinned for I/O; wait and retry, as long as the fallback's patience
    MOVE impossible (other memory, another process, an older kernel): an exact copy

Without a fallback nothing is copied: only a page that no other process maps any more is unshared
and moved.  Source: the rules of ``mm/userfaultfd.c``.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from typing import Final, TypeAlias

from uffdaemon.moves.refusals import CAUSE_OF_ERRNO
from uffdaemon.moves.requests import (
    COPY,
    PROTECT,
    RELEASE,
    UNPROTECT,
    CopyOver,
    Divide,
    Issue,
    Look,
    Request,
    Terms,
    Unshare,
    Wait,
)
from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE
from uffdaemon.uapi.moved import Cause, Moved, Run, joined
from uffdaemon.uapi.outcomes import MOVE_ALLOW_SOURCE_HOLES, Code, Operation, Outcome, Result
from uffdaemon.uapi.page_facts import PageFacts, why_busy

ATTEMPTS: Final = 16
"""How many times a page is unshared before waiting: each fork shares it again."""
EXCLUSIVE_ATTEMPTS: Final = 6
"""The same for a page that no other process maps, before it counts as pinned: a child may start
and exit between two steps."""
EVENT_PATIENCE: Final = 1.0
"""Seconds to wait until a pending event is read, without a fallback."""
LONGEST: Final = max(16 << 20, HUGE_PAGE_SIZE)
"""Bytes in one ioctl at most, so that none takes long."""
_SHORT_PAUSE: Final = 0.0002
_FIRST_PAUSE: Final = 0.0005
_LONGEST_PAUSE: Final = 0.05


_Steps: TypeAlias = Generator[Request, None, None]


class Ladder:
    """One range to move.  Its first `moved` bytes have been moved already."""

    def __init__(self, dst: int, src: int, length: int, terms: Terms, moved: int = 0) -> None:
        self._dst, self._src, self._length = dst, src, length
        self._terms = terms
        self._fallback = terms.fallback
        self._at = 0
        self._ends: list[int] = []
        """Offsets at which mappings end, once they are known."""
        self._runs: list[Run] = []
        self._waited = 0.0
        self._pause = _FIRST_PAUSE
        self._unshare_length = HUGE_PAGE_SIZE
        """Bytes to unshare at a time."""
        self._plain_until = 0
        """Copies before this offset are made without write-protection, which is not available."""
        self._inconsistencies = 0
        self._record(moved, Outcome.MOVED)

    @property
    def moved(self) -> Moved:
        """The outcomes so far."""
        return Moved(joined(self._runs))

    # -- outcomes ------------------------------------------------------------------------------

    @property
    def _end(self) -> int:
        """The offset at which the current mapping ends."""
        return next((part for part in self._ends if part > self._at), self._length)

    def _record(
        self, length: int, outcome: Outcome, cause: Cause | None = None, error: int = 0
    ) -> None:
        if length:
            run = Run(self._dst + self._at, self._src + self._at, length, outcome, cause, error)
            self._runs.append(run)
            self._at += length
            self._inconsistencies = 0

    def _fail(self, length: int, cause: Cause, error: int) -> None:
        self._record(length, Outcome.FAILED, cause, error)

    # -- steps ---------------------------------------------------------------------------------

    def climb(self) -> _Steps:
        """Yield requests until every page has an outcome."""
        while self._at < self._length:
            if self._terms.impossible is not None:
                yield from self._impossible(self._terms.impossible)
                continue
            result = yield from self._move(min(self._end - self._at, LONGEST))
            self._record(result.done, Outcome.MOVED)
            if not result.complete:
                yield from self._refused(result.error)

    def _move(self, length: int) -> Generator[Request, None, Result]:
        mode = MOVE_ALLOW_SOURCE_HOLES if self._terms.allow_source_holes else 0
        dst, src = self._dst + self._at, self._src + self._at
        issue = Issue(Operation(Code.MOVE, dst, length, src, mode))
        yield issue
        return issue.result

    def _refused(self, error: int) -> _Steps:
        if error == errno.EBUSY:
            yield from self._busy()
        elif error == errno.EAGAIN:
            yield from self._event(self._end - self._at)
        elif error == errno.EINVAL:
            yield from self._invalid()
        elif error == errno.ENOTTY:
            yield from self._impossible(Cause.NO_MOVE)
        elif error == errno.ENOENT:
            yield from self._no_source()
        elif error == errno.EEXIST:
            yield from self._not_empty()
        elif error == errno.EFAULT:
            self._fail(PAGE_SIZE, Cause.SOURCE_MARKER, error)
        else:
            self._fail(self._length - self._at, CAUSE_OF_ERRNO.get(error, Cause.OTHER), error)

    def _look(self, length: int) -> Generator[Request, None, list[PageFacts]]:
        look = Look(self._src + self._at, length)
        yield look
        return look.pages

    def _empty_at_dst(self, count: int) -> Generator[Request, None, int]:
        """How many of the next `count` pages have an empty destination, up to the first that does
        not: MOVE refuses that one for another reason."""
        look = Look(self._dst + self._at, count * PAGE_SIZE)
        yield look
        return next((n for n, page in enumerate(look.pages) if page.there), count)

    def _wait(self, reason: str) -> _Steps:
        pause, self._pause = self._pause, min(self._pause * 2, _LONGEST_PAUSE)
        self._waited += pause
        yield Wait(pause, reason)

    def _event(self, length: int) -> _Steps:
        """EAGAIN: an event is pending, and its thread waits until the event is read."""
        patience = EVENT_PATIENCE if self._fallback is None else self._fallback.patience
        if self._waited < max(patience, EVENT_PATIENCE):
            yield from self._wait("an event is in flight (EAGAIN)")
        else:
            self._fail(length, Cause.EVENT, errno.EAGAIN)

    def _impossible(self, cause: Cause) -> _Steps:
        """MOVE is impossible: copy each mapping separately."""
        if cause is not Cause.OTHER_PROCESS and not self._ends and self._fallback is not None:
            yield from self._divide()
        error = errno.ENOTTY if cause is Cause.NO_MOVE else errno.EINVAL
        yield from self._copy_or_fail(self._end - self._at, cause, error)

    def _divide(self) -> Generator[Request, None, Divide]:
        divide = Divide(self._dst + self._at, self._src + self._at, self._end - self._at)
        yield divide
        at = self._at
        for part in divide.parts:
            at += part
            self._ends.append(at)
        self._ends.sort()
        return divide

    # -- EBUSY ---------------------------------------------------------------------------------

    def _busy(self) -> _Steps:
        """EBUSY: the page is not exclusive to this process."""
        pages = yield from self._look(min(self._end - self._at, HUGE_PAGE_SIZE))
        cause = why_busy(pages[0])
        length = self._equally_busy(pages, cause)
        if not length:
            # The page is gone by now: the next MOVE returns the reason.
            yield from self._inconsistent(Cause.NOT_EXCLUSIVE, errno.EBUSY)
            return
        free = yield from self._empty_at_dst(length // PAGE_SIZE)
        if not free:
            # MOVE checks the destination first, except for a part of a huge page.
            yield from self._not_empty()
            return
        length = self._equally_busy(pages[:free], cause)
        if cause is not None and self._fallback is None:
            self._fail(length, cause, errno.EBUSY)
        else:
            yield from self._unshare(length, cause)

    def _unshare(self, length: int, cause: Cause | None) -> _Steps:
        """Unshare pages and move them, repeatedly if they are shared again."""
        attempts = exclusive = 0
        while attempts < ATTEMPTS or (yield from self._wait_for_forks()):
            attempts += 1
            length = min(length, self._unshare_length)
            yield Unshare(self._src + self._at, length)
            result = yield from self._move(length)
            self._record(result.done, Outcome.UNSHARED_AND_MOVED, cause or Cause.SHARED)
            if result.error == errno.EAGAIN and not result.done:
                yield from self._event(length)
                return
            if result.done or result.error != errno.EBUSY:
                self._unshare_length = min(2 * self._unshare_length, HUGE_PAGE_SIZE)
                return  # the next MOVE returns the reason for the rest
            pages = yield from self._look(length)
            if not pages[0].there:
                return
            cause = why_busy(pages[0])
            if cause is not None and self._fallback is None:
                break
            if cause is None:
                exclusive += 1
                if exclusive == EXCLUSIVE_ATTEMPTS:
                    yield from self._pinned(self._equally_busy(pages, None))
                    return
                # The kernel takes short references to pages now and then.
                yield Wait(_SHORT_PAUSE)
            else:
                # Fewer pages take less time, in which fewer forks happen.
                self._unshare_length = max(self._unshare_length // 2, PAGE_SIZE)
        yield from self._copy_or_fail(PAGE_SIZE, cause or Cause.SHARED, errno.EBUSY)

    def _wait_for_forks(self) -> Generator[Request, None, bool]:
        """Wait for a moment without forks.  False: the patience is used up."""
        if self._fallback is None or self._waited >= self._fallback.patience:
            return False
        yield from self._wait("the source page is shared again and again")
        return True

    def _equally_busy(self, pages: list[PageFacts], cause: Cause | None) -> int:
        """How many bytes, from the first of `pages` on, are busy for the same visible reason.
        Holes never count: populating one would make a page of zeros."""
        first = pages[0]
        misalignment = (
            (self._dst + self._at) % HUGE_PAGE_SIZE,
            (self._src + self._at) % HUGE_PAGE_SIZE,
        )
        aligned = misalignment == (0, 0)
        if first.huge and aligned and len(pages) * PAGE_SIZE == HUGE_PAGE_SIZE:
            return HUGE_PAGE_SIZE if all(page.there for page in pages) else PAGE_SIZE
        if not first.present or cause is None:
            return PAGE_SIZE if first.there else 0
        count = 1
        while count < len(pages) and pages[count].present and why_busy(pages[count]) is cause:
            count += 1
        return count * PAGE_SIZE

    def _inconsistent(self, cause: Cause, error: int) -> _Steps:
        """The pages do not match the errno: the range is being changed concurrently."""
        self._inconsistencies += 1
        if self._inconsistencies > ATTEMPTS:
            self._fail(PAGE_SIZE, cause, error)
        else:
            yield from self._wait("the range is being changed concurrently")

    def _pinned(self, length: int) -> _Steps:
        """EBUSY though no other process maps the page: it is pinned."""
        stop = self._at + length
        fallback = self._fallback
        if fallback is None:
            self._fail(length, Cause.PINNED, errno.EBUSY)
            return
        while self._waited < fallback.patience:
            yield from self._wait("the source page is pinned for I/O")
            pages = yield from self._look(stop - self._at)
            if not all(page.there for page in pages) or why_busy(pages[0]) is not None:
                return  # no longer pinned, or busy for another reason
            yield Unshare(self._src + self._at, stop - self._at)
            result = yield from self._move(stop - self._at)
            self._record(result.done, Outcome.WAITED_AND_MOVED, Cause.PINNED)
            if result.complete or result.error not in (errno.EBUSY, errno.EAGAIN):
                return
        length = stop - self._at
        if fallback.copy_pinned:
            yield from self._copy(length, Cause.PINNED, Outcome.COPIED_PINNED)
        else:
            self._fail(length, Cause.PINNED, errno.EBUSY)

    # -- the other refusals --------------------------------------------------------------------

    def _invalid(self) -> _Steps:
        """EINVAL: the range crosses mappings, or its memory is of the wrong type."""
        divide = yield from self._divide()
        if len(divide.parts) > 1:
            return
        rest = self._end - self._at
        if not divide.registered:
            self._fail(rest, Cause.NOT_REGISTERED, errno.EINVAL)
        else:
            yield from self._copy_or_fail(rest, Cause.WRONG_MEMORY, errno.EINVAL)

    def _not_empty(self) -> _Steps:
        """EEXIST: the destination is not empty.  If the source is, the page was moved before."""
        pages = yield from self._look(PAGE_SIZE)
        if pages[0].there:
            self._fail(PAGE_SIZE, Cause.NOT_EMPTY, errno.EEXIST)
            return
        # If it has been moved just now, its waiting threads have not been woken.
        yield Issue(Operation(Code.WAKE, self._dst + self._at, PAGE_SIZE))
        self._fail(PAGE_SIZE, Cause.ALREADY_MOVED, errno.EEXIST)

    def _no_source(self) -> _Steps:
        """ENOENT: a hole at the source, or the destination is not registered."""
        pages = yield from self._look(min(self._end - self._at, HUGE_PAGE_SIZE))
        holes = next((n for n, page in enumerate(pages) if page.there), len(pages))
        if holes:
            free = yield from self._empty_at_dst(holes)
            if free:
                self._fail(free * PAGE_SIZE, Cause.SOURCE_HOLE, errno.ENOENT)
            else:
                yield from self._not_empty()
            return
        divide = Divide(self._dst + self._at, self._src + self._at, self._end - self._at)
        yield divide
        if divide.registered:
            yield from self._inconsistent(Cause.SOURCE_HOLE, errno.ENOENT)
        else:
            self._fail(divide.parts[0], Cause.NOT_REGISTERED, errno.ENOENT)

    def _copy_or_fail(self, length: int, cause: Cause, error: int) -> _Steps:
        """These pages cannot be moved: copy them if the fallback allows it."""
        if self._fallback is None:
            self._fail(length, cause, error)
        else:
            yield from self._copy(length, cause, Outcome.EXACTLY_COPIED)

    # -- copies --------------------------------------------------------------------------------

    def _copy(self, length: int, cause: Cause, outcome: Outcome) -> _Steps:
        stop = self._at + length
        size = self._terms.page_size
        piece = max(self._terms.piece // size, 1) * size
        while self._at < stop:
            pages = yield from self._look(min(stop - self._at, piece))
            first = pages[0]
            kind = first.there, first.marker
            run = PAGE_SIZE * next(
                (n for n, page in enumerate(pages) if (page.there, page.marker) != kind), len(pages)
            )
            if first.marker:
                self._fail(size, Cause.SOURCE_MARKER, errno.EFAULT)
            elif first.there:
                yield from self._copy_run(run, stop, cause, outcome)
            elif self._terms.allow_source_holes:
                self._record(run, outcome, cause)
            else:
                self._fail(run, Cause.SOURCE_HOLE, errno.ENOENT)

    def _copy_run(self, length: int, stop: int, cause: Cause, outcome: Outcome) -> _Steps:
        plain = self._at < self._plain_until
        copy = CopyOver(self._dst + self._at, self._src + self._at, length, not plain)
        yield copy
        if plain and outcome is Outcome.EXACTLY_COPIED:
            outcome = Outcome.COPIED
        error = copy.error
        if copy.stage == UNPROTECT:
            # The pages arrived, but are still write-protected: an event is pending.
            self._fail(copy.done, Cause.EVENT, error)
            return
        self._record(copy.done, outcome, cause)
        if not error:
            return
        refused = copy.stage in (PROTECT, COPY) and not copy.done
        if copy.exact and refused and error in _UNPROTECTABLE[copy.stage]:
            # Not registered for write-protection, or the kernel cannot protect this type of memory.
            if self._fallback is not None and self._fallback.lose_writes:
                self._plain_until = self._end
            else:
                self._fail(stop - self._at, Cause.UNPROTECTABLE, error)
        elif error == errno.EAGAIN:
            yield from self._event(stop - self._at)
        elif error in (errno.EEXIST, errno.EFAULT) and copy.stage == COPY:
            self._fail(self._terms.page_size, CAUSE_OF_ERRNO[error], error)
        elif copy.stage == RELEASE:
            self._fail(stop - self._at, Cause.OTHER, error)
        elif error == errno.ENOENT:
            self._fail(stop - self._at, Cause.NOT_REGISTERED, error)
        else:
            self._fail(stop - self._at, CAUSE_OF_ERRNO.get(error, Cause.OTHER), error)


_UNPROTECTABLE: Final = {PROTECT: (errno.ENOENT, errno.EINVAL), COPY: (errno.EINVAL,)}
