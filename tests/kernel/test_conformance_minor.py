"""The kernel's tests minor, minor-wp and minor-collapse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kernel.conformance import (
    MINOR,
    WP,
    Handler,
    conformance,
    content,
    content_of,
    map_area,
    page_offsets,
    placed,
)
from tests.support.calls import in_thread
from uffdaemon import Advice, FaultKind, Memory, MemoryType
from uffdaemon.errors import MemoryRefused
from uffdaemon.lowlevel import Features, PageCategory, RegisterMode, Userfaultfd, scan_pages
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from uffdaemon.uapi.events import PageFault


def _flipped(data: bytes) -> bytes:
    return (int.from_bytes(data) ^ ((1 << 8 * len(data)) - 1)).to_bytes(len(data))


def _minor_faults(memory: Memory, *, write_protect: bool = False) -> None:
    """Fill the page cache with flipped bits; each fault flips them back before it CONTINUEs."""
    page = memory.page_size
    features = MINOR | (WP | Features.WP_UNPOPULATED if write_protect else Features(0))
    with memory.alias() as alias, Userfaultfd.open(features) as uffd:
        mode = RegisterMode.MINOR | (RegisterMode.WP if write_protect else RegisterMode(0))
        uffd.register(memory.start, memory.length, mode)
        for offset in page_offsets(memory):
            alias.write(offset, _flipped(content(offset, page)))

        def answer(uffd: Userfaultfd, fault: PageFault, offset: int) -> None:
            start = memory.start + offset
            if fault.kind is FaultKind.WP:
                assert fault.write
                placed(uffd.write_protect(start, page, protect=False))
                return
            alias.write(offset, _flipped(alias.read(offset, page)))
            placed(uffd.continue_(start, page, write_protect=write_protect, page_size=page))
            again = uffd.continue_(start, page, write_protect=write_protect, page_size=page)
            assert (again.done, again.present) == (0, page)

        handler = Handler(memory.start, page, answer)
        running = in_thread(handler.run, uffd)
        pages = memory.length // page
        for offset in page_offsets(memory):
            assert memory.read(offset, page) == content(offset, page)
        if write_protect:
            memory.touch(write=True)
        handler.stop.cross()
        counts = running.result()
        assert (counts.missing, counts.minor) == (0, pages)
        assert counts.write_protect == (pages if write_protect else 0)


@conformance("minor", MINOR)
def test_minor(kind: MemoryType) -> None:
    with map_area(kind) as memory:
        _minor_faults(memory)


@conformance("minor-wp", MINOR | WP | Features.WP_UNPOPULATED)
def test_minor_wp(kind: MemoryType) -> None:
    with map_area(kind) as memory:
        _minor_faults(memory, write_protect=True)


@pytest.mark.usefixtures("transparent_huge_pages")
@conformance("minor-collapse", MINOR)
def test_minor_collapse(kind: MemoryType) -> None:
    length = 2 * HUGE_PAGE_SIZE
    with Memory.map(length, kind, transparent_huge=True) as memory, Userfaultfd.open(MINOR) as uffd:
        _minor_faults(memory)
        uffd.register(memory.start, length, RegisterMode.MINOR)
        try:
            memory.advise(Advice.COLLAPSE)
        except MemoryRefused as refused:
            # As the kernel's own test has it: not every kernel does.
            pytest.skip(f"{refused}")
        assert memory.read(0, length) == content_of(memory)
        assert uffd.read_events() == []
        with memory.alias() as alias:
            alias.touch()
        [whole] = scan_pages(memory.start, length)
        assert whole.categories & PageCategory.HUGE
