"""The kernel's tests wp-fork, wp-fork-with-event and wp-unpopulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.kernel.conformance import WP, Handler, conformance, map_area, placed
from tests.kernel.page_flags import write_protected
from tests.support.calls import in_child
from uffdaemon import Advice, Memory, MemoryType, native
from uffdaemon.lowlevel import Features, RegisterMode, Userfaultfd

if TYPE_CHECKING:
    from uffdaemon.uapi.events import PageFault

_MADV_PAGEOUT = 21


def _no_fault(uffd: Userfaultfd, fault: PageFault, offset: int) -> None:
    raise AssertionError(fault)


def _zap(memory: Memory) -> None:
    """Take the page out of the page table, if its type lets us, and keep what it holds."""
    if memory.type.shared:
        memory.advise(Advice.DONTNEED, 0, memory.page_size)
    else:
        # Without swap, and for hugetlb, this does nothing: then the bit has nothing to survive.
        native.advise(memory.start, memory.page_size, _MADV_PAGEOUT)


def _bit_in_a_fork(memory: Memory) -> bool:
    return in_child(write_protected, memory.start).result()


def _wp_fork(memory: Memory, uffd: Userfaultfd, *, kept: bool) -> None:
    """Whether a fork keeps the uffd-wp bit, of a page and of the marker in its place."""
    page = memory.page_size
    uffd.register(memory.start, memory.length, RegisterMode.WP)
    memory.write(0, b"\1")
    placed(uffd.write_protect(memory.start, page))
    assert write_protected(memory.start)
    assert _bit_in_a_fork(memory) is kept

    _zap(memory)
    assert write_protected(memory.start)
    assert _bit_in_a_fork(memory) is kept

    placed(uffd.write_protect(memory.start, page, protect=False))
    assert not write_protected(memory.start)
    memory.write(0, b"\2")
    assert not write_protected(memory.start)
    uffd.unregister(memory.start, memory.length)


@conformance("wp-fork", WP)
def test_wp_fork(kind: MemoryType) -> None:
    with Userfaultfd.open(WP) as uffd, map_area(kind) as memory:
        _wp_fork(memory, uffd, kept=False)


@conformance("wp-fork-with-event", WP | Features.EVENT_FORK)
def test_wp_fork_with_event(kind: MemoryType) -> None:
    with Userfaultfd.open(WP | Features.EVENT_FORK) as uffd, map_area(kind) as memory:
        # Another process reads: os.fork() keeps the GIL until its event has been read.
        handler = Handler(memory.start, memory.page_size, _no_fault)
        reader = in_child(handler.run, uffd)
        _wp_fork(memory, uffd, kept=True)
        handler.stop.cross()
        counts = reader.result()
        assert (counts.forks, counts.faults) == (2, 0)


@conformance("wp-unpopulated", WP | Features.WP_UNPOPULATED)
def test_wp_unpopulated(kind: MemoryType) -> None:
    with Userfaultfd.open(WP | Features.WP_UNPOPULATED) as uffd, map_area(kind) as memory:
        page, start = memory.page_size, memory.start
        uffd.register(start, memory.length, RegisterMode.WP)

        # A marker is set, and cleared.
        placed(uffd.write_protect(start, page))
        assert write_protected(start)
        placed(uffd.write_protect(start, page, protect=False))
        assert not write_protected(start)

        # Discarding takes the marker along; the page that comes then has no bit.
        placed(uffd.write_protect(start, page))
        memory.advise(Advice.DONTNEED, 0, page)
        assert not write_protected(start)
        memory.write(0, b"\1")
        assert not write_protected(start)
        memory.advise(Advice.DONTNEED, 0, page)

        # Reading through a marker finds zeros, and no handler is asked.
        placed(uffd.write_protect(start, page))
        assert memory.read(0, page) == bytes(page)
        assert uffd.read_events() == []
        memory.advise(Advice.DONTNEED, 0, page)
