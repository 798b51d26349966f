"""Staging: what is read or decoded into it arrives whole, and nothing of it stays behind."""

from __future__ import annotations

import errno
import os
import signal
import zlib
from contextlib import contextmanager
from itertools import product
from typing import TYPE_CHECKING

import pytest

from tests.kernel.moving import fates, there
from tests.support.calls import in_child, in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.messages import next_fault
from tests.support.page_contents import PAGE, content
from uffdaemon import Memory, Outcome, errors
from uffdaemon.lowlevel import Features, PageCategory, Userfaultfd, scan_pages
from uffdaemon.moves import Cause, Fallback, Staging
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

HUGE = HUGE_PAGE_SIZE
both_kinds = pytest.mark.parametrize("huge", [True, False], ids=["huge", "4k"])


@contextmanager
def _target(length: int, *, huge: bool = False) -> Iterator[tuple[Userfaultfd, Memory]]:
    """Memory that is guarded and empty."""
    with (
        Userfaultfd.open(Features.MOVE) as uffd,
        Memory.map(length, transparent_huge=huge) as memory,
    ):
        uffd.register(memory.start, length)
        yield uffd, memory


@contextmanager
def _file(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("file")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


# -- filling by hand ---------------------------------------------------------------------------


@pytest.mark.usefixtures("transparent_huge_pages")
@both_kinds
@kernel_test(features=Features.MOVE)
def test_what_was_read_into_it_moves_to_whoever_waits(huge: bool) -> None:
    data = content(8)
    with (
        _target(8 * PAGE) as (uffd, memory),
        Staging(8 * PAGE, transparent_huge=huge) as staging,
        _file(b"head" + data) as fd,
    ):
        assert staging.length == 8 * PAGE
        assert staging.memory.length == (HUGE if huge else 8 * PAGE)
        assert staging.page_size == PAGE
        assert staging.read_from(fd, 4, 0, 8 * PAGE) == 8 * PAGE
        reader = in_thread(memory.read, PAGE, PAGE)
        next_fault(uffd)
        moved = staging.move(uffd, memory.start, 0, 8 * PAGE, verify=True)
        assert fates(moved) == [(8, Outcome.MOVED, None)]
        assert reader.result() == data[PAGE : 2 * PAGE]
        assert memory.read(0, memory.length) == data
        # The rest of a huge page of which a part has moved stays.
        assert there(staging.memory) == (list(range(8, 512)) if huge else [])


@pytest.mark.usefixtures("transparent_huge_pages")
@both_kinds
@kernel_test(features=Features.MOVE)
def test_what_was_decoded_into_a_view_moves_like_anything_else(huge: bool) -> None:
    data = content(16)
    decoder = zlib.decompressobj()
    packed = zlib.compress(data)
    with (
        _target(16 * PAGE) as (uffd, memory),
        Staging(16 * PAGE, transparent_huge=huge) as staging,
    ):
        with staging.view(0, 16 * PAGE) as view:
            at = 0
            for start in range(0, len(packed), 500):
                decoded = decoder.decompress(packed[start : start + 500])
                view[at : at + len(decoded)] = decoded
                at += len(decoded)
        assert (at, decoder.eof) == (16 * PAGE, True)
        # In any order, and used again where it is empty.
        staging.move(uffd, memory.start + 8 * PAGE, 8 * PAGE, 8 * PAGE)
        staging.move(uffd, memory.start, 0, 8 * PAGE)
        assert memory.read(0, memory.length) == data
        assert bytes(staging.view(0, PAGE)) == bytes(PAGE)


@kernel_test(features=Features.MOVE)
def test_reading_stops_at_the_end_of_the_file_and_says_where() -> None:
    with Staging(4 * PAGE, transparent_huge=False) as staging, _file(b"x" * 5000) as fd:
        assert staging.read_from(fd, 0) == 5000
        assert staging.read_from(fd, 4990, 100) == 10
        assert staging.read_from(fd, 5000) == 0
        assert staging.read_from(fd, 0, PAGE, 0) == 0
        assert bytes(staging.view(100, 20)) == b"x" * 20
        assert bytes(staging.view(4999, 2)) == b"x\0"
        with pytest.raises(OSError, match="Bad file descriptor"):
            staging.read_from(-1, 0)


# -- fill --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test(features=Features.MOVE)
def test_huge_pages_arrive_whole_where_the_destination_is_aligned() -> None:
    data = content(3 * 512)
    with (
        _target(4 * HUGE, huge=True) as (uffd, memory),
        Staging(2 * HUGE) as staging,
        _file(data) as fd,
    ):
        # Half a huge page beside the boundary at both ends; two whole ones in between.
        dst = memory.start + HUGE // 2
        moved = staging.fill(uffd, dst, fd, 0, 3 * HUGE)
        assert moved.bytes(Outcome.MOVED) == 3 * HUGE
        huge = scan_pages(memory.start, memory.length, required=PageCategory.HUGE)
        assert [(found.start, found.length) for found in huge] == [(memory.start + HUGE, 2 * HUGE)]
        assert memory.read(HUGE // 2, 3 * HUGE) == data
        assert there(memory) == list(range(256, 256 + 3 * 512))


@pytest.mark.usefixtures("transparent_huge_pages")
@kernel_test(features=Features.MOVE)
def test_huge_pages_arrive_whole_whatever_staging_was_used_for_before() -> None:
    data = content(512)
    with (
        _target(3 * HUGE, huge=True) as (uffd, memory),
        Staging(HUGE) as staging,
        _file(data) as fd,
    ):
        # One that is split for a page that is there, and a part of one.
        uffd.copy(memory.start + 7 * PAGE, b"o" * PAGE)
        assert staging.fill(uffd, memory.start, fd, 0, HUGE).bytes(Outcome.MOVED) == HUGE - PAGE
        staging.fill(uffd, memory.start + HUGE, fd, 0, 4 * PAGE)
        staging.fill(uffd, memory.start + 2 * HUGE, fd, 0, HUGE)
        [found] = scan_pages(memory.start, memory.length, required=PageCategory.HUGE)
        assert (found.start, found.length) == (memory.start + 2 * HUGE, HUGE)
        assert memory.read(2 * HUGE, HUGE) == data


@pytest.mark.usefixtures("transparent_huge_pages")
@both_kinds
@kernel_test(features=Features.MOVE)
def test_any_range_is_filled_and_its_last_page_ends_in_zeros(huge: bool) -> None:
    for first, (pages, tail) in product((0, 1, 511), ((1, 0), (3, 1), (512, 4095), (1030, 1234))):
        length = pages * PAGE
        data = content(pages)[: length - PAGE + tail] if tail else content(pages)
        with (
            _target(4 * HUGE, huge=huge) as (uffd, memory),
            Staging(HUGE, transparent_huge=huge) as staging,
            _file(b"odd" + data) as fd,
        ):
            # What it was used for before must not be seen behind the end of the file.
            staging.memory.write(0, b"\xff" * staging.length)
            moved = staging.fill(uffd, memory.start + first * PAGE, fd, 3, length)
            assert moved.complete
            assert moved.bytes(Outcome.MOVED) == length
            assert memory.read(first * PAGE, length) == data + bytes(length - len(data))
            assert there(memory) == list(range(first, first + pages))


@kernel_test(features=Features.MOVE)
def test_a_file_that_lacks_whole_pages_is_too_short_and_says_by_how_much() -> None:
    data = content(6)
    with (
        _target(8 * PAGE) as (uffd, memory),
        Staging(2 * PAGE, transparent_huge=False) as staging,
        _file(data[:-1]) as fd,
    ):
        with pytest.raises(errors.SourceTooShort) as caught:
            staging.fill(uffd, memory.start, fd, PAGE, 8 * PAGE)
        # The pieces before have arrived, and nothing is made up for the one that lacks a page.
        missing = 2 * PAGE - (PAGE - 1)
        assert str(caught.value).startswith(f"the file ends at {len(data) - 1:#x}, {missing} bytes")
        assert memory.read(0, 4 * PAGE) == data[PAGE : 5 * PAGE]
        assert there(memory) == [0, 1, 2, 3]


@kernel_test(features=Features.MOVE)
def test_filling_takes_whole_pages_and_at_least_one() -> None:
    with (
        _target(PAGE) as (uffd, memory),
        Staging(PAGE, transparent_huge=False) as staging,
        _file(b"x") as fd,
    ):
        for dst, length in ((0, 0), (0, 100), (1, PAGE), (0, -PAGE)):
            with pytest.raises(errors.InvalidRange):
                staging.fill(uffd, memory.start + dst, fd, 0, length)
        assert there(memory) == []
        # However small the piece.
        staging.fill(uffd, memory.start, fd, 0, PAGE, piece=1)
        assert memory.read(0, 2) == b"x\0"


@pytest.mark.usefixtures("transparent_huge_pages")
@both_kinds
@kernel_test(features=Features.MOVE)
def test_what_is_there_stays_and_leaves_nothing_behind(huge: bool) -> None:
    data = content(16)
    with (
        _target(HUGE, huge=huge) as (uffd, memory),
        Staging(4 * PAGE, transparent_huge=huge) as staging,
        _file(data) as fd,
    ):
        for page in (2, 3, 9):
            uffd.copy(memory.start + page * PAGE, b"o" * PAGE)
        # A whole huge page is read and not moved as one: the range is short.
        moved = staging.fill(uffd, memory.start, fd, 0, 16 * PAGE)
        assert [(run.dst - memory.start, run.length) for run in moved.refused] == [
            (2 * PAGE, 2 * PAGE),
            (9 * PAGE, PAGE),
        ]
        assert {run.cause for run in moved.refused} == {Cause.NOT_EMPTY}
        assert moved.bytes(Outcome.MOVED) == 13 * PAGE
        assert memory.read(0, 16 * PAGE) == b"".join(
            b"o" * PAGE if page in (2, 3, 9) else data[page * PAGE : (page + 1) * PAGE]
            for page in range(16)
        )
        assert [n for n in there(staging.memory) if n < staging.length // PAGE] == []


@kernel_test(features=Features.MOVE)
def test_whoever_waits_is_woken_by_the_piece_that_brings_the_page() -> None:
    data = content(64)
    with (
        _target(64 * PAGE) as (uffd, memory),
        Staging(8 * PAGE, transparent_huge=False) as staging,
        _file(data) as fd,
    ):
        readers = []
        for page in (0, 13, 63):
            readers.append((page, in_thread(memory.read, page * PAGE, PAGE)))
            assert next_fault(uffd).address == memory.start + page * PAGE
        staging.fill(uffd, memory.start, fd, 0, 64 * PAGE)
        for page, reader in readers:
            assert reader.result() == data[page * PAGE : (page + 1) * PAGE]


@kernel_test(features=Features.MOVE)
def test_refusals_other_than_that_it_is_there_are_raised() -> None:
    with (
        _target(2 * PAGE) as (uffd, memory),
        Staging(2 * PAGE, transparent_huge=False) as staging,
        _file(content(2)) as fd,
    ):
        uffd.unregister(memory.start + PAGE, PAGE)
        with pytest.raises(errors.NotRegistered) as caught:
            staging.fill(uffd, memory.start, fd, 0, 2 * PAGE)
        assert fates(caught.value.moved) == [
            (1, Outcome.MOVED, None),
            (1, Outcome.FAILED, Cause.NOT_REGISTERED),
        ]


# -- forks -------------------------------------------------------------------------------------


@kernel_test(features=Features.MOVE)
def test_a_child_does_not_get_it_and_dies_of_touching_it() -> None:
    with (
        _target(PAGE) as (uffd, memory),
        Staging(PAGE, transparent_huge=False) as staging,
    ):
        staging.memory.write(0, content(1))
        child = in_child(staging.memory.read, 0, 1)
        assert os.WTERMSIG(child.wait()) == signal.SIGSEGV
        staging.move(uffd, memory.start, 0, PAGE, verify=True)
        assert memory.read(0, PAGE) == content(1)


@kernel_test(features=Features.MOVE)
def test_a_child_that_was_to_have_it_shares_it_and_keeps_it_from_moving() -> None:
    read, write = os.pipe()
    with (
        _target(2 * PAGE) as (uffd, memory),
        Staging(2 * PAGE, transparent_huge=False, dont_fork=False) as staging,
    ):
        staging.memory.write(0, content(2))

        def look_later() -> bytes:
            os.read(read, 1)
            return staging.memory.read(0, 2 * PAGE)

        child = in_child(look_later)
        with pytest.raises(errors.PageShared) as caught:
            staging.move(uffd, memory.start)
        assert fates(caught.value.moved) == [(2, Outcome.FAILED, Cause.SHARED)]
        assert there(memory) == []
        moved = staging.move(uffd, memory.start, fallback=Fallback(), verify=True)
        assert fates(moved) == [(2, Outcome.UNSHARED_AND_MOVED, Cause.SHARED)]
        assert memory.read(0, 2 * PAGE) == content(2)
        memory.write(0, b"changed")
        os.write(write, b"x")
        assert child.result() == content(2)


# -- what it refuses ---------------------------------------------------------------------------


@both_kinds
@kernel_test(features=Features.MOVE)
def test_a_range_outside_of_it_is_refused(huge: bool) -> None:
    with (
        _target(PAGE) as (uffd, memory),
        Staging(PAGE, transparent_huge=huge) as staging,
        _file(b"x") as fd,
    ):
        end = staging.length
        for offset, length in ((-PAGE, PAGE), (0, end + 1), (end, 1), (end + 1, None), (0, -1)):
            with pytest.raises(errors.InvalidRange, match="of a staging of"):
                staging.view(offset, length)
            with pytest.raises(errors.InvalidRange, match="of a staging of"):
                staging.read_from(fd, 0, offset, length)
            with pytest.raises(errors.InvalidRange, match="of a staging of"):
                staging.move(uffd, memory.start, offset, length)
        assert len(staging.view(end)) == 0
        # Nothing to move is a mistake, as it is for `move`.
        for offset, length in ((end, None), (0, 0), (1, None), (0, 1)):
            with pytest.raises(errors.InvalidRange):
                staging.move(uffd, memory.start, offset, length)


@pytest.mark.parametrize("length", [0, -1, -PAGE])
@both_kinds
@kernel_test()
def test_it_holds_at_least_one_byte(huge: bool, length: int) -> None:
    with pytest.raises(errors.InvalidRange, match="at least 1"):
        Staging(length, transparent_huge=huge)
    with Staging(1, transparent_huge=huge) as staging:
        assert staging.length == PAGE


@kernel_test(features=Features.MOVE)
def test_once_closed_it_refuses_everything_and_may_be_closed_again() -> None:
    with _target(PAGE) as (uffd, memory), _file(b"x") as fd:
        staging = Staging(PAGE, transparent_huge=False)
        with staging:
            pass
        staging.close()
        for use in (
            staging.view,
            lambda: staging.read_from(fd, 0),
            lambda: staging.move(uffd, memory.start),
            lambda: staging.fill(uffd, memory.start, fd, 0, PAGE),
        ):
            with pytest.raises(errors.InvalidRange, match="has been closed"):
                use()
        assert there(memory) == []


@kernel_test(features=Features.MOVE)
def test_what_was_never_filled_is_a_hole_and_is_not_moved_as_zeros() -> None:
    with (
        _target(2 * PAGE) as (uffd, memory),
        Staging(2 * PAGE, transparent_huge=False) as staging,
    ):
        staging.memory.write(PAGE, content(1))
        with pytest.raises(errors.SourceHole) as caught:
            staging.move(uffd, memory.start)
        assert caught.value.errno == errno.ENOENT
        assert there(memory) == [1]
