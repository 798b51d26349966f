"""The kernel's tests move, move-pmd and move-pmd-split."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.kernel.conformance import Handler, conformance, content, content_of, placed
from tests.support.calls import in_thread
from tests.support.page_contents import PAGE
from uffdaemon import Advice, Memory, MemoryType
from uffdaemon.lowlevel import Features, PageCategory, Userfaultfd, scan_pages
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffdaemon.uapi.events import PageFault


def _move_all(source: Memory, memory: Memory, step: int) -> None:
    """Let each fault move `step` bytes; the content moves, the source empties, nothing else."""
    source.write(0, content_of(source))
    if step == HUGE_PAGE_SIZE:
        [whole] = scan_pages(source.start, source.length, required=PageCategory.PRESENT)
        assert whole.categories & PageCategory.HUGE, "transparent huge pages could not be had"

    with Userfaultfd.open(Features.MOVE) as uffd:
        uffd.register(memory.start, memory.length)

        def answer(uffd: Userfaultfd, fault: PageFault, offset: int) -> None:
            assert not fault.write
            placed(uffd.move(memory.start + offset, source.start + offset, step))

        handler = Handler(memory.start, step, answer)
        running = in_thread(handler.run, uffd)
        for offset in range(0, memory.length, step):
            for part in range(offset, offset + step, PAGE):
                assert memory.read(part, PAGE) == content(part, PAGE)
            assert scan_pages(source.start + offset, step) == []
            assert source.read(offset, step) == bytes(step)
        handler.stop.cross()
        counts = running.result()
        assert counts.missing == counts.faults == memory.length // step


@contextmanager
def _huge_pages(kind: MemoryType) -> Iterator[tuple[Memory, Memory]]:
    length = 4 * HUGE_PAGE_SIZE
    with (
        Memory.map(length, kind, transparent_huge=True, dont_fork=True) as source,
        Memory.map(length, kind, transparent_huge=True) as memory,
    ):
        yield source, memory


@pytest.mark.smoke
@conformance("move", Features.MOVE)
def test_move(kind: MemoryType) -> None:
    length = 128 * PAGE
    with Memory.map(length, kind, dont_fork=True) as source, Memory.map(length, kind) as memory:
        source.advise(Advice.NOHUGEPAGE)
        _move_all(source, memory, PAGE)


@pytest.mark.usefixtures("transparent_huge_pages")
@conformance("move-pmd", Features.MOVE)
def test_move_of_huge_pages(kind: MemoryType) -> None:
    with _huge_pages(kind) as (source, memory):
        _move_all(source, memory, HUGE_PAGE_SIZE)
        [whole] = scan_pages(memory.start, memory.length)
        assert whole.categories & PageCategory.HUGE, "moved, but not as one entry"


@pytest.mark.usefixtures("transparent_huge_pages")
@conformance("move-pmd-split", Features.MOVE)
def test_move_of_huge_pages_to_where_none_are_wanted(kind: MemoryType) -> None:
    with _huge_pages(kind) as (source, memory):
        memory.advise(Advice.NOHUGEPAGE)
        _move_all(source, memory, HUGE_PAGE_SIZE)
