"""UFFDIO_MOVE: what it moves, what it refuses, and that no refusal is ever a copy."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from tests.kernel.conformance import Handler
from tests.kernel.moving import two_sides
from tests.kernel.page_flags import exclusive
from tests.support.calls import in_child, in_thread
from tests.support.clib import Helpers
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_fault
from tests.support.obstacles import Pins
from tests.support.page_contents import PAGE, content
from uffdaemon import Advice, Memory, MemoryType
from uffdaemon.errors import OperationError, PageNotExclusive, PlacementRefused
from uffdaemon.lowlevel import (
    Code,
    Features,
    Operation,
    PageCategory,
    RegisterMode,
    Status,
    Userfaultfd,
    scan_pages,
)
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from pathlib import Path

    from uffdaemon.uapi.events import PageFault


def _present(memory: Memory) -> int:
    """Bytes that have a page."""
    return sum(found.length for found in scan_pages(memory.start, memory.length))


@pytest.mark.smoke
@kernel_test(features=Features.MOVE)
def test_a_move_answers_a_fault_and_empties_the_source() -> None:
    with two_sides(4) as (uffd, source, memory):
        reader = in_thread(memory.read, 0, memory.length)
        next_fault(uffd)
        result = uffd.move(memory.start, source.start, memory.length)
        assert (result.status, result.done) == (Status.DONE, memory.length)
        assert reader.result() == content(4)
        assert _present(source) == 0


@kernel_test(features=Features.MOVE)
def test_what_a_fork_shares_is_busy_until_it_is_made_our_own() -> None:
    with two_sides(4, dont_fork=False) as (uffd, source, memory):
        assert in_child(lambda: None).result() is None
        # The child is gone, and pagemap says that we are alone: the kernel knows better.
        assert exclusive(source.start + PAGE)
        source.advise(Advice.POPULATE_WRITE, 0, PAGE)
        with pytest.raises(PageNotExclusive, match="not exclusive to us") as caught:
            uffd.move(memory.start, source.start, memory.length)
        error = caught.value
        assert error.errno == errno.EBUSY
        assert (error.result.done, error.result.present) == (PAGE, 0)
        assert (error.address, error.length) == (memory.start + PAGE, 3 * PAGE)
        # Not copied behind the caller's back.
        assert _present(memory) == PAGE
        assert _present(source) == 3 * PAGE

        source.advise(Advice.POPULATE_WRITE, PAGE, 3 * PAGE)
        rest = error.result.rest
        assert uffd.move(rest.dst, rest.src, rest.length).done == 3 * PAGE
        assert memory.read(0, memory.length) == content(4)


@kernel_test(features=Features.MOVE)
def test_dont_fork_keeps_a_fork_from_getting_in_the_way() -> None:
    with two_sides(1) as (uffd, source, memory):
        child = in_child(signal.pause)
        assert uffd.move(memory.start, source.start, PAGE).complete
        os.kill(child.pid, signal.SIGKILL)
        child.wait()


@pytest.mark.usefixtures("ksm")
@kernel_test(features=Features.MOVE)
def test_what_ksm_merged_is_busy_until_it_is_unmerged() -> None:
    pages = 16
    with two_sides(pages, filled=False) as (uffd, source, memory):
        source.write(0, b"k" * source.length)
        source.advise(Advice.MERGEABLE)
        while not _merged():
            os.sched_yield()  # ksmd tells nobody; the deadline is the limit
        with pytest.raises(PageNotExclusive):
            uffd.move(memory.start, source.start, memory.length)
        source.advise(Advice.UNMERGEABLE)
        done = pages * PAGE - _present(source)
        result = uffd.move(memory.start + done, source.start + done, memory.length - done)
        assert result.complete
        assert memory.read(0, memory.length) == b"k" * memory.length


@kernel_test(features=Features.MOVE)
def test_what_is_pinned_stays_busy_until_it_is_let_go() -> None:
    with two_sides(1) as (uffd, source, memory):
        pins = Pins(source.start)
        for _ in range(2):
            with pytest.raises(PageNotExclusive, match="pinned for I/O"):
                uffd.move(memory.start, source.start, PAGE)
            # The cure for what a fork shares: what is still busy then is pinned.
            source.advise(Advice.POPULATE_WRITE)
        assert source.read(0, PAGE) == content(1)
        assert _present(memory) == 0
        pins.end()
        assert uffd.move(memory.start, source.start, PAGE).complete


def _merged() -> bool:
    with open("/proc/self/ksm_merging_pages") as pages:
        return int(pages.read()) > 0


@kernel_test(features=Features.MOVE)
def test_a_destination_that_is_not_empty_is_eexist() -> None:
    with two_sides(4) as (uffd, source, memory):
        uffd.copy(memory.start + 2 * PAGE, b"o" * PAGE)
        with pytest.raises(OperationError, match="the destination is not empty") as caught:
            uffd.move(memory.start, source.start, memory.length)
        assert caught.value.errno == errno.EEXIST
        assert caught.value.result.done == 2 * PAGE
        assert caught.value.address == memory.start + 2 * PAGE
        assert memory.read(0, 3 * PAGE) == content(2) + b"o" * PAGE
        assert source.read(2 * PAGE, 2 * PAGE) == content(4)[2 * PAGE :]


@kernel_test(features=Features.MOVE)
def test_a_hole_in_the_source_is_enoent_unless_it_is_allowed() -> None:
    with two_sides(4, filled=False) as (uffd, source, memory):
        for page in (0, 1, 3):
            source.write(page * PAGE, b"m" * PAGE)
        with pytest.raises(OperationError, match="a hole in the source") as caught:
            uffd.move(memory.start, source.start, memory.length)
        assert caught.value.errno == errno.ENOENT
        assert caught.value.result.done == 2 * PAGE

        rest = caught.value.result.rest
        result = uffd.move(rest.dst, rest.src, rest.length, allow_source_holes=True)
        assert (result.status, result.progress) == (Status.DONE, 2 * PAGE)
        assert _present(source) == 0
        # Where the hole was, there still is nothing.
        reader = in_thread(memory.read, 2 * PAGE, 1)
        assert next_fault(uffd).address == memory.start + 2 * PAGE
        uffd.zeropage(memory.start + 2 * PAGE, PAGE)
        assert reader.result() == b"\0"
        assert memory.read(3 * PAGE, 1) == b"m"


@pytest.mark.parametrize("kind", [kind for kind in MemoryType if kind is not MemoryType.ANONYMOUS])
@kernel_test(features=Features.MOVE)
def test_only_anonymous_memory_moves(kind: MemoryType) -> None:
    length = HUGE_PAGE_SIZE
    with (
        Userfaultfd.open(Features.MOVE) as uffd,
        Memory.map(length) as plain,
        Memory.map(length) as target,
        Memory.map(length, kind) as other,
    ):
        plain.touch(write=True)
        other.touch(write=True)
        uffd.register(target.start, length)
        with pytest.raises(OperationError, match="private anonymous") as caught:
            uffd.move(target.start, other.start, length)
        assert caught.value.errno == errno.EINVAL
        assert caught.value.result.progress == 0
        other.advise(Advice.REMOVE if kind.shared else Advice.DONTNEED)
        uffd.register(other.start, length)
        with pytest.raises(OperationError, match="private anonymous") as caught:
            uffd.move(other.start, plain.start, length)
        assert caught.value.errno == errno.EINVAL
        assert _present(plain) == length


@kernel_test(features=Features.MOVE)
def test_another_process_is_refused_before_the_kernel_is_asked() -> None:
    with Userfaultfd.open(Features.MOVE) as uffd, Memory.map(2 * PAGE) as memory:
        uffd.register(memory.start, PAGE)
        foreign = Userfaultfd.adopt(os.dup(uffd.fileno()))
        with pytest.raises(PlacementRefused, match="only within the process"):
            foreign.move(memory.start, memory.start + PAGE, PAGE)
        # And the kernel's own answer, from a fork that holds the descriptor: EINVAL.
        memory.touch(PAGE, PAGE, write=True)

        def move() -> int:
            with pytest.raises(OperationError) as caught:
                uffd.move(memory.start, memory.start + PAGE, PAGE)
            return caught.value.number

        assert in_child(move).result() == errno.EINVAL


@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test(features=Features.MOVE)
def test_a_part_of_a_huge_page_moves_and_leaves_the_rest() -> None:
    with two_sides(HUGE_PAGE_SIZE // PAGE, filled=False, huge=True) as (uffd, source, memory):
        source.write(0, b"h" * source.length)
        part = 16 * PAGE
        assert uffd.move(memory.start + part, source.start + part, part).done == part
        assert memory.read(part, part) == b"h" * part
        assert _present(source) == HUGE_PAGE_SIZE - part
        assert source.read(0, part) == b"h" * part


@kernel_test(features=Features.MOVE)
def test_the_zero_page_moves() -> None:
    with two_sides(1, filled=False) as (uffd, source, memory):
        source.touch()
        [zero] = scan_pages(source.start, PAGE)
        assert zero.categories & PageCategory.PFNZERO
        assert uffd.move(memory.start, source.start, PAGE).done == PAGE
        assert _present(source) == 0
        assert memory.read(0, PAGE) == bytes(PAGE)


@kernel_test(features=Features.MOVE | Features.POISON | Features.WP_UNPOPULATED)
def test_markers_are_in_the_way_on_both_sides() -> None:
    features = Features.MOVE | Features.POISON | Features.WP_UNPOPULATED
    with (
        Userfaultfd.open(features | Features.PAGEFAULT_FLAG_WP) as uffd,
        Memory.map(2 * PAGE, dont_fork=True) as source,
        Memory.map(2 * PAGE) as memory,
    ):
        source.touch(0, PAGE, write=True)
        uffd.register(memory.start, memory.length, RegisterMode.MISSING | RegisterMode.WP)
        uffd.register(source.start + PAGE, PAGE)
        uffd.poison(memory.start, PAGE)
        with pytest.raises(OperationError) as caught:
            uffd.move(memory.start, source.start, PAGE)
        assert caught.value.errno == errno.EEXIST
        uffd.write_protect(memory.start + PAGE, PAGE)
        with pytest.raises(OperationError) as caught:
            uffd.move(memory.start + PAGE, source.start, PAGE)
        assert caught.value.errno == errno.EEXIST
        uffd.write_protect(memory.start + PAGE, PAGE, protect=False)
        uffd.poison(source.start + PAGE, PAGE)
        with pytest.raises(OperationError, match="a marker") as caught:
            uffd.move(memory.start + PAGE, source.start + PAGE, PAGE)
        assert caught.value.errno == errno.EFAULT


@kernel_test(features=Features.MOVE)
def test_no_write_is_lost_while_a_page_is_moved_back_and_forth(helpers: Path) -> None:
    moves = 200
    library = Helpers(helpers)
    with (
        Userfaultfd.open(Features.MOVE) as uffd,
        Memory.map(PAGE, dont_fork=True) as source,
        Memory.map(PAGE, dont_fork=True) as memory,
    ):
        source.touch(write=True)
        uffd.register(memory.start, PAGE)
        uffd.register(source.start, PAGE)

        def move_back(uffd: Userfaultfd, fault: PageFault, offset: int) -> None:
            assert uffd.move(source.start, memory.start, PAGE).done == PAGE

        added = (ctypes.c_uint64 * 1)()
        enough = threading.Event()

        def count() -> None:
            while not enough.is_set():
                library.increment(source.start, PAGE, 1000, 0, added)

        handler = Handler(source.start, PAGE, move_back)
        running = in_thread(handler.run, uffd)
        counting = in_thread(count)
        moved = 0
        while moved < moves:
            [result] = uffd.execute([Operation(Code.MOVE, memory.start, PAGE, source.start)])
            # It may be away already, and the handler has not brought it back yet.
            assert result.error in (0, errno.ENOENT, errno.EEXIST), result
            moved += result.done == PAGE
        enough.set()
        counting.result()
        handler.stop.cross()
        counts = running.result()
        assert counts.missing in (moves, moves - 1)
        where = source if counts.missing == moves else memory
        assert int.from_bytes(where.read(0, 8), "little") == added[0]
