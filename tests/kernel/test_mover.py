"""Moving many ranges in one call, with proof, and by exact copies."""

from __future__ import annotations

import errno
import mmap
import os
from array import array
from ctypes import addressof, c_char

import pytest

from tests.kernel.moving import fates, there, two_sides
from tests.kernel.page_flags import write_protected
from tests.support.calls import in_child, in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_fault
from tests.support.obstacles import Pins
from tests.support.page_contents import PAGE, content
from uffdaemon import Advice, Memory, MemoryType, Outcome, errors
from uffdaemon.kernel.page_probe import look
from uffdaemon.lowlevel import Features, PageCategory, RegisterMode, Userfaultfd, scan_pages
from uffdaemon.moves import Cause, Fallback, Moved, can_move, copy_exactly, move, move_many
from uffdaemon.ranges import HUGE_PAGE_SIZE

BOTH = RegisterMode.MISSING | RegisterMode.WP
WP = Features.MOVE | Features.PAGEFAULT_FLAG_WP | Features.WP_HUGETLBFS_SHMEM
REMOVE = Features.MOVE | Features.EVENT_REMOVE


# -- many --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test(features=Features.MOVE)
def test_neighbours_share_an_ioctl() -> None:
    half = HUGE_PAGE_SIZE // 2
    with (
        Userfaultfd.open(Features.MOVE) as uffd,
        Memory.map(2 * HUGE_PAGE_SIZE, transparent_huge=True, dont_fork=True) as source,
        Memory.map(2 * HUGE_PAGE_SIZE, transparent_huge=True) as target,
    ):
        uffd.register(target.start, target.length)
        source.touch(write=True)
        # Two halves of a huge page arrive as one only if the kernel is asked for both at once.
        moves = [
            (target.start + at, source.start + at, half)
            for at in (0, half, HUGE_PAGE_SIZE + half, HUGE_PAGE_SIZE)
        ]
        moved = move_many(uffd, moves, verify=True)
        assert [run.length for run in moved.runs] == [2 * half, half, half]
        [huge] = scan_pages(target.start, target.length, required=PageCategory.HUGE)
        assert (huge.start, huge.length) == (target.start, HUGE_PAGE_SIZE)


@kernel_test(features=Features.MOVE)
def test_an_array_and_any_iterable_say_the_same() -> None:
    with two_sides(8) as (uffd, source, target):
        # Backwards: every page has an ioctl of its own, and a run of its own.
        triples = [(target.start + n * PAGE, source.start + n * PAGE, PAGE) for n in (3, 2, 1, 0)]
        moved = move_many(uffd, iter(triples))
        assert [run[:3] for run in moved.runs] == triples
        assert moved.bytes(Outcome.MOVED) == 4 * PAGE
        flat = array("Q")
        for n in range(4, 8):
            flat.extend((target.start + n * PAGE, source.start + n * PAGE, PAGE))
        moved = move_many(uffd, flat, verify=True)
        assert [run[:3] for run in moved.runs] == [
            (target.start + 4 * PAGE, source.start + 4 * PAGE, 4 * PAGE)
        ]
        # What was returned is no view of the caller's array.
        flat[0] = 0
        assert moved.runs[0].dst == target.start + 4 * PAGE
        assert target.read(0, 8 * PAGE) == content(8)
        assert there(source) == []


@kernel_test(features=Features.MOVE)
def test_moving_nothing_is_no_mistake() -> None:
    with Userfaultfd.open(Features.MOVE) as uffd:
        nothing: list[tuple[int, int, int]] = []
        for moves in (nothing, iter(nothing), array("Q")):
            moved = move_many(uffd, moves, verify=True)
            assert (moved.runs, moved.complete, moved.refused) == ((), True, [])


@kernel_test(features=WP)
def test_every_triple_goes_as_far_as_it_can_and_says_what_stopped_it() -> None:
    with (
        two_sides(12, WP) as (uffd, source, target),
        Pins(source.start + 8 * PAGE),
    ):
        source.advise(Advice.DONTNEED, 5 * PAGE, PAGE)
        uffd.copy(target.start + 10 * PAGE, b"o" * PAGE)
        moves = [
            (target.start + first * PAGE, source.start + first * PAGE, pages * PAGE)
            for first, pages in ((4, 3), (7, 3), (10, 2), (0, 4))
        ]
        # The first two are neighbours, and stop at a hole in the first of them.
        with pytest.raises(errors.SourceHole) as caught:
            move_many(uffd, moves)
        error = caught.value
        assert (error.address, error.errno) == (target.start + 5 * PAGE, errno.ENOENT)
        assert fates(error.moved) == [
            (1, Outcome.MOVED, None),
            (1, Outcome.FAILED, Cause.SOURCE_HOLE),
            (2, Outcome.MOVED, None),
            (1, Outcome.FAILED, Cause.PINNED),
            (1, Outcome.MOVED, None),
            (1, Outcome.FAILED, Cause.NOT_EMPTY),
            (1, Outcome.MOVED, None),
            (4, Outcome.MOVED, None),
        ]
        assert there(source) == [8, 10]
        assert [n for n in range(12) if n not in there(target)] == [5, 8]
        assert source.read(8 * PAGE, PAGE) == content(12)[8 * PAGE : 9 * PAGE]
        assert target.read(10 * PAGE, PAGE) == b"o" * PAGE


@kernel_test(features=Features.MOVE)
def test_what_is_no_list_of_triples_moves_nothing() -> None:
    with two_sides(4) as (uffd, source, target):
        good = (target.start, source.start, PAGE)
        arrays = [
            array("Q", good[:2]),
            array("Q", [*good, 0]),
            array("I", [1, 2, 3]),
            array("d", good),
        ]
        lists = [[good[:2]], [good[:2]] * 3, [(*good, 0)], [good, (-PAGE, source.start, PAGE)]]
        for moves in (*arrays, *lists):
            with pytest.raises(errors.InvalidRange):
                move_many(uffd, moves)  # type: ignore[arg-type]
        assert there(source) == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [(1, 0, PAGE), (0, 1, PAGE), (0, 0, PAGE - 1), (0, 0, 0)])
@kernel_test(features=Features.MOVE)
def test_a_triple_that_is_not_made_of_pages_moves_nothing(bad: tuple[int, int, int]) -> None:
    with two_sides(4) as (uffd, source, target):
        dst, src, length = bad
        moves = [
            (target.start, source.start, PAGE),
            (target.start + 2 * PAGE + dst, source.start + 2 * PAGE + src, length),
        ]
        with pytest.raises(errors.InvalidRange):
            move_many(uffd, moves)
        # No error could say what has become of the first.
        assert there(source) == [0, 1, 2, 3]


@kernel_test(features=Features.MOVE)
def test_what_the_library_did_not_map_is_refused_by_name_before_anything_moves() -> None:
    with (
        two_sides(2) as (uffd, source, target),
        Memory.map(PAGE, dont_fork=True) as far,
        mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as theirs,
    ):
        theirs[:] = b"t" * PAGE
        view = c_char.from_buffer(theirs)
        foreign = addressof(view)
        del view
        far.write(0, b"f" * PAGE)
        moves = [
            (target.start, source.start, PAGE),
            (target.start + PAGE, foreign, PAGE),
        ]
        with pytest.raises(errors.ForeignMemory, match=f"{foreign:#x}"):
            move_many(uffd, moves)
        endless = 1 << 40
        with pytest.raises(errors.ForeignMemory, match=f"{endless} bytes at {far.start:#x}"):
            move_many(uffd, [moves[0], (target.start, far.start, endless)])
        assert (there(source), there(target)) == ([0, 1], [])
        # Several of ours are no less ours for what may lie between them.
        move_many(uffd, [moves[0], (target.start + PAGE, far.start, PAGE)], verify=True)
        assert target.read(0, 2 * PAGE) == content(1) + b"f" * PAGE
        target.advise(Advice.DONTNEED)
        move_many(uffd, moves[1:], foreign=True, verify=True)
        assert target.read(PAGE, PAGE) == b"t" * PAGE
        assert theirs[:] == bytes(PAGE)


# -- with proof --------------------------------------------------------------------------------


@kernel_test(features=Features.MOVE)
def test_a_source_that_is_touched_again_is_not_proved_empty() -> None:
    with two_sides(4, dont_fork=False) as (uffd, source, target):
        # Shared with a child that has ended: not all is done in one step.
        assert in_child(lambda: None).result() is None
        uffd.tell = lambda result: source.touch(2 * PAGE, PAGE)
        with pytest.raises(errors.SourceNotEmpty, match="a thread has touched it since") as caught:
            move(uffd, target.start, source.start, 4 * PAGE, verify=True)
        assert (caught.value.address, caught.value.length) == (source.start + 2 * PAGE, PAGE)
        # It has moved all the same.
        assert target.read(0, 4 * PAGE) == content(4)


@kernel_test(features=Features.MOVE)
def test_a_source_that_a_later_move_fills_is_not_proved_empty() -> None:
    with two_sides(2) as (uffd, source, target):
        uffd.register(source.start, source.length)
        moves = [
            (target.start, source.start, PAGE),
            (source.start, source.start + PAGE, PAGE),
        ]
        with pytest.raises(errors.SourceNotEmpty) as caught:
            move_many(uffd, moves, verify=True)
        assert (caught.value.address, caught.value.length) == (source.start, PAGE)
        assert target.read(0, PAGE) + source.read(0, PAGE) == content(2)


# -- exact copies ------------------------------------------------------------------------------

_EXACT = (
    (MemoryType.SHMEM, MemoryType.ANONYMOUS),
    (MemoryType.ANONYMOUS, MemoryType.SHMEM),
    (MemoryType.ANONYMOUS, MemoryType.ANONYMOUS),
    (MemoryType.HUGETLB, MemoryType.HUGETLB_PRIVATE),
    (MemoryType.HUGETLB_PRIVATE, MemoryType.HUGETLB),
)


@pytest.mark.parametrize(("kind", "into"), _EXACT, ids=lambda kind: kind.value)
@kernel_test(features=WP)
def test_an_exact_copy_leaves_the_source_empty_and_both_sides_writable(
    kind: MemoryType, into: MemoryType
) -> None:
    size = HUGE_PAGE_SIZE if kind.huge else PAGE
    data = content(3, size)
    with (
        Userfaultfd.open(WP) as uffd,
        # A handler of its own, as where the source is somebody else's region.
        Userfaultfd.open(WP) as theirs,
        Memory.map(3 * size, kind, dont_fork=True) as source,
        Memory.map(4 * size, into) as target,
    ):
        source.write(0, data)
        uffd.register(target.start, target.length, BOTH)
        with pytest.raises(errors.Unprotectable):
            copy_exactly(uffd, target.start, source.start, size, page_size=size)
        assert source.read(0, 3 * size) == data
        theirs.register(source.start, source.length, BOTH)
        reader = in_thread(target.read, size, size)
        next_fault(uffd)
        moved = copy_exactly(
            uffd,
            target.start,
            source.start,
            3 * size,
            source_uffd=theirs,
            verify=True,
            page_size=size,
            piece=size,
        )
        [run] = moved.runs
        assert run[3:5] == (Outcome.EXACTLY_COPIED, Cause.ASKED_FOR)
        assert reader.result() == data[size : 2 * size]
        assert scan_pages(source.start, source.length) == []
        # A later writer of the source finds a missing page, and one of the destination nothing.
        target.write(0, b"w")
        assert target.read(0, 3 * size) == b"w" + data[1:]
        writer = in_thread(source.write, size, b"v")
        assert next_fault(theirs).address == source.start + size
        theirs.copy(source.start + size, bytes(size), page_size=size)
        writer.result()
        assert source.read(size, 2) == b"v\0"


@kernel_test(features=WP)
def test_what_is_there_is_not_overwritten_by_a_copy_and_the_source_stays_writable() -> None:
    with two_sides(4, WP) as (uffd, source, target):
        for memory in (source, target):
            uffd.register(memory.start, memory.length, BOTH)
        uffd.copy(target.start + PAGE, b"o" * PAGE)
        source.advise(Advice.DONTNEED, 3 * PAGE, PAGE)
        with pytest.raises(errors.DestinationNotEmpty) as caught:
            copy_exactly(uffd, target.start, source.start, 4 * PAGE)
        assert fates(caught.value.moved) == [
            (1, Outcome.EXACTLY_COPIED, Cause.ASKED_FOR),
            (1, Outcome.FAILED, Cause.NOT_EMPTY),
            (1, Outcome.EXACTLY_COPIED, Cause.ASKED_FOR),
            (1, Outcome.FAILED, Cause.SOURCE_HOLE),
        ]
        assert (there(source), there(target)) == ([1], [0, 1, 2])
        sides = range(source.start, source.end, PAGE), range(target.start, target.end, PAGE)
        assert not any(write_protected(address) for side in sides for address in side)
        source.write(PAGE, b"w")


# -- other memory ------------------------------------------------------------------------------


@kernel_test(features=WP)
def test_from_outside_of_a_process_nothing_moves_and_copies_are_exact() -> None:
    with two_sides(2, WP) as (uffd, source, target):
        for memory in (source, target):
            uffd.register(memory.start, memory.length, BOTH)
        # What was adopted is taken for another process's.
        with Userfaultfd.adopt(os.dup(uffd.fileno())) as foreign:
            arguments = (foreign, target.start, source.start, 2 * PAGE)
            with pytest.raises(errors.OtherProcess):
                move(*arguments)
            with pytest.raises(errors.OtherProcess):
                move_many(foreign, [arguments[1:]])
            assert {run.cause for run in can_move(*arguments)} == {Cause.OTHER_PROCESS}
            # It protects addresses over there, and so cannot protect this source.
            with pytest.raises(errors.Unprotectable):
                move(*arguments, fallback=Fallback())
            assert there(source) == [0, 1]
            moved = move(*arguments, fallback=Fallback(), source_uffd=uffd, verify=True)
        assert fates(moved) == [(2, Outcome.EXACTLY_COPIED, Cause.OTHER_PROCESS)]
        assert target.read(0, 2 * PAGE) == content(2)


@kernel_test(features=Features.MOVE)
def test_a_range_of_several_mappings_moves_piece_by_piece() -> None:
    with two_sides(9) as (uffd, source, target):
        for memory, first, pages in ((source, 2, 3), (target, 4, 2)):
            memory.advise(Advice.NOHUGEPAGE, first * PAGE, pages * PAGE)
        uffd.unregister(target.start + 7 * PAGE, PAGE)
        source.advise(Advice.DONTNEED, 3 * PAGE, PAGE)
        with pytest.raises(errors.SourceHole) as caught:
            move(uffd, target.start, source.start, 9 * PAGE)
        assert fates(caught.value.moved) == [
            (3, Outcome.MOVED, None),
            (1, Outcome.FAILED, Cause.SOURCE_HOLE),
            (3, Outcome.MOVED, None),
            (1, Outcome.FAILED, Cause.NOT_REGISTERED),
            (1, Outcome.MOVED, None),
        ]
        assert (there(source), there(target)) == ([7], [0, 1, 2, 4, 5, 6, 8])


@pytest.mark.usefixtures("ksm")
@kernel_test(features=Features.MOVE)
def test_what_is_merged_is_refused_by_name_and_unmerged_if_that_may_be() -> None:
    with two_sides(16) as (uffd, source, target):
        source.write(0, b"k" * source.length)
        source.advise(Advice.MERGEABLE)
        while not all(page.merged for page in look(source.start, source.length)):
            os.sched_yield()  # ksmd tells nobody; the deadline is the limit
        half = 8 * PAGE
        with pytest.raises(errors.PageMerged) as caught:
            move(uffd, target.start, source.start, half)
        assert fates(caught.value.moved) == [(8, Outcome.FAILED, Cause.MERGED)]
        foretold = can_move(uffd, target.start, source.start, half, fallback=Fallback())
        moved = move(uffd, target.start, source.start, half, fallback=Fallback(), verify=True)
        assert fates(moved) == [(8, Outcome.UNSHARED_AND_MOVED, Cause.MERGED)]
        assert fates(Moved(tuple(foretold))) == fates(moved)
        assert target.read(0, half) == b"k" * half
        assert source.read(half, half) == b"k" * half


# -- looking -----------------------------------------------------------------------------------


@kernel_test(features=Features.MOVE)
def test_after_a_fork_each_side_sees_its_own_pages() -> None:
    with two_sides(3, dont_fork=False) as (uffd, source, target):
        before = look(source.start, source.length)
        assert [page.exclusive for page in before] == [True] * 3

        def look_again() -> tuple[list[int], list[int]]:
            source.advise(Advice.DONTNEED, 0, PAGE)
            target.write(PAGE, b"child")
            return there(source), there(target)

        assert in_child(look_again).result() == ([1, 2], [1])
        assert (there(source), there(target)) == ([0, 1, 2], [])
        # The kernel goes on taking for shared what the child had; what it sees is told at once.
        assert look(source.start, source.length) == before
        moved = move(uffd, target.start, source.start, 3 * PAGE, verify=True)
        assert moved.bytes(Outcome.UNSHARED_AND_MOVED) == 3 * PAGE
