"""What the conformance tests share: names, areas of memory with known content, handlers."""

from __future__ import annotations

import select
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.support.calls import Barrier
from tests.support.conformance_table import KERNEL_TESTS
from tests.support.kernel_tests import NO_FEATURES, kernel_test
from uffdaemon import Advice, FaultKind, Memory, MemoryType
from uffdaemon.lowlevel import (
    Event,
    Features,
    ForkEvent,
    RemapEvent,
    RemoveEvent,
    Result,
    UnmapEvent,
    Userfaultfd,
)
from uffdaemon.ranges import HUGE_PAGE_SIZE, PAGE_SIZE
from uffdaemon.uapi.events import PageFault, UnknownEvent

WP = Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM
MINOR = Features.MINOR_SHMEM | Features.MINOR_HUGETLBFS
MISSING = Features.MISSING_SHMEM | Features.MISSING_HUGETLBFS

Body = Callable[..., None]


def conformance(name: str, features: Features = NO_FEATURES) -> Callable[[Body], Body]:
    """Mark a test as the counterpart of the kernel's test `name`, on its types of memory."""
    types = KERNEL_TESTS[name]

    def decorate(body: Body) -> Body:
        test = kernel_test(features=features)(body)
        test = pytest.mark.parametrize("kind", types, ids=[kind.value for kind in types])(test)
        marked: Body = pytest.mark.conformance(name)(test)
        return marked

    return decorate


def map_area(kind: MemoryType, pages: int = 0) -> Memory:
    """Memory of a few pages; huge ones are fewer."""
    count = pages or (8 if kind.huge else 128)
    return Memory.map(count * (HUGE_PAGE_SIZE if kind.huge else PAGE_SIZE), kind)


def page_offsets(memory: Memory) -> range:
    """Where each page begins."""
    return range(0, memory.length, memory.page_size)


def content(offset: int, page_size: int) -> bytes:
    """What the page at `offset` of every area is to hold: a counter that is not 0, and filling."""
    number = offset // page_size
    return struct.pack("<Q", number + 1) + bytes([number % 251]) * (page_size - 8)


def content_of(memory: Memory) -> bytes:
    """What all of the area is to hold."""
    return b"".join(content(offset, memory.page_size) for offset in page_offsets(memory))


def discard(memory: Memory, offset: int = 0, length: int | None = None) -> None:
    """Let go of the pages, in the way that its type needs."""
    advice = Advice.REMOVE if memory.type.shared else Advice.DONTNEED
    memory.advise(advice, offset, length)


def placed(result: Result) -> None:
    """Assert that an operation did all that it was asked for."""
    assert result.complete, result
    assert result.done == result.length, result


@dataclass
class Counts:
    """What a handler has seen."""

    missing: int = 0
    minor: int = 0
    write_protect: int = 0
    forks: int = 0
    remaps: int = 0
    removes: int = 0
    unmaps: int = 0

    @property
    def faults(self) -> int:
        return self.missing + self.minor + self.write_protect


@dataclass
class Handler:
    """Answers for one area, and for those of its forks.

    ``answer`` is called with the userfaultfd, the fault, and the offset of its page in the area.
    """

    start: int
    page_size: int
    answer: Callable[[Userfaultfd, PageFault, int], None]
    stop: Barrier = field(default_factory=Barrier)
    counts: Counts = field(default_factory=Counts)
    _poll: select.poll = field(default_factory=select.poll)
    _uffds: dict[int, Userfaultfd] = field(default_factory=dict)
    _starts: dict[int, int] = field(default_factory=dict)

    def run(self, uffd: Userfaultfd) -> Counts:
        """Answer until told to stop, and until nothing is pending then."""
        self._uffds = {uffd.fileno(): uffd}
        self._starts = {uffd.fileno(): self.start}
        self._poll.register(uffd, select.POLLIN)
        self._poll.register(self.stop, select.POLLIN)
        while True:
            ready = [fd for fd, _ in self._poll.poll()]
            if ready == [self.stop.fileno()]:
                return self.counts
            for fd in ready:
                if fd in self._uffds:
                    for event in self._uffds[fd].read_events():
                        self._event(fd, event)

    def _event(self, fd: int, event: Event) -> None:
        match event:
            case PageFault():
                self._fault(self._uffds[fd], event, self._starts[fd])
            case ForkEvent(child):
                self.counts.forks += 1
                self._uffds[child] = Userfaultfd.adopt(child)
                self._starts[child] = self._starts[fd]
                self._poll.register(child, select.POLLIN)
            case RemapEvent(_, target, _):
                self.counts.remaps += 1
                self._starts[fd] = target
            case RemoveEvent(start, end):
                self.counts.removes += 1
                # As the kernel's test does: later accesses are the kernel's again.
                self._uffds[fd].unregister(start, end - start)
            case UnmapEvent():
                self.counts.unmaps += 1
            case UnknownEvent():
                raise AssertionError(event)

    def _fault(self, uffd: Userfaultfd, fault: PageFault, start: int) -> None:
        match fault.kind:
            case FaultKind.MISSING:
                self.counts.missing += 1
            case FaultKind.MINOR:
                self.counts.minor += 1
            case FaultKind.WP:
                self.counts.write_protect += 1
            case FaultKind.UNKNOWN:
                raise AssertionError(fault)
        self.answer(uffd, fault, (fault.address - start) // self.page_size * self.page_size)
