"""A source and a destination, between which pages move or are seen to be refused."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support.obstacles import BOTH_MODES, PROTECTED
from tests.support.page_contents import PAGE, content
from uffdaemon import Memory, MemoryType, Outcome
from uffdaemon.errors import MoveRefused
from uffdaemon.lowlevel import Userfaultfd, scan_pages
from uffdaemon.moves import Cause, Fallback, Moved, move
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator


class Scene(NamedTuple):
    """A source full of pages that tell themselves apart, and an empty destination."""

    uffd: Userfaultfd
    source: Memory
    target: Memory
    data: bytes

    def move(self, fallback: Fallback | None = None) -> Moved:
        """Move all of it, and have it proved that the source is empty then."""
        where = self.target.start, self.source.start, self.source.length
        size = max(self.source.page_size, self.target.page_size)
        moved = move(self.uffd, *where, fallback=fallback, verify=True, page_size=size)
        assert self.target.read(0, self.target.length) == self.data
        return moved

    def refused(self, fallback: Fallback | None = None) -> MoveRefused:
        """See it refused as a whole, and everything where it was."""
        with pytest.raises(MoveRefused) as caught:
            self.move(fallback)
        error = caught.value
        [run] = error.moved.refused
        assert error.cause is run.cause
        assert (run.dst, run.src) == (self.target.start, self.source.start)
        assert run.length == self.source.length
        assert self.source.read(0, self.source.length) == self.data
        assert scan_pages(self.target.start, self.target.length) == []
        return error


@contextmanager
def scene(
    pages: int = 4,
    kind: MemoryType = MemoryType.ANONYMOUS,
    target_kind: MemoryType = MemoryType.ANONYMOUS,
    *,
    huge: bool = False,
    dont_fork: bool = False,
) -> Iterator[Scene]:
    """Both sides are registered in both modes; `huge` is for transparent huge pages."""
    big = huge or kind.huge or target_kind.huge
    length = HUGE_PAGE_SIZE if big else pages * PAGE
    plain = MemoryType.ANONYMOUS
    with (
        Userfaultfd.open(PROTECTED) as uffd,
        Memory.map(
            length, kind, transparent_huge=big and kind is plain, dont_fork=dont_fork
        ) as source,
        Memory.map(length, target_kind, transparent_huge=big and target_kind is plain) as target,
    ):
        data = content(length // PAGE)
        source.write(0, data)
        for side in (source, target):
            uffd.register(side.start, side.length, BOTH_MODES)
        yield Scene(uffd, source, target, data)


def outcomes(moved: Moved) -> list[tuple[Outcome, Cause | None]]:
    """Of each run, and why."""
    return [(run.outcome, run.cause) for run in moved.runs]
