"""The errno of a single MOVE for everything that can be wrong, and how far it came before.

In the kernel's own order: an event in flight, the arguments, the mappings, each page by itself.
Source: ``userfaultfd_move`` in ``fs/userfaultfd.c``, ``validate_move_areas`` and ``move_pages`` in
``mm/userfaultfd.c``; run on Linux 6.18.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from tests.support.calls import in_child, in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import wait_readable
from tests.support.obstacles import BOTH_MODES, PROTECTED, Pins, Sharer, guard, lock, protect
from tests.support.page_contents import PAGE
from uffdaemon import Advice, Memory, MemoryType
from uffdaemon.lowlevel import (
    Code,
    Features,
    Operation,
    RegisterMode,
    RemoveEvent,
    Status,
    Userfaultfd,
    scan_pages,
)
from uffdaemon.ranges import HUGE_PAGE_SIZE
from uffdaemon.uapi.outcomes import MOVE_ALLOW_SOURCE_HOLES, status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LENGTH: Final = 4 * PAGE
# -- the table ---------------------------------------------------------------------------------


class Scene(NamedTuple):
    """Four pages that move, until something is done to them."""

    uffd: Userfaultfd
    source: Memory
    memory: Memory
    stack: ExitStack

    @property
    def whole(self) -> Operation:
        return Operation(Code.MOVE, self.memory.start, LENGTH, self.source.start)

    @property
    def third(self) -> tuple[int, int]:
        """The page that is special: where it is, and where it is due."""
        return self.source.start + 2 * PAGE, self.memory.start + 2 * PAGE


def register_elsewhere(scene: Scene, memory: Memory) -> None:
    scene.uffd.unregister(memory.start, LENGTH)
    other = scene.stack.enter_context(Userfaultfd.open())
    other.register(memory.start, LENGTH)


def register_wp_only(scene: Scene) -> None:
    scene.uffd.unregister(scene.memory.start, LENGTH)
    scene.uffd.register(scene.memory.start, LENGTH, RegisterMode.WP)


def protect_both(scene: Scene) -> None:
    for memory in (scene.source, scene.memory):
        protect(memory.start, LENGTH, 1)


def lock_both(scene: Scene) -> None:
    for memory in (scene.source, scene.memory):
        lock(memory.start, LENGTH)


def allow_holes(scene: Scene) -> Operation:
    return scene.whole._replace(mode=MOVE_ALLOW_SOURCE_HOLES)


def hole(scene: Scene) -> None:
    scene.source.advise(Advice.DONTNEED, 2 * PAGE, PAGE)


def fill(scene: Scene) -> None:
    scene.uffd.zeropage(scene.third[1], PAGE)


def share(scene: Scene) -> Sharer:
    scene.source.advise(Advice.DOFORK)
    sharer = Sharer(scene.source)
    scene.source.advise(Advice.POPULATE_WRITE, 0, 2 * PAGE)
    return sharer


def pin(scene: Scene) -> None:
    scene.stack.callback(Pins(scene.third[0]).end)


ARGUMENTS: Final[dict[str, Callable[[Operation], Operation]]] = {
    "unaligned destination": lambda move: move._replace(dst=move.dst + 1),
    "unaligned source": lambda move: move._replace(src=move.src + 1),
    "unaligned length": lambda move: move._replace(length=PAGE + 1),
    "no length": lambda move: move._replace(length=0),
    "unknown mode": lambda move: move._replace(mode=4),
    "destination outside of the address space": lambda move: move._replace(dst=-PAGE % 2**64),
    "source outside of the address space": lambda move: move._replace(src=-PAGE % 2**64),
}
"""Each is EINVAL."""

MAPPINGS: Final[dict[str, tuple[Callable[[Scene], object], int]]] = {
    "source in two mappings": (
        lambda scene: scene.source.advise(Advice.DOFORK, 0, 2 * PAGE),
        errno.EINVAL,
    ),
    "destination in two mappings": (
        lambda scene: scene.memory.advise(Advice.DONTFORK, 0, 2 * PAGE),
        errno.EINVAL,
    ),
    "source not mapped": (lambda scene: scene.source.unmap(0, LENGTH), errno.ENOENT),
    "source that ends": (lambda scene: scene.source.unmap(2 * PAGE, 2 * PAGE), errno.EINVAL),
    "destination not mapped": (lambda scene: scene.memory.unmap(0, LENGTH), errno.ENOENT),
    "destination that ends": (lambda scene: scene.memory.unmap(2 * PAGE, 2 * PAGE), errno.EINVAL),
    "destination not registered": (
        lambda scene: scene.uffd.unregister(scene.memory.start, LENGTH),
        errno.EINVAL,
    ),
    "destination of another userfaultfd": (
        lambda scene: register_elsewhere(scene, scene.memory),
        errno.EINVAL,
    ),
    "destination registered WP only": (register_wp_only, 0),
    "source of another userfaultfd": (lambda scene: register_elsewhere(scene, scene.source), 0),
    "source read-only": (lambda scene: protect(scene.source.start, LENGTH, 1), errno.EINVAL),
    "destination read-only": (lambda scene: protect(scene.memory.start, LENGTH, 1), errno.EINVAL),
    "both read-only": (protect_both, errno.EINVAL),
    "source executable": (lambda scene: protect(scene.source.start, LENGTH, 7), errno.EINVAL),
    "source locked": (lambda scene: lock(scene.source.start, LENGTH), errno.EINVAL),
    "destination locked": (lambda scene: lock(scene.memory.start, LENGTH), errno.EINVAL),
    "both locked": (lock_both, 0),
}
"""What is done to them, and what MOVE says then: all or nothing."""

PAGES: Final[dict[str, tuple[Sequence[Callable[[Scene], object]], int]]] = {
    "source hole": ([hole], errno.ENOENT),
    "source hole, allowed": ([hole, allow_holes], 0),
    "source hole, and a page at the destination": ([hole, fill], errno.EEXIST),
    "source hole, allowed, and a page": ([hole, fill, allow_holes], errno.EEXIST),
    "destination page": ([fill], errno.EEXIST),
    "destination poison": ([lambda s: s.uffd.poison(s.third[1], PAGE)], errno.EEXIST),
    "destination WP marker": ([lambda s: s.uffd.write_protect(s.third[1], PAGE)], errno.EEXIST),
    "destination guard": ([lambda s: guard(s.third[1])], errno.EEXIST),
    "source poison": ([hole, lambda s: s.uffd.poison(s.third[0], PAGE)], errno.EFAULT),
    "source WP marker": ([hole, lambda s: s.uffd.write_protect(s.third[0], PAGE)], errno.EFAULT),
    "source page write-protected": ([lambda s: s.uffd.write_protect(s.third[0], PAGE)], 0),
    "source guard": ([lambda s: guard(s.third[0])], errno.EFAULT),
    "source shared": ([share], errno.EBUSY),
    "source shared with a child that has ended": ([lambda s: share(s).sees()], errno.EBUSY),
    "source pinned": ([pin], errno.EBUSY),
}
"""What is done about the third page, and what MOVE says after the first two."""


@contextmanager
def scene_of_four() -> Iterator[Scene]:
    with (
        ExitStack() as stack,
        Userfaultfd.open(PROTECTED) as uffd,
        Memory.map(LENGTH, dont_fork=True) as source,
        Memory.map(LENGTH) as memory,
    ):
        source.write(0, b"m" * LENGTH)
        for side in (source, memory):
            uffd.register(side.start, LENGTH, BOTH_MODES)
        yield Scene(uffd, source, memory, stack)


def check(scene: Scene, operation: Operation, error: int, done: int) -> None:
    """Carry it out: `done` bytes move, and nothing else happens."""
    [result] = scene.uffd.execute([operation])
    assert (result.error, result.done, result.present) == (error, done, 0)
    assert result.status is status_of(error)
    if done:
        assert scan_pages(scene.source.start, done) == []
        assert scene.memory.read(0, min(done, 2 * PAGE)) == b"m" * min(done, 2 * PAGE)


@pytest.mark.parametrize("what", ARGUMENTS)
@kernel_test(features=PROTECTED)
def test_arguments(what: str) -> None:
    with scene_of_four() as scene:
        check(scene, ARGUMENTS[what](scene.whole), errno.EINVAL, 0)


@pytest.mark.parametrize("what", MAPPINGS)
@kernel_test(features=PROTECTED)
def test_mappings(what: str) -> None:
    change, error = MAPPINGS[what]
    with scene_of_four() as scene:
        change(scene)
        check(scene, scene.whole, error, 0 if error else LENGTH)


@pytest.mark.parametrize("what", PAGES)
@kernel_test(features=PROTECTED)
def test_pages(what: str) -> None:
    steps, error = PAGES[what]
    with scene_of_four() as scene:
        operation = scene.whole
        for step in steps:
            answer = step(scene)
            operation = answer if isinstance(answer, Operation) else operation
        check(scene, operation, error, 2 * PAGE if error else LENGTH)


@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test(features=PROTECTED)
def test_a_huge_page_at_the_destination_is_eexist() -> None:
    with (
        scene_of_four() as scene,
        Memory.map(HUGE_PAGE_SIZE, transparent_huge=True) as huge,
    ):
        huge.touch(write=True)
        scene.uffd.register(huge.start, huge.length)
        check(scene, scene.whole._replace(dst=huge.start), errno.EEXIST, 0)


@pytest.mark.parametrize("side", ["source", "destination", "both"])
@pytest.mark.parametrize("kind", [kind for kind in MemoryType if kind is not MemoryType.ANONYMOUS])
@kernel_test(features=PROTECTED)
def test_memory_of_another_kind_is_einval(kind: MemoryType, side: str) -> None:
    plain = MemoryType.ANONYMOUS
    with (
        Userfaultfd.open(PROTECTED) as uffd,
        Memory.map(HUGE_PAGE_SIZE, plain if side == "destination" else kind) as source,
        Memory.map(HUGE_PAGE_SIZE, plain if side == "source" else kind) as memory,
    ):
        source.touch(write=True)
        uffd.register(memory.start, memory.length)
        [result] = uffd.execute([Operation(Code.MOVE, memory.start, HUGE_PAGE_SIZE, source.start)])
        assert (result.error, result.done) == (errno.EINVAL, 0)
        assert scan_pages(memory.start, HUGE_PAGE_SIZE) == []


@kernel_test(features=PROTECTED)
def test_from_another_process_it_is_einval() -> None:
    with (
        Userfaultfd.open(PROTECTED) as uffd,
        Memory.map(LENGTH) as source,
        Memory.map(LENGTH) as memory,
    ):
        source.write(0, b"m" * LENGTH)
        uffd.register(memory.start, LENGTH)

        def move() -> tuple[int, int]:
            [result] = uffd.execute([Operation(Code.MOVE, memory.start, LENGTH, source.start)])
            return result.error, result.done

        assert in_child(move).result() == (errno.EINVAL, 0)


@kernel_test(features=Features.MOVE)
def test_it_need_not_be_negotiated() -> None:
    with (
        Userfaultfd.open() as uffd,
        Memory.map(PAGE) as source,
        Memory.map(PAGE) as memory,
    ):
        source.write(0, b"m" * PAGE)
        uffd.register(memory.start, PAGE)
        [result] = uffd.execute([Operation(Code.MOVE, memory.start, PAGE, source.start)])
        assert (result.error, result.done) == (0, PAGE)


@pytest.mark.parametrize("wrong", [False, True])
@kernel_test(features=Features.MOVE | Features.EVENT_REMOVE)
def test_an_event_in_flight_is_eagain_whatever_else_is_wrong(wrong: bool) -> None:
    with (
        Userfaultfd.open(Features.MOVE | Features.EVENT_REMOVE) as uffd,
        Memory.map(LENGTH, dont_fork=True) as source,
        Memory.map(LENGTH) as memory,
        Memory.map(PAGE) as discarded,
    ):
        source.write(0, b"m" * LENGTH)
        for each in (memory, discarded):
            uffd.register(each.start, each.length)
        discarding = in_thread(discarded.advise, Advice.DONTNEED)
        wait_readable(uffd)
        operation = Operation(Code.MOVE, memory.start, LENGTH, source.start)
        bad = operation._replace(dst=1, src=2, length=3, mode=4)
        [result] = uffd.execute([bad if wrong else operation])
        assert (result.status, result.error, result.done) == (Status.RETRY, errno.EAGAIN, 0)
        assert uffd.read_events() == [RemoveEvent(discarded.start, discarded.end)]
        discarding.result()
        [result] = uffd.execute([bad if wrong else operation])
        expected = (errno.EINVAL, 0) if wrong else (0, LENGTH)
        assert (result.error, result.done) == expected
