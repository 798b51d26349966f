"""Memory that has pages before it is guarded: refused by name, kept, or cleared."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING, Literal

import pytest
import trio

from tests.support.kernel_tests import kernel_test
from tests.support.page_contents import PAGE
from uffdaemon import (
    Advice,
    ByKind,
    BytesSource,
    Continue,
    CopyFrom,
    Memory,
    MemoryType,
    errors,
    native,
    open_daemon,
)
from uffdaemon.lowlevel import Features, RegisterMode
from uffdaemon.ranges import HUGE_PAGE_SIZE

if TYPE_CHECKING:
    from uffdaemon.guard.present_pages import Present

_PAGES = 6


def _map(kind: MemoryType, pages: int) -> Memory:
    """Memory of so many pages of its own size."""
    return Memory.map(pages * (HUGE_PAGE_SIZE if kind.huge else PAGE), kind)


def _policy(memory: Memory) -> CopyFrom:
    return CopyFrom(BytesSource(b"x" * memory.length))


def _first_bytes(memory: Memory) -> bytes:
    size = memory.page_size
    return b"".join(memory.read(at, 1) for at in range(0, memory.length, size))


@pytest.mark.parametrize("present", ["refuse", "keep", "discard"])
@pytest.mark.parametrize("kind", MemoryType)
@kernel_test()
async def test_pages_that_were_touched(kind: MemoryType, present: Present) -> None:
    with _map(kind, _PAGES) as memory:
        size = memory.page_size
        for page in (1, 2, 5):
            memory.write(page * size, b"o")
        async with open_daemon() as daemon:
            if present == "refuse":
                with pytest.raises(
                    errors.PagesPresent, match=r"3 pages of .* \(offsets "
                ) as caught:
                    daemon.guard(memory, _policy(memory))
                assert caught.value.runs == [(size, 3 * size), (5 * size, 6 * size)]
                assert _first_bytes(memory) == b"\0oo\0\0o"
                return
            region = daemon.guard(memory, _policy(memory), present=present)
            assert region.pages.filled() == (3 if present == "keep" else 0)
            found = await trio.to_thread.run_sync(_first_bytes, memory)
            assert found == (b"xooxxo" if present == "keep" else b"x" * _PAGES)
            daemon.remove_region(region)


@kernel_test()
async def test_one_byte_of_a_huge_page(transparent_huge_pages: None) -> None:
    with Memory.map(2 * HUGE_PAGE_SIZE, transparent_huge=True) as memory:
        memory.write(0, b"o")
        async with open_daemon() as daemon:
            with pytest.raises(errors.PagesPresent) as caught:
                daemon.guard(memory, _policy(memory))
            assert caught.value.runs == [(0, HUGE_PAGE_SIZE)]
            daemon.guard(memory, _policy(memory), present="discard")
            assert await trio.to_thread.run_sync(memory.read, 5 * PAGE, 1) == b"x"


@pytest.mark.parametrize("kind", [MemoryType.SHMEM, MemoryType.HUGETLB])
@kernel_test(features=Features.MINOR_SHMEM)
async def test_pages_that_only_the_memory_file_has(kind: MemoryType) -> None:
    """Missing faults do not report them; minor faults do."""
    with _map(kind, _PAGES) as memory, memory.alias() as behind:
        size = memory.page_size
        behind.write(size, b"o")
        behind.write(3 * size, b"o")
        async with open_daemon() as daemon:
            with pytest.raises(errors.PagesPresent, match="2 pages of ") as caught:
                daemon.guard(memory, _policy(memory))
            runs, unmapped = caught.value.runs, caught.value.unmapped
            if kind.huge:
                assert (runs, unmapped) == ([], 2 * size)
            else:
                assert (runs, unmapped) == ([(size, 2 * size), (3 * size, 4 * size)], 0)
            daemon.guard(memory, _policy(memory), present="discard")
            assert await trio.to_thread.run_sync(_first_bytes, memory) == b"x" * _PAGES


@kernel_test(features=Features.MINOR_SHMEM)
async def test_contents_behind_memory_with_minor_faults() -> None:
    with Memory.map(_PAGES * PAGE, MemoryType.SHMEM) as memory, memory.alias() as behind:
        behind.write(PAGE, b"o")
        async with open_daemon() as daemon:
            daemon.guard(
                memory,
                ByKind(missing=_policy(memory), minor=Continue()),
                features=Features.MINOR_SHMEM,
                register=RegisterMode.MISSING | RegisterMode.MINOR,
            )
            assert await trio.to_thread.run_sync(_first_bytes, memory) == b"xoxxxx"


@kernel_test(features=Features.MINOR_SHMEM)
async def test_the_neighbours_of_a_page_behind_memory_that_may_have_huge_pages(
    shmem_huge_pages: None,
) -> None:
    """A huge page would put zeros in the page cache for 511 pages that nobody wrote."""
    with Memory.map(HUGE_PAGE_SIZE, MemoryType.SHMEM) as memory, memory.alias() as behind:
        async with open_daemon() as daemon:
            daemon.guard(
                memory,
                ByKind(missing=_policy(memory), minor=Continue()),
                features=Features.MINOR_SHMEM,
                register=RegisterMode.MISSING | RegisterMode.MINOR,
            )
            behind.write(PAGE, b"o")
            found = await trio.to_thread.run_sync(_first_bytes, memory)
            assert found == b"xo" + b"x" * (HUGE_PAGE_SIZE // PAGE - 2)


@kernel_test()
async def test_locked_memory() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Memory.map(_PAGES * PAGE) as memory:
        locked = libc.mlock(ctypes.c_void_p(memory.start), ctypes.c_size_t(memory.length))
        if locked:
            pytest.skip("this user may not lock memory")
        async with open_daemon() as daemon:
            with pytest.raises(errors.PagesPresent, match=f"{_PAGES} pages of "):
                daemon.guard(memory, _policy(memory))
            daemon.guard(memory, _policy(memory), present="discard")
            assert await trio.to_thread.run_sync(_first_bytes, memory) == b"x" * _PAGES


@pytest.mark.parametrize("end", ["daemon", "hold", "removed"])
@kernel_test()
async def test_memory_that_is_guarded_again(end: Literal["daemon", "hold", "removed"]) -> None:
    with Memory.map(_PAGES * PAGE) as memory:
        async with open_daemon() as daemon:
            region = daemon.guard(memory, _policy(memory))
            await trio.to_thread.run_sync(memory.touch, 0, 2 * PAGE)
            if end != "daemon":
                missing: Literal["hold", "release"] = "hold" if end == "hold" else "release"
                daemon.remove_region(region, missing=missing)
        other = CopyFrom(BytesSource(b"y" * memory.length))
        async with open_daemon() as daemon:
            if end == "removed":
                with pytest.raises(errors.PagesPresent, match="2 pages of "):
                    daemon.guard(memory, other)
                region = daemon.guard(memory, other, present="discard")
                kept = b""
            else:
                with pytest.raises(errors.PlacementRefused, match="is registered still"):
                    daemon.guard(memory, other, present="discard")
                region = daemon.guard(memory, other)
                kept = b"xx"
            assert region.pages.filled() == len(kept)
            found = await trio.to_thread.run_sync(_first_bytes, memory)
            assert found == kept + b"y" * (_PAGES - len(kept))


@kernel_test()
async def test_kernels_without_a_page_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(*_: object, **__: object) -> tuple[int, int, list[tuple[int, int, int]]]:
        return -errno.ENOTTY, 0, []

    with Memory.map(_PAGES * PAGE) as memory:
        memory.write(PAGE, b"o" * 2 * PAGE)
        monkeypatch.setattr(native, "scan", scan)
        async with open_daemon() as daemon:
            with pytest.raises(errors.PagesPresent) as caught:
                daemon.guard(memory, _policy(memory))
            assert caught.value.runs == [(PAGE, 3 * PAGE)]


@kernel_test()
async def test_memory_registered_for_write_protect_faults_has_pages() -> None:
    with Memory.map(_PAGES * PAGE) as memory:
        memory.write(0, b"o")
        async with open_daemon() as daemon:
            daemon.guard(
                memory,
                _policy(memory),
                features=Features.PAGEFAULT_FLAG_WP,
                register=RegisterMode.WP,
            )
            memory.advise(Advice.DONTNEED)


@kernel_test()
async def test_a_mistaken_value() -> None:
    with Memory.map(PAGE) as memory:
        async with open_daemon() as daemon:
            with pytest.raises(ValueError, match="present is 'refuse', 'keep' or 'discard'"):
                daemon.guard(memory, _policy(memory), present="zero")  # type: ignore[arg-type]  # the mistake
