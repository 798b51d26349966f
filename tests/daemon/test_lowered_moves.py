"""Moves that C carries out: only from memory that is still ours, and with all books kept."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from tests.support.calls import in_thread
from tests.support.kernel_tests import kernel_test
from tests.support.notes import Recorder
from tests.support.page_contents import PAGE, content
from uffdaemon import (
    BytesSource,
    CopyFrom,
    FaultAround,
    FaultKind,
    Memory,
    MoveOrCopy,
    Outcome,
    Region,
    StrictMove,
    errors,
    open_daemon,
)
from uffdaemon.lowlevel import (
    Code,
    Features,
    Operation,
    RegisterMode,
    Result,
    Userfaultfd,
    scan_pages,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from uffdaemon.kernel.userfaultfd import CarryOut

PAGES = 64


class Issued:
    """What Python issues on any userfaultfd, while C issues the rest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codes: list[Code] = []
        execute = Userfaultfd.execute

        def noting(
            uffd: Userfaultfd, operations: list[Operation], carry_out: CarryOut | None = None
        ) -> list[Result]:
            self.codes += [operation.code for operation in operations]
            return execute(uffd, operations, carry_out)

        monkeypatch.setattr(Userfaultfd, "execute", noting)


@pytest.mark.parametrize("around", [1, 16])
@pytest.mark.parametrize("policy", [StrictMove, MoveOrCopy])
@kernel_test(features=Features.MOVE)
async def test_c_moves_without_python(policy: type[StrictMove | MoveOrCopy], around: int) -> None:
    data = content(PAGES)
    with pytest.MonkeyPatch.context() as monkeypatch:
        source = Memory.map(len(data), dont_fork=True)
        memory = Memory.map(len(data))
        source.write(0, data)
        recorder = Recorder()
        async with open_daemon(hooks=[recorder.hooks]) as daemon:
            region = daemon.guard(
                memory, FaultAround(policy(source), around), features=Features.MOVE
            )
            await trio.lowlevel.checkpoint()
            issued = Issued(monkeypatch)
            assert await trio.to_thread.run_sync(memory.read, 0, len(data)) == data
            await recorder.resolutions(PAGES // around)
            assert Code.MOVE not in issued.codes
            statistics = daemon.statistics()
            assert statistics.faults == {(FaultKind.MISSING, Outcome.MOVED): PAGES // around}
            assert statistics.bytes_done == {Outcome.MOVED: len(data)}
            assert region.pages.filled() == PAGES
        assert scan_pages(source.start, source.length) == []
        assert {each.done for each in recorder.resolved} == {around * PAGE}


@pytest.mark.parametrize("policy", [StrictMove, MoveOrCopy])
@kernel_test(features=Features.MOVE)
async def test_the_check_mode_is_pythons_and_finds_nothing(
    policy: type[StrictMove | MoveOrCopy],
) -> None:
    data = content(2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        source, memory = Memory.map(2 * PAGE, dont_fork=True), Memory.map(2 * PAGE)
        source.write(0, data)
        async with open_daemon() as daemon:
            issued = Issued(monkeypatch)
            daemon.guard(memory, policy(source, verify=True), features=Features.MOVE)
            assert await trio.to_thread.run_sync(memory.read, 0, len(data)) == data
            assert issued.codes.count(Code.MOVE) == 2
            assert daemon.statistics().failures == {}


@kernel_test(features=Features.MOVE)
async def test_a_source_that_was_unmapped_is_moved_from_no_more() -> None:
    data = content(2)
    source, memory = Memory.map(2 * PAGE, dont_fork=True), Memory.map(2 * PAGE)
    source.write(0, data)
    start = source.start
    recorder = Recorder()
    async with open_daemon(hooks=[recorder.hooks]) as daemon:
        daemon.guard(memory, StrictMove(start), features=Features.MOVE)
        assert await trio.to_thread.run_sync(memory.read, 0, PAGE) == data[:PAGE]
        source.close()
        # Somebody else's memory takes the place of the source.
        with taken(start, 2 * PAGE) as theirs:
            reader = in_thread(memory.read, PAGE, 1)
            [(_, error)] = await recorder.failures(1)
            assert isinstance(error, errors.ForeignMemory)
            assert theirs.raw[PAGE:] == b"t" * PAGE
            assert memory.userfaultfd is not None
            memory.userfaultfd.zeropage(memory.start + PAGE, PAGE)
            assert await trio.to_thread.run_sync(reader.result) == bytes(1)


@kernel_test(features=Features.MOVE)
async def test_a_source_that_has_been_moved_elsewhere_is_found_there() -> None:
    data = content(2)
    source, memory = Memory.map(2 * PAGE, dont_fork=True), Memory.map(2 * PAGE)
    source.write(0, data)
    async with open_daemon() as daemon:
        daemon.guard(memory, StrictMove(source), features=Features.MOVE)
        assert await trio.to_thread.run_sync(memory.read, 0, PAGE) == data[:PAGE]
        source.remap()
        assert await trio.to_thread.run_sync(memory.read, PAGE, PAGE) == data[PAGE:]


@kernel_test(features=Features.MOVE)
async def test_what_leaves_a_region_that_is_served_is_missing_there() -> None:
    data = content(2)
    uffd = Userfaultfd.open(Features.MOVE)
    source, memory = Memory.map(2 * PAGE, dont_fork=True), Memory.map(2 * PAGE)
    async with open_daemon() as daemon:
        regions = [
            daemon.add_region(
                uffd,
                Region(each.start, each.length, policy),
                register=RegisterMode.MISSING,
            )
            for each, policy in (
                (source, CopyFrom(BytesSource(data))),
                (memory, StrictMove(source)),
            )
        ]
        await trio.to_thread.run_sync(source.touch)
        assert [region.pages.filled() for region in regions] == [2, 0]
        assert await trio.to_thread.run_sync(memory.read, 0, PAGE) == data[:PAGE]
        assert [region.pages.filled() for region in regions] == [1, 1]
        assert 0 not in regions[0].pages.present
        # So it is brought once more for whoever asks.
        assert await trio.to_thread.run_sync(source.read, 0, PAGE) == data[:PAGE]


_READ_WRITE = 1 | 2  # PROT_READ | PROT_WRITE
_HERE = 0x02 | 0x20 | 0x100000  # MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE


@contextmanager
def taken(start: int, length: int) -> Iterator[ctypes.Array[ctypes.c_char]]:
    """Other memory at an address that is free."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    address, size = ctypes.c_void_p(start), ctypes.c_size_t(length)
    assert libc.mmap(address, size, _READ_WRITE, _HERE, -1, ctypes.c_long(0)) == start
    theirs = (ctypes.c_char * length).from_address(start)
    theirs.raw = b"t" * length
    yield theirs
    libc.munmap(address, size)
