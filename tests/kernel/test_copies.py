"""Copies in the place of moves: unreleasable sources, several mappings, parts that differ."""

from __future__ import annotations

import pytest

from tests.kernel.page_flags import write_protected
from tests.support.calls import in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_fault
from tests.support.obstacles import BOTH_MODES, PROTECTED, lock
from tests.support.page_contents import PAGE
from uffdaemon import Advice, Memory, MemoryType, Outcome, errors
from uffdaemon.lowlevel import PageCategory, Userfaultfd, scan_pages
from uffdaemon.moves import Fallback, copy_exactly, move
from uffdaemon.moves.driver import check_empty


@pytest.mark.parametrize("kind", [MemoryType.ANONYMOUS, MemoryType.SHMEM])
@kernel_test(features=PROTECTED)
def test_what_cannot_be_released_is_taken_back(kind: MemoryType) -> None:
    with (
        Userfaultfd.open(PROTECTED) as uffd,
        Memory.map(PAGE, MemoryType.SHMEM) as source,
        Memory.map(PAGE, kind) as target,
    ):
        source.write(0, b"x" * PAGE)
        for memory in (source, target):
            uffd.register(memory.start, PAGE, BOTH_MODES)
        lock(source.start)  # MADV_REMOVE refuses it
        with pytest.raises(errors.MoveRefused, match="EINVAL") as caught:
            move(uffd, target.start, source.start, PAGE, fallback=Fallback())
        assert not isinstance(caught.value, errors.WrongMemory)
        # It is at the source alone, and whoever writes there need not wait.
        assert source.read(0, 1) == b"x"
        source.write(0, b"y")
        assert not write_protected(target.start)
        reader = in_thread(target.read, 0, 1)
        assert next_fault(uffd).address == target.start
        uffd.copy(target.start, b"z" * PAGE)
        assert reader.result() == b"z"
        target.write(0, b"w")


@kernel_test(features=PROTECTED)
def test_each_mapping_of_the_destination_is_copied_by_itself() -> None:
    with (
        Userfaultfd.open(PROTECTED) as uffd,
        Memory.map(4 * PAGE) as source,
        Memory.map(4 * PAGE) as target,
    ):
        source.write(0, b"x" * source.length)
        target.advise(Advice.DONTFORK, 0, 2 * PAGE)
        for memory in (source, target):
            uffd.register(memory.start, memory.length, BOTH_MODES)
        moved = copy_exactly(uffd, target.start, source.start, source.length, verify=True)
        assert moved.bytes(Outcome.EXACTLY_COPIED) == source.length
        assert target.read(0, target.length) == b"x" * target.length


@kernel_test(features=PROTECTED)
def test_writes_are_risked_only_where_protection_is_not_to_be_had() -> None:
    with (
        Userfaultfd.open(PROTECTED) as uffd,
        Memory.map(4 * PAGE, MemoryType.SHMEM) as source,
        Memory.map(4 * PAGE) as target,
    ):
        source.write(0, b"x" * source.length)
        uffd.register(target.start, target.length, BOTH_MODES)
        uffd.register(source.start + 2 * PAGE, 2 * PAGE, BOTH_MODES)
        fallback = Fallback(lose_writes=True)
        moved = move(uffd, target.start, source.start, source.length, fallback=fallback)
        assert [(run.length, run.outcome) for run in moved.runs] == [
            (2 * PAGE, Outcome.COPIED),
            (2 * PAGE, Outcome.EXACTLY_COPIED),
        ]
        assert not scan_pages(source.start, source.length, required=PageCategory.PRESENT)
        assert target.read(0, target.length) == b"x" * target.length


@pytest.mark.parametrize("holes", [False, True])
@kernel_test(features=PROTECTED)
def test_pages_of_a_file_that_are_not_mapped_are_no_holes(holes: bool) -> None:
    with (
        Userfaultfd.open(PROTECTED) as uffd,
        Memory.map(2 * PAGE, MemoryType.SHMEM) as source,
        Memory.map(2 * PAGE) as target,
        source.alias() as alias,
    ):
        for memory in (source, target):
            uffd.register(memory.start, memory.length, BOTH_MODES)
        alias.write(0, b"x" * PAGE)
        if not holes:
            alias.write(PAGE, b"y" * PAGE)
        moved = move(
            uffd,
            target.start,
            source.start,
            source.length,
            fallback=Fallback(),
            allow_source_holes=holes,
            verify=True,
        )
        assert moved.complete
        assert target.read(0, PAGE) == b"x" * PAGE
        # The page is the file's no more; reading a hole there makes a page of zeros.
        assert alias.read(0, 1) == bytes(1)
        with pytest.raises(errors.SourceNotEmpty):
            check_empty(source.start, PAGE)
