"""Staging: memory to read or decode into, from which pages are moved to their destination.

Moving copies nothing, and a whole transparent huge page moves in a few microseconds.  So filling
memory this way is as fast as reading straight into it, and a page appears complete or not at all.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from uffdaemon import errors, native
from uffdaemon.kernel.memory import Advice, Memory
from uffdaemon.moves.calls import move, move_at_once
from uffdaemon.moves.refusals import refusal
from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE, check_range
from uffdaemon.uapi.moved import Cause, Moved, Run, joined
from uffdaemon.uapi.outcomes import Outcome

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from uffdaemon.actions import Fallback
    from uffdaemon.kernel.userfaultfd import Userfaultfd

_PIECE = max(8 << 20, HUGE_PAGE_SIZE)


class Staging:
    """`length` bytes (rounded up to whole pages) of plain memory at `start`, empty again wherever
    pages were moved away.

    With `transparent_huge` it is made of huge pages where the kernel has them.  Writing a byte then
    makes a huge page of zeros around it (2 MiB on x86-64): bytes that are not decoded yet would
    arrive as zeros, not as a `SourceHole`.  With `dont_fork` children do not get it: a page that a
    child shares could not be moved.  Raises `InvalidRange`, `MemoryRefused`.
    """

    def __init__(
        self, length: int, *, transparent_huge: bool = True, dont_fork: bool = True
    ) -> None:
        unit = HUGE_PAGE_SIZE if transparent_huge else PAGE_SIZE
        if length <= 0:
            raise errors.InvalidRange(f"a staging of {length} bytes: at least 1 is needed")
        self.length: int = length + -length % PAGE_SIZE
        """Bytes."""
        self.memory: Memory = Memory.map(
            length + -length % unit, transparent_huge=transparent_huge, dont_fork=dont_fork
        )
        """The memory itself, which is made of whole huge pages."""

    @property
    def start(self) -> int:
        """Its address, in bytes."""
        return self.memory.start

    @property
    def page_size(self) -> int:
        """Bytes; what is moved must be made of whole pages."""
        return self.memory.page_size

    def view(self, offset: int = 0, length: int | None = None) -> memoryview:
        """The bytes themselves, to be decoded into; no view may be used after `close`.

        Raises `InvalidRange`.
        """
        start, length = self._range(offset, length)
        return native.view_memory(start, length)

    def read_from(
        self, fd: int, file_offset: int, offset: int = 0, length: int | None = None
    ) -> int:
        """pread(2) into it until `length` bytes (default: to its end) or the file's end are
        reached; returns how many bytes were read.  Raises OSError."""
        with self.view(offset, length) as view:
            return _read(fd, file_offset, view)

    def move(
        self,
        uffd: Userfaultfd,
        dst: int,
        offset: int = 0,
        length: int | None = None,
        *,
        fallback: Fallback | None = None,
        verify: bool = False,
    ) -> Moved:
        """Move `length` bytes (default: to its end) to `dst`.  Raises what `move` raises."""
        start, length = self._range(offset, length)
        return move(uffd, dst, start, length, fallback=fallback, verify=verify)

    def fill(
        self,
        uffd: Userfaultfd,
        dst: int,
        fd: int,
        file_offset: int,
        length: int,
        *,
        piece: int = _PIECE,
    ) -> Moved:
        """Fill `length` bytes at `dst` with those of a file from `file_offset` on: read a piece,
        move it, and so on.  Whole huge pages arrive unsplit where `dst` is aligned to them.

        Everything else in the staging memory is lost.  The first piece ends where `dst` is aligned,
        and `piece` (bytes) is cut to what fits here.
        Bytes past the end of the file in its last page are zeros.  Pages that are present already
        stay, and are ``refused`` in the result.  Raises `SourceTooShort` when the file lacks
        whole pages, `MoveRefused` for any other refusal, OSError.
        """
        check_range(dst, length, PAGE_SIZE, "the range to fill")
        unit = HUGE_PAGE_SIZE if length >= HUGE_PAGE_SIZE <= self.length else PAGE_SIZE
        piece = max(min(piece, self.length) // unit, 1) * unit
        runs: list[Run] = []
        split = True
        at = 0
        with self.view() as view:
            while at < length:
                # A huge page moves as a whole if both sides are aligned to it.
                skew = (dst + at) % unit
                size = min(piece - skew, length - at)
                if split and unit == HUGE_PAGE_SIZE:
                    # The rest of a huge page of which a part has moved, or its page table alone,
                    # keeps the next one from being huge.
                    self.memory.advise(Advice.DONTNEED)
                _read_pages(fd, file_offset + at, view[skew : skew + size])
                done = move_at_once(uffd, dst + at, self.start + skew, size)
                if done:
                    runs.append(Run(dst + at, self.start + skew, done, Outcome.MOVED))
                if done < size:
                    runs += self._move_rest(uffd, dst + at + done, skew + done, size - done)
                split = bool(skew or size % unit or done < size)
                at += size
        return Moved(joined(runs))

    def _move_rest(self, uffd: Userfaultfd, dst: int, offset: int, length: int) -> tuple[Run, ...]:
        """Move what was refused at first, except for pages that are present already."""
        try:
            return self.move(uffd, dst, offset, length).runs
        except errors.DestinationNotEmpty as error:
            # A fault filled a page first.  The bytes read for it must not stay here.
            self.memory.advise(Advice.DONTNEED, offset, length)
            tried = Moved(tuple(map(_known_to_have_moved, error.moved.runs)))
            others = [run for run in tried.refused if run.cause is not Cause.NOT_EMPTY]
            if others:
                raise refusal(tried, others[0]) from None
            return tried.runs

    def _range(self, offset: int, length: int | None) -> tuple[int, int]:
        if self.start == 0:
            raise errors.InvalidRange("this staging has been closed")
        length = self.length - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > self.length:
            raise errors.InvalidRange(
                f"{length} bytes at offset {offset} of a staging of {self.length} bytes"
            )
        return self.start + offset, length

    def close(self) -> None:
        """Unmap it, with the pages that were not moved."""
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _read(fd: int, file_offset: int, view: memoryview) -> int:
    at = 0
    while at < len(view):
        got = os.preadv(fd, [view[at:] if at else view], file_offset + at)
        if got == 0:
            break
        at += got
    return at


def _read_pages(fd: int, file_offset: int, view: memoryview) -> None:
    """Read whole pages; past the end of the file the last one has zeros."""
    got = _read(fd, file_offset, view)
    tail = -got % PAGE_SIZE
    if got + tail < len(view):
        raise errors.SourceTooShort(
            f"the file ends at {file_offset + got:#x}, {len(view) - got} bytes before what was "
            "asked for"
        )
    if tail:
        view[got:] = bytes(tail)


def _known_to_have_moved(run: Run) -> Run:
    """The source was written just before: a page that is missing there by now has been moved."""
    if run.cause is not Cause.ALREADY_MOVED:
        return run
    return run._replace(outcome=Outcome.MOVED, cause=None, error=0)
